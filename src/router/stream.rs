//! A node's event stream on its way to the client.
//!
//! ```text
//! chunks ─▶ whole events only ─▶ client          upstream ends after [DONE]: the end
//!              (a partial one waits)             ends, breaks or falls silent before: error event
//! ```
//!
//! What says nothing yet (the role of a chat) waits for the first piece of the answer: until then the
//! request can still go to another node. After that nothing is read ahead: the next chunk is asked for when the client took the last one. Because
//! only whole events go out, an error event never lands inside another event.

mod opening;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};
use tokio::time::{Instant, Sleep, sleep};

use super::balance::Pick;
use super::error::error_event;
use super::legs::LegError;
use super::observation::{Observation, Outcome};

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
    upstream: reqwest::Body,
    splitter: Splitter,
}

impl EventStream {
    pub(super) fn new(upstream: reqwest::Body, last: Last) -> Self {
        Self {
            upstream,
            splitter: Splitter::new(last),
        }
    }

    /// Waits for the first events that say something, and returns them with what came before. A
    /// stream that ends before them is truncated.
    pub(super) async fn first(&mut self) -> Result<FirstEvents, LegError> {
        let mut waiting = BytesMut::new();
        loop {
            let events = std::future::poll_fn(|cx| self.poll_events(cx)).await;
            let events = events.unwrap_or(Err(LegError::Truncated))?;
            let code = error_code(&events);
            if code.is_none()
                && waiting.len() + events.len() <= opening::MOST
                && opening::says_nothing(&events)
            {
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
    fn poll_events(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, LegError>>> {
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

/// What a streamed request holds until its end.
pub(super) struct Held {
    pub(super) permit: super::admission::Permit,
    pub(super) pick: Pick,
    pub(super) prefill: Option<super::handoff::Background>,
    pub(super) observation: Observation,
    /// What the client knows the request by.
    pub(super) id: Arc<str>,
}

/// A timer that ends so late was not looked at.
const OVERSLEPT: Duration = Duration::from_secs(1);

/// The client's end of a stream. Dropped early, it aborts the upstream.
pub(super) struct ReplyBody {
    first: Option<Bytes>,
    running: Option<(EventStream, Held)>,
    silence: Pin<Box<Sleep>>,
    /// The timer runs since we asked for a chunk, not since the last one: a slow client is not a
    /// silent node.
    armed: bool,
    chunk_timeout: Duration,
}

impl ReplyBody {
    pub(super) fn new(
        first: Bytes,
        rest: EventStream,
        held: Held,
        chunk_timeout: Duration,
    ) -> Self {
        Self {
            first: Some(first),
            running: Some((rest, held)),
            silence: Box::pin(sleep(chunk_timeout)),
            armed: false,
            chunk_timeout,
        }
    }

    fn end(&mut self, outcome: Outcome) {
        if let Some((_, held)) = self.running.take() {
            if let (Some(prefill), Outcome::Ok) = (held.prefill, outcome) {
                prefill.detach();
            }
            held.observation.finish(outcome);
            drop((held.pick, held.permit));
        }
    }

    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.armed {
            self.silence
                .as_mut()
                .reset(Instant::now() + self.chunk_timeout);
            self.armed = true;
        }
        ready!(self.silence.as_mut().poll(cx));
        if Instant::now() < self.silence.deadline() + OVERSLEPT {
            return Poll::Ready(());
        }
        // pegaflow itself stood still (SIGSTOP, a frozen container), and what the node said is still unread.
        self.silence
            .as_mut()
            .reset(Instant::now() + self.chunk_timeout);
        self.silence.as_mut().poll(cx)
    }
}

impl Drop for ReplyBody {
    fn drop(&mut self) {
        // Some clients hang up on [DONE], without waiting for the end of the body.
        if let Some((stream, _)) = &self.running
            && stream.splitter.done
            && self.first.is_none()
        {
            self.end(Outcome::Ok);
        }
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        if let Some(first) = this.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        let Some((stream, held)) = &mut this.running else {
            return Poll::Ready(None);
        };
        let last = stream.splitter.last;
        let error = match stream.poll_events(cx) {
            Poll::Ready(Some(Ok(events))) => {
                this.armed = false;
                held.observation.piece(&events);
                return Poll::Ready(Some(Ok(Frame::data(events))));
            }
            Poll::Ready(None) => {
                this.end(Outcome::Ok);
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Err(error))) => error,
            Poll::Pending => {
                ready!(this.poll_silence(cx));
                LegError::ChunkTimeout(this.chunk_timeout)
            }
        };
        let Some((_, held)) = &this.running else {
            return Poll::Ready(None);
        };
        tracing::warn!(node = %held.pick.node(), id = %held.id, %error, "a stream broke off");
        let event = error_event(&error, last, &held.id);
        this.end(Outcome::BrokenOff);
        Poll::Ready(Some(Ok(Frame::data(event))))
    }
}

#[cfg(test)]
mod tests;
