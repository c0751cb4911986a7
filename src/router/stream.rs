//! A node's event stream.
//!
//! ```text
//! chunks ─▶ whole events only          upstream ends after [DONE]: the end
//!              (a partial one waits)   ends or breaks before, or says that it failed: an error
//! ```
//!
//! What says nothing yet (the role of a chat) waits for the first piece of the answer: until then the
//! request can still go to another node. Because only whole events go out, an error event never lands
//! inside another event. What the client gets of them: see [`super::reply`].

mod opening;

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http_body::Body;

use super::legs::{LegError, excerpt};
use super::pool::NodeBody;

/// Bytes of one event.
const MAX_EVENT: usize = 16 << 20;

/// The first events of a stream.
pub(super) enum FirstEvents {
    Content(Bytes),
    /// A 200 whose first word is an error.
    Error {
        code: u64,
        text: Bytes,
    },
}

/// How a stream ends that is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Last {
    /// With `data: [DONE]`.
    Done,
    /// As its HTTP body does; what its last event is, is not known here.
    Body,
}

/// Whole events from a node.
pub(super) struct EventStream {
    upstream: Box<NodeBody>,
    splitter: Splitter,
    /// The node said so after events that went out.
    failure: Option<LegError>,
}

impl EventStream {
    pub(super) fn new(upstream: NodeBody, last: Last) -> Self {
        Self {
            upstream: Box::new(upstream),
            splitter: Splitter::new(last),
            failure: None,
        }
    }

    /// `[DONE]` has gone out.
    pub(super) fn is_done(&self) -> bool {
        self.splitter.done
    }

    /// Waits for the first events that say something, and returns them with what came before. A
    /// stream that ends before them is truncated.
    pub(super) async fn first(&mut self) -> Result<FirstEvents, LegError> {
        let mut waiting = BytesMut::new();
        loop {
            let events = std::future::poll_fn(|cx| self.poll_events(cx)).await;
            let events = events.unwrap_or(Err(LegError::Truncated))?;
            let said = opening::said(&events);
            let code = error_code(said);
            if said.is_empty() && waiting.len() + events.len() <= opening::MOST {
                waiting.extend_from_slice(&events);
                continue;
            }
            let text = if waiting.is_empty() {
                events
            } else {
                waiting.extend_from_slice(&events);
                waiting.freeze()
            };
            return Ok(match code {
                Some(code) => FirstEvents::Error { code, text },
                None => FirstEvents::Content(text),
            });
        }
    }

    /// `None`: the stream ended as it should.
    pub(super) fn poll_events(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, LegError>>> {
        if let Some(failure) = self.failure.take() {
            return Poll::Ready(Some(Err(failure)));
        }
        let events = ready!(self.poll_chunk(cx));
        let Some(Ok(events)) = events else {
            return Poll::Ready(events);
        };
        let Some((before, failure)) = self.splitter.failure(&events) else {
            return Poll::Ready(Some(Ok(events)));
        };
        if before == 0 {
            return Poll::Ready(Some(Err(failure)));
        }
        self.failure = Some(failure);
        Poll::Ready(Some(Ok(events.slice(..before))))
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, LegError>>> {
        loop {
            let frame = ready!(Pin::new(&mut self.upstream).poll_frame(cx));
            let events = match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(chunk) => self.splitter.push(chunk).transpose(),
                    Err(_trailers) => None,
                },
                Some(Err(error)) => Some(Err(LegError::Transport(error))),
                None => return Poll::Ready(self.splitter.finish().transpose()),
            };
            if events.is_some() {
                return Poll::Ready(events);
            }
        }
    }
}

/// Cuts a byte stream after whole events.
struct Splitter {
    partial: BytesMut,
    last: Last,
    done: bool,
}

impl Splitter {
    fn new(last: Last) -> Self {
        Self {
            partial: BytesMut::new(),
            last,
            done: false,
        }
    }

