//! The router's figures. All durations are in seconds.

use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::split::{Endpoint, WholeReason};
use crate::handoff::HandoffFailure;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    endpoint: &'static str,
    outcome: &'static str,
    path: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PathLabels {
    path: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RetryLabels {
    leg: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

/// Counters, gauges and histograms under `pegaflow_router_*`. Cheap to clone; clones share them.
#[derive(Debug, Clone)]
pub struct RouterMetrics {
    requests: Family<RequestLabels, Counter>,
    ttft: Family<PathLabels, Histogram>,
    total: Family<PathLabels, Histogram>,
    inter_chunk: Histogram,
    handoff_wait: Histogram,
    decode_first_byte: Histogram,
    retries: Family<RetryLabels, Counter>,
    fallbacks: Family<ReasonLabels, Counter>,
    cancellations: Counter,
    in_flight: Gauge,
    queued: Gauge,
}

/// Why a prompt was not handed off, as far as it is known beforehand; a failed leg adds its own.
const FALLBACKS: [&str; 11] = [
    "no_decode_node",
    "not_opened",
    "handoff_timeout",
    HandoffFailure::NoSpace.label(),
    HandoffFailure::ProducerDied.label(),
    HandoffFailure::Aborted.label(),
    HandoffFailure::SaveFailed.label(),
    HandoffFailure::Damaged.label(),
    HandoffFailure::Deadline.label(),
    HandoffFailure::Abandoned.label(),
    HandoffFailure::EngineDown.label(),
];

impl RouterMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            ttft: Family::new_with_constructor(seconds),
            total: Family::new_with_constructor(seconds),
            inter_chunk: seconds(),
            handoff_wait: seconds(),
            decode_first_byte: seconds(),
            retries: Family::default(),
            fallbacks: Family::default(),
            cancellations: Counter::default(),
            in_flight: Gauge::default(),
            queued: Gauge::default(),
        };
        // There from the start, at zero: a rate over a counter that does not exist yet is no rate.
        for reason in FALLBACKS {
            drop(metrics.fallbacks.get_or_create(&ReasonLabels { reason }));
        }
        let registry = registry.sub_registry_with_prefix("pegaflow_router");
        registry.register("requests", "Requests that ended", metrics.requests.clone());
        registry.register(
            "ttft_seconds",
            "From a request's head to the first piece of its answer",
            metrics.ttft.clone(),
        );
        registry.register(
            "request_seconds",
            "From a request's head to the end of its answer",
            metrics.total.clone(),
        );
        registry.register(
            "inter_chunk_seconds",
            "Between two pieces of a streamed answer",
            metrics.inter_chunk.clone(),
        );
        registry.register(
            "handoff_wait_seconds",
            "From sending the prefill leg to the prompt's KV being complete",
            metrics.handoff_wait.clone(),
        );
        registry.register(
            "decode_first_byte_seconds",
            "From sending a decode or whole leg to the first piece of its answer",
            metrics.decode_first_byte.clone(),
        );
        registry.register("retries", "Legs sent once more", metrics.retries.clone());
        registry.register(
            "fallbacks",
            "Split requests whose prompt was not handed off as intended",
            metrics.fallbacks.clone(),
        );
        registry.register(
            "cancellations",
            "Requests whose client went away",
            metrics.cancellations.clone(),
        );
        registry.register(
            "in_flight",
            "Requests being served",
            metrics.in_flight.clone(),
        );
        registry.register(
            "queued",
            "Requests that wait for a place",
            metrics.queued.clone(),
        );
        metrics
    }

    pub(super) fn retry(&self, leg: &'static str, reason: &'static str) {
        self.retries
            .get_or_create(&RetryLabels { leg, reason })
            .inc();
    }

    pub(super) fn fallback(&self, reason: &'static str) {
        self.fallbacks.get_or_create(&ReasonLabels { reason }).inc();
    }

    pub(super) fn handoff_ready(&self, waited: Duration) {
        self.handoff_wait.observe(waited.as_secs_f64());
    }

    pub(super) fn leg_first_byte(&self, waited: Duration) {
        self.decode_first_byte.observe(waited.as_secs_f64());
    }

    pub(super) fn inter_chunk(&self, waited: Duration) {
        self.inter_chunk.observe(waited.as_secs_f64());
    }

    pub(super) fn hold_in_flight(&self) -> GaugeGuard {
        GaugeGuard::hold(&self.in_flight)
    }

    pub(super) fn hold_queued(&self) -> GaugeGuard {
        GaugeGuard::hold(&self.queued)
    }
}

fn seconds() -> Histogram {
    // 1 ms to about 9 min.
    Histogram::new(exponential_buckets(0.001, 2.0, 20))
}

/// One, for as long as it lives.
#[derive(Debug)]
pub(super) struct GaugeGuard(Gauge);

impl GaugeGuard {
    fn hold(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

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
    pub(super) fn of(status: http::StatusCode) -> Self {
        match status.as_u16() {
            429 | 503 => Self::Refused,
            400..500 => Self::ClientError,
            500.. => Self::Failed,
            _ => Self::Ok,
        }
    }

    fn label(self) -> &'static str {
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
    metrics: RouterMetrics,
    endpoint: Endpoint,
    path: &'static str,
    reason: &'static str,
    started: Instant,
    outcome: Outcome,
}

impl Observation {
    pub(super) fn start(metrics: &RouterMetrics, endpoint: Endpoint) -> Self {
        Self {
            metrics: metrics.clone(),
            endpoint,
            path: "none",
            reason: "",
            started: Instant::now(),
            outcome: Outcome::Cancelled,
        }
    }

    /// `None`: split.
    pub(super) fn takes_path(&mut self, whole: Option<WholeReason>) {
        (self.path, self.reason) = match whole {
            Some(reason) => ("whole", reason.label()),
            None => ("split", ""),
        };
    }

    pub(super) fn first_byte(&self) {
        let path = PathLabels { path: self.path };
        let waited = self.started.elapsed().as_secs_f64();
        self.metrics.ttft.get_or_create(&path).observe(waited);
    }

    pub(super) fn finish(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        if self.outcome == Outcome::Cancelled {
            self.metrics.cancellations.inc();
        }
        let labels = RequestLabels {
            endpoint: self.endpoint.label(),
            outcome: self.outcome.label(),
            path: self.path,
            reason: self.reason,
        };
        self.metrics.requests.get_or_create(&labels).inc();
        let path = PathLabels { path: self.path };
        let total = self.started.elapsed().as_secs_f64();
        self.metrics.total.get_or_create(&path).observe(total);
    }
}
