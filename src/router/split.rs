//! Which requests are split, and what each leg is sent. Pure.
//!
//! Everything that shapes the prompt (model, messages, tools, chat template, salt, truncation, ...)
//! goes to both legs unchanged, or the KV hashes would not meet. On the prefill leg everything that
//! shapes the *output* is neutralised: it computes one token that nobody reads.

use bytes::Bytes;

use super::body::{Fields, ObjectWriter};
use crate::handoff::HandoffId;
use crate::topology::Connector;

const KV_PARAMS: &str = "kv_transfer_params";
/// The part of it that is ours.
const MARK: &str = "pegaflow";
/// vLLM merges this object into the same place that [`KV_PARAMS`] ends up in.
const EXTRA_ARGS: &str = "vllm_xargs";
const OUTPUT_LIMITS: [&str; 3] = ["max_tokens", "max_completion_tokens", "max_output_tokens"];

/// What a client asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Endpoint {
    Completions,
    Chat,
    /// Passed on as it is.
    Other,
}

impl Endpoint {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
            Self::Other => "other",
        }
    }
}

/// Why one node serves a request alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum WholeReason {
    /// No proven prefill/decode pair is ready.
    NoPair,
    /// The hand-off would take longer than the prompt.
    ShortPrompt,
    /// Prefill has enough to do, and decode nothing.
    PrefillBusy,
    /// At most one token is wanted: the prefill node's answer would be the answer.
    OneToken,
    Echo,
    PromptLogprobs,
    Truncation,
    BeamSearch,
    BestOf,
    /// Several prompts in one request.
    Batch,
    /// Not a completion and not a chat.
    OtherEndpoint,
    /// No prompt that we know how to prefill; the node says what is wrong with it.
    NoPrompt,
}

impl WholeReason {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::NoPair => "no_pair",
            Self::ShortPrompt => "short_prompt",
            Self::PrefillBusy => "prefill_busy",
            Self::OneToken => "one_token",
            Self::Echo => "echo",
            Self::PromptLogprobs => "prompt_logprobs",
            Self::Truncation => "truncation",
            Self::BeamSearch => "beam_search",
            Self::BestOf => "best_of",
            Self::Batch => "batch",
            Self::OtherEndpoint => "other_endpoint",
            Self::NoPrompt => "no_prompt",
        }
    }
}

/// Why this request is never split, whatever the fleet looks like.
pub(super) fn never_split(endpoint: Endpoint, fields: &Fields<'_>) -> Option<WholeReason> {
    if endpoint == Endpoint::Other {
        return Some(WholeReason::OtherEndpoint);
    }
    let number = |key: &str| fields.present(key).and_then(as_number);
    let few = |key: &&str| number(key).is_some_and(|limit| limit <= 1.0);
    if OUTPUT_LIMITS.iter().any(few) {
        return Some(WholeReason::OneToken);
    }
    if fields.present("echo").is_some_and(is_truthy) {
        return Some(WholeReason::Echo);
    }
    if fields.present("prompt_logprobs").is_some() {
        return Some(WholeReason::PromptLogprobs);
    }
    if number("truncate_prompt_tokens").is_some_and(|limit| limit < 0.0) {
        return Some(WholeReason::Truncation);
    }
    if fields.present("use_beam_search").is_some_and(is_truthy) {
        return Some(WholeReason::BeamSearch);
    }
    let many = |key: &str| number(key).is_some_and(|count| count > 1.0);
    if many("best_of") || (fields.present("best_of").is_some() && many("n")) {
        return Some(WholeReason::BestOf);
    }
    match endpoint {
        Endpoint::Chat if fields.present("messages").is_none() => Some(WholeReason::NoPrompt),
        Endpoint::Chat | Endpoint::Other => None,
        Endpoint::Completions if fields.present("prompt_embeds").is_some() => {
            Some(WholeReason::NoPrompt)
        }
        Endpoint::Completions => match fields.present("prompt") {
            None => Some(WholeReason::NoPrompt),
            Some(prompt) => is_batch(prompt).then_some(WholeReason::Batch),
        },
    }
}

