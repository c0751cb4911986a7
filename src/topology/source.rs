//! Where each key stands: in the file, or in a `--set` argument.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Problem, ProblemKind};

/// A position in the file or in an argument; line and column count from 1, the column in characters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The `--set` argument that it is a position in; `None`: the file.
    pub argument: Option<Arc<str>>,
    pub line: usize,
    pub column: usize,
}

impl Place {
    const START: Self = Self {
        argument: None,
        line: 1,
        column: 1,
    };

    /// For a message about this file.
    pub fn show<'p>(&'p self, file: &'p Path) -> impl fmt::Display + 'p {
        fmt::from_fn(move |f| match &self.argument {
            Some(argument) => write!(f, "--set '{argument}' column {}", self.column),
            None => write!(f, "{}:{}:{}", file.display(), self.line, self.column),
        })
    }
}

/// A text that keys come from.
pub(super) struct Text {
    text: Arc<str>,
    is_argument: bool,
    /// Where offsets begin.
    base: usize,
}

impl Text {
    pub(super) fn file(text: &str) -> Self {
        Self {
            text: text.into(),
            is_argument: false,
            base: 0,
        }
    }

    pub(super) fn argument(text: &str) -> Self {
        Self {
            text: text.into(),
            is_argument: true,
            base: 0,
        }
    }

    /// The same text, with offsets that count from there.
    pub(super) fn from(&self, base: usize) -> Self {
        Self {
            text: self.text.clone(),
            is_argument: self.is_argument,
            base,
        }
    }

    pub(super) fn place(&self, offset: usize) -> Place {
        let before = self.text.get(..self.base + offset).unwrap_or(&self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let in_line = before.get(line_start..).unwrap_or_default();
        Place {
            argument: self.is_argument.then(|| self.text.clone()),
            line: before.matches('\n').count() + 1,
            column: in_line.chars().count() + 1,
        }
    }
}

/// The places of every key and value of one file, by key path (`node[1].gpus`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    file: PathBuf,
    keys: BTreeMap<String, Place>,
    values: BTreeMap<String, Place>,
    /// What the file has where a variable's value was put in.
    templates: BTreeMap<String, String>,
}

impl Source {
    pub(super) fn new(file: &Path, text: &str, document: &DeTable<'_>) -> Self {
        let mut source = Self {
            file: file.to_owned(),
            keys: BTreeMap::new(),
            values: BTreeMap::new(),
            templates: BTreeMap::new(),
        };
        source.add_table(&Text::file(text), "", document);
        source
    }

    /// A key and all below it stands elsewhere now.
    pub(super) fn replace(
        &mut self,
        path: &str,
        key: Place,
        text: &Text,
        value: &Spanned<DeValue<'_>>,
    ) {
        let is_below = |found: &String, _: &mut Place| !is_within(found, path);
        self.keys.retain(is_below);
        self.values.retain(is_below);
        self.keys.insert(path.to_owned(), key);
        self.add_value(text, path.to_owned(), value);
    }

    pub(super) fn set_templates(&mut self, templates: Vec<(String, String)>) {
        self.templates = templates.into_iter().collect();
    }

    /// The text that the file has, of a value with something in it that it got from a variable.
    pub(super) fn template(&self, path: &str) -> Option<&str> {
        self.templates.get(path).map(String::as_str)
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
            .cloned()
            .unwrap_or_else(|| self.value(path))
    }

    /// Where a value stands; for a value that is not there, the table that lacks it.
    pub fn value(&self, path: &str) -> Place {
        let mut path = path;
        loop {
            if let Some(place) = self.values.get(path) {
                return place.clone();
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = path.get(..end).unwrap_or_default(),
                None => return Place::START,
            }
        }
    }

    fn add_table(&mut self, text: &Text, path: &str, table: &DeTable<'_>) {
        for (key, value) in table {
            let path = join(path, key.get_ref());
            let place = text.place(key.span().start);
            self.keys.insert(path.clone(), place);
            self.add_value(text, path, value);
        }
    }

    fn add_value(&mut self, text: &Text, path: String, value: &Spanned<DeValue<'_>>) {
        match value.get_ref() {
            DeValue::Table(table) => self.add_table(text, &path, table),
            DeValue::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    self.add_value(text, format!("{path}[{index}]"), item);
                }
            }
            _ => {}
        }
        let place = text.place(value.span().start);
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

/// The path is the other one, or leads further down from it.
pub(super) fn is_within(path: &str, other: &str) -> bool {
    path.strip_prefix(other)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// What the TOML parser could not read.
pub(super) fn syntax_problem(text: &str, error: &toml::de::Error) -> Problem<ProblemKind> {
    let offset = error.span().map_or(0, |span| span.start);
    Problem {
        place: Text::file(text).place(offset),
        key: String::new(),
        kind: ProblemKind::Syntax {
            message: error.message().to_owned(),
        },
    }
}
