//! What the engine counts, as the status page and the metrics show it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::Serialize;

use super::latency::Latencies;
use super::protocol::{Commit, KeyState, Loaded, RefusalCode, SessionKind};
use crate::fleet::NodeId;

/// A picture of the store at one moment.
#[derive(Debug, Clone, Default, Serialize)]
pub struct EngineStats {
    /// Rises with every new arena; 0 while there is none.
    pub epoch: u64,
    pub slots: u32,
    /// Slots that are not free.
    pub used: u32,
    pub ready: u32,
    pub pending: u32,
    pub leased: u32,
    /// Slots that wait for the processes of a dead incarnation to be gone.
    pub quarantined: u32,
    /// Slots of chunks that are not what was saved, until their turn to be evicted.
    pub damaged: u32,
    /// Slots set aside for the hand-offs under way.
    pub reserved: u64,
    pub handoffs_open: u64,
    pub arena_bytes: u64,
    pub evictions: u64,
    /// How long the oldest lease of a request has lasted; 0 without any.
    pub oldest_lease_seconds: f64,
    /// How long the oldest chunk has been Pending; 0 without any.
    pub oldest_pending_seconds: f64,
    pub namespace: BTreeMap<String, String>,
    pub sessions: Vec<SessionStats>,
    /// Occupancy, pool by pool.
    pub pools: BTreeMap<String, PoolStats>,
    #[serde(flatten)]
    pub counters: Counters,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PoolStats {
    /// Its share of the store's capacity.
    pub capacity_bytes: u64,
    /// 0 until a worker has fixed the size of a chunk.
    pub arena_bytes: u64,
    pub slots: u32,
    /// Slots that are not free.
    pub used: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SessionStats {
    pub node: NodeId,
    pub incarnation: u64,
    pub kind: SessionKind,
    pub rank: u32,
    pub pid: u32,
}

/// What only ever rises.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    pub lookups: u64,
    /// Keys, over all lookups.
    pub hits: u64,
    pub misses: u64,
    pub pending_hits: u64,
    /// Chunks of which a rank has written its part, ranks counted apart.
    pub saved_chunks: u64,
    pub saved_bytes: u64,
    /// From the beginning of a rank's copy to its end.
    pub save_seconds: Latencies,
    pub discarded_chunks: u64,
    /// Chunks that were given up because a rank neither wrote nor discarded its part in time.
    pub stuck_chunks: u64,
    /// Chunks that a reader found to be something else than what was saved.
    pub damaged_chunks: u64,
    /// Commits, discards and reports of damage that named a chunk of the past, or of others.
    pub stale_refs: u64,
    pub loaded_chunks: u64,
    pub loaded_bytes: u64,
    pub load_seconds: Latencies,
    pub failed_loads: u64,
    pub stores_refused: u64,
    pub handoffs_fired: u64,
    /// Those of the fired that the store held before prefill.
    pub handoffs_already_stored: u64,
    pub handoffs_failed: BTreeMap<&'static str, u64>,
    /// From `open` to the moment when every chunk was there.
    pub handoff_seconds: Latencies,
    /// Fired hand-offs that hold nothing any more: `looked_up` as intended, or why else.
    pub handoffs_released: BTreeMap<&'static str, u64>,
    pub sessions_opened: u64,
    pub sessions_refused: u64,
    /// Sessions that broke the protocol or did not read their answers.
    pub sessions_broken: u64,
    /// Sessions that ended, by why.
    pub sessions_lost: BTreeMap<&'static str, u64>,
    /// The same figures, node by node.
    pub nodes: BTreeMap<NodeId, NodeCounters>,
    /// The last refusals.
    pub refusals: VecDeque<RefusedSession>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct NodeCounters {
    pub hits: u64,
    pub misses: u64,
    pub pending_hits: u64,
    pub saved_bytes: u64,
    pub loaded_bytes: u64,
}

/// A `hello` that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RefusedSession {
    pub node: String,
    pub incarnation: u64,
    pub code: RefusalCode,
    /// The namespace fields that differ.
    pub fields: Vec<String>,
    pub message: String,
}

/// How many refusals are remembered.
const REFUSALS: usize = 16;

/// More names than this are no nodes of ours; their figures are kept together.
const MAX_NODES: usize = 1024;

impl EngineStats {
    /// Another pool's figures on top.
    pub fn add(&mut self, other: Self) {
        self.epoch = self.epoch.max(other.epoch);
        self.slots += other.slots;
        self.used += other.used;
        self.ready += other.ready;
        self.pending += other.pending;
        self.leased += other.leased;
        self.quarantined += other.quarantined;
        self.damaged += other.damaged;
        self.reserved += other.reserved;
        self.handoffs_open += other.handoffs_open;
        self.arena_bytes += other.arena_bytes;
        self.evictions += other.evictions;
        self.oldest_lease_seconds = self.oldest_lease_seconds.max(other.oldest_lease_seconds);
        self.oldest_pending_seconds = self
            .oldest_pending_seconds
            .max(other.oldest_pending_seconds);
        if self.namespace.is_empty() {
            self.namespace = other.namespace;
        }
        self.sessions.extend(other.sessions);
        self.pools.extend(other.pools);
        self.counters.add(other.counters);
    }
}

impl NodeCounters {
    fn add(&mut self, other: Self) {
        self.hits += other.hits;
        self.misses += other.misses;
        self.pending_hits += other.pending_hits;
        self.saved_bytes = self.saved_bytes.saturating_add(other.saved_bytes);
        self.loaded_bytes = self.loaded_bytes.saturating_add(other.loaded_bytes);
    }
}

impl Counters {
    /// Another pool's figures on top.
    fn add(&mut self, other: Self) {
        // Taken apart, so that no field is forgotten.
        let Self {
            lookups,
            hits,
            misses,
            pending_hits,
            saved_chunks,
            saved_bytes,
            save_seconds,
            discarded_chunks,
            stuck_chunks,
            damaged_chunks,
            stale_refs,
            loaded_chunks,
            loaded_bytes,
            load_seconds,
            failed_loads,
            stores_refused,
            handoffs_fired,
            handoffs_already_stored,
            handoffs_failed,
            handoff_seconds,
            handoffs_released,
            sessions_opened,
            sessions_refused,
            sessions_broken,
            sessions_lost,
            nodes,
            refusals,
        } = other;
        self.lookups += lookups;
        self.hits += hits;
        self.misses += misses;
        self.pending_hits += pending_hits;
        self.saved_chunks += saved_chunks;
        self.saved_bytes = self.saved_bytes.saturating_add(saved_bytes);
        self.save_seconds.add(&save_seconds);
        self.discarded_chunks += discarded_chunks;
        self.stuck_chunks += stuck_chunks;
        self.damaged_chunks += damaged_chunks;
        self.stale_refs += stale_refs;
        self.loaded_chunks += loaded_chunks;
        self.loaded_bytes = self.loaded_bytes.saturating_add(loaded_bytes);
        self.load_seconds.add(&load_seconds);
        self.failed_loads += failed_loads;
        self.stores_refused += stores_refused;
        self.handoffs_fired += handoffs_fired;
        self.handoffs_already_stored += handoffs_already_stored;
        self.handoff_seconds.add(&handoff_seconds);
        self.sessions_opened += sessions_opened;
        self.sessions_refused += sessions_refused;
        self.sessions_broken += sessions_broken;
        for (mine, theirs) in [
            (&mut self.handoffs_failed, handoffs_failed),
            (&mut self.handoffs_released, handoffs_released),
            (&mut self.sessions_lost, sessions_lost),
        ] {
            for (label, count) in theirs {
                *mine.entry(label).or_default() += count;
            }
        }
        for (node, figures) in nodes {
            self.node(&node).add(figures);
        }
        self.refusals.extend(refusals);
        self.refusals.truncate(REFUSALS);
    }

