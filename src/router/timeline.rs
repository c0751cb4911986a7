//! When a request reached which step, on which node.
//!
//! ```text
//! head ─ queue ─▶ admitted ─▶ body read ─▶ P sent ─▶ settled ─▶ D sent ─▶ first piece ─▶ last piece
//!                                           │ (KV ready, or given up)  ▲
//!                                           └────────── whole ─────────┘
//! ```
//!
//! A step that is taken again (a retry) keeps its first time, so that the parts of a `Server-Timing` header add up to
//! what the client waited for. All of it is known in pieces of one future, so the lock is never waited for.

use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::HeaderValue;

use crate::fleet::NodeId;

/// Which leg gives the client's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AnswerLeg {
    Decode,
    Whole,
}

impl AnswerLeg {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Whole => "whole",
        }
    }
}

/// Times since the request's head.
#[derive(Debug, Clone, Default)]
pub(super) struct Marks {
    pub(super) admitted: Option<Duration>,
    pub(super) body_read: Option<Duration>,
    pub(super) prefill_sent: Option<Duration>,
    /// Prefill is waited for no longer, with or without KV.
    pub(super) settled: Option<Duration>,
    pub(super) answer_sent: Option<Duration>,
    /// The last attempt's, which gave the answer.
    pub(super) answer_last_sent: Option<Duration>,
    pub(super) first_piece: Option<Duration>,
    /// The last node that the prompt was sent to.
    pub(super) prefill: Option<NodeId>,
    pub(super) answer: Option<(AnswerLeg, NodeId)>,
    /// Legs that were sent once more.
    pub(super) retries: u32,
}

impl Marks {
    pub(super) fn queued(&self) -> Option<Duration> {
        self.admitted
    }

    /// From sending P to what it came to.
    pub(super) fn prefilled(&self) -> Option<Duration> {
        Some(self.settled?.saturating_sub(self.prefill_sent?))
    }

    /// From P's end to D's begin: what the router itself took, and the wait for a node.
    pub(super) fn dispatched(&self) -> Option<Duration> {
        Some(self.answer_sent?.saturating_sub(self.settled?))
    }

    /// From sending the leg that answers to the first piece of its answer, all attempts together.
    pub(super) fn answered(&self) -> Option<Duration> {
        Some(self.first_piece?.saturating_sub(self.answer_sent?))
    }

    /// Where a request that is over now ended.
    pub(super) fn stage(&self) -> &'static str {
        match (&self.answer, self.first_piece) {
            (_, Some(_)) => "stream",
            (Some((leg, _)), None) => leg.label(),
            (None, None) if self.prefill_sent.is_some() => "prefill",
            (None, None) if self.body_read.is_some() => "dispatch",
            (None, None) if self.admitted.is_some() => "body",
            (None, None) => "queue",
        }
    }

    /// `queue;dur=0.1, prefill;dur=41.7, decode;dur=12.0, total;dur=54.0`: milliseconds, as far as they are known.
    pub(super) fn server_timing(&self, total: Duration) -> Option<HeaderValue> {
        let leg = self
            .answer
            .as_ref()
            .map_or("answer", |(leg, _)| leg.label());
        let parts = [
            ("queue", self.queued()),
            ("prefill", self.prefilled()),
            (leg, self.answered()),
            ("total", Some(total)),
        ];
        let mut text = String::with_capacity(96);
        for (name, took) in parts {
            let Some(took) = took else { continue };
            let comma = if text.is_empty() { "" } else { ", " };
            let tenths = (took.as_micros() + 50) / 100;
            let (whole, tenth) = (tenths / 10, tenths % 10);
            // Writing to a string does not fail.
            let _ = write!(text, "{comma}{name};dur={whole}.{tenth}");
        }
        HeaderValue::try_from(text).ok()
    }
}

#[derive(Debug)]
pub(super) struct Timeline {
    started: Instant,
    marks: Mutex<Marks>,
}

