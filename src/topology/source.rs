//! Where each key stands in the file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Problem, ProblemKind};

/// A position in a file; both count from 1, the column in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub line: usize,
    pub column: usize,
}

impl Place {
    const START: Self = Self { line: 1, column: 1 };

    fn of_offset(text: &str, offset: usize) -> Self {
        let before = text.get(..offset).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self {
            line: before.matches('\n').count() + 1,
            column: before
                .get(line_start..)
                .map_or(0, |line| line.chars().count())
                + 1,
        }
    }
}

/// The places of every key and value of one file, by key path (`node[1].gpus`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    file: PathBuf,
    keys: BTreeMap<String, Place>,
    values: BTreeMap<String, Place>,
}

impl Source {
    pub(super) fn new(file: &Path, text: &str, document: &DeTable<'_>) -> Self {
        let mut source = Self {
            file: file.to_owned(),
            keys: BTreeMap::new(),
            values: BTreeMap::new(),
        };
        source.add_table(text, "", document);
        source
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The key is written in the file.
    pub fn has(&self, path: &str) -> bool {
        self.values.contains_key(path)
    }

    /// Where a key's name stands.
    pub fn key(&self, path: &str) -> Place {
        self.keys
            .get(path)
            .copied()
            .unwrap_or_else(|| self.value(path))
    }

    /// Where a value stands; for a value that is not there, the table that lacks it.
    pub fn value(&self, path: &str) -> Place {
        let mut path = path;
        loop {
            if let Some(place) = self.values.get(path) {
                return *place;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = path.get(..end).unwrap_or_default(),
                None => return Place::START,
            }
        }
    }

    fn add_table(&mut self, text: &str, path: &str, table: &DeTable<'_>) {
        for (key, value) in table {
            let path = join(path, key.get_ref());
            let place = Place::of_offset(text, key.span().start);
            self.keys.insert(path.clone(), place);
            self.add_value(text, path, value);
        }
    }

    fn add_value(&mut self, text: &str, path: String, value: &Spanned<DeValue<'_>>) {
        match value.get_ref() {
            DeValue::Table(table) => self.add_table(text, &path, table),
            DeValue::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    self.add_value(text, format!("{path}[{index}]"), item);
                }
            }
            _ => {}
        }
        let place = Place::of_offset(text, value.span().start);
        self.values.insert(path, place);
    }
}

/// The path of a key inside a table's path.
pub(super) fn join(table: &str, key: &str) -> String {
    if table.is_empty() {
        key.to_owned()
    } else {
        format!("{table}.{key}")
    }
}

/// What the TOML parser could not read.
pub(super) fn syntax_problem(text: &str, error: &toml::de::Error) -> Problem<ProblemKind> {
    let offset = error.span().map_or(0, |span| span.start);
    Problem {
        place: Place::of_offset(text, offset),
        key: String::new(),
        kind: ProblemKind::Syntax {
            message: error.message().to_owned(),
        },
    }
}