    /// The events that `chunk` completes.
    fn push(&mut self, chunk: Bytes) -> Result<Option<Bytes>, LegError> {
        let events = if self.partial.is_empty() {
            let end = last_event_end(&chunk, 0);
            let (events, rest) = (chunk.slice(..end), chunk.slice(end..));
            self.partial.extend_from_slice(&rest);
            events
        } else {
            let seen = self.partial.len();
            self.partial.extend_from_slice(&chunk);
            let end = last_event_end(&self.partial, seen.saturating_sub(2));
            self.partial.split_to(end).freeze()
        };
        if self.partial.len() > MAX_EVENT {
            return Err(LegError::TooLarge { limit: MAX_EVENT });
        }
        if events.is_empty() {
            return Ok(None);
        }
        self.done = ends_with_done(&events);
        Ok(Some(events))
    }

    /// A node whose engine dies says so in an event, and ends the stream as if it were whole. Returns
    /// where that event begins. What is the client's mistake is the client's to read.
    fn failure(&mut self, events: &[u8]) -> Option<(usize, LegError)> {
        if self.last != Last::Done || memchr::memmem::find(events, b"\"error\"").is_none() {
            return None;
        }
        let mut at = 0;
        for line in events.split_inclusive(|byte| *byte == b'\n') {
            if error_code(line).is_some_and(|code| !(400..500).contains(&code)) {
                self.done = false;
                return Some((at, LegError::InStream(excerpt(line))));
            }
            at += line.len();
        }
        None
    }

    /// After the last chunk. `Ok(None)`: the stream was complete.
    fn finish(&mut self) -> Result<Option<Bytes>, LegError> {
        let rest = std::mem::take(&mut self.partial);
        if !rest.is_empty() && (self.last == Last::Body || ends_with_done(&rest)) {
            self.done = true;
            return Ok(Some(rest.freeze()));
        }
        if self.done || self.last == Last::Body {
            Ok(None)
        } else {
            Err(LegError::Truncated)
        }
    }
}

/// One past the last blank line (LF or CRLF) that ends at or after `from`; 0 if there is none.
fn last_event_end(bytes: &[u8], from: usize) -> usize {
    let mut end = bytes.len();
    while end > from {
        let head = bytes.get(..end).unwrap_or_default();
        if head.ends_with(b"\n\n") || head.ends_with(b"\n\r\n") {
            return end;
        }
        end -= 1;
    }
    0
}

/// The last line that is not blank is `data: [DONE]`.
fn ends_with_done(events: &[u8]) -> bool {
    let text = events.trim_ascii_end();
    let before = text
        .strip_suffix(b"data: [DONE]")
        .or_else(|| text.strip_suffix(b"data:[DONE]"));
    before.is_some_and(|before| before.is_empty() || before.ends_with(b"\n"))
}

/// The code in `data: {"error": {..., "code": 500}}` (0 if it names none) or in vLLM's older
/// `data: {"object":"error", ..., "code": 500}`.
fn error_code(events: &[u8]) -> Option<u64> {
    #[derive(serde::Deserialize)]
    struct Event {
        #[serde(default)]
        object: String,
        error: Option<serde_json::Value>,
        code: Option<u64>,
    }
    let line = events.split(|byte| *byte == b'\n').next()?;
    let json = line.strip_prefix(b"data:")?.trim_ascii();
    // Only an error has one of these near its beginning; the others are not parsed.
    let start = json.get(..json.len().min(64))?;
    let near = |word: &[u8]| start.windows(word.len()).any(|window| window == word);
    if !near(b"\"error\"") {
        return None;
    }
    let event: Event = serde_json::from_slice(json).ok()?;
    match event.error {
        Some(error) => Some(
            error
                .get("code")
                .and_then(|code| code.as_u64())
                .unwrap_or(0),
        ),
        None if event.object == "error" => Some(event.code.unwrap_or(0)),
        None => None,
    }
}

#[cfg(test)]
mod tests;
