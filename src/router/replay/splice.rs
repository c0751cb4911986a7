//! Events of a continuation in the shape of the stream that they go on with. Rare, so parsed.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::recipe::Recipe;

/// What all events of one stream say alike.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Head {
    id: String,
    created: Value,
    model: Value,
}

impl Head {
    /// From the first of some events.
    pub(super) fn read(events: &[u8]) -> Option<Self> {
        events.split(|byte| *byte == b'\n').find_map(|line| {
            let json = line.strip_prefix(b"data:")?.trim_ascii();
            serde_json::from_slice(json).ok()
        })
    }
}

/// `prompt`, `base`: tokens of the prompt, and of the answer before the continuation.
pub(super) fn splice(
    events: &[u8],
    head: &Head,
    recipe: &Recipe,
    prompt: usize,
    base: usize,
) -> Bytes {
    let mut out = Vec::with_capacity(events.len() + 64);
    for line in events.split(|byte| *byte == b'\n') {
        let Some(json) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else {
            continue;
        };
        out.extend_from_slice(b"data: ");
        match serde_json::from_slice(json) {
            Ok(event) => {
                let event = Value::Object(reshape(event, head, recipe, prompt, base));
                out.extend_from_slice(event.to_string().as_bytes());
            }
            // `[DONE]`.
            Err(_) => out.extend_from_slice(json),
        }
        out.extend_from_slice(b"\n\n");
    }
    out.into()
}

fn reshape(
    mut event: Map<String, Value>,
    head: &Head,
    recipe: &Recipe,
    prompt: usize,
    base: usize,
) -> Map<String, Value> {
    event.insert("id".to_owned(), json!(head.id));
    event.insert("created".to_owned(), head.created.clone());
    event.insert("model".to_owned(), head.model.clone());
    if recipe.is_chat() {
        event.insert("object".to_owned(), json!("chat.completion.chunk"));
    }
    if let Some(choices) = event.get_mut("choices").and_then(Value::as_array_mut) {
        for choice in choices.iter_mut().filter_map(Value::as_object_mut) {
            // Told at the beginning, and to those who asked.
            forget(choice, "prompt_token_ids");
            if !recipe.wants_ids() {
                forget(choice, "token_ids");
            }
            if recipe.is_chat() {
                into_chat(choice);
            }
        }
    }
    if let Some(usage) = event.get_mut("usage").and_then(Value::as_object_mut) {
        let generated = usage.get("completion_tokens").and_then(Value::as_u64);
        let generated = generated.unwrap_or(0) + base as u64;
        usage.insert("prompt_tokens".to_owned(), json!(prompt));
        usage.insert("completion_tokens".to_owned(), json!(generated));
        usage.insert("total_tokens".to_owned(), json!(prompt as u64 + generated));
        let details = usage.get_mut("prompt_tokens_details");
        if let Some(cached) = details.and_then(|details| details.get_mut("cached_tokens")) {
            // A part of the answer may be among them.
            *cached = json!(cached.as_u64().unwrap_or(0).min(prompt as u64));
        }
    }
    event
}

/// A field that every event has stays.
fn forget(choice: &mut Map<String, Value>, key: &str) {
    if let Some(value) = choice.get_mut(key) {
        *value = Value::Null;
    }
}

/// The choice of a completion, as one of a chat.
fn into_chat(choice: &mut Map<String, Value>) {
    choice.remove("prompt_token_ids");
    if choice.get("finish_reason").is_none_or(Value::is_null) {
        choice.remove("stop_reason");
    }
    if let Some(text) = choice.remove("text") {
        choice.insert("delta".to_owned(), json!({"content": text}));
    }
}

/// The end of a stream whose last token went out.
pub(super) fn end(
    head: &Head,
    is_chat: bool,
    usage: bool,
    prompt: usize,
    generated: usize,
) -> Bytes {
    let mut out = String::new();
    if usage {
        let object = if is_chat {
            "chat.completion.chunk"
        } else {
            "text_completion"
        };
        let usage = json!({
            "id": head.id, "object": object, "created": head.created, "model": head.model, "choices": [],
            "usage": {
                "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
            },
        });
        out = format!("data: {usage}\n\n");
    }
    out.push_str("data: [DONE]\n\n");
    out.into()
}
