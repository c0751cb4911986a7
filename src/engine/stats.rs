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
    /// Slots set aside for the hand-offs under way.
    pub reserved: u64,
    pub handoffs_open: u64,
    pub arena_bytes: u64,
    pub evictions: u64,
    /// How long the oldest lease of a request has lasted; 0 without any.
    pub oldest_lease_seconds: f64,
    pub namespace: BTreeMap<String, String>,
    pub sessions: Vec<SessionStats>,
    #[serde(flatten)]
    pub counters: Counters,
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
    /// Commits and discards that named a chunk of the past.
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

impl Counters {
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
