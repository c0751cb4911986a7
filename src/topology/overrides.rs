//! `--set KEY=VALUE`: a key of the file, written on the command line.
//!
//! KEY is a path: `kv.capacity`, `node[1].gpus`, `node.decode.gpus` (a node by its name), `node.decode.env.NAME`.
//! VALUE is TOML. What is none and does not begin like a TOML string, list or table is a plain
//! string, so that `model=owner/name` and `kv.capacity=8GiB` need no quotes within quotes.

use std::borrow::Cow;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Problem, ProblemKind};
use super::source::{Source, Text, join};

/// Writes every override into the document, later ones over earlier ones.
pub(super) fn apply<'d>(
    document: &mut DeTable<'d>,
    overrides: &'d [String],
    source: &mut Source,
) -> Vec<Problem<ProblemKind>> {
    let mut problems = Vec::new();
    for argument in overrides {
        let text = Text::argument(argument);
        let set = Override::parse(argument).and_then(|set| {
            let mut path = Path {
                text: &text,
                value_text: text.from(set.value_offset),
                rest: set.steps,
                done: String::new(),
                source: &mut *source,
            };
            path.set_in_table(document, set.value)
        });
        if let Err(refusal) = set {
            problems.push(Problem {
                place: text.place(refusal.offset),
                key: refusal.key,
                kind: refusal.kind,
            });
        }
    }
    problems
}

/// Why an override cannot be used.
struct Refusal {
    /// In the argument.
    offset: usize,
    /// As far as the path was understood.
    key: String,
    kind: ProblemKind,
}

impl Refusal {
    fn malformed(offset: usize, instead: impl Into<String>) -> Self {
        Self {
            offset,
            key: String::new(),
            kind: ProblemKind::Override {
                instead: instead.into(),
            },
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step<'d> {
    Name(&'d str),
    Index(usize),
}

/// A step and where it begins in the argument.
type Located<'d> = (usize, Step<'d>);

/// A `KEY=VALUE`, understood.
struct Override<'d> {
    steps: Vec<Located<'d>>,
    value: Spanned<DeValue<'d>>,
    value_offset: usize,
}

impl<'d> Override<'d> {
    fn parse(argument: &'d str) -> Result<Self, Refusal> {
        let Some((path, value)) = argument.split_once('=') else {
            let instead = "write KEY=VALUE, like kv.capacity=16GiB";
            return Err(Refusal::malformed(0, instead));
        };
        let steps = steps(path)?;
        let text = value.trim();
        let value_offset = path.len() + 1 + (value.len() - value.trim_start().len());
        let understood = |value| {
            Ok(Self {
                steps,
                value,
                value_offset,
            })
        };
        match DeValue::parse(text) {
            Ok(value) => understood(value),
            Err(_) if !text.starts_with(['"', '\'', '[', '{']) => {
                let string = DeValue::String(Cow::Borrowed(text));
                understood(Spanned::new(0..text.len(), string))
            }
            Err(error) => Err(Refusal {
                offset: value_offset + error.span().map_or(0, |span| span.start),
                key: path.trim().to_owned(),
                kind: ProblemKind::Syntax {
                    message: error.message().to_owned(),
                },
            }),
        }
    }
}

/// `a.b[0].c`, or `a.b.0.c`.
fn steps(path: &str) -> Result<Vec<Located<'_>>, Refusal> {
    const INSTEAD: &str =
        "write a path of keys before the =, like router.listen, node[0].gpus or node.decode.gpus";
    let is_bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let mut steps = Vec::new();
    let mut offset = path.len() - path.trim_start().len();
    for part in path.trim().split('.') {
        let malformed = || Refusal::malformed(offset, INSTEAD);
        let mut pieces = part.split('[');
        let name = pieces.next().unwrap_or_default();
        if name.is_empty() || !name.chars().all(is_bare) {
            return Err(malformed());
        }
        steps.push((offset, Step::Name(name)));
        let mut bracket = offset + name.len();
        for piece in pieces {
            let index = piece
                .strip_suffix(']')
                .and_then(|index| index.parse().ok())
                .ok_or_else(malformed)?;
            steps.push((bracket, Step::Index(index)));
            bracket += piece.len() + 1;
        }
        offset += part.len() + 1;
    }
    Ok(steps)
}

/// The way from the top of the document to the key.
struct Path<'d, 's> {
    text: &'s Text,
    value_text: Text,
    rest: Vec<Located<'d>>,
    /// What has been walked, like `node[1]`.
    done: String,
    source: &'s mut Source,
}

