//! Which streamed requests can go on elsewhere, and what is asked for then. Pure.

use serde_json::Value;

use super::super::body::{Fields, ObjectWriter};
use super::super::split::Endpoint;

/// Why a stream cannot go on elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in super::super) enum Refusal {
    /// Several answers at once, or the best of several.
    Choices,
    Logprobs,
    /// A grammar's state is lost.
    Guided,
    /// A tool parser's state is lost.
    Tools,
    /// What makes sampling repeatable counts from the answer's first token.
    Seed,
    /// Counts the answer's tokens apart from the prompt's.
    Penalty,
    /// vLLM holds text back that could begin a stop string.
    Stop,
    /// More than text: its ids are not all there is of it.
    Multimodal,
    Echo,
    /// A field whose meaning for the rest of an answer is not known here.
    UnknownField,
    /// A limit that is no number, or was reached without a word.
    Limit,
    /// The answer went through a parser: there is reasoning, or a tool call, in it.
    Parsed,
    /// The node told no token ids.
    NoIds,
    /// It went on too often already.
    TooOften,
}

impl Refusal {
    pub(in super::super) const ALL: [Self; 14] = [
        Self::Choices,
        Self::Logprobs,
        Self::Guided,
        Self::Tools,
        Self::Seed,
        Self::Penalty,
        Self::Stop,
        Self::Multimodal,
        Self::Echo,
        Self::UnknownField,
        Self::Limit,
        Self::Parsed,
        Self::NoIds,
        Self::TooOften,
    ];

    pub(in super::super) fn label(self) -> &'static str {
        match self {
            Self::Choices => "choices",
            Self::Logprobs => "logprobs",
            Self::Guided => "guided",
            Self::Tools => "tools",
            Self::Seed => "seed",
            Self::Penalty => "penalty",
            Self::Stop => "stop",
            Self::Multimodal => "multimodal",
            Self::Echo => "echo",
            Self::UnknownField => "unknown_field",
            Self::Limit => "limit",
            Self::Parsed => "parsed",
            Self::NoIds => "no_ids",
            Self::TooOften => "too_often",
        }
    }
}

/// What the continuation repeats: it means the same for the rest of an answer as for the whole.
const KEPT: [&str; 19] = [
    "allowed_token_ids",
    "cache_salt",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "min_p",
    "model",
    "priority",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop_token_ids",
    "stream_interval",
    "stream_options",
    "temperature",
    "top_k",
    "top_p",
    "user",
];

/// What is in the prompt's ids already, or names the request.
const DONE: [&str; 24] = [
    "add_generation_prompt",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "include_reasoning",
    "kv_transfer_params",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "metadata",
    "min_tokens",
    "parallel_tool_calls",
    "prompt",
    "reasoning_effort",
    "request_id",
    "return_token_ids",
    "safety_identifier",
    "service_tier",
    "store",
    "stream",
    "truncate_prompt_tokens",
    "truncation_side",
];

/// vLLM's default on `/v1/completions`.
const COMPLETION_TOKENS: u64 = 16;

/// How to ask for the rest of one stream.
#[derive(Debug)]
pub(in super::super) struct Recipe {
    is_chat: bool,
    kept: Vec<(String, String)>,
    /// `None`: what the model has room for.
    limit: Option<u64>,
    min_tokens: u64,
    wants_ids: bool,
    wants_usage: bool,
}

impl Recipe {
    /// `None`: it is not a stream of completions or chat at all.
    pub(in super::super) fn of(
        endpoint: Endpoint,
        fields: &Fields<'_>,
    ) -> Option<Result<Self, Refusal>> {
        let is_chat = match endpoint {
            Endpoint::Completions => false,
            Endpoint::Chat => true,
            Endpoint::Other => return None,
        };
        (fields.present("stream") == Some("true")).then(|| Self::read(is_chat, fields))
    }

    fn read(is_chat: bool, fields: &Fields<'_>) -> Result<Self, Refusal> {
        for (key, raw) in fields.iter().filter(|(_, raw)| *raw != "null") {
            judge(key, raw, fields)?;
        }
        let limits: &[&str] = if is_chat {
            &["max_completion_tokens", "max_tokens"]
        } else {
            &["max_tokens"]
        };
        let limit = limits.iter().find_map(|key| fields.present(key));
        let limit = limit.map(|raw| raw.parse().map_err(|_| Refusal::Limit));
        let default = (!is_chat).then_some(COMPLETION_TOKENS);
        let min = fields.present("min_tokens").map(str::parse);
        let kept = fields.iter().filter(|(key, _)| KEPT.contains(key));
        let options = fields.present("stream_options");
        let options = options.and_then(|raw| serde_json::from_str::<Value>(raw).ok());
        Ok(Self {
            is_chat,
            kept: kept
                .map(|(key, raw)| (key.to_owned(), raw.to_owned()))
                .collect(),
            limit: limit.transpose()?.or(default),
            min_tokens: min.transpose().map_err(|_| Refusal::Limit)?.unwrap_or(0),
            wants_ids: fields.present("return_token_ids") == Some("true"),
            wants_usage: options
                .is_some_and(|options| options.get("include_usage") == Some(&Value::Bool(true))),
        })
    }