    /// A node's own figures.
    pub fn node(&mut self, node: &NodeId) -> &mut NodeCounters {
        let known = self.nodes.contains_key(node) || self.nodes.len() < MAX_NODES;
        let name = if known { node.clone() } else { "other".into() };
        self.nodes.entry(name).or_default()
    }

    pub fn looked_up(&mut self, node: &NodeId, states: &[u8]) {
        self.lookups += 1;
        let count = |wanted: KeyState| {
            let same = states.iter().filter(|&&state| state == wanted as u8);
            same.count() as u64
        };
        let found = count(KeyState::Hit);
        let missed = count(KeyState::Miss);
        let pending = count(KeyState::Pending);
        self.hits += found;
        self.misses += missed;
        self.pending_hits += pending;
        let node = self.node(node);
        node.hits += found;
        node.misses += missed;
        node.pending_hits += pending;
    }

    /// A rank's copy of some chunks into the store took so long.
    pub fn saved(&mut self, node: &NodeId, commit: &Commit) {
        self.saved_bytes = self.saved_bytes.saturating_add(commit.bytes);
        self.save_seconds
            .record(Duration::from_micros(commit.micros));
        let node = self.node(node);
        node.saved_bytes = node.saved_bytes.saturating_add(commit.bytes);
    }

    pub fn loaded(&mut self, node: &NodeId, loaded: Loaded) {
        self.loaded_chunks += u64::from(loaded.chunks);
        self.loaded_bytes = self.loaded_bytes.saturating_add(loaded.bytes);
        self.load_seconds
            .record(Duration::from_micros(loaded.micros));
        self.failed_loads += u64::from(loaded.failed);
        let node = self.node(node);
        node.loaded_bytes = node.loaded_bytes.saturating_add(loaded.bytes);
    }

    pub fn released(&mut self, how: &'static str) {
        *self.handoffs_released.entry(how).or_default() += 1;
    }

    pub fn refused(&mut self, refused: RefusedSession) {
        self.sessions_refused += 1;
        self.refusals.truncate(REFUSALS - 1);
        self.refusals.push_front(refused);
    }
}
