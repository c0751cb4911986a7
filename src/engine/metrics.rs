//! The engine's figures for `/metrics`, read from the store at each scrape.

//! Names follow Prometheus: base units, `_total` on what only rises, histograms for durations. What
//! is labelled by `node` names the vLLM node that said or did it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use super::latency::Latencies;
use super::protocol::SessionKind;
use super::server::Shared;
use super::stats::{EngineStats, NodeCounters, PoolStats};

#[derive(Debug)]
pub struct EngineCollector(pub Arc<Shared>);

impl Collector for EngineCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let stats = self.0.read(|pools| pools.stats(Instant::now()));
        gauges(&mut encoder, &stats, self.0.is_up())?;
        counters(&mut encoder, &stats)?;
        arena(&mut encoder, stats.arena_bytes, self.0.prefaulted())?;
        by_pool(&mut encoder, &stats)?;
        by_node(&mut encoder, &stats)?;
        by_outcome(&mut encoder, &stats)?;
        histograms(&mut encoder, &stats)
    }
}

fn gauges(encoder: &mut DescriptorEncoder<'_>, stats: &EngineStats, up: bool) -> fmt::Result {
    let gauges: [(&str, &str, u64); 10] = [
        ("up", "1 while the store serves", up.into()),
        (
            "slots",
            "Chunks that fit into the arena",
            stats.slots.into(),
        ),
        ("slots_used", "Slots that are not free", stats.used.into()),
        (
            "slots_ready",
            "Chunks that can be found",
            stats.ready.into(),
        ),
        (
            "slots_pending",
            "Chunks being written",
            stats.pending.into(),
        ),
        ("slots_leased", "Slots that are pinned", stats.leased.into()),
        (
            "slots_quarantined",
            "Slots that a lost session may still be writing",
            stats.quarantined.into(),
        ),
        (
            "slots_damaged",
            "Slots of chunks that are not what was saved, until their turn to be evicted",
            stats.damaged.into(),
        ),
        (
            "slots_reserved",
            "Slots set aside for hand-offs",
            stats.reserved,
        ),
        (
            "handoffs_open",
            "Hand-offs under way or held",
            stats.handoffs_open,
        ),
    ];
    for (name, help, value) in gauges {
        let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        let name = format!("pegaflow_engine_{name}");
        gauge.encode(encoder.encode_descriptor(&name, help, None, gauge.metric_type())?)?;
    }
    for (name, help, age) in [
        (
            "pegaflow_engine_oldest_lease_age",
            "How long the oldest lease of a request has lasted",
            stats.oldest_lease_seconds,
        ),
        (
            "pegaflow_engine_oldest_pending_age",
            "How long the oldest chunk has been in writing",
            stats.oldest_pending_seconds,
        ),
    ] {
        let (unit, gauge) = (Some(&Unit::Seconds), ConstGauge::new(age));
        gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)?;
    }
    let mut sessions: BTreeMap<(&str, &str), i64> = BTreeMap::new();
    for session in &stats.sessions {
        let kind = match session.kind {
            SessionKind::Scheduler => "scheduler",
            SessionKind::Worker => "worker",
        };
        *sessions.entry((session.node.as_str(), kind)).or_default() += 1;
    }
    let mut family = encoder.encode_descriptor(
        "pegaflow_engine_sessions",
        "Connected vLLM processes",
        None,
        MetricType::Gauge,
    )?;
    for ((node, kind), count) in sessions {
        let labels = [("node", node), ("kind", kind)];
        ConstGauge::new(count).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn arena(encoder: &mut DescriptorEncoder<'_>, bytes: u64, prefaulted: u64) -> fmt::Result {
    for (name, help, value) in [
        ("arena_bytes", "Size of the arena", bytes),
        (
            "arena_prefaulted_bytes",
            "Bytes of the arena that got their memory ahead of use",
            prefaulted,
        ),
    ] {
        let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        let name = format!("pegaflow_engine_{name}");
        gauge.encode(encoder.encode_descriptor(&name, help, None, gauge.metric_type())?)?;
    }
    Ok(())
}

fn counters(encoder: &mut DescriptorEncoder<'_>, stats: &EngineStats) -> fmt::Result {
    let c = &stats.counters;
    let counters: [(&str, &str, u64); 13] = [
        ("lookups", "Lookups", c.lookups),
        ("evictions", "Chunks evicted", stats.evictions),
        ("stores_refused", "Stores without space", c.stores_refused),
        (
            "saved_chunks",
            "Chunk parts saved, ranks counted apart",
            c.saved_chunks,
        ),
        (
            "discarded_chunks",
            "Chunks that could not be saved",
            c.discarded_chunks,
        ),
        (
            "stuck_chunks",
            "Chunks given up because their save never ended",
            c.stuck_chunks,
        ),
        (
            "damaged_chunks",
            "Chunks that a reader found to be something else than what was saved",
            c.damaged_chunks,
        ),
        (
            "stale_refs",
            "Commits, discards and reports of damage that name no chunk of the sender's",
            c.stale_refs,
        ),
        ("loaded_chunks", "Chunk parts loaded", c.loaded_chunks),
        ("failed_loads", "Loads that failed", c.failed_loads),
        ("sessions_opened", "Sessions opened", c.sessions_opened),
        ("sessions_refused", "Sessions refused", c.sessions_refused),
        (
            "sessions_broken",
            "Sessions that broke the protocol",
            c.sessions_broken,
        ),
    ];
    for (name, help, value) in counters {
        let counter = ConstCounter::new(value);
        let name = format!("pegaflow_engine_{name}");
        counter.encode(encoder.encode_descriptor(&name, help, None, counter.metric_type())?)?;
    }
    Ok(())
}

fn by_pool(encoder: &mut DescriptorEncoder<'_>, stats: &EngineStats) -> fmt::Result {
    type Figure = fn(&PoolStats) -> u64;
    let figures: [(&str, &str, Figure); 4] = [
        ("capacity_bytes", "A pool's share of the store", |pool| {
            pool.capacity_bytes
        }),
        ("arena_bytes", "Size of a pool's arena", |pool| {
            pool.arena_bytes
        }),
        ("slots", "Chunks that fit into a pool", |pool| {
            pool.slots.into()
        }),
        ("slots_used", "A pool's slots that are not free", |pool| {
            pool.used.into()
        }),
    ];
    for (name, help, figure) in figures {
        let name = format!("pegaflow_engine_pool_{name}");
        let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
        for (pool, stats) in &stats.pools {
            let gauge = ConstGauge::new(i64::try_from(figure(stats)).unwrap_or(i64::MAX));
            gauge.encode(family.encode_family(&[("pool", pool.as_str())])?)?;
        }
    }
    Ok(())
}

fn by_node(encoder: &mut DescriptorEncoder<'_>, stats: &EngineStats) -> fmt::Result {
    type Figure = fn(&NodeCounters) -> u64;
    let figures: [(&str, &str, Figure); 5] = [
        ("lookup_hits", "Keys found", |node| node.hits),
        ("lookup_misses", "Keys not found", |node| node.misses),
        ("lookup_pending", "Keys found while being written", |node| {
            node.pending_hits
        }),
        ("saved_bytes", "Bytes saved", |node| node.saved_bytes),
        ("loaded_bytes", "Bytes loaded", |node| node.loaded_bytes),
    ];
    for (name, help, figure) in figures {
        let values = stats.counters.nodes.iter();
        let values = values.map(|(node, counters)| (node.as_str(), figure(counters)));
        family(encoder, (name, help, "node"), values)?;
    }
    Ok(())
}

/// Hand-offs and sessions by how they ended.
fn by_outcome(encoder: &mut DescriptorEncoder<'_>, stats: &EngineStats) -> fmt::Result {
    let c = &stats.counters;
    let stored = c.handoffs_already_stored;
    let fired = [
        ("fired", c.handoffs_fired.saturating_sub(stored)),
        ("already_stored", stored),
    ];
    let plain = |counts: &BTreeMap<&'static str, u64>| {
        let counts = counts.iter().map(|(&label, &count)| (label, count));
        counts.collect::<Vec<_>>()
    };
    let outcomes = fired.into_iter().chain(plain(&c.handoffs_failed));
    family(
        encoder,
        ("handoffs", "Hand-offs by outcome", "outcome"),
        outcomes,
    )?;
    let released = (
        "handoffs_released",
        "Fired hand-offs, by what ended them",
        "how",
    );
    family(encoder, released, plain(&c.handoffs_released))?;
    let lost = ("sessions_lost", "Sessions that ended, by why", "why");
    family(encoder, lost, plain(&c.sessions_lost))
}

