//! How often a node may die, and how long it then stays down. Pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::plan::SupervisorPlan;

/// Ready for this long, a node has shown that it can live: the next restart is at once again.
const HEALTHY: Duration = Duration::from_secs(600);
const JITTER: f64 = 0.2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Restart(Duration),
    CrashLoop,
}

/// The deaths of one node.
#[derive(Debug)]
pub struct Deaths {
    first: Duration,
    max: Duration,
    limit: usize,
    window: Duration,
    recent: VecDeque<Instant>,
    in_a_row: u32,
    rng: StdRng,
}

impl Deaths {
    pub fn new(plan: &SupervisorPlan, seed: u64) -> Self {
        Self {
            first: plan.backoff_first,
            max: plan.backoff_max,
            limit: usize::try_from(plan.crash_limit.max(1)).unwrap_or(usize::MAX),
            window: plan.crash_window,
            recent: VecDeque::new(),
            in_a_row: 0,
            rng: StdRng::seed_from_u64(seed),
        }
    }

    /// Counts a death at `now` of a node that had been ready since `ready`.
    pub fn record(&mut self, now: Instant, ready: Option<Instant>) -> Verdict {
        if ready.is_some_and(|since| now.saturating_duration_since(since) >= HEALTHY) {
            self.in_a_row = 0;
        }
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.recent.push_back(now);
        let window = self.window;
        self.recent
            .retain(|death| now.saturating_duration_since(*death) < window);
        if self.recent.len() >= self.limit {
            return Verdict::CrashLoop;
        }
        Verdict::Restart(self.delay())
    }

    /// A person has looked after the node: it starts afresh.
    pub fn forget(&mut self) {
        self.recent.clear();
        self.in_a_row = 0;
    }

    fn delay(&mut self) -> Duration {
        let Some(doublings) = self.in_a_row.checked_sub(2) else {
            return Duration::ZERO;
        };
        let factor = 2u32.checked_pow(doublings).unwrap_or(u32::MAX);
        let full = self.first.saturating_mul(factor).min(self.max);
        let jitter = self.rng.random_range(1.0 - JITTER..=1.0 + JITTER);
        full.mul_f64(jitter).min(self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::plan;
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn patient() -> SupervisorPlan {
        SupervisorPlan {
            crash_limit: 100,
            ..plan()
        }
    }

    #[test]
    fn the_first_restart_is_at_once_and_then_delays_double_up_to_the_limit() {
        let plan = patient();
        let mut deaths = Deaths::new(&plan, 1);
        let now = Instant::now();
        assert_eq!(deaths.record(now, None), Verdict::Restart(Duration::ZERO));
        for doublings in 0..40 {
            let Verdict::Restart(delay) = deaths.record(now, None) else {
                panic!("gave up");
            };
            let full = plan
                .backoff_first
                .saturating_mul(2u32.saturating_pow(doublings))
                .min(plan.backoff_max);
            assert!(delay <= plan.backoff_max);
            assert!(delay >= full.mul_f64(0.79) && delay <= full.mul_f64(1.21));
        }
    }

    #[test]
    fn ten_ready_minutes_are_a_fresh_start() {
        let mut deaths = Deaths::new(&patient(), 1);
        let now = Instant::now();
        deaths.record(now, None);
        assert_ne!(
            deaths.record(now, Some(now)),
            Verdict::Restart(Duration::ZERO)
        );
        let later = now + HEALTHY;
        assert_eq!(
            deaths.record(later, Some(now)),
            Verdict::Restart(Duration::ZERO)
        );
    }

    #[test]
    fn too_many_deaths_in_the_window_are_a_crash_loop_and_slow_ones_are_not() {
        let plan = SupervisorPlan {
            crash_limit: 3,
            crash_window: SECOND * 100,
            ..plan()
        };
        let start = Instant::now();
        let mut quick = Deaths::new(&plan, 1);
        let verdicts = [0, 1, 2].map(|at| quick.record(start + SECOND * at, None));
        assert!(matches!(verdicts[1], Verdict::Restart(_)));
        assert_eq!(verdicts[2], Verdict::CrashLoop);
        let mut slow = Deaths::new(&plan, 1);
        for at in [0, 60, 120, 180, 240] {
            let verdict = slow.record(start + SECOND * at, None);
            assert!(matches!(verdict, Verdict::Restart(_)));
        }
    }
}