impl<'d> Path<'d, '_> {
    fn refuse(&self, offset: usize, instead: String) -> Refusal {
        Refusal {
            offset,
            key: self.done.clone(),
            kind: ProblemKind::Override { instead },
        }
    }

    fn next(&mut self) -> Option<Located<'d>> {
        (!self.rest.is_empty()).then(|| self.rest.remove(0))
    }

    fn set_in_table(
        &mut self,
        table: &mut DeTable<'d>,
        value: Spanned<DeValue<'d>>,
    ) -> Result<(), Refusal> {
        let (offset, name) = match self.next() {
            Some((offset, Step::Name(name))) => (offset, name),
            Some((offset, Step::Index(_))) => {
                return Err(self.refuse(offset, "a table has keys; write one".to_owned()));
            }
            None => return Ok(()),
        };
        self.done = join(&self.done, name);
        let key = Spanned::new(offset..offset + name.len(), Cow::Borrowed(name));
        if self.rest.is_empty() {
            let place = self.text.place(offset);
            self.source
                .replace(&self.done, place, &self.value_text, &value);
            table.insert(key, value);
            return Ok(());
        }
        if !table.contains_key(name) {
            let empty = Spanned::new(key.span(), DeValue::Table(DeTable::new()));
            let place = self.text.place(offset);
            self.source.replace(&self.done, place, self.text, &empty);
            table.insert(key, empty);
        }
        match table.get_mut(name) {
            Some(inner) => self.set_in_value(inner.get_mut(), value),
            None => Ok(()),
        }
    }

    fn set_in_value(
        &mut self,
        target: &mut DeValue<'d>,
        value: Spanned<DeValue<'d>>,
    ) -> Result<(), Refusal> {
        let offset = self.rest.first().map_or(0, |(offset, _)| *offset);
        match target {
            DeValue::Table(table) => self.set_in_table(table, value),
            DeValue::Array(items) => {
                let index = self.item(items)?;
                self.done = format!("{}[{index}]", self.done);
                let Some(item) = items.get_mut(index) else {
                    return Ok(());
                };
                if self.rest.is_empty() {
                    let place = self.value_text.place(value.span().start);
                    self.source
                        .replace(&self.done, place, &self.value_text, &value);
                    *item = value;
                    return Ok(());
                }
                self.set_in_value(item.get_mut(), value)
            }
            _ => {
                let instead = format!("`{}` is neither a table nor a list; end there", self.done);
                Err(self.refuse(offset, instead))
            }
        }
    }

    /// Which item of a list the next step means: an index, or the name of a node.
    fn item(&mut self, items: &[Spanned<DeValue<'d>>]) -> Result<usize, Refusal> {
        let Some((offset, step)) = self.next() else {
            return Err(self.refuse(0, "write which item of the list".to_owned()));
        };
        let named = |name: &str| {
            let mut names = items.iter().map(|item| node_name(item.get_ref()));
            names.position(|found| found == Some(name))
        };
        let found = match step {
            Step::Index(index) => Some(index),
            Step::Name(name) => named(name).or_else(|| name.parse().ok()),
        };
        found.filter(|index| *index < items.len()).ok_or_else(|| {
            let names: Vec<String> = (0..)
                .zip(items)
                .map(|(index, item)| match node_name(item.get_ref()) {
                    Some(name) => format!("[{index}] ({name})"),
                    None => format!("[{index}]"),
                })
                .collect();
            let there = match names.as_slice() {
                [] => "the list is empty".to_owned(),
                names => format!("there is {}", names.join(", ")),
            };
            self.refuse(offset, format!("no such item; {there}"))
        })
    }
}

/// The name that a `[[node]]` has, which is its role where it has none of its own.
fn node_name<'v>(item: &'v DeValue<'_>) -> Option<&'v str> {
    let table = item.as_table()?;
    let name = table.get("name").or_else(|| table.get("role"))?;
    name.get_ref().as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_names_and_indices() {
        use Step::{Index, Name};
        let read = |path| {
            steps(path)
                .ok()
                .map(|steps| steps.into_iter().map(|(_, step)| step).collect::<Vec<_>>())
        };
        assert_eq!(
            read(" node[1].env.A_B "),
            Some(vec![Name("node"), Index(1), Name("env"), Name("A_B")])
        );
        assert_eq!(
            read("node.decode-1.args[0]"),
            Some(vec![Name("node"), Name("decode-1"), Name("args"), Index(0)])
        );
        for path in [
            "", ".", "a.", "a..b", "a[", "a[x]", "a[0", "[0]", "a b", "a[0]b", "a[-1]",
        ] {
            assert_eq!(read(path), None, "{path:?}");
        }
    }
}
