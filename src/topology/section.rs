//! One table of the file: typed access to its keys, with a problem for each that does not fit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::keys::Table;
use super::problem::{Findings, ProblemKind};
use super::source::join;
use super::value::{duration, non_empty, string, wrong};

/// A table of the file, or nothing where it was left out.
pub(super) struct Section<'t, 'd, 'f, 's> {
    table: Option<&'t DeTable<'d>>,
    known: &'static Table,
    pub(super) path: String,
    pub(super) findings: &'f mut Findings<'s>,
}

impl<'t, 'd, 'f, 's> Section<'t, 'd, 'f, 's> {
    pub(super) fn new(
        table: &'t DeTable<'d>,
        path: String,
        known: &'static Table,
        findings: &'f mut Findings<'s>,
    ) -> Self {
        for (key, _) in table {
            let key = key.get_ref().as_ref();
            if known.key(key).is_none() {
                let hint = known.hint(key);
                findings.add_at_key(&join(&path, key), ProblemKind::UnknownKey { hint });
            }
        }
        Self {
            table: Some(table),
            known,
            path,
            findings,
        }
    }

    pub(super) fn sub(&mut self, key: &str, known: &'static Table) -> Section<'t, 'd, '_, 's> {
        let path = join(&self.path, key);
        match self.raw(key) {
            Some(DeValue::Table(table)) => Section::new(table, path, known, self.findings),
            other => {
                if let Some(value) = other {
                    let header = format!("a table, like {}", known.header);
                    self.findings.add(&path, wrong(value, &header));
                }
                Section {
                    table: None,
                    known,
                    path,
                    findings: self.findings,
                }
            }
        }
    }

    pub(super) fn raw(&self, key: &str) -> Option<&'t DeValue<'d>> {
        debug_assert!(self.known.key(key).is_some(), "`{key}` is not in keys.rs");
        self.table?.get(key).map(toml::Spanned::get_ref)
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.raw(key).is_some()
    }

    pub(super) fn get<T>(
        &mut self,
        key: &str,
        read: impl Fn(&DeValue<'_>) -> Result<T, ProblemKind>,
    ) -> Option<T> {
        match read(self.raw(key)?) {
            Ok(value) => Some(value),
            Err(kind) => {
                self.findings.add(&join(&self.path, key), kind);
                None
            }
        }
    }

    pub(super) fn require(&mut self, key: &str, instead: &str) -> Option<String> {
        if !self.has(key) {
            self.missing(key, instead);
        }
        self.get(key, non_empty)
    }

    pub(super) fn missing(&mut self, key: &str, instead: &str) {
        let instead = instead.to_owned();
        self.findings
            .add(&join(&self.path, key), ProblemKind::Missing { instead });
    }

    pub(super) fn strings(&mut self, key: &str) -> Vec<String> {
        let path = join(&self.path, key);
        let items = match self.raw(key) {
            None => return Vec::new(),
            Some(DeValue::Array(items)) => items,
            Some(other) => {
                let instead = "a list of strings, like [\"--flag\", \"value\"]";
                self.findings.add(&path, wrong(other, instead));
                return Vec::new();
            }
        };
        let mut strings = Vec::new();
        for (index, item) in items.iter().enumerate() {
            match non_empty(item.get_ref()) {
                Ok(text) => strings.push(text),
                Err(kind) => self.findings.add(&format!("{path}[{index}]"), kind),
            }
        }
        strings
    }

    pub(super) fn string_map(&mut self, key: &str) -> BTreeMap<String, String> {
        let path = join(&self.path, key);
        let table = match self.raw(key) {
            None => return BTreeMap::new(),
            Some(DeValue::Table(table)) => table,
            Some(other) => {
                let instead = "a table of strings, like { NAME = \"value\" }";
                self.findings.add(&path, wrong(other, instead));
                return BTreeMap::new();
            }
        };
        let mut map = BTreeMap::new();
        for (name, value) in table {
            let name = name.get_ref().as_ref();
            match string(value.get_ref()) {
                Ok(text) => {
                    map.insert(name.to_owned(), text);
                }
                Err(kind) => self.findings.add(&join(&path, name), kind),
            }
        }
        map
    }

    /// A file; a relative path starts from the topology's directory.
    pub(super) fn file(&mut self, key: &str, base: &Path) -> Option<PathBuf> {
        self.get(key, non_empty).map(|path| base.join(path))
    }

    /// A duration above zero.
    pub(super) fn seconds(&mut self, key: &str, default: u64) -> Duration {
        self.get(key, duration)
            .unwrap_or(Duration::from_secs(default))
    }
}
