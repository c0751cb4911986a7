//! What requests felt like in the last seconds, request by request: written by the router, read by the dashboard.
//!
//! ```text
//! router: each piece, each end of a request ─▶ Live: one second's Spreads and Requests ─▶ Second, taken once a second
//! ```
//!
//! The histograms of `/metrics` double from bucket to bucket, which is too coarse to look at; these keep two digits.
//! Where nobody asked for it nothing is kept. What a second keeps is bounded: see [`MOST_REQUESTS`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::fleet::NodeId;

/// Requests of one second that are kept one by one; of more only the last ones are.
pub const MOST_REQUESTS: usize = 200;
/// In µs: longer is counted as this.
const LONGEST: u64 = 3_600_000_000;
const DIGITS: u8 = 2;

/// Where the router writes. Cheap to clone; clones share it. The default keeps nothing.
#[derive(Debug, Clone, Default)]
pub struct Live(Option<Arc<Mutex<Second>>>);

/// Times, to two digits.
#[derive(Debug, Clone)]
pub struct Spread(Option<Histogram<u32>>);

/// Some percentiles of a [`Spread`], in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    pub count: u64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// One request that is over. Times are in milliseconds since its head; `None`: it did not get there.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Request {
    pub id: Arc<str>,
    /// When its head came, in milliseconds since 1970.
    pub at: u64,
    pub endpoint: &'static str,
    /// `split`, `whole`, or `none` where it ended before that was known.
    pub way: &'static str,
    /// Why it was not split.
    pub reason: &'static str,
    pub outcome: &'static str,
    /// `None`: no head was sent.
    pub status: Option<u16>,
    pub prefill: Option<NodeId>,
    /// Who gave the answer, or should have.
    pub answer: Option<NodeId>,
    pub retries: u32,
    /// Pieces of a stream.
    pub tokens: Option<u64>,
    pub admitted: Option<f64>,
    pub body_read: Option<f64>,
    pub prefill_sent: Option<f64>,
    /// Prefill is waited for no longer, with or without KV.
    pub settled: Option<f64>,
    pub answer_sent: Option<f64>,
    pub first_piece: Option<f64>,
    pub end: f64,
}

/// What happened since the last [`Live::take`].
#[derive(Debug, Clone, Default)]
pub struct Second {
    pub ttft: Spread,
    pub itl: Spread,
    pub tpot: Spread,
    /// By what a request came to.
    pub outcomes: BTreeMap<&'static str, u64>,
    /// Pieces of streams.
    pub tokens: u64,
    /// Prompts that were sent to a node, of requests that are over now.
    pub sent: BTreeMap<NodeId, u64>,
    pub parts: Parts,
    /// The last [`MOST_REQUESTS`].
    pub requests: Vec<Request>,
}

/// Where the time of split requests to their first token went, all of them together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Parts {
    pub requests: u64,
    pub queue: f64,
    pub prefill: f64,
    pub dispatch: f64,
    pub decode: f64,
}

impl Live {
    /// One that keeps what it is told.
    pub fn on() -> Self {
        Self(Some(Arc::default()))
    }

    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// The first piece of an answer.
    pub fn ttft(&self, took: Duration) {
        self.with(|second| {
            second.ttft.add(took, 1);
            second.tokens += 1;
        });
    }

    /// So many more came with the first piece.
    pub fn together(&self, count: u64) {
        self.with(|second| {
            second.itl.add(Duration::ZERO, count);
            second.tokens += count;
        });
    }

    /// `count` pieces that came together, `gap` after those before.
    pub fn pieces(&self, gap: Duration, count: u64) {
        self.with(|second| {
            second.itl.add(gap, 1);
            second.itl.add(Duration::ZERO, count.saturating_sub(1));
            second.tokens += count;
        });
    }

    pub fn tpot(&self, time: Duration) {
        self.with(|second| second.tpot.add(time, 1));
    }

    /// A request is over. `make` is called only where somebody looks.
    pub fn finished(&self, make: impl FnOnce() -> Request) {
        let Some(shared) = &self.0 else { return };
        let request = make();
        let mut second = lock(shared);
        *second.outcomes.entry(request.outcome).or_default() += 1;
        for node in [&request.prefill, &request.answer].into_iter().flatten() {
            *second.sent.entry(node.clone()).or_default() += 1;
        }
        second.parts.add(&request);
        if second.requests.len() >= MOST_REQUESTS * 2 {
            second.requests.drain(..MOST_REQUESTS);
        }
        second.requests.push(request);
    }

    /// What happened since the last call.
    pub fn take(&self) -> Second {
        let Some(shared) = &self.0 else {
            return Second::default();
        };
        let mut second = std::mem::take(&mut *lock(shared));
        let surplus = second.requests.len().saturating_sub(MOST_REQUESTS);
        second.requests.drain(..surplus);
        second
    }

    fn with(&self, told: impl FnOnce(&mut Second)) {
        if let Some(shared) = &self.0 {
            told(&mut lock(shared));
        }
    }
}