/// The prefill leg's body.
pub(super) fn prefill_body(
    fields: &Fields<'_>,
    handoff: &HandoffId,
    connector: Connector,
) -> Bytes {
    write_leg(fields, handoff, Leg::Prefill(connector))
}

/// What NIXL's prefill side is to be told: keep the KV for another node, which is not known yet. vLLM's documentation
/// of the connector has it so.
const NIXL_KEEP: &str = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

/// Makes a decode node let go what a prefill node keeps for it. vLLM refuses the request, as it knows no such model,
/// and tells its connector so, which tells the prefill node's; nothing is computed.
pub(super) fn release_body(params: &str) -> Bytes {
    let mut writer = ObjectWriter::with_capacity(params.len() + 128);
    writer.field("model", "\"pegaflow: release\"");
    writer.field("prompt", "[0]");
    writer.field("max_tokens", "1");
    writer.field(KV_PARAMS, params);
    writer.finish()
}

/// Makes vLLM tell the ids of an answer's tokens.
const ASK_IDS: &str = "return_token_ids";

/// The decode leg's body: the client's, marked with the hand-off where the store is ours. `params`: what the prefill
/// node's connector has to say to this one's, a JSON object. `asks_ids`: see [`super::replay`].
pub(super) fn decode_body(
    fields: &Fields<'_>,
    handoff: &HandoffId,
    params: Option<&str>,
    (connector, asks_ids): (Connector, bool),
) -> Bytes {
    let leg = Leg::Decode {
        connector,
        params,
        asks_ids,
    };
    write_leg(fields, handoff, leg)
}

/// A prefill node's words to decode, out of its reply: a JSON object.
pub(super) fn kv_transfer_params(reply: &[u8]) -> Option<String> {
    let fields = Fields::parse(reply).ok()?;
    let params = fields.present(KV_PARAMS)?;
    params.starts_with('{').then(|| params.to_owned())
}

/// The body for a node that serves the request alone: the client's own bytes, unless they would
/// steer KV, hold a key twice or name an alias, or ids are asked for.
pub(super) fn whole_body(fields: &Fields<'_>, original: &Bytes, asks_ids: bool) -> Bytes {
    let steers = || fields.iter().any(|(key, raw)| steers_kv(key, raw));
    if !asks_ids && !fields.differ() && !steers() {
        return original.clone();
    }
    let mut writer = ObjectWriter::with_capacity(original.len() + 32);
    write_client_fields(&mut writer, fields, asks_ids);
    writer.finish()
}

fn write_client_fields(writer: &mut ObjectWriter, fields: &Fields<'_>, asks_ids: bool) {
    for (key, raw) in fields.iter() {
        if !(asks_ids && key == ASK_IDS) {
            write_client_field(writer, key, raw);
        }
    }
    if asks_ids {
        writer.field(ASK_IDS, "true");
    }
}

#[derive(Clone, Copy)]
enum Leg<'a> {
    Prefill(Connector),
    Decode {
        connector: Connector,
        params: Option<&'a str>,
        asks_ids: bool,
    },
}

