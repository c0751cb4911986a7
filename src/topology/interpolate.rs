//! `${NAME}` and `${NAME:-default}` in the file's strings: values of pegaflow's own environment.
//!
//! `$$` is a dollar sign, and so is one that no brace follows. What came from a variable is not shown: a
//! problem with such a value shows the text of the file, and [`Secrets`] hides it elsewhere.

use std::borrow::Cow;
use std::ffi::OsString;
use std::fmt;

use toml::de::{DeTable, DeValue};

use super::problem::ProblemKind;
use super::source::join;

/// Shorter values are no secrets, and hiding every "1" would make a log unreadable.
const SHORTEST: usize = 4;
const HIDDEN: &str = "***";

/// Looks a variable up.
pub(super) type Env<'e> = &'e dyn Fn(&str) -> Option<OsString>;

/// What variables gave to the nodes' `env` and `args` and to what `[runtime]` installs: the keys
/// that hold tokens and passwords. Shown nowhere.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secrets {
    /// The longest first: one may be a part of another.
    values: Vec<String>,
}

impl Secrets {
    /// The text without them.
    pub fn redact<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let mut text = Cow::Borrowed(text);
        for value in &self.values {
            if text.contains(value.as_str()) {
                text = Cow::Owned(text.replace(value.as_str(), HIDDEN));
            }
        }
        text
    }

    /// [`Secrets::redact`] in place.
    pub fn redact_in(&self, text: &mut String) {
        if let Cow::Owned(redacted) = self.redact(text) {
            *text = redacted;
        }
    }

    /// Hides this too.
    pub fn add(&mut self, value: &str) {
        // A log has lines, and a value of several is found by each of them.
        for line in value.lines().map(str::trim) {
            // As JSON and Rust's and Python's debug formats write it.
            let escaped = line.replace('\\', r"\\").replace('"', r#"\""#);
            for form in [line.to_owned(), escaped] {
                if form.chars().count() >= SHORTEST && !self.values.contains(&form) {
                    self.values.push(form);
                }
            }
        }
        self.values
            .sort_by_key(|value| std::cmp::Reverse(value.len()));
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({})", self.values.len())
    }
}

/// What interpolation did.
#[derive(Default)]
pub(super) struct Interpolated {
    pub(super) secrets: Secrets,
    /// Keys whose value holds a variable's, with the text that the file has.
    pub(super) templates: Vec<(String, String)>,
    pub(super) problems: Vec<(String, ProblemKind)>,
}

impl Interpolated {
    /// Replaces the variables in every string of the document.
    pub(super) fn of(document: &mut DeTable<'_>, env: Env<'_>) -> Self {
        let mut done = Self::default();
        done.table("", document, env);
        done
    }

    fn table(&mut self, path: &str, table: &mut DeTable<'_>, env: Env<'_>) {
        for (key, value) in table.iter_mut() {
            self.value(join(path, key.get_ref()), value.get_mut(), env);
        }
    }

    fn value(&mut self, path: String, value: &mut DeValue<'_>, env: Env<'_>) {
        match value {
            DeValue::Table(table) => self.table(&path, table, env),
            DeValue::Array(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    self.value(format!("{path}[{index}]"), item.get_mut(), env);
                }
            }
            DeValue::String(text) if text.contains('$') => match fill(text, env) {
                Ok(filled) => {
                    if !filled.values.is_empty() {
                        if may_hold_secrets(&path) {
                            filled
                                .values
                                .iter()
                                .for_each(|value| self.secrets.add(value));
                        }
                        self.templates.push((path, text.clone().into_owned()));
                    }
                    *text = Cow::Owned(filled.text);
                }
                Err(kind) => self.problems.push((path, kind)),
            },
            _ => {}
        }
    }
}