fn lock(shared: &Mutex<Second>) -> MutexGuard<'_, Second> {
    // Nothing that runs under the lock can leave it half-written.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Parts {
    /// Only of a split request that got its first token.
    fn add(&mut self, request: &Request) {
        let marks = (
            request.admitted,
            request.prefill_sent,
            request.settled,
            request.answer_sent,
            request.first_piece,
        );
        let (Some(admitted), Some(prefill), Some(settled), Some(answer), Some(first)) = marks
        else {
            return;
        };
        self.requests += 1;
        self.queue += admitted;
        self.prefill += settled - prefill;
        self.dispatch += answer - settled;
        self.decode += first - answer;
    }
}

impl Default for Spread {
    fn default() -> Self {
        // These bounds are good, so this does not fail.
        Self(Histogram::new_with_bounds(1, LONGEST, DIGITS).ok())
    }
}

impl Spread {
    fn add(&mut self, time: Duration, count: u64) {
        let (Some(histogram), 1..) = (&mut self.0, count) else {
            return;
        };
        let micros = u64::try_from(time.as_micros()).unwrap_or(LONGEST);
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        histogram.saturating_record_n(micros, count);
    }

    pub fn merge(&mut self, other: &Self) {
        if let (Some(into), Some(from)) = (&mut self.0, &other.0) {
            // Their bounds are the same, so everything fits.
            let _ = into.add(from);
        }
    }

    /// `None`: there was nothing.
    pub fn percentiles(&self) -> Option<Percentiles> {
        let histogram = self.0.as_ref().filter(|histogram| !histogram.is_empty())?;
        let ms = |micros: u64| micros as f64 / 1e3;
        let at = |part: f64| ms(histogram.value_at_quantile(part));
        Some(Percentiles {
            count: histogram.len(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: ms(histogram.max()),
        })
    }
}

/// In milliseconds since 1970; 0 before that.
pub fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(outcome: &'static str, first_piece: Option<f64>) -> Request {
        Request {
            id: "r".into(),
            at: 0,
            endpoint: "completions",
            way: "split",
            reason: "",
            outcome,
            status: Some(200),
            prefill: Some("p".into()),
            answer: Some("d".into()),
            retries: 0,
            tokens: Some(3),
            admitted: Some(1.0),
            body_read: Some(2.0),
            prefill_sent: Some(2.5),
            settled: Some(52.5),
            answer_sent: Some(53.0),
            first_piece,
            end: 100.0,
        }
    }

    #[test]
    fn a_second_is_what_happened_since_the_last_one() {
        let live = Live::on();
        for ms in 1..=100 {
            live.ttft(Duration::from_millis(ms));
        }
        live.pieces(Duration::from_millis(10), 3);
        live.finished(|| request("ok", Some(63.0)));
        live.finished(|| request("failed", None));
        let second = live.clone().take();
        let ttft = second.ttft.percentiles().unwrap();
        let near = |found: f64, exact: f64| (found / exact - 1.0).abs() < 0.01;
        assert!(
            near(ttft.p50, 50.0) && near(ttft.p99, 99.0) && near(ttft.max, 100.0),
            "{ttft:?}"
        );
        assert_eq!((ttft.count, second.tokens), (100, 103));
        let itl = second.itl.percentiles().unwrap();
        assert_eq!((itl.count, itl.p50), (3, 0.0));
        assert!(near(itl.max, 10.0));
        assert_eq!(second.outcomes, BTreeMap::from([("ok", 1), ("failed", 1)]));
        assert_eq!(second.sent[&NodeId::from("p")], 2);
        let Parts {
            requests,
            queue,
            prefill,
            dispatch,
            decode,
        } = second.parts;
        assert_eq!(
            (requests, queue, prefill, dispatch, decode),
            (1, 1.0, 50.0, 0.5, 10.0)
        );
        let next = live.take();
        assert_eq!((next.tokens, next.ttft.percentiles()), (0, None));
    }

    #[test]
    fn what_is_kept_is_bounded_and_nothing_is_kept_for_nobody() {
        let live = Live::on();
        for number in 0..5_000 {
            live.finished(|| Request {
                at: number,
                ..request("ok", None)
            });
        }
        live.ttft(Duration::MAX);
        let second = live.take();
        assert_eq!(second.requests.len(), MOST_REQUESTS);
        assert_eq!(second.requests.last().unwrap().at, 4_999);
        assert_eq!(second.outcomes["ok"], 5_000);
        assert!(second.ttft.percentiles().unwrap().max >= LONGEST as f64 / 1e3);

        let off = Live::default();
        off.finished(|| unreachable!("nobody looks"));
        off.ttft(Duration::from_secs(1));
        assert_eq!(off.take().tokens, 0);
    }

    #[test]
    fn spreads_add_up() {
        let mut all = Spread::default();
        assert_eq!(all.percentiles(), None);
        for ms in [10, 30] {
            let mut one = Spread::default();
            one.add(Duration::from_millis(ms), 5);
            all.merge(&one);
        }
        let found = all.percentiles().unwrap();
        assert_eq!(found.count, 10);
        assert!((found.p90 / 30.0 - 1.0).abs() < 0.01, "{found:?}");
    }
}