fn write_leg(fields: &Fields<'_>, handoff: &HandoffId, leg: Leg<'_>) -> Bytes {
    let size = fields.iter().map(|(key, raw)| key.len() + raw.len() + 4);
    let mut writer = ObjectWriter::with_capacity(size.sum::<usize>() + 160);
    let (name, connector, params) = match leg {
        Leg::Decode {
            connector,
            params,
            asks_ids,
        } => {
            write_client_fields(&mut writer, fields, asks_ids);
            ("decode", connector, params)
        }
        Leg::Prefill(connector) => {
            for (key, raw) in fields.iter() {
                match on_prefill(key, raw) {
                    OnPrefill::Keep => write_client_field(&mut writer, key, raw),
                    OnPrefill::Set(value) => writer.field(key, value),
                    OnPrefill::Drop => {}
                }
            }
            if !OUTPUT_LIMITS.iter().any(|key| fields.get(key).is_some()) {
                writer.field("max_tokens", "1");
            }
            let keep = (connector == Connector::Nixl).then_some(NIXL_KEEP);
            ("prefill", connector, keep)
        }
    };
    if connector == Connector::Nixl {
        // NIXL knows nothing of hand-offs' names.
        if let Some(params) = params {
            writer.field(KV_PARAMS, params);
        }
        return writer.finish();
    }
    let mark = format!(r#"{{"handoff":"{handoff}","leg":"{name}"}}"#);
    match params {
        None => writer.field(KV_PARAMS, &format!(r#"{{"{MARK}":{mark}}}"#)),
        Some(params) => writer.field(KV_PARAMS, &with_mark(params, &mark)),
    }
    writer.finish()
}

fn with_mark(params: &str, mark: &str) -> String {
    let mut writer = ObjectWriter::with_capacity(params.len() + mark.len() + 16);
    if let Ok(fields) = Fields::parse(params.as_bytes()) {
        for (key, raw) in fields.iter().filter(|(key, _)| *key != MARK) {
            writer.field(key, raw);
        }
    }
    writer.field(MARK, mark);
    // Built from text, so it is text.
    String::from_utf8_lossy(&writer.finish()).into_owned()
}

enum OnPrefill {
    Keep,
    Set(&'static str),
    Drop,
}

fn on_prefill(key: &str, raw: &str) -> OnPrefill {
    match key {
        "max_tokens" | "max_completion_tokens" | "max_output_tokens" | "n" => OnPrefill::Set("1"),
        "stream" | "background" | "store" => OnPrefill::Set("false"),
        // "none" keeps the tools in the prompt; "auto" would need a server flag.
        "tool_choice" if forces_a_tool(raw) => OnPrefill::Set("\"none\""),
        "min_tokens" | "stream_options" | "best_of" | "use_beam_search" => OnPrefill::Drop,
        "stop" | "stop_token_ids" | "logprobs" | "top_logprobs" => OnPrefill::Drop,
        "response_format" | "structured_outputs" => OnPrefill::Drop,
        "guided_json" | "guided_regex" | "guided_choice" | "guided_grammar" => OnPrefill::Drop,
        "return_token_ids" | "return_tokens_as_token_ids" => OnPrefill::Drop,
        _ => OnPrefill::Keep,
    }
}

fn forces_a_tool(raw: &str) -> bool {
    !matches!(raw, "\"auto\"" | "\"none\"" | "null")
}

fn write_client_field(writer: &mut ObjectWriter, key: &str, raw: &str) {
    if !steers_kv(key, raw) {
        return writer.field(key, raw);
    }
    if let (EXTRA_ARGS, Ok(inner)) = (key, Fields::parse(raw.as_bytes())) {
        let mut rest = ObjectWriter::with_capacity(raw.len());
        for (key, raw) in inner.iter().filter(|(key, _)| *key != KV_PARAMS) {
            rest.field(key, raw);
        }
        let rest = rest.finish();
        // Built from text, so it is text.
        if let Ok(rest) = std::str::from_utf8(&rest) {
            writer.field(EXTRA_ARGS, rest);
        }
    }
}

/// The client's field would reach the KV connector.
fn steers_kv(key: &str, raw: &str) -> bool {
    match key {
        KV_PARAMS => true,
        EXTRA_ARGS => {
            Fields::parse(raw.as_bytes()).is_ok_and(|inner| inner.get(KV_PARAMS).is_some())
        }
        _ => false,
    }
}

/// vLLM takes numbers in quotes too.
fn as_number(raw: &str) -> Option<f64> {
    raw.trim_matches('"').trim().parse().ok()
}

/// vLLM takes 1, "true", "yes", ... for true: whatever is not clearly false counts.
fn is_truthy(raw: &str) -> bool {
    !matches!(raw, "false" | "0" | "\"false\"" | "\"0\"")
}

/// A string and a list of token ids are one prompt; so is a list that holds just one of them.
fn is_batch(prompt: &str) -> bool {
    let Some(inner) = prompt.strip_prefix('[') else {
        return !prompt.starts_with('"');
    };
    match inner.trim_start().as_bytes().first() {
        Some(b'"' | b'[') => {
            let prompts = serde_json::from_str::<Vec<&serde_json::value::RawValue>>(prompt);
            !prompts.is_ok_and(|prompts| prompts.len() == 1)
        }
        Some(b'0'..=b'9') => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests;
