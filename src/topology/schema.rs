//! The JSON schema of a topology file, for editors: [`keys`] in another form.
//!
//! It knows what one value may be, not what goes together: the reader has the last word. A string with
//! a variable in it fits every key that takes strings, since nobody knows its value yet.

mod reference;

use serde_json::{Map, Value, json};

pub use reference::reference;

use super::keys::{self, Absent, Key, Shape, Table};

/// `${...}` somewhere in it.
const VARIABLE: &str = r"\$\{";
const NAME: &str = "[a-z0-9-]{1,40}";
const ID_PART: &str = "[A-Za-z0-9._-]+";
const DURATION: &str = "([0-9]+(\\.[0-9]+)?\\s*(nanos|nsec|ns|usec|us|µs|millis|msec|ms|seconds?|secs?|s|\
                        minutes?|mins?|m|hours?|hrs?|hr|h|days?|d|weeks?|wks?|w|months?|M|years?|yrs?|y)\\s*)+";
const SIZE: &str = r"([0-9]+|([0-9]+(\.[0-9]*)?|\.[0-9]+)\s*([bB]|[kmgtpeKMGTPE][iI]?[bB]?))";
const PERCENT: &str = "([1-9][0-9]?|100)%";
/// A token of HTTP, or nothing.
const HEADER: &str = "[!#$%&'*+.^_`|~0-9A-Za-z-]*";
const ADDRESS: &str = r"([0-9]{1,3}(\.[0-9]{1,3}){3}|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}";

const ORIGIN: &str = r"\*|https?://[!-.0-~]+";
/// Neither all addresses nor a group of machines.
const HOST: &str = r"(?!(0|22[4-9]|23[0-9])\.)[0-9]{1,3}(\.[0-9]{1,3}){3}|(?![fF]{2})(?=.*:.*:)(?=.*[1-9A-Fa-f])[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*";

const NODE_URL: &str = r"[hH][tT][tT][pP][sS]?://[^/?#@\s]+:[0-9]{1,5}/?";

/// JSON schema, draft 7: what the TOML editors know.
pub fn schema() -> Value {
    let mut schema = table(&keys::TOP);
    schema.insert(
        "$schema".into(),
        "http://json-schema.org/draft-07/schema#".into(),
    );
    schema.insert("title".into(), "pegaflow topology".into());
    Value::Object(schema)
}

fn table(table: &Table) -> Map<String, Value> {
    let required = table
        .keys
        .iter()
        .filter(|key| matches!(key.absent, Absent::Required));
    let required: Vec<&str> = required.map(|key| key.name).collect();
    let properties: Map<String, Value> = table
        .keys
        .iter()
        .map(|key| (key.name.to_owned(), Value::Object(property(key))))
        .collect();
    let mut schema = Map::new();
    schema.insert("description".into(), table.doc.into());
    schema.insert("type".into(), "object".into());
    schema.insert("properties".into(), Value::Object(properties));
    if !required.is_empty() {
        schema.insert("required".into(), required.into());
    }
    schema.insert("additionalProperties".into(), false.into());
    schema
}

fn property(key: &Key) -> Map<String, Value> {
    let mut property = match of_shape(key.shape) {
        Value::Object(property) => property,
        _ => Map::new(),
    };
    let description = match key.absent {
        Absent::Words(words) => format!("{} Default: {words}.", key.doc),
        Absent::Is(_) | Absent::Required => key.doc.to_owned(),
    };
    property.insert("description".into(), description.into());
    if let Absent::Is(default) = key.absent
        && let Some(default) = json_of(default)
    {
        property.insert("default".into(), default);
    }
    property
}

/// A default that is not TOML has none in the schema; a test looks at all of them.
fn json_of(toml: &str) -> Option<Value> {
    let document: toml::Table = toml::from_str(&format!("x = {toml}")).ok()?;
    serde_json::to_value(document.get("x")?).ok()
}

fn of_shape(shape: Shape) -> Value {
    match shape {
        Shape::Text => json!({"type": "string", "pattern": r"\S"}),
        Shape::Name => text(NAME),
        Shape::Model => text(&format!("[/.].*|builtin:tiny|{ID_PART}(/{ID_PART})?")),
        Shape::OneOf(choices) => any_of([choice(choices), variable()]),
        Shape::Boolean => json!({"type": "boolean"}),
        Shape::Integer(from, to, 1) => integer(from, to),
        Shape::Integer(from, to, step) => {
            json!({"type": "integer", "minimum": from, "maximum": to, "multipleOf": step})
        }
        Shape::Number(from, to) => json!({"type": "number", "minimum": from, "maximum": to}),
        Shape::Duration => text(&format!("(?=.*[1-9]){DURATION}")),
        Shape::DurationOrZero => text(DURATION),
        Shape::Size => text(&format!("(?=.*[1-9]){SIZE}")),
        Shape::SizeOrPercent => text(&format!("(?=.*[1-9])({SIZE}|{PERCENT})")),
        Shape::Address => text(ADDRESS),
        Shape::Host => text(HOST),
        Shape::Url => text(NODE_URL),
        Shape::Header => text(HEADER),
        Shape::Strings => json!({"type": "array", "items": of_shape(Shape::Text)}),
        Shape::Origins => json!({"type": "array", "items": text(ORIGIN)}),
        Shape::Aliases => json!({
            "type": "object",
            "additionalProperties": {"type": "string", "pattern": r"\S"},
            "propertyNames": {"pattern": r"\S"},
        }),
        Shape::Variables => json!({
            "type": "object",
            "additionalProperties": {"type": "string"},
            "propertyNames": {"pattern": "^[^=]+$"},
        }),
        Shape::Numa => any_of([
            choice(&["auto", "interleave", "none"]),
            variable(),
            list(integer(0, 1023)),
        ]),
        Shape::Gpus => any_of([
            choice(&["auto"]),
            variable(),
            integer(1, 64),
            list(any_of([
                integer(0, 1023),
                text("GPU-.*"),
                text(PCI_ADDRESS),
            ])),
        ]),
        Shape::Cpus => any_of([choice(&["auto", "all"]), variable(), list(integer(0, 4095))]),
        Shape::Table(inner) => Value::Object(table(inner)),
        Shape::Tables(inner) => {
            json!({"type": "array", "minItems": 1, "items": Value::Object(table(inner))})
        }
    }
}

/// As [`super::PciAddress`] reads it.
const PCI_ADDRESS: &str = r"([0-9a-fA-F]+:)?[0-9a-fA-F]{1,2}:[01]?[0-9a-fA-F]\.0";

/// The whole string fits the pattern, or holds a variable.
fn text(pattern: &str) -> Value {
    json!({"type": "string", "pattern": format!(r"^({pattern})$|{VARIABLE}")})
}

fn choice(choices: &[&str]) -> Value {
    json!({"enum": choices})
}

fn variable() -> Value {
    json!({"type": "string", "pattern": VARIABLE})
}

fn integer(from: i64, to: i64) -> Value {
    json!({"type": "integer", "minimum": from, "maximum": to})
}

fn list(items: Value) -> Value {
    json!({"type": "array", "minItems": 1, "uniqueItems": true, "items": items})
}

fn any_of<const N: usize>(shapes: [Value; N]) -> Value {
    json!({"anyOf": shapes.to_vec()})
}
