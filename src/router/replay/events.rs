//! What is read from a node's events on their way, without parsing them.
//!
//! The words that are looked for begin or end at a quote that is not escaped and stand before a
//! colon: inside a string they cannot occur, there the quote would be escaped.

use bytes::{Bytes, BytesMut};
use memchr::memmem;

/// What a client gets of some events, and what was seen in them.
pub(super) struct Pieces {
    pub(super) text: Bytes,
    pub(super) look: Look,
}

/// What was seen in some events.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) prompt: Vec<u32>,
    pub(super) generated: Vec<u32>,
    /// A choice has its last token.
    pub(super) finished: bool,
    /// There is an event without choices, as the one with the usage is.
    pub(super) ended: bool,
    /// A piece of a chat that is not content alone.
    pub(super) odd: bool,
    /// Ids that are none.
    pub(super) unreadable: bool,
}

/// The end of `"token_ids":` and of `"prompt_token_ids":`.
const IDS: &[u8] = b"token_ids\":";
const PROMPT: &[u8] = b"\"prompt_";
const FINISH: &[u8] = b"\"finish_reason\":";
const DELTA: &[u8] = b"\"delta\":{";

/// Reads whole events; `keep`: the ids stay in them.
pub(super) fn look(events: Bytes, keep: bool) -> Pieces {
    let mut look = Look {
        finished: is_finished(&events),
        ended: memmem::find(&events, b"\"choices\":[]").is_some(),
        odd: is_odd(&events),
        ..Look::default()
    };
    let mut text: Option<BytesMut> = None;
    let mut copied = 0;
    for at in memmem::find_iter(&events, IDS) {
        let value = at + IDS.len();
        let rest = events.get(value..).unwrap_or_default();
        let Some((ids, length)) = ids(rest) else {
            look.unreadable = true;
            continue;
        };
        let before = events.get(..at).unwrap_or_default();
        let is_prompt = before.ends_with(PROMPT);
        let name = if is_prompt { PROMPT.len() } else { 1 };
        if is_prompt {
            look.prompt.extend(ids);
        } else {
            look.generated.extend(ids);
        }
        if keep {
            continue;
        }
        let (start, end) = with_comma(&events, at.saturating_sub(name), value + length);
        let out = text.get_or_insert_with(|| BytesMut::with_capacity(events.len()));
        out.extend_from_slice(events.get(copied..start).unwrap_or_default());
        copied = end;
    }
    let text = match text {
        None => events,
        Some(mut out) => {
            out.extend_from_slice(events.get(copied..).unwrap_or_default());
            out.freeze()
        }
    };
    Pieces { text, look }
}

/// The comma before what is cut out goes with it, or else the one after it.
fn with_comma(events: &[u8], start: usize, end: usize) -> (usize, usize) {
    let before = events.get(..start).unwrap_or_default();
    let kept = before.trim_ascii_end();
    if kept.ends_with(b",") {
        return (kept.len() - 1, end);
    }
    let after = events.get(end..).unwrap_or_default();
    let rest = after.trim_ascii_start();
    match rest.strip_prefix(b",") {
        Some(rest) => (start, events.len() - rest.len()),
        None => (start, end),
    }
}

/// A list of ids or null, and how many bytes it takes.
fn ids(json: &[u8]) -> Option<(Vec<u32>, usize)> {
    let spaces = json.len() - json.trim_ascii_start().len();
    let json = json.get(spaces..)?;
    if json.starts_with(b"null") {
        return Some((Vec::new(), spaces + 4));
    }
    let inner = json.strip_prefix(b"[")?;
    let end = memchr::memchr(b']', inner)?;
    let list = inner.get(..end)?;
    let mut ids = Vec::with_capacity(list.len() / 4);
    if !list.trim_ascii().is_empty() {
        for id in list.split(|byte| *byte == b',') {
            ids.push(std::str::from_utf8(id).ok()?.trim().parse().ok()?);
        }
    }
    Some((ids, spaces + end + 2))
}

fn is_finished(events: &[u8]) -> bool {
    memmem::find_iter(events, FINISH).any(|at| {
        let value = events.get(at + FINISH.len()..).unwrap_or_default();
        value.trim_ascii_start().starts_with(b"\"")
    })
}

/// A delta that does not begin with its content or its role, or has a parser's work in it. One that
/// is empty is a parser's as well: it holds something back.
fn is_odd(events: &[u8]) -> bool {
    let begins = |at: usize| {
        let delta = events.get(at + DELTA.len()..).unwrap_or_default();
        let delta = delta.trim_ascii_start();
        delta.starts_with(b"\"content\":") || delta.starts_with(b"\"role\":")
    };
    let parsed = |word: &[u8]| memmem::find(events, word).is_some();
    !memmem::find_iter(events, DELTA).all(begins)
        || parsed(b"\"reasoning\":\"")
        || parsed(b"\"reasoning_content\":\"")
        || parsed(b"\"tool_calls\":[{")
        || parsed(b"\"function_call\":{")
}

pub(super) fn ids_json<'a>(ids: impl Iterator<Item = &'a u32>) -> String {
    let mut text = String::from("[");
    for id in ids {
        if text.len() > 1 {
            text.push(',');
        }
        text.push_str(&id.to_string());
    }
    text.push(']');
    text
}
