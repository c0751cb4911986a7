//! The router's figures. All durations are in seconds. `docs/router.md` has a row for each.
//!
//! What every request or piece needs is looked up once, here: a lookup by labels costs more than the rest of it.

mod labels;

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::breaker::Duty;
use super::replay::Refusal;
use super::timeline::AnswerLeg;
use crate::fleet::NodeId;
use crate::handoff::HandoffFailure;
use crate::traffic::NodeLoad;
pub(super) use labels::RequestLabels;
use labels::{
    BreakerLabels, FALLBACKS, LEGS, LegLabels, NodeLabels, PathLabels, REPLAYS, RETRIES,
    ReasonLabels, ReplayLabels, RetryLabels, STAGES, StageLabels,
};

/// Which way a request took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Way {
    /// It ended before that was known.
    #[default]
    None,
    Split,
    Whole,
}

impl Way {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Split => "split",
            Self::Whole => "whole",
        }
    }
}

/// What differs by the way that a request took.
#[derive(Debug, Clone)]
pub(super) struct WayMetrics {
    pub(super) ttft: Histogram,
    pub(super) itl: Histogram,
    pub(super) tpot: Histogram,
    pub(super) total: Histogram,
}

/// One kind of leg.
#[derive(Debug, Clone)]
struct LegMetrics {
    first_byte: Histogram,
    whole: Histogram,
}

/// Counters, gauges and histograms under `pegaflow_router_*`. Cheap to clone; clones share them.
#[derive(Debug, Clone)]
pub struct RouterMetrics {
    requests: Family<RequestLabels, Counter>,
    ways: [WayMetrics; 3],
    queue: Histogram,
    handoff_wait: Histogram,
    dispatch: Histogram,
    prefill: Histogram,
    decode: LegMetrics,
    whole: LegMetrics,
    retries: Family<RetryLabels, Counter>,
    retries_denied: Family<LegLabels, Counter>,
    breakers_opened: Family<LegLabels, Counter>,
    breakers: Family<BreakerLabels, Gauge>,
    fallbacks: Family<ReasonLabels, Counter>,
    cancellations: Family<StageLabels, Counter>,
    replays: Family<ReplayLabels, Counter>,
    in_flight: Gauge,
    queued: Gauge,
    node_requests: Family<NodeLabels, Gauge>,
    node_tokens: Family<NodeLabels, Gauge>,
}

