//! What a failed examination leads to, given those before it of the same two lives. Pure.
//!
//! ```text
//! wrong ───────────────────────────────────────────────▶ Refuse
//! different (2), fault (3) ──── as often as that ──────▶ Refuse
//! silent (3) ┐                  neither ever proven ───▶ Refuse
//! broken (10)┴─ as often as that┴ one was proven once ─▶ Unpaired, again after `Pace::max`
//! store off ───────────────────────────────────────────▶ Unpaired, again after `Pace::max`
//! less often ──────────────────────────────────────────▶ Again, later each time
//! ```

use std::time::Duration;

use tokio::time::Instant;

use super::check::Severity;

/// Fresh prompts differ again: not a near tie.
const MAX_DIFFERENCES: u32 = 2;
/// A hand-off that fails this often between two living nodes is not an accident.
const MAX_FAULTS: u32 = 3;
/// So many lost connections or timeouts between two healthy nodes are not one either.
const MAX_BREAKS: u32 = 10;

/// How soon a pair is examined again.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    pub first: Duration,
    pub max: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            first: Duration::from_secs(1),
            max: Duration::from_secs(30),
        }
    }
}

/// What else is known when an examination has failed.
#[derive(Debug, Clone, Copy)]
pub struct Standing {
    /// One of the two was proven once, in this life or an earlier one.
    pub ever_proven: bool,
    /// An earlier examination found the store turned off; it does not come back.
    pub store_off: bool,
    /// How long a once proven pair may stay broken before the node serves unproven.
    pub grace: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Again(Duration),
    /// Serve whole requests meanwhile.
    Unpaired(Duration),
    Refuse,
}

/// The failed examinations of two lives with each other.
#[derive(Debug, Default)]
pub struct History {
    pub not_before: Option<Instant>,
    differences: u32,
    faults: u32,
    silences: u32,
    breaks: u32,
    broken_since: Option<Instant>,
}

impl History {
    /// Counts an examination that began at `began` and has failed at `now`.
    pub fn failed(
        &mut self,
        severity: Severity,
        standing: Standing,
        pace: Pace,
        (began, now): (Instant, Instant),
    ) -> Outcome {
        let outcome = match severity {
            Severity::Wrong => Outcome::Refuse,
            Severity::StoreOff => Outcome::Unpaired(pace.max),
            Severity::Silent if standing.store_off => Outcome::Unpaired(pace.max),
            Severity::Different => after(&mut self.differences, MAX_DIFFERENCES, pace),
            Severity::Fault => after(&mut self.faults, MAX_FAULTS, pace),
            Severity::Silent => standing.spare(after(&mut self.silences, MAX_FAULTS, pace), pace),
            Severity::Broken => {
                let since = *self.broken_since.get_or_insert(began);
                let outcome = standing.spare(after(&mut self.breaks, MAX_BREAKS, pace), pace);
                let patient = now.saturating_duration_since(since) < standing.grace;
                match outcome {
                    Outcome::Again(delay) if standing.ever_proven && !patient => {
                        Outcome::Unpaired(delay)
                    }
                    outcome => outcome,
                }
            }
        };
        self.not_before = match outcome {
            Outcome::Again(delay) | Outcome::Unpaired(delay) => Some(now + delay),
            Outcome::Refuse => Some(now + pace.first),
        };
        outcome
    }
}

impl Standing {
    /// What shows no wrong KV does not refuse a node whose partner was good once.
    fn spare(&self, outcome: Outcome, pace: Pace) -> Outcome {
        match outcome {
            Outcome::Refuse if self.ever_proven => Outcome::Unpaired(pace.max),
            outcome => outcome,
        }
    }
}

fn after(count: &mut u32, limit: u32, pace: Pace) -> Outcome {
    let factor = 2u32.saturating_pow(*count);
    *count = count.saturating_add(1);
    if *count >= limit {
        return Outcome::Refuse;
    }
    Outcome::Again(pace.first.saturating_mul(factor).min(pace.max))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNKNOWN: Standing = Standing {
        ever_proven: false,
        store_off: false,
        grace: Duration::MAX,
    };
    const KNOWN: Standing = Standing {
        ever_proven: true,
        ..UNKNOWN
    };

    fn outcomes(severity: Severity, standing: Standing, count: usize) -> Vec<Outcome> {
        let mut history = History::default();
        let now = Instant::now();
        (0..count)
            .map(|_| history.failed(severity, standing, Pace::default(), (now, now)))
            .collect()
    }

    #[test]
    fn breaks_are_tried_again_ever_later_and_refuse_only_who_was_never_proven() {
        let seconds = [1, 2, 4, 8, 16, 30, 30, 30, 30];
        let again = seconds.map(|seconds| Outcome::Again(Duration::from_secs(seconds)));
        let unknown = outcomes(Severity::Broken, UNKNOWN, 10);
        assert_eq!(unknown[..9], again);
        assert_eq!(unknown[9], Outcome::Refuse);
        let known = outcomes(Severity::Broken, KNOWN, 40);
        assert_eq!(known[..9], again);
        let unpaired = Outcome::Unpaired(Pace::default().max);
        assert!(known[9..].iter().all(|outcome| *outcome == unpaired));
    }

    #[test]
    fn a_once_proven_pair_does_not_wait_through_long_timeouts() {
        let mut history = History::default();
        let grace = Duration::from_secs(60);
        let standing = Standing { grace, ..KNOWN };
        let times = (Instant::now(), Instant::now() + grace * 2);
        let outcome = history.failed(Severity::Broken, standing, Pace::default(), times);
        assert_eq!(outcome, Outcome::Unpaired(Pace::default().first));
    }

    #[test]
    fn wrong_kv_is_refused_whoever_was_proven() {
        for (severity, limit) in [
            (Severity::Wrong, 1),
            (Severity::Different, 2),
            (Severity::Fault, 3),
        ] {
            let outcomes = outcomes(severity, KNOWN, limit);
            let (last, before) = outcomes.split_last().unwrap();
            assert_eq!(*last, Outcome::Refuse, "{severity:?}");
            assert!(before.iter().all(|it| matches!(it, Outcome::Again(_))));
        }
    }

    #[test]
    fn silence_is_no_fault_of_the_nodes_once_the_store_is_off() {
        let off = Standing {
            store_off: true,
            ..UNKNOWN
        };
        let unpaired = Outcome::Unpaired(Pace::default().max);
        assert_eq!(outcomes(Severity::Silent, off, 5), [unpaired; 5]);
        assert_eq!(outcomes(Severity::Silent, UNKNOWN, 3)[2], Outcome::Refuse);
        assert_eq!(outcomes(Severity::Silent, KNOWN, 3)[2], unpaired);
    }
}
