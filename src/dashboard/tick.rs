//! One second's figures.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use serde::Serialize;

use crate::engine::{Engine, EngineStats};
use crate::fleet::NodeId;
use crate::live::{Live, Parts, Percentiles, Request, Second, Spread, unix_ms};
use crate::router::RouterMetrics;
use crate::traffic::Traffic;

/// Percentiles are of so many seconds: one of a fleet that is not busy has hardly a request.
const WINDOW: usize = 10;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Tick {
    /// Its end, in milliseconds since 1970.
    pub(super) at: u64,
    /// How long it was.
    pub(super) seconds: f64,
    pub(super) outcomes: BTreeMap<&'static str, u64>,
    /// Pieces of streams.
    pub(super) tokens: u64,
    pub(super) in_flight: i64,
    pub(super) queued: i64,
    /// Over the last [`WINDOW`] seconds.
    pub(super) ttft: Option<Percentiles>,
    pub(super) itl: Option<Percentiles>,
    pub(super) tpot: Option<Percentiles>,
    pub(super) parts: Option<MeanParts>,
    pub(super) nodes: BTreeMap<NodeId, NodeTick>,
    /// `None`: there is no store, or it is turned off.
    pub(super) engine: Option<EngineTick>,
}

/// Where the time to the first token went, in ms: means over the split requests that ended.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct MeanParts {
    queue: f64,
    prefill: f64,
    dispatch: f64,
    decode: f64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct NodeTick {
    /// Prompts, of the requests that ended.
    sent: u64,
    in_flight: usize,
    /// Of those in flight, by estimate.
    tokens: u64,
}

/// The store. What is counted is what came in this second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct EngineTick {
    capacity_bytes: u64,
    arena_bytes: u64,
    slots: u32,
    used: u32,
    ready: u32,
    pending: u32,
    leased: u32,
    handoffs_open: u64,
    hits: u64,
    misses: u64,
    saved_bytes: u64,
    loaded_bytes: u64,
    handoffs_fired: u64,
    handoffs_failed: u64,
    evictions: u64,
}

/// Makes a [`Tick`] each time it is asked.
pub(super) struct Sampler {
    live: Live,
    metrics: RouterMetrics,
    engine: Option<Arc<Engine>>,
    last: Instant,
    before: Option<EngineStats>,
    window: VecDeque<Second>,
}

impl Sampler {
    pub(super) fn new(live: Live, metrics: RouterMetrics, engine: Option<Arc<Engine>>) -> Self {
        Self {
            live,
            metrics,
            engine,
            last: Instant::now(),
            before: None,
            window: VecDeque::with_capacity(WINDOW + 1),
        }
    }

    /// The time since the last one, and the requests that ended in it.
    pub(super) fn tick(&mut self, traffic: &Traffic) -> (Tick, Vec<Request>) {
        let now = Instant::now();
        let seconds = now.duration_since(self.last).as_secs_f64();
        self.last = now;
        let mut second = self.live.take();
        let requests = std::mem::take(&mut second.requests);
        let (in_flight, queued) = self.metrics.under_way();
        let nodes = nodes(&second, traffic);
        let (outcomes, tokens) = (std::mem::take(&mut second.outcomes), second.tokens);
        let parts = MeanParts::of(second.parts);
        self.window.push_back(second);
        if self.window.len() > WINDOW {
            self.window.pop_front();
        }
        let tick = Tick {
            at: unix_ms(SystemTime::now()),
            seconds,
            outcomes,
            tokens,
            in_flight,
            queued,
            ttft: self.lately(|second| &second.ttft),
            itl: self.lately(|second| &second.itl),
            tpot: self.lately(|second| &second.tpot),
            parts,
            nodes,
            engine: self.engine(),
        };
        (tick, requests)
    }

    fn lately(&self, spread: impl Fn(&Second) -> &Spread) -> Option<Percentiles> {
        let mut all = Spread::default();
        for second in &self.window {
            all.merge(spread(second));
        }
        all.percentiles()
    }

    fn engine(&mut self) -> Option<EngineTick> {
        let engine = self.engine.as_ref().filter(|engine| engine.is_running())?;
        let stats = engine.stats();
        let tick = EngineTick::of(&stats, self.before.as_ref());
        self.before = Some(stats);
        Some(tick)
    }
}

fn nodes(second: &Second, traffic: &Traffic) -> BTreeMap<NodeId, NodeTick> {
    let mut nodes: BTreeMap<NodeId, NodeTick> = BTreeMap::new();
    for (node, load) in traffic.loads() {
        let tick = nodes.entry(node).or_default();
        (tick.in_flight, tick.tokens) = (load.requests, load.tokens);
    }
    for (node, sent) in &second.sent {
        nodes.entry(node.clone()).or_default().sent = *sent;
    }
    nodes
}

impl MeanParts {
    fn of(parts: Parts) -> Option<Self> {
        let count = parts.requests as f64;
        (parts.requests > 0).then(|| Self {
            queue: parts.queue / count,
            prefill: parts.prefill / count,
            dispatch: parts.dispatch / count,
            decode: parts.decode / count,
        })
    }
}

impl EngineTick {
    /// Without an earlier look nothing is known to have come.
    fn of(stats: &EngineStats, before: Option<&EngineStats>) -> Self {
        let since = |count: fn(&EngineStats) -> u64| {
            let before = before.map_or_else(|| count(stats), count);
            count(stats).saturating_sub(before)
        };
        Self {
            capacity_bytes: stats.pools.values().map(|pool| pool.capacity_bytes).sum(),
            arena_bytes: stats.arena_bytes,
            slots: stats.slots,
            used: stats.used,
            ready: stats.ready,
            pending: stats.pending,
            leased: stats.leased,
            handoffs_open: stats.handoffs_open,
            hits: since(|stats| stats.counters.hits),
            misses: since(|stats| stats.counters.misses),
            saved_bytes: since(|stats| stats.counters.saved_bytes),
            loaded_bytes: since(|stats| stats.counters.loaded_bytes),
            handoffs_fired: since(|stats| stats.counters.handoffs_fired),
            handoffs_failed: since(|stats| stats.counters.handoffs_failed.values().sum()),
            evictions: since(|stats| stats.evictions),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::registry::Registry;
    use std::time::Duration;

    #[test]
    fn percentiles_are_of_the_last_seconds_and_counts_of_this_one() {
        let live = Live::on();
        let metrics = RouterMetrics::register(&mut Registry::default());
        let mut sampler = Sampler::new(live.clone(), metrics, None);
        let traffic = Traffic::default();
        live.ttft(Duration::from_millis(40));
        assert_eq!(sampler.tick(&traffic).0.tokens, 1);
        for _ in 1..WINDOW {
            let (tick, requests) = sampler.tick(&traffic);
            assert_eq!((tick.tokens, requests.len()), (0, 0));
            assert_eq!(tick.ttft.unwrap().count, 1);
        }
        let (tick, _) = sampler.tick(&traffic);
        assert_eq!((tick.ttft, tick.parts, tick.engine), (None, None, None));
        assert_eq!(sampler.window.len(), WINDOW);
    }

    #[test]
    fn the_store_s_counts_are_differences() {
        let mut stats = EngineStats::default();
        stats.counters.hits = 7;
        assert_eq!(EngineTick::of(&stats, None).hits, 0);
        let before = stats.clone();
        stats.counters.hits = 10;
        assert_eq!(EngineTick::of(&stats, Some(&before)).hits, 3);
        // A store that was turned off and on begins anew.
        assert_eq!(EngineTick::of(&before, Some(&stats)).hits, 0);
    }
}