impl RouterMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("pegaflow_router");
        let requests = Family::<RequestLabels, Counter>::default();
        registry.register("requests", "Requests that ended", requests.clone());
        let ways = ways(registry);
        let queue = histogram(
            registry,
            "queue_seconds",
            "From a request's head to its place",
        );
        let handoff_wait = histogram(
            registry,
            "handoff_wait_seconds",
            "From sending the prefill leg to the prompt's KV being complete",
        );
        let dispatch = histogram(
            registry,
            "dispatch_seconds",
            "From the end of the wait for prefill to sending the decode leg",
        );
        let legs = Family::<LegLabels, Histogram>::new_with_constructor(seconds);
        registry.register(
            "leg_seconds",
            "From sending a leg to the end of its answer, where it ended well",
            legs.clone(),
        );
        let firsts = Family::<LegLabels, Histogram>::new_with_constructor(seconds);
        registry.register(
            "leg_first_byte_seconds",
            "From sending a leg to the first piece of its answer",
            firsts.clone(),
        );
        let leg = |leg| LegMetrics {
            first_byte: firsts.get_or_create_owned(&LegLabels { leg }),
            whole: legs.get_or_create_owned(&LegLabels { leg }),
        };
        let retries = Family::<RetryLabels, Counter>::default();
        let legs_and_reasons = LEGS
            .into_iter()
            .flat_map(|leg| RETRIES.map(|why| (leg, why)));
        let producer_died = ("prefill", HandoffFailure::ProducerDied.label());
        for (leg, reason) in legs_and_reasons.chain([producer_died]) {
            drop(retries.get_or_create(&RetryLabels { leg, reason }));
        }
        registry.register("retries", "Legs sent once more", retries.clone());
        let retries_denied = Family::<LegLabels, Counter>::default();
        for leg in LEGS {
            drop(retries_denied.get_or_create(&LegLabels { leg }));
        }
        registry.register(
            "retries_denied",
            "Legs that were not sent once more, since too many had been",
            retries_denied.clone(),
        );
        let breakers_opened = Family::<LegLabels, Counter>::default();
        for duty in [Duty::Prefill, Duty::Answer] {
            let leg = duty.label();
            drop(breakers_opened.get_or_create(&LegLabels { leg }));
        }
        registry.register(
            "breakers_opened",
            "Times that a node was left alone because it kept failing",
            breakers_opened.clone(),
        );
        let breakers = Family::<BreakerLabels, Gauge>::default();
        registry.register(
            "breaker_state",
            "0 closed, 1 half open, 2 open: the node is left alone",
            breakers.clone(),
        );
        let fallbacks = Family::<ReasonLabels, Counter>::default();
        for reason in FALLBACKS {
            drop(fallbacks.get_or_create(&ReasonLabels { reason }));
        }
        registry.register(
            "fallbacks",
            "Split requests whose prompt was not handed off as intended",
            fallbacks.clone(),
        );
        let cancellations = Family::<StageLabels, Counter>::default();
        for stage in STAGES {
            drop(cancellations.get_or_create(&StageLabels { stage }));
        }
        registry.register(
            "cancellations",
            "Requests whose client went away, by what was being waited for",
            cancellations.clone(),
        );
        let replays = Family::<ReplayLabels, Counter>::default();
        let refused = Refusal::ALL.map(|refusal| ("refused", refusal.label()));
        for (outcome, reason) in REPLAYS.into_iter().chain(refused) {
            drop(replays.get_or_create(&ReplayLabels { outcome, reason }));
        }
        registry.register(
            "replays",
            "Streams whose node failed after their first piece, and what became of them",
            replays.clone(),
        );
        let (in_flight, queued) = (Gauge::default(), Gauge::default());
        registry.register("in_flight", "Requests being served", in_flight.clone());
        registry.register("queued", "Requests that wait for a place", queued.clone());
        let node_requests = Family::<NodeLabels, Gauge>::default();
        registry.register(
            "node_in_flight",
            "Requests that a node has",
            node_requests.clone(),
        );
        let node_tokens = Family::<NodeLabels, Gauge>::default();
        registry.register(
            "node_in_flight_tokens",
            "Tokens of those requests, estimated from their bytes",
            node_tokens.clone(),
        );
        Self {
            requests,
            ways,
            queue,
            handoff_wait,
            dispatch,
            prefill: legs.get_or_create_owned(&LegLabels { leg: "prefill" }),
            decode: leg(AnswerLeg::Decode.label()),
            whole: leg(AnswerLeg::Whole.label()),
            retries,
            retries_denied,
            breakers_opened,
            breakers,
            fallbacks,
            cancellations,
            replays,
            in_flight,
            queued,
            node_requests,
            node_tokens,
        }
    }

    /// Before somebody looks.
    pub(super) fn set_node(&self, node: &NodeId, load: NodeLoad) {
        let gauge = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let labels = NodeLabels {
            node: node.to_string(),
        };
        let requests = self.node_requests.get_or_create(&labels);
        requests.set(gauge(load.requests as u64));
        let tokens = self.node_tokens.get_or_create(&labels);
        tokens.set(gauge(load.tokens));
    }

    pub(super) fn request(&self, labels: &RequestLabels) {
        self.requests.get_or_create(labels).inc();
    }

    pub(super) fn way(&self, way: Way) -> &WayMetrics {
        let [none, split, whole] = &self.ways;
        match way {
            Way::None => none,
            Way::Split => split,
            Way::Whole => whole,
        }
    }

    pub(super) fn retry(&self, leg: &'static str, reason: &'static str) {
        self.retries
            .get_or_create(&RetryLabels { leg, reason })
            .inc();
    }

    pub(super) fn retry_denied(&self, leg: &'static str) {
        self.retries_denied.get_or_create(&LegLabels { leg }).inc();
    }

    pub(super) fn breaker_opened(&self, leg: &'static str) {
        self.breakers_opened.get_or_create(&LegLabels { leg }).inc();
    }

    /// Before somebody looks.
    pub(super) fn set_breaker(&self, node: &NodeId, duty: Duty, state: &str) {
        let labels = BreakerLabels {
            node: node.to_string(),
            leg: duty.label(),
        };
        let state = match state {
            "open" => 2,
            "half_open" => 1,
            _ => 0,
        };
        self.breakers.get_or_create(&labels).set(state);
    }

    pub(super) fn fallback(&self, reason: &'static str) {
        self.fallbacks.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// A stream's node failed; what became of the stream.
    pub(super) fn replay(&self, outcome: &'static str, reason: &'static str) {
        self.replays
            .get_or_create(&ReplayLabels { outcome, reason })
            .inc();
    }

    pub(super) fn cancelled(&self, stage: &'static str) {
        self.cancellations
            .get_or_create(&StageLabels { stage })
            .inc();
    }

    pub(super) fn queued_for(&self, waited: Duration) {
        self.queue.observe(waited.as_secs_f64());
    }

    pub(super) fn handoff_ready(&self, waited: Duration) {
        self.handoff_wait.observe(waited.as_secs_f64());
    }

    pub(super) fn dispatched(&self, took: Duration) {
        self.dispatch.observe(took.as_secs_f64());
    }

    /// P's reply is complete.
    pub(super) fn prefill_leg(&self, took: Duration) {
        self.prefill.observe(took.as_secs_f64());
    }

    pub(super) fn leg_first_byte(&self, leg: AnswerLeg, waited: Duration) {
        self.leg(leg).first_byte.observe(waited.as_secs_f64());
    }

    pub(super) fn answer_leg(&self, leg: AnswerLeg, took: Duration) {
        self.leg(leg).whole.observe(took.as_secs_f64());
    }

    fn leg(&self, leg: AnswerLeg) -> &LegMetrics {
        match leg {
            AnswerLeg::Decode => &self.decode,
            AnswerLeg::Whole => &self.whole,
        }
    }

    /// Requests that are being served now, and those that wait for a place.
    pub fn under_way(&self) -> (i64, i64) {
        (self.in_flight.get(), self.queued.get())
    }

    pub(super) fn hold_in_flight(&self) -> GaugeGuard {
        GaugeGuard::hold(&self.in_flight)
    }

    pub(super) fn hold_queued(&self) -> GaugeGuard {
        GaugeGuard::hold(&self.queued)
    }
}

/// In the order of [`RouterMetrics::way`].
fn ways(registry: &mut Registry) -> [WayMetrics; 3] {
    let mut family = |name, help| {
        let family = Family::<PathLabels, Histogram>::new_with_constructor(seconds);
        registry.register(name, help, family.clone());
        family
    };
    let ttft = family(
        "ttft_seconds",
        "From a request's head to the first piece of its answer",
    );
    let itl = family(
        "itl_seconds",
        "Between two events of a streamed completion or chat",
    );
    let tpot = family(
        "tpot_seconds",
        "Mean time between the events of one streamed completion or chat",
    );
    let total = family(
        "request_seconds",
        "From a request's head to the end of its answer",
    );
    [Way::None, Way::Split, Way::Whole].map(|way| {
        let path = PathLabels { path: way.label() };
        WayMetrics {
            ttft: ttft.get_or_create_owned(&path),
            itl: itl.get_or_create_owned(&path),
            tpot: tpot.get_or_create_owned(&path),
            total: total.get_or_create_owned(&path),
        }
    })
}

fn histogram(registry: &mut Registry, name: &'static str, help: &'static str) -> Histogram {
    let histogram = seconds();
    registry.register(name, help, histogram.clone());
    histogram
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
