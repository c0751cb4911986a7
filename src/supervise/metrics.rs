//! How long restarts take, stage by stage.
//!
//! ```text
//! leader dies ──▶ the death is seen ──▶ the gate is open ──▶ the next leader runs ──▶ ready
//!           "seen"              "gate"               "spawn"                   "ready"
//! ```
//!
//! A planned delay (backoff) is no part of any stage. Deaths that pegaflow brings about itself have
//! no "seen".

use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::fleet::Phase;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: &'static str,
}

/// `pegaflow_node_restart_seconds`. Cheap to clone; clones share it.
#[derive(Debug, Clone)]
pub struct SupervisorMetrics {
    restart: Family<StageLabels, Histogram>,
}

impl SupervisorMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        // 1 ms to about 9 min.
        let seconds: fn() -> Histogram = || Histogram::new(exponential_buckets(0.001, 2.0, 20));
        let restart = Family::new_with_constructor(seconds);
        for stage in ["seen", "gate", "spawn", "ready"] {
            drop(restart.get_or_create(&StageLabels { stage }));
        }
        registry.register(
            "pegaflow_node_restart_seconds",
            "Stages of a node's restart: seen, gate (without the planned delay), spawn, ready",
            restart.clone(),
        );
        Self { restart }
    }

    fn observe(&self, stage: &'static str, took: Duration) {
        let labels = StageLabels { stage };
        self.restart
            .get_or_create(&labels)
            .observe(took.as_secs_f64());
    }
}

/// One node's restarts.
#[derive(Debug)]
pub struct Timing {
    metrics: SupervisorMetrics,
    /// When it was found dead, and how long it is to stay so.
    died: Option<(Instant, Duration)>,
    spawning: Option<Instant>,
    spawned: Option<Instant>,
}

impl Timing {
    pub fn new(metrics: SupervisorMetrics) -> Self {
        Self {
            metrics,
            died: None,
            spawning: None,
            spawned: None,
        }
    }

    /// The leader exited `ago`.
    pub fn seen(&self, ago: Duration) {
        self.metrics.observe("seen", ago);
    }

    pub fn entered(&mut self, phase: &Phase, now: Instant) {
        match phase {
            Phase::Backoff { delay } => {
                self.died.get_or_insert((now, *delay));
            }
            Phase::Ready => {
                if let Some(at) = self.spawned.take() {
                    self.metrics.observe("ready", now - at);
                }
            }
            _ => {}
        }
    }

    /// The gate is open.
    pub fn spawning(&mut self, now: Instant) {
        self.spawned = None;
        self.spawning = self.died.take().map(|(at, delay)| {
            let waited = now.saturating_duration_since(at);
            self.metrics.observe("gate", waited.saturating_sub(delay));
            now
        });
    }

    /// The leader runs.
    pub fn spawned(&mut self, now: Instant) {
        self.spawned = self.spawning.take().map(|at| {
            self.metrics.observe("spawn", now - at);
            now
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(registry: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        text
    }

    #[test]
    fn only_restarts_are_timed_and_their_planned_delay_is_left_out() {
        let mut registry = Registry::default();
        let mut timing = Timing::new(SupervisorMetrics::register(&mut registry));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        timing.spawning(at(0));
        timing.spawned(at(1));
        timing.entered(&Phase::Ready, at(9));
        let first_start = shown(&registry);
        let counts = first_start.lines().filter(|line| line.contains("_count{"));
        let counts: Vec<_> = counts.collect();
        let is_zero = |line: &&str| line.ends_with(" 0");
        assert!(
            counts.len() == 4 && counts.iter().all(is_zero),
            "{counts:?}"
        );
        let delay = Duration::from_secs(5);
        timing.entered(&Phase::Backoff { delay }, at(10));
        timing.spawning(at(17));
        timing.spawned(at(20));
        timing.entered(&Phase::Ready, at(60));
        timing.entered(&Phase::Ready, at(70));
        for (stage, seconds) in [("gate", "2.0"), ("spawn", "3.0"), ("ready", "40.0")] {
            let sum = format!("seconds_sum{{stage=\"{stage}\"}} {seconds}\n");
            assert!(shown(&registry).contains(&sum), "{}", shown(&registry));
        }
    }
}
