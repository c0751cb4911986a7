//! What is seen of one request: its figures, its `Server-Timing`, its line in the access log.
//!
//! ```text
//! start ─▶ (steps: the Timeline) ─▶ commit: TTFT ─▶ pieces: ITL ─▶ finish, or dropped: cancelled
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderValue, StatusCode};

use super::access::Access;
use super::metrics::{RequestLabels, RouterMetrics, Way};
use super::split::{Endpoint, WholeReason};
use super::timeline::{Marks, Pace, Timeline};
use crate::live::{self, Live, Request};

/// Events of one piece that count: a node that sends more at once streams nothing.
const MOST_AT_ONCE: u64 = 1024;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Ok,
    /// A node or the router refused it as the client's mistake.
    ClientError,
    /// No place or no node.
    Refused,
    Failed,
    /// Failed after its first byte.
    BrokenOff,
    Cancelled,
}

impl Outcome {
    pub(super) fn of(status: StatusCode) -> Self {
        match status.as_u16() {
            429 | 503 => Self::Refused,
            400..500 => Self::ClientError,
            500.. => Self::Failed,
            _ => Self::Ok,
        }
    }

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ClientError => "client_error",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::BrokenOff => "broken_off",
            Self::Cancelled => "cancelled",
        }
    }
}

/// One request's figures. Dropped unfinished, it counts as cancelled: only the client's going
/// away drops a request in the middle.
#[derive(Debug)]
pub(super) struct Observation {
    pub(super) timeline: Timeline,
    metrics: RouterMetrics,
    live: Live,
    id: Arc<str>,
    endpoint: Endpoint,
    way: Way,
    reason: &'static str,
    /// `None`: no head was sent.
    status: Option<StatusCode>,
    pace: Option<Pace>,
    outcome: Outcome,
    /// `None`: nobody reads it.
    access: Option<Box<Access>>,
}

impl Observation {
    pub(super) fn start(
        metrics: &RouterMetrics,
        live: &Live,
        id: &Arc<str>,
        endpoint: Endpoint,
        access: Option<Box<Access>>,
    ) -> Self {
        Self {
            timeline: Timeline::start(),
            metrics: metrics.clone(),
            live: live.clone(),
            id: id.clone(),
            endpoint,
            way: Way::None,
            reason: "",
            status: None,
            pace: None,
            outcome: Outcome::Cancelled,
            access,
        }
    }

    /// `None`: split.
    pub(super) fn takes_path(&mut self, whole: Option<WholeReason>) {
        (self.way, self.reason) = match whole {
            Some(reason) => (Way::Whole, reason.label()),
            None => (Way::Split, ""),
        };
    }

    /// The head of the answer goes out. What it says of the time so far.
    pub(super) fn commit(&mut self, status: StatusCode) -> Option<HeaderValue> {
        self.status = Some(status);
        let marks = self.timeline.marks();
        let first = marks.first_piece;
        let timing = marks.server_timing(first.unwrap_or_else(|| self.timeline.elapsed()));
        drop(marks);
        if let Some(first) = first {
            let way = self.metrics.way(self.way);
            way.ttft.observe(first.as_secs_f64());
            self.live.ttft(first);
        }
        timing
    }

    /// Pieces follow the first one.
    pub(super) fn streams(&mut self, first: &[u8]) {
        if self.endpoint != Endpoint::Other {
            let pace = Pace::start(first, Instant::now());
            self.at_once(pace.events());
            self.live.together(pace.events());
            self.pace = Some(pace);
        }
    }

    /// More events of the answer have come.
    pub(super) fn piece(&mut self, events: &[u8]) {
        let Some(pace) = &mut self.pace else { return };
        if let Some((gap, count)) = pace.piece(events, Instant::now()) {
            let itl = &self.metrics.way(self.way).itl;
            itl.observe(gap.as_secs_f64());
            self.live.pieces(gap, count);
            self.at_once(count - 1);
        }
    }

    /// So many events came together with the one before them.
    fn at_once(&self, count: u64) {
        let itl = &self.metrics.way(self.way).itl;
        (0..count.min(MOST_AT_ONCE)).for_each(|_| itl.observe(0.0));
    }

    pub(super) fn finish(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }

    /// For who watches.
    fn request(&self, marks: &Marks, total: Duration) -> Request {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let arrived = SystemTime::now().checked_sub(total);
        Request {
            id: self.id.clone(),
            at: live::unix_ms(arrived.unwrap_or(SystemTime::UNIX_EPOCH)),
            endpoint: self.endpoint.label(),
            way: self.way.label(),
            reason: self.reason,
            outcome: self.outcome.label(),
            status: self.status.map(|status| status.as_u16()),
            prefill: marks.prefill.clone(),
            answer: marks.answer.as_ref().map(|(_, node)| node.clone()),
            retries: marks.retries,
            tokens: self.pace.as_ref().map(|pace| pace.events() + 1),
            admitted: marks.admitted.map(ms),
            body_read: marks.body_read.map(ms),
            prefill_sent: marks.prefill_sent.map(ms),
            settled: marks.settled.map(ms),
            answer_sent: marks.answer_sent.map(ms),
            first_piece: marks.first_piece.map(ms),
            end: ms(total),
        }
    }

    fn observe(&self, total: Duration) {
        self.metrics.request(&RequestLabels {
            endpoint: self.endpoint.label(),
            outcome: self.outcome.label(),
            path: self.way.label(),
            reason: self.reason,
        });
        let way = self.metrics.way(self.way);
        way.total.observe(total.as_secs_f64());
        if let Some(tpot) = self.pace.as_ref().and_then(Pace::tpot) {
            way.tpot.observe(tpot.as_secs_f64());
            self.live.tpot(tpot);
        }
        let marks = self.timeline.marks();
        if self.outcome == Outcome::Cancelled {
            self.metrics.cancelled(marks.stage());
        }
        if let Some(queued) = marks.queued() {
            self.metrics.queued_for(queued);
        }
        if let Some(took) = marks.dispatched() {
            self.metrics.dispatched(took);
        }
        if let (Outcome::Ok, Some((leg, _)), Some(sent)) =
            (self.outcome, &marks.answer, marks.answer_last_sent)
        {
            self.metrics.answer_leg(*leg, total.saturating_sub(sent));
        }
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        let total = self.timeline.elapsed();
        self.observe(total);
        self.live
            .finished(|| self.request(&self.timeline.marks(), total));
        if let Some(access) = self.access.take() {
            let end = super::access::End {
                status: self.status,
                outcome: self.outcome.label(),
                way: self.way.label(),
                reason: self.reason,
                events: self.pace.as_ref().map(Pace::events),
                total,
            };
            access.write(&self.timeline.marks(), &end);
        }
    }
}
