//! Circuit breakers: a node that keeps failing is left alone for a moment, instead of being found out by every request.
//!
//! ```text
//!            failures in a row, or a bad share of many
//!  Closed ─────────────────────────────────────────────▶ Open (1 s, doubling up to 15 s)
//!    ▲                                                     │ time is up
//!    │ it answers                                          ▼
//!    └──────────────────────────────────────────────── HalfOpen: one request goes through
//!                                  it fails: Open, twice as long ◀─┘
//! ```
//!
//! - There is one for each node and leg: a node that fails to prefill may still answer well.
//! - Only what the node did counts: no connection, a broken one, silence, 5xx. A client's mistake (4xx) shows that the
//!   node works. That a node left ready is the fleet's word, and is not counted again.
//! - Open is no refusal. Where every node that could take a request is open, it is sent to one of them all the same.
//! - A new incarnation starts closed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::legs::LegError;
use super::metrics::RouterMetrics;
use crate::fleet::{NodeId, NodeView, Role};

/// Failures in a row that open it.
const IN_A_ROW: u32 = 5;
/// So many answers within [`WINDOW`], half of them failures, open it too.
const MANY: u32 = 20;
const WINDOW: Duration = Duration::from_secs(10);
/// Short beside what clients wait for before they try again.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(15);

/// What a node is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Duty {
    Prefill,
    /// Give the client's answer, after a hand-off or alone.
    Answer,
}

impl Duty {
    /// What a node of this role may be asked to do: at worst, any node answers.
    pub(super) fn of(role: Role) -> &'static [Self] {
        match role {
            Role::Prefill => &[Self::Prefill, Self::Answer],
            Role::Decode | Role::Unified => &[Self::Answer],
        }
    }

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Answer => "answer",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed,
    Open {
        until: Instant,
        lasts: Duration,
    },
    /// Its one request is on its way.
    HalfOpen {
        lasts: Duration,
    },
}

/// One node's for one duty. Pure: the time comes from outside.
#[derive(Debug, Clone, Copy)]
struct Breaker {
    state: State,
    in_a_row: u32,
    /// Of the window.
    begun: Instant,
    answers: u32,
    failures: u32,
    incarnation: u64,
}

impl Breaker {
    fn new(incarnation: u64, now: Instant) -> Self {
        Self {
            state: State::Closed,
            in_a_row: 0,
            begun: now,
            answers: 0,
            failures: 0,
            incarnation,
        }
    }

    /// A request may be sent.
    fn lets_through(&self, now: Instant) -> bool {
        match self.state {
            State::Closed => true,
            State::Open { until, .. } => until <= now,
            State::HalfOpen { .. } => false,
        }
    }

    /// A request is to be sent. True: it is the one that decides; `None`: another one is, or it is too early.
    fn send(&mut self, now: Instant) -> Option<bool> {
        match self.state {
            State::Closed => Some(false),
            State::Open { until, lasts } if until <= now => {
                self.state = State::HalfOpen { lasts };
                Some(true)
            }
            State::Open { .. } | State::HalfOpen { .. } => None,
        }
    }

    fn answered(&mut self, now: Instant) {
        if self.state != State::Closed {
            *self = Self::new(self.incarnation, now);
        }
        self.in_a_row = 0;
        self.count(now, false);
    }

    /// True: it opened.
    fn failed(&mut self, now: Instant) -> bool {
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.count(now, true);
        let lasts = match self.state {
            State::Closed => {
                let bad = self.answers >= MANY && self.failures * 2 >= self.answers;
                if self.in_a_row < IN_A_ROW && !bad {
                    return false;
                }
                FIRST
            }
            // Sent before it opened, or as a last resort: known already.
            State::Open { until, .. } if now < until => return false,
            State::Open { lasts, .. } | State::HalfOpen { lasts } => (lasts * 2).min(LONGEST),
        };
        let until = now + lasts;
        self.state = State::Open { until, lasts };
        (self.answers, self.failures) = (0, 0);
        true
    }

    /// The request that decides ended without saying anything of the node.
    fn undecided(&mut self, now: Instant) {
        if let State::HalfOpen { lasts } = self.state {
            self.state = State::Open { until: now, lasts };
        }
    }

    fn count(&mut self, now: Instant, failure: bool) {
        if now.saturating_duration_since(self.begun) > WINDOW {
            (self.begun, self.answers, self.failures) = (now, 0, 0);
        }
        self.answers = self.answers.saturating_add(1);
        self.failures = self.failures.saturating_add(u32::from(failure));
    }

    fn label(&self, now: Instant) -> &'static str {
        match self.state {
            State::Closed => "closed",
            State::Open { until, .. } if now < until => "open",
            State::Open { .. } | State::HalfOpen { .. } => "half_open",
        }
    }
}

type Key = (NodeId, Duty);

/// Of all nodes. Cheap to clone; clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Breakers {
    shared: Arc<Shared>,
}

