//! Which events at the beginning of a stream say nothing yet.
//!
//! A chat stream of vLLM begins with an event that only names the role, before the first token is
//! sent. A client that got it has got nothing, but it could not be answered by another node any more.
//! So such events wait for the first one that says something.

use serde::Deserialize;
use serde_json::{Map, Value};

/// Bytes that wait at most: more than the roles of the most choices that a request can ask for, and than
/// the ids of a prompt of a million tokens.
pub const MOST: usize = 8 << 20;

/// From the first event on that is more than choices without a single piece of an answer; empty: there is none.
pub fn said(events: &[u8]) -> &[u8] {
    let mut rest = events;
    while !rest.is_empty() {
        let end = rest.iter().position(|byte| *byte == b'\n');
        let (line, after) = rest.split_at(end.map_or(rest.len(), |end| end + 1));
        if !line.trim_ascii().is_empty() && !is_bare(line) {
            break;
        }
        rest = after;
    }
    rest
}

/// The rest of it, a prompt's ids among them, is skipped.
#[derive(Deserialize)]
struct Event {
    choices: Vec<Value>,
}

fn is_bare(line: &[u8]) -> bool {
    let json = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii);
    let event: Option<Event> = json.and_then(|json| serde_json::from_slice(json).ok());
    event.is_some_and(|event| !event.choices.is_empty() && event.choices.iter().all(is_bare_choice))
}

/// Whatever is there but the choice's number and its role is empty, known to us or not.
fn is_bare_choice(choice: &Value) -> bool {
    let Some(choice) = choice.as_object() else {
        return false;
    };
    choice
        .iter()
        .all(|(key, value)| match (key.as_str(), value) {
            ("index", _) => true,
            ("delta", Value::Object(delta)) => {
                let mut delta = delta.iter();
                delta.all(|(key, value)| key == "role" || is_empty(value))
            }
            _ => is_empty(value),
        })
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => Map::is_empty(fields),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says_nothing(events: &[u8]) -> bool {
        said(events).is_empty()
    }

    const ROLE: &str = r#"data: {"id":"x","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":[1,2]}"#;

    #[test]
    fn a_role_alone_says_nothing() {
        let two = r#"data: {"choices":[{"index":0,"delta":{"role":"assistant"}},{"index":1,"delta":{"role":"assistant","content":null,"tool_calls":[]}}]}"#;
        let piece =
            r#"data: {"choices":[{"index":0,"text":"","logprobs":null,"finish_reason":null}]}"#;
        for event in [ROLE, two, piece] {
            assert!(says_nothing(format!("{event}\n\n").as_bytes()), "{event}");
            assert!(says_nothing(
                format!("{event}\r\n\r\n{event}\r\n\r\n").as_bytes()
            ));
        }
    }

    #[test]
    fn whatever_else_there_is_says_something() {
        let choice = |choice: &str| format!("data: {{\"choices\":[{choice}]}}\n\n");
        for events in [
            choice(r#"{"index":0,"delta":{"content":"a"}}"#),
            choice(r#"{"index":0,"delta":{"role":"assistant","reasoning":"a"}}"#),
            choice(r#"{"index":0,"delta":{"tool_calls":[{"index":0}]}}"#),
            choice(r#"{"index":0,"delta":{"content":""},"finish_reason":"stop"}"#),
            choice(r#"{"index":0,"text":"","token_ids":[7]}"#),
            choice(r#"{"index":0,"text":"","logprobs":{"tokens":["a"]}}"#),
            choice(r#"{"index":0,"delta":{}},{"index":1,"delta":{"content":"a"}}"#),
            choice(""),
            choice("3"),
            format!(
                "{ROLE}\n\n{}",
                choice(r#"{"index":0,"delta":{"content":"a"}}"#)
            ),
            format!("{ROLE}\n\ndata: [DONE]\n\n"),
            ": ping\n\n".to_owned(),
            "event: error\n\n".to_owned(),
            "data: {\"usage\":{}}\n\n".to_owned(),
            "data: not json\n\n".to_owned(),
        ] {
            assert!(!says_nothing(events.as_bytes()), "{events}");
        }
    }
}