/// Counters that differ in one label: (name, help, label), and a value for each.
fn family<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, label): (&str, &str, &str),
    values: impl IntoIterator<Item = (&'a str, u64)>,
) -> fmt::Result {
    let name = format!("pegaflow_engine_{name}");
    let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
    for (value, count) in values {
        ConstCounter::new(count).encode(family.encode_family(&[(label, value)])?)?;
    }
    Ok(())
}

fn histograms(encoder: &mut DescriptorEncoder<'_>, stats: &EngineStats) -> fmt::Result {
    let c = &stats.counters;
    let histograms: [(&str, &str, &Latencies); 3] = [
        (
            "save_duration",
            "A rank's copy into the store",
            &c.save_seconds,
        ),
        (
            "load_duration",
            "A rank's copy out of the store",
            &c.load_seconds,
        ),
        (
            "handoff_duration",
            "From a hand-off's opening to the moment when all of it was stored",
            &c.handoff_seconds,
        ),
    ];
    for (name, help, latencies) in histograms {
        let name = format!("pegaflow_engine_{name}");
        let (unit, kind) = (Some(&Unit::Seconds), MetricType::Histogram);
        encoder
            .encode_descriptor(&name, help, unit, kind)?
            .encode_histogram::<NoLabelSet>(
                latencies.sum(),
                latencies.count(),
                &latencies.buckets(),
                None,
            )?;
    }
    Ok(())
}