impl Timeline {
    pub(super) fn start() -> Self {
        Self {
            started: Instant::now(),
            marks: Mutex::default(),
        }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn admitted(&self) {
        self.first(|marks| &mut marks.admitted);
    }

    pub(super) fn body_read(&self) {
        self.first(|marks| &mut marks.body_read);
    }

    pub(super) fn prefill_sent(&self, node: &NodeId) {
        let now = self.elapsed();
        let mut marks = self.marks();
        if marks.prefill_sent.is_some() {
            marks.retries += 1;
        }
        marks.prefill_sent.get_or_insert(now);
        marks.prefill = Some(node.clone());
    }

    pub(super) fn settled(&self) {
        self.first(|marks| &mut marks.settled);
    }

    pub(super) fn answer_sent(&self, leg: AnswerLeg, node: &NodeId) {
        let now = self.elapsed();
        let mut marks = self.marks();
        if marks.answer_sent.is_some() {
            marks.retries += 1;
        }
        marks.answer_sent.get_or_insert(now);
        marks.answer_last_sent = Some(now);
        marks.answer = Some((leg, node.clone()));
    }

    pub(super) fn first_piece(&self) {
        self.first(|marks| &mut marks.first_piece);
    }

    pub(super) fn marks(&self) -> MutexGuard<'_, Marks> {
        // Nothing that runs under the lock can leave it half-written.
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn first(&self, step: impl FnOnce(&mut Marks) -> &mut Option<Duration>) {
        let now = self.elapsed();
        step(&mut self.marks()).get_or_insert(now);
    }
}

/// Between the pieces of a stream: how many events there were, and when.
#[derive(Debug)]
pub(super) struct Pace {
    first: Instant,
    last: Instant,
    /// After the first one.
    events: u64,
}

impl Pace {
    pub(super) fn start(first: &[u8], now: Instant) -> Self {
        // Of a chat, the role comes with it and is no part of an answer.
        let roles = memchr::memmem::find_iter(first, b"\"role\":\"assistant\"").count() as u64;
        Self {
            first: now,
            last: now,
            events: answer_events(first).saturating_sub(roles + 1),
        }
    }

    /// The time since the piece before, and how many events came at once; `None`: it holds no part of an answer.
    pub(super) fn piece(&mut self, events: &[u8], now: Instant) -> Option<(Duration, u64)> {
        let count = answer_events(events);
        if count == 0 {
            return None;
        }
        let gap = now.saturating_duration_since(self.last);
        self.last = now;
        self.events += count;
        Some((gap, count))
    }

    pub(super) fn events(&self) -> u64 {
        self.events
    }

