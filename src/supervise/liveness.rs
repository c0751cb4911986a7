//! Whether a node still works. Pure.
//!
//! ```text
//!  /metrics ─┬─ what its engine reports has changed ───────────────────────▶ a sign of life
//!            ├─ the same with requests running, for `hang_timeout` ─────────▶ dead
//!            └─ idle, or no answer, for `idle_canary` ──▶ ask for one token
//!                                    ┌────────────────────────┘
//!                                    ├─ answered, or the figures change ───▶ a sign of life
//!                                    └─ refused three times, or neither for `hang_timeout` ▶ dead
//! ```
//!
//! A late answer is no evidence: a busy API server is late with everything, and the pulse of a server
//! that does not answer is only unknown. What counts is an engine that was seen to stand still, and a
//! node that had nothing to do and could not give one token.

use std::time::{Duration, Instant};

use crate::plan::SupervisorPlan;

use super::probe::metric;

/// What moves while an engine works, and only then. Not how many requests it has: clients come and go,
/// and so do canaries. The cache's use is among them because a long prompt counts its tokens only at
/// its end.
const FIGURES: [&str; 5] = [
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:iteration_tokens_total_count",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
];
const RUNNING: &str = "vllm:num_requests_running";
/// Of the time between two pulses, this much counts as seen: a server that was deaf for a minute
/// answers with the figures of before.
const SEEN_BETWEEN: Duration = Duration::from_secs(5);
/// One refusal may be an accident.
const REFUSALS: u32 = 3;
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What the engine reports at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Pulse {
    running: f64,
    figures: [f64; FIGURES.len()],
}

impl Pulse {
    /// `None`: the node keeps no statistics.
    pub fn parse(metrics: &str) -> Option<Self> {
        let running = metric(metrics, RUNNING)?;
        let figures = FIGURES.map(|name| metric(metrics, name).unwrap_or(0.0));
        Some(Self { running, figures })
    }
}

/// What became of the one token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Canary {
    Answered,
    Refused(String),
    /// Not answered in time, or not even connected.
    Late,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Pulse,
    Canary,
}

/// Why a node is dead.
pub type Cause = String;

/// The signs of life of one incarnation, from the moment it is warm.
#[derive(Debug)]
pub struct Liveness {
    interval: Duration,
    limit: Duration,
    every: Option<Duration>,
    last: Option<Pulse>,
    /// When the last pulse came.
    pulsed: Instant,
    /// When the last sign of life came.
    alive: Instant,
    /// How long the engine was seen to stand still with requests running.
    frozen: Duration,
    /// `None`: in flight.
    next_pulse: Option<Instant>,
    /// Since when one token has been asked for.
    asked: Option<Instant>,
    in_flight: bool,
    /// When to ask once more, after a canary that was refused or late.
    again: Option<Instant>,
    refusals: u32,
}

impl Liveness {
    pub fn new(plan: &SupervisorPlan, now: Instant) -> Self {
        Self {
            interval: plan.health_interval,
            limit: plan.hang_timeout,
            every: plan.idle_canary,
            last: None,
            pulsed: now,
            alive: now,
            frozen: Duration::ZERO,
            next_pulse: Some(now),
            asked: None,
            in_flight: false,
            again: None,
            refusals: 0,
        }
    }

    /// When to call [`Liveness::check`] again.
    pub fn deadline(&self) -> Option<Instant> {
        self.next_pulse
            .into_iter()
            .chain(self.overdue_at())
            .chain(self.canary_at())
            .min()
    }

    /// What to ask the node now, unless it is dead.
    pub fn check(&mut self, now: Instant) -> Result<Vec<Ask>, Cause> {
        if self.overdue_at().is_some_and(|at| now >= at) {
            let limit = humantime::format_duration(self.limit);
            return Err(format!(
                "hung: asked for one token, and gave no sign of life for {limit}"
            ));
        }
        let mut asks = vec![];
        if self.next_pulse.is_some_and(|at| now >= at) {
            self.next_pulse = None;
            asks.push(Ask::Pulse);
        }
        if self.canary_at().is_some_and(|at| now >= at) {
            self.in_flight = true;
            self.again = None;
            self.asked.get_or_insert(now);
            asks.push(Ask::Canary);
        }
        Ok(asks)
    }

    /// `None`: no answer, or none that says anything.
    pub fn pulse(&mut self, pulse: Option<Pulse>, now: Instant) -> Result<(), Cause> {
        self.next_pulse = Some(now + self.interval);
        let Some(pulse) = pulse else {
            return Ok(());
        };
        let between = now.saturating_duration_since(self.pulsed);
        self.pulsed = now;
        let moved = |last: &Pulse| last.figures != pulse.figures;
        if self.last.as_ref().is_none_or(moved) {
            self.shown_alive(now);
        } else if pulse.running > 0.0 {
            self.frozen += between.min(SEEN_BETWEEN.max(self.interval * 2));
        } else {
            self.frozen = Duration::ZERO;
        }
        let running = pulse.running;
        self.last = Some(pulse);
        if self.frozen < self.limit {
            return Ok(());
        }
        let limit = humantime::format_duration(self.limit);
        Err(format!(
            "hung: {running} requests running, and its token counters stood still for {limit}"
        ))
    }

    pub fn canary(&mut self, canary: Canary, now: Instant) -> Result<(), Cause> {
        self.in_flight = false;
        match canary {
            Canary::Answered => self.shown_alive(now),
            // It waited behind requests that were served.
            Canary::Late if self.asked < Some(self.alive) => self.asked = None,
            Canary::Late => self.again = Some(now + ASK_AGAIN),
            Canary::Refused(why) => {
                self.refusals += 1;
                self.again = Some(now + ASK_AGAIN);
                if self.refusals >= REFUSALS {
                    return Err(format!("does not give one token: {why}"));
                }
            }
        }
        Ok(())
    }

    fn shown_alive(&mut self, now: Instant) {
        self.alive = now;
        self.frozen = Duration::ZERO;
        self.refusals = 0;
        self.again = None;
        if !self.in_flight {
            self.asked = None;
        }
    }

    fn overdue_at(&self) -> Option<Instant> {
        Some(self.asked?.max(self.alive) + self.limit)
    }

    fn canary_at(&self) -> Option<Instant> {
        if self.in_flight {
            return None;
        }
        if self.again.is_some() {
            return self.again;
        }
        let busy = self.last.as_ref().is_some_and(|last| last.running > 0.0);
        Some(match self.every {
            Some(every) if !busy => self.alive + every,
            // Requests running, or nobody wants canaries: only who is silent is asked.
            every => self.pulsed + every.unwrap_or(self.limit),
        })
    }
}

#[cfg(test)]
mod tests;
