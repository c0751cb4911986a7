//! `docs/topology-keys.md`: the table of keys as a table for people, so that no key is missing there and none is made up.

use std::fmt::Write as _;

use super::super::keys::{self, Absent, Key, Shape, Table};

const BEGIN: &str = "\
# Every key of a topology

Made by `pegaflow schema --markdown` from the table that the reader of topologies uses. What keys mean together, and why one would set them, is in [topology.md](topology.md).
";

/// In Markdown.
pub fn reference() -> String {
    let mut out = BEGIN.to_owned();
    section(&mut out, &keys::TOP);
    out
}

fn section(out: &mut String, table: &Table) {
    let title = match table.header {
        "" => "Top".to_owned(),
        header => format!("`{header}`"),
    };
    // Writing to a string does not fail.
    let _ = write!(out, "\n## {title}\n\n{}\n\n", table.doc);
    out.push_str("| key | value | default | |\n|---|---|---|---|\n");
    let (tables, plain): (Vec<&Key>, Vec<&Key>) = table
        .keys
        .iter()
        .partition(|key| inner(key.shape).is_some());
    for key in plain {
        let default = match key.absent {
            Absent::Required => "required".to_owned(),
            Absent::Is(toml) => format!("`{toml}`"),
            Absent::Words(words) => words.to_owned(),
        };
        let (name, value, doc) = (key.name, value(key.shape), key.doc);
        let _ = writeln!(
            out,
            "| `{name}` | {} | {} | {} |",
            cell(&value),
            cell(&default),
            cell(doc)
        );
    }
    for inner in tables.into_iter().filter_map(|key| inner(key.shape)) {
        section(out, inner);
    }
}

fn inner(shape: Shape) -> Option<&'static Table> {
    match shape {
        Shape::Table(inner) | Shape::Tables(inner) => Some(inner),
        _ => None,
    }
}

/// A bar would end the cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn value(shape: Shape) -> String {
    match shape {
        Shape::OneOf(choices) => {
            let quoted = choices.iter().map(|choice| format!("`\"{choice}\"`"));
            return quoted.collect::<Vec<_>>().join(", ");
        }
        Shape::Integer(from, to, 1) => return format!("an integer from {from} to {to}"),
        Shape::Integer(from, to, step) => {
            return format!("a multiple of {step} from {from} to {to}");
        }
        Shape::Number(from, to) => return format!("a number from {from} to {to}"),
        Shape::Text => "a string",
        Shape::Name => "1 to 40 of `a-z0-9-`",
        Shape::Model => {
            "`\"owner/name\"`, `\"/directory\"`, `\"./directory\"` or `\"builtin:tiny\"`"
        }
        Shape::Boolean => "`true` or `false`",
        Shape::Duration => "a time like `\"30s\"`, above zero",
        Shape::DurationOrZero => "a time like `\"30s\"` or `\"0s\"`",
        Shape::Size => "a size like `\"8GiB\"`",
        Shape::SizeOrPercent => "a size like `\"8GiB\"`, or a share like `\"50%\"`",
        Shape::Address => "an IP address and a port like `\"127.0.0.1:8000\"`",
        Shape::Host => "an IP address like `\"10.0.0.8\"`",
        Shape::Url => "like `\"http://10.0.0.7:8000\"` or `\"https://...\"`",
        Shape::Header => "a header's name, or `\"\"`",
        Shape::Strings => "a list of strings",
        Shape::Origins => "a list like `[\"https://chat.example.com\"]`, or `[\"*\"]`",
        Shape::Aliases => "a table of names like `{ \"gpt-4o\" = \"Qwen3-8B\" }`",
        Shape::Variables => "a table of strings like `{ NAME = \"value\" }`",
        Shape::Numa => "`\"auto\"`, `\"interleave\"`, `\"none\"` or a list like `[0, 1]`",
        Shape::Gpus => "`\"auto\"`, a number, or a list like `[0, \"GPU-...\"]`",
        Shape::Cpus => "`\"auto\"`, `\"all\"` or a list like `[0, 1]`",
        Shape::Table(_) | Shape::Tables(_) => "a table",
    }
    .to_owned()
}