    pub(super) fn is_chat(&self) -> bool {
        self.is_chat
    }

    /// The client itself asked for token ids.
    pub(in super::super) fn wants_ids(&self) -> bool {
        self.wants_ids
    }

    pub(super) fn wants_usage(&self) -> bool {
        self.wants_usage
    }

    /// Tokens that may still come after `generated`: `Some(None)` for as many as the model has room
    /// for, `None` for none, though the last one has not said that it is the last.
    pub(super) fn left(&self, generated: usize) -> Option<Option<u64>> {
        match self.limit {
            None => Some(None),
            Some(limit) => match limit.saturating_sub(generated as u64) {
                0 => None,
                left => Some(Some(left)),
            },
        }
    }

    /// All but the prompt and the upper limit.
    pub(super) fn write(&self, writer: &mut ObjectWriter, generated: usize) {
        for (key, raw) in &self.kept {
            writer.field(key, raw);
        }
        writer.field("stream", "true");
        let min = self.min_tokens.saturating_sub(generated as u64);
        if min > 0 {
            writer.field("min_tokens", &min.to_string());
        }
    }
}

/// Whether a field, which is not null, stands in the way.
fn judge(key: &str, raw: &str, fields: &Fields<'_>) -> Result<(), Refusal> {
    let zero = || raw.parse::<f64>() == Ok(0.0);
    let one = || raw.parse::<f64>() == Ok(1.0);
    let empty = || {
        let mut bytes = raw.bytes().filter(|byte| !byte.is_ascii_whitespace());
        matches!(
            (bytes.next(), bytes.next(), bytes.next()),
            (Some(b'['), Some(b']'), None) | (Some(b'"'), Some(b'"'), None)
        )
    };
    let off = || raw == "false";
    let unless = |fine: bool, refusal| if fine { Ok(()) } else { Err(refusal) };
    match key {
        "messages" => unless(is_text_only(raw), Refusal::Multimodal),
        "seed" => unless(is_greedy(fields), Refusal::Seed),
        _ if KEPT.contains(&key) || DONE.contains(&key) => Ok(()),
        "n" | "best_of" => unless(one(), Refusal::Choices),
        "use_beam_search" => unless(off(), Refusal::Choices),
        "logprobs" => unless(off(), Refusal::Logprobs),
        "top_logprobs" => unless(zero(), Refusal::Logprobs),
        "prompt_logprobs" | "logprob_token_ids" => Err(Refusal::Logprobs),
        "presence_penalty" | "frequency_penalty" => unless(zero(), Refusal::Penalty),
        "bad_words" => unless(empty(), Refusal::Penalty),
        "stop" => unless(empty(), Refusal::Stop),
        "echo" => unless(off(), Refusal::Echo),
        "suffix" => unless(empty(), Refusal::Echo),
        "tools" | "functions" => {
            let unused = fields.present("tool_choice") == Some("\"none\"");
            unless(empty() || unused, Refusal::Tools)
        }
        // It says something only beside tools.
        "tool_choice" => unless(matches!(raw, "\"none\"" | "\"auto\""), Refusal::Tools),
        "response_format" => unless(is_plain_text(raw), Refusal::Guided),
        "structured_outputs" => Err(Refusal::Guided),
        _ if key.starts_with("guided_") => Err(Refusal::Guided),
        _ => Err(Refusal::UnknownField),
    }
}

fn is_greedy(fields: &Fields<'_>) -> bool {
    let temperature = fields.present("temperature");
    temperature.and_then(|raw| raw.parse::<f64>().ok()) == Some(0.0)
}

fn is_plain_text(format: &str) -> bool {
    let format: Value = serde_json::from_str(format).unwrap_or_default();
    is_text(&format)
}

/// Every part of every message is text. Only messages with parts are looked into.
fn is_text_only(messages: &str) -> bool {
    if memchr::memmem::find(messages.as_bytes(), b"\"type\"").is_none() {
        return true;
    }
    let messages: Value = serde_json::from_str(messages).unwrap_or_default();
    let text = |part: &Value| part.is_string() || is_text(part);
    let plain = |message: &Value| match message.get("content") {
        Some(Value::Array(parts)) => parts.iter().all(text),
        Some(content) => content.is_string() || content.is_null(),
        None => true,
    };
    messages.as_array().is_some_and(|all| all.iter().all(plain))
}

fn is_text(part: &Value) -> bool {
    part.get("type").and_then(Value::as_str) == Some("text")
}