impl Breakers {
    pub(super) fn new(metrics: &RouterMetrics) -> Self {
        let shared = Shared {
            metrics: Some(metrics.clone()),
            ..Shared::default()
        };
        Self {
            shared: Arc::new(shared),
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    /// Only of nodes that have failed lately: two for each node at most.
    noted: Mutex<BTreeMap<Key, Breaker>>,
    /// How many those are: while all is well, nobody takes the lock.
    count: AtomicUsize,
    metrics: Option<RouterMetrics>,
}

impl Breakers {
    pub(super) fn lets_through(&self, node: &NodeView, duty: Duty, now: Instant) -> bool {
        if self.is_quiet() {
            return true;
        }
        let noted = self.lock();
        let breaker = noted.get(&(node.id.clone(), duty));
        breaker.is_none_or(|breaker| {
            breaker.incarnation != node.incarnation || breaker.lets_through(now)
        })
    }

    /// A request goes to the node, unless its breaker has shut meanwhile.
    pub(super) fn send(&self, node: &NodeView, duty: Duty, now: Instant) -> Option<Trial> {
        let mut trial = self.insist(node, duty);
        trial.decides = trial
            .noted(|breaker| breaker.send(now))
            .unwrap_or(Some(false))?;
        Some(trial)
    }

    /// A request goes to the node whatever its breaker says, as a last resort. It may close it, and blocks nobody.
    pub(super) fn insist(&self, node: &NodeView, duty: Duty) -> Trial {
        Trial {
            breakers: self.clone(),
            key: (node.id.clone(), duty),
            incarnation: node.incarnation,
            decides: false,
        }
    }

    /// Those that are not closed, or have failed lately.
    pub(super) fn states(&self, now: Instant) -> BTreeMap<(NodeId, Duty), &'static str> {
        let noted = self.lock();
        let state = |(key, breaker): (&Key, &Breaker)| (key.clone(), breaker.label(now));
        noted.iter().map(state).collect()
    }

    fn is_quiet(&self) -> bool {
        self.shared.count.load(Ordering::Acquire) == 0
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Breaker>> {
        // Whatever a breaker says, requests are served.
        self.shared
            .noted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One request at one node: what it came to is told to the node's breaker, once. Dropped before (the client went
/// away), it says nothing of the node, and lets the next request decide.
#[derive(Debug)]
pub(super) struct Trial {
    breakers: Breakers,
    key: Key,
    incarnation: u64,
    /// The breaker waits for this one.
    decides: bool,
}

impl Trial {
    /// The node did as it should; a client's mistake counts as that.
    pub(super) fn answered(&mut self, now: Instant) {
        let closed = self.noted(|breaker| {
            let was_open = breaker.state != State::Closed;
            breaker.answered(now);
            was_open
        });
        self.decides = false;
        if closed == Some(true) {
            let (node, duty) = (&self.key.0, self.key.1.label());
            tracing::info!(%node, leg = duty, "it answers again");
        }
        self.breakers.forget_the_well(&self.key);
    }

    /// True: its breaker opened.
    pub(super) fn failed(&mut self, error: &LegError, now: Instant) -> bool {
        if !blames_the_node(error) {
            return false;
        }
        let incarnation = self.incarnation;
        let mut noted = self.breakers.lock();
        let new = || Breaker::new(incarnation, now);
        let breaker = noted.entry(self.key.clone()).or_insert_with(new);
        if breaker.incarnation < incarnation {
            *breaker = new();
        }
        let opened = breaker.incarnation == incarnation && breaker.failed(now);
        let count = noted.len();
        self.breakers.shared.count.store(count, Ordering::Release);
        drop(noted);
        self.decides = false;
        if opened {
            let (node, duty) = (&self.key.0, self.key.1.label());
            if let Some(metrics) = &self.breakers.shared.metrics {
                metrics.breaker_opened(duty);
            }
            tracing::warn!(%node, leg = duty, %error, "it keeps failing: it is left alone for a while");
        }
        opened
    }

    /// This incarnation's breaker, if it is noted.
    fn noted<T>(&self, act: impl FnOnce(&mut Breaker) -> T) -> Option<T> {
        if self.breakers.is_quiet() {
            return None;
        }
        let mut noted = self.breakers.lock();
        let breaker = noted.get_mut(&self.key)?;
        (breaker.incarnation == self.incarnation).then(|| act(breaker))
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if self.decides {
            self.noted(|breaker| breaker.undecided(Instant::now()));
        }
    }
}

impl Breakers {
    fn forget_the_well(&self, key: &Key) {
        if self.is_quiet() {
            return;
        }
        let mut noted = self.lock();
        let is_well = |breaker: &Breaker| breaker.state == State::Closed && breaker.failures == 0;
        if noted.get(key).is_some_and(is_well) {
            noted.remove(key);
        }
        let count = noted.len();
        self.shared.count.store(count, Ordering::Release);
    }
}

/// A node that left ready is the fleet's to judge; the others are its own doing.
fn blames_the_node(error: &LegError) -> bool {
    !matches!(error, LegError::NodeLost { .. })
}

#[cfg(test)]
mod tests;
