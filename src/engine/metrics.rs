//! The engine's figures for `/metrics`, read from the store at each scrape.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::server::Shared;
use super::stats::EngineStats;
use super::store::Store;

#[derive(Debug)]
pub struct EngineCollector(pub Arc<Shared>);

impl Collector for EngineCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let stats = self.0.read(Store::stats);
        gauges(&mut encoder, &stats, self.0.is_up())?;
        counters(&mut encoder, &stats)?;
        arena(&mut encoder, stats.arena_bytes, self.0.prefaulted())?;
        labelled(&mut encoder, &stats)
    }
}

fn gauges(encoder: &mut DescriptorEncoder<'_>, stats: &EngineStats, up: bool) -> fmt::Result {
    let gauges: [(&str, &str, u64); 9] = [
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
            "Slots that wait for dead processes to be reaped",
            stats.quarantined.into(),
        ),
        (
            "sessions",
            "Connected vLLM processes",
            stats.sessions.len() as u64,
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
    let counters: [(&str, &str, u64); 18] = [
        ("lookups", "Lookups", c.lookups),
        ("lookup_hits", "Keys found", c.hits),
        ("lookup_misses", "Keys not found", c.misses),
        (
            "lookup_pending",
            "Keys found while being written",
            c.pending_hits,
        ),
        ("evictions", "Chunks evicted", stats.evictions),
        ("stores_refused", "Stores without space", c.stores_refused),
        (
            "saved_chunks",
            "Chunk parts saved, ranks counted apart",
            c.saved_chunks,
        ),
        ("saved_bytes", "Bytes saved", c.saved_bytes),
        ("save_micros", "Microseconds spent saving", c.save_micros),
        (
            "discarded_chunks",
            "Chunks that could not be saved",
            c.discarded_chunks,
        ),
        (
            "stale_refs",
            "Commits and discards of past chunks",
            c.stale_refs,
        ),
        ("loaded_chunks", "Chunk parts loaded", c.loaded_chunks),
        ("loaded_bytes", "Bytes loaded", c.loaded_bytes),
        ("load_micros", "Microseconds spent loading", c.load_micros),
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

/// Hand-offs by how they ended.
fn labelled(encoder: &mut DescriptorEncoder<'_>, stats: &EngineStats) -> fmt::Result {
    let c = &stats.counters;
    let stored = c.handoffs_already_stored;
    let fired = [
        ("fired", c.handoffs_fired.saturating_sub(stored)),
        ("already_stored", stored),
    ];
    let failed = c.handoffs_failed.iter().map(|(&why, &count)| (why, count));
    let mut family = encoder.encode_descriptor(
        "pegaflow_engine_handoffs",
        "Hand-offs by outcome",
        None,
        MetricType::Counter,
    )?;
    for (outcome, count) in fired.into_iter().chain(failed) {
        let counter = ConstCounter::new(count);
        counter.encode(family.encode_family(&[("outcome", outcome)])?)?;
    }
    Ok(())
}