fn may_hold_secrets(path: &str) -> bool {
    let of_a_node = path
        .strip_prefix("node[")
        .and_then(|rest| rest.split_once("]."))
        .is_some_and(|(_, key)| key.starts_with("env.") || key.starts_with("args["));
    of_a_node || path.starts_with("runtime.requirements[") || path.starts_with("runtime.overrides[")
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Filled {
    text: String,
    /// What variables gave; not the defaults, which the file shows anyway.
    values: Vec<String>,
}

fn fill(text: &str, env: Env<'_>) -> Result<Filled, ProblemKind> {
    let mut filled = Filled::default();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        filled.text.push_str(before);
        rest = if let Some(after) = after.strip_prefix('$') {
            filled.text.push('$');
            after
        } else if let Some(after) = after.strip_prefix('{') {
            let (inside, after) = after.split_once('}').ok_or_else(|| malformed(after))?;
            let (name, default) = match inside.split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (inside, None),
            };
            if !is_name(name) {
                return Err(malformed(inside));
            }
            match (lookup(name, env)?, default) {
                (Some(value), None) => filled.take(value),
                (Some(value), Some(_)) if !value.is_empty() => filled.take(value),
                (_, Some(default)) => filled.text.push_str(default),
                (None, None) => {
                    return Err(ProblemKind::UnsetVariable {
                        name: name.to_owned(),
                    });
                }
            }
            after
        } else {
            filled.text.push('$');
            after
        };
    }
    filled.text.push_str(rest);
    Ok(filled)
}

impl Filled {
    fn take(&mut self, value: String) {
        self.text.push_str(&value);
        self.values.push(value);
    }
}

fn lookup(name: &str, env: Env<'_>) -> Result<Option<String>, ProblemKind> {
    let utf8 = |value: OsString| {
        value.into_string().map_err(|_| ProblemKind::BadVariable {
            found: format!("${{{name}}}, whose value is not UTF-8"),
        })
    };
    env(name).map(utf8).transpose()
}

fn is_name(name: &str) -> bool {
    let is_letter = |c: char| c.is_ascii_alphabetic() || c == '_';
    name.starts_with(is_letter) && name.chars().all(|c| is_letter(c) || c.is_ascii_digit())
}

fn malformed(inside: &str) -> ProblemKind {
    let shown: String = inside.chars().take(40).collect();
    ProblemKind::BadVariable {
        found: format!("\"${{{shown}\""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(name: &str) -> Option<OsString> {
        match name {
            "A" => Some("value".into()),
            "EMPTY" => Some("".into()),
            "DOLLAR" => Some("${A}$$".into()),
            _ => None,
        }
    }

    #[test]
    fn variables_defaults_and_dollars() {
        for (text, expected) in [
            ("${A}", "value"),
            ("-${A}-${A}-", "-value-value-"),
            ("${NONE:-x y}", "x y"),
            ("${NONE:-}", ""),
            ("${A:-x}", "value"),
            ("${EMPTY}", ""),
            ("${EMPTY:-x}", "x"),
            ("$A $ $", "$A $ $"),
            ("$${A}", "${A}"),
            ("$$$${A}$", "$${A}$"),
            // A value is not looked into again.
            ("${DOLLAR}", "${A}$$"),
        ] {
            assert_eq!(fill(text, &env).unwrap().text, expected, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_filled_is_told() {
        assert!(
            matches!(fill("x${NONE}", &env), Err(ProblemKind::UnsetVariable { name }) if name == "NONE")
        );
        for text in ["${", "${A", "${}", "${A B}", "${1A}", "${A-x}", "${:-x}"] {
            let filled = fill(text, &env);
            assert!(
                matches!(filled, Err(ProblemKind::BadVariable { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn secrets_are_hidden_whole_and_defaults_and_short_values_are_none() {
        let mut secrets = Secrets::default();
        for value in ["token", "token-2\nsecond line", "abc"] {
            secrets.add(value);
        }
        assert_eq!(secrets.redact("a token-2 b token abc"), "a *** b *** abc");
        assert_eq!(secrets.redact("the second line"), "the ***");
        assert_eq!(format!("{secrets:?}"), "Secrets(3)");
        secrets.add("a\"b\\c");
        assert_eq!(secrets.redact(r#"{"key": "a\"b\\c"}"#), r#"{"key": "***"}"#);
        assert_eq!(fill("${NONE:-public}", &env).unwrap().values, [""; 0]);
    }

    #[test]
    fn secrets_are_in_env_args_and_requirements_only() {
        for (path, expected) in [
            ("node[0].env.TOKEN", true),
            ("node[12].args[3]", true),
            ("runtime.requirements[0]", true),
            ("runtime.python", false),
            ("model", false),
            ("node[0].name", false),
        ] {
            assert_eq!(may_hold_secrets(path), expected, "{path}");
        }
    }
}
