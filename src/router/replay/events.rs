//! What is read from a node's events on their way, without parsing them.
//!
//! The words that are looked for begin or end at a quote that is not escaped and stand before a
//! colon: inside a string they cannot occur, there the quote would be escaped.

use std::sync::LazyLock;

use bytes::{Bytes, BytesMut};
use memchr::memmem::Finder;

use super::super::body::Fields;

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

const NULL: &[u8] = b"null";
const PROMPT: &[u8] = b"\"prompt_";
/// The end of `"token_ids":` and of `"prompt_token_ids":`. Made once: every piece of every stream is searched.
static IDS: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new(b"token_ids\":"));
static FINISH: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new(b"\"finish_reason\":"));
static DELTA: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new(b"\"delta\":"));
static END: LazyLock<Finder<'_>> = LazyLock::new(|| Finder::new(b"\"choices\":[]"));

/// Reads whole events; `keep`: the ids stay in them, else their fields say null.
pub(super) fn look(events: Bytes, keep: bool) -> Pieces {
    let mut look = Look {
        finished: is_finished(&events),
        ended: END.find(&events).is_some(),
        odd: is_odd(&events),
        ..Look::default()
    };
    let mut text: Option<BytesMut> = None;
    let mut copied = 0;
    for at in IDS.find_iter(&events) {
        let value = at + IDS.needle().len();
        let rest = events.get(value..).unwrap_or_default();
        let Some((ids, length)) = ids(rest) else {
            look.unreadable = true;
            continue;
        };
        let before = events.get(..at).unwrap_or_default();
        if before.ends_with(PROMPT) {
            look.prompt.extend(ids);
        } else {
            look.generated.extend(ids);
        }
        if keep || rest.trim_ascii_start().starts_with(NULL) {
            continue;
        }
        // As the node says it where nobody asks for ids.
        let out = text.get_or_insert_with(|| BytesMut::with_capacity(events.len()));
        out.extend_from_slice(events.get(copied..value).unwrap_or_default());
        out.extend_from_slice(NULL);
        copied = value + length;
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

/// A list of ids or null, and how many bytes it takes.
fn ids(json: &[u8]) -> Option<(Vec<u32>, usize)> {
    let spaces = json.len() - json.trim_ascii_start().len();
    let json = json.get(spaces..)?;
    if json.starts_with(NULL) {
        return Some((Vec::new(), spaces + NULL.len()));
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
    FINISH
        .find_iter(events)
        .any(|at| after(events, at, &FINISH).starts_with(b"\""))
}

/// A delta that says more than its role and its content, or neither: then a parser has worked on it, and may
/// hold something back.
fn is_odd(events: &[u8]) -> bool {
    DELTA.find_iter(events).any(|at| {
        let json = serde_json::Deserializer::from_slice(after(events, at, &DELTA));
        match json.into_iter::<Fields<'_>>().next() {
            Some(Ok(delta)) => !is_plain(&delta),
            Some(Err(_)) | None => true,
        }
    })
}

fn is_plain(delta: &Fields<'_>) -> bool {
    let says = |key: &str| delta.present(key).is_some();
    (says("role") || says("content"))
        && delta.iter().all(|(key, raw)| {
            matches!(key, "role" | "content") || matches!(raw, "null" | "[]" | "\"\"")
        })
}

/// What follows a word that was found at `at`.
fn after<'a>(events: &'a [u8], at: usize, word: &Finder<'_>) -> &'a [u8] {
    let rest = events.get(at + word.needle().len()..).unwrap_or_default();
    rest.trim_ascii_start()
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