    /// Time per output token, as far as a node sends one token in an event.
    pub(super) fn tpot(&self) -> Option<Duration> {
        let span = self.last.saturating_duration_since(self.first);
        (self.events > 0).then(|| span.div_f64(self.events as f64))
    }
}

/// Events that hold a part of an answer: not `[DONE]`, and not the usage before it. Looks for line ends only.
fn answer_events(events: &[u8]) -> u64 {
    let mut count = 0;
    let mut line = 0;
    for end in memchr::memchr_iter(b'\n', events) {
        let blank = matches!(events.get(line..end), Some([] | [b'\r']));
        count += u64::from(blank && line > 0);
        line = end + 1;
    }
    let text = events.trim_ascii_end();
    let before = text
        .strip_suffix(b"data: [DONE]")
        .or_else(|| text.strip_suffix(b"data:[DONE]"));
    let text = match before {
        Some(before) => {
            count -= u64::from(count > 0);
            before.trim_ascii_end()
        }
        None => text,
    };
    // Usage ends with `}}`, where an answer ends with `]}`.
    if count > 0 && text.ends_with(b"}}") {
        let last =
            memchr::memrchr(b'\n', text).map_or(text, |at| text.get(at..).unwrap_or_default());
        let bare = memchr::memmem::find(last, b"\"choices\":[]").is_some();
        count -= u64::from(bare);
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "data: {\"choices\":[{\"index\":0,\"text\":\" a\"}]}\n\n";
    const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"completion_tokens\":8}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn events_are_counted_without_their_frame() {
        for (events, count) in [
            (String::new(), 0),
            (TOKEN.to_owned(), 1),
            (TOKEN.repeat(3), 3),
            (TOKEN.replace('\n', "\r\n").repeat(2), 2),
            (format!("{TOKEN}{DONE}"), 1),
            (DONE.to_owned(), 0),
            (DONE.replace('\n', "\r\n"), 0),
            (USAGE.to_owned(), 0),
            (format!("{TOKEN}{USAGE}{DONE}"), 1),
            (format!("event: x\n{TOKEN}"), 1),
            // Nested braces at the end of an answer.
            ("data: {\"choices\":[{}],\"x\":{\"y\":1}}\n\n".to_owned(), 1),
        ] {
            assert_eq!(answer_events(events.as_bytes()), count, "{events:?}");
        }
    }

    #[test]
    fn the_mean_gap_is_the_time_per_token() {
        let start = Instant::now();
        let mut pace = Pace::start(TOKEN.as_bytes(), start);
        assert_eq!(pace.tpot(), None);
        assert_eq!(
            pace.piece(TOKEN.as_bytes(), start + ms(10)),
            Some((ms(10), 1))
        );
        let two = TOKEN.repeat(2);
        assert_eq!(
            pace.piece(two.as_bytes(), start + ms(40)),
            Some((ms(30), 2))
        );
        let end = format!("{USAGE}{DONE}");
        assert_eq!(pace.piece(end.as_bytes(), start + ms(90)), None);
        assert_eq!(pace.events(), 3);
        assert_eq!(pace.tpot(), Some(ms(40) / 3));
    }

    #[test]
    fn what_came_with_the_first_event_counts_but_for_the_role() {
        let role =
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n";
        let events = |first: String| Pace::start(first.as_bytes(), Instant::now()).events();
        assert_eq!(events(TOKEN.repeat(3)), 2);
        assert_eq!(events(format!("{role}{TOKEN}")), 0);
        assert_eq!(events(format!("{role}{TOKEN}{TOKEN}")), 1);
        assert_eq!(events(String::new()), 0);
    }

    #[test]
    fn the_header_says_what_is_known_in_milliseconds() {
        let mut marks = Marks::default();
        let said = |marks: &Marks| {
            marks
                .server_timing(ms(60))
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        };
        assert_eq!(said(&marks), "total;dur=60.0");
        marks.admitted = Some(Duration::from_micros(149));
        marks.prefill_sent = Some(ms(1));
        marks.settled = Some(Duration::from_micros(42_650));
        assert_eq!(
            said(&marks),
            "queue;dur=0.1, prefill;dur=41.7, total;dur=60.0"
        );
        marks.answer = Some((AnswerLeg::Decode, "d".into()));
        marks.answer_sent = Some(ms(43));
        marks.first_piece = Some(ms(60));
        assert_eq!(
            said(&marks),
            "queue;dur=0.1, prefill;dur=41.7, decode;dur=17.0, total;dur=60.0"
        );
        // The longest there can be is still a short header.
        let never = Duration::MAX;
        (marks.admitted, marks.settled, marks.first_piece) =
            (Some(never), Some(never), Some(never));
        assert!(marks.server_timing(never).unwrap().len() < 160);
    }

    #[test]
    fn a_retry_keeps_the_first_time_and_is_counted() {
        let timeline = Timeline::start();
        let [a, b] = ["a", "b"].map(NodeId::from);
        timeline.prefill_sent(&a);
        let first = timeline.marks().prefill_sent;
        timeline.prefill_sent(&b);
        timeline.settled();
        timeline.answer_sent(AnswerLeg::Decode, &a);
        timeline.answer_sent(AnswerLeg::Decode, &b);
        let marks = timeline.marks().clone();
        assert_eq!((marks.prefill_sent, marks.retries), (first, 2));
        assert_eq!(marks.prefill, Some(b.clone()));
        assert_eq!(marks.answer, Some((AnswerLeg::Decode, b)));
        assert!(marks.answer_sent <= marks.answer_last_sent);
    }

    #[test]
    fn the_stage_is_the_last_step_that_was_begun() {
        let timeline = Timeline::start();
        let stage = || timeline.marks().stage();
        let node = NodeId::from("n");
        assert_eq!(stage(), "queue");
        timeline.admitted();
        assert_eq!(stage(), "body");
        timeline.body_read();
        assert_eq!(stage(), "dispatch");
        timeline.prefill_sent(&node);
        assert_eq!(stage(), "prefill");
        timeline.answer_sent(AnswerLeg::Whole, &node);
        assert_eq!(stage(), "whole");
        timeline.first_piece();
        assert_eq!(stage(), "stream");
    }
}
