//! What the engine counts, as the status page and the metrics show it.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

use super::protocol::{Loaded, RefusalCode, SessionKind};
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
    pub save_micros: u64,
    pub discarded_chunks: u64,
    /// Commits and discards that named a chunk of the past.
    pub stale_refs: u64,
    pub loaded_chunks: u64,
    pub loaded_bytes: u64,
    pub load_micros: u64,
    pub failed_loads: u64,
    pub stores_refused: u64,
    pub handoffs_fired: u64,
    /// Those of the fired that the store held before prefill.
    pub handoffs_already_stored: u64,
    pub handoffs_failed: BTreeMap<&'static str, u64>,
    pub sessions_opened: u64,
    pub sessions_refused: u64,
    /// Sessions that broke the protocol or did not read their answers.
    pub sessions_broken: u64,
    /// The last refusals.
    pub refusals: VecDeque<RefusedSession>,
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

impl Counters {
    pub fn loaded(&mut self, loaded: Loaded) {
        self.loaded_chunks += u64::from(loaded.chunks);
        self.loaded_bytes = self.loaded_bytes.saturating_add(loaded.bytes);
        self.load_micros = self.load_micros.saturating_add(loaded.micros);
        self.failed_loads += u64::from(loaded.failed);
    }

    pub fn refused(&mut self, refused: RefusedSession) {
        self.sessions_refused += 1;
        self.refusals.truncate(REFUSALS - 1);
        self.refusals.push_front(refused);
    }
}
