//! What an operator can see of the store and do to it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::handoffs::Stage;
use super::stats::SessionStats;
use crate::fleet::NodeId;

/// The store at one moment, in detail.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Inspection {
    pub namespaces: Vec<NamespaceInfo>,
    pub sessions: Vec<SessionStats>,
    /// The oldest, at most [`MAX_LISTED`].
    pub leases: Vec<LeaseInfo>,
    /// The oldest, at most [`MAX_LISTED`].
    pub handoffs: Vec<HandoffInfo>,
}

/// The most leases, and the most hand-offs, in an [`Inspection`].
pub const MAX_LISTED: usize = 100;

/// KV that can be exchanged: its identity, and the part of the arena that it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NamespaceInfo {
    /// Whose nodes exchange it: `pool` in the topology.
    pub pool: String,
    /// 0 until a worker has fixed the size of a chunk.
    pub epoch: u64,
    pub fields: BTreeMap<String, String>,
    /// Ranks that write a chunk.
    pub world: u32,
    /// Connected vLLM processes.
    pub sessions: usize,
    pub slots: u32,
    pub free: u32,
    pub ready: u32,
    pub pending: u32,
    pub quarantined: u32,
    pub damaged: u32,
    pub leased: u32,
    /// Set aside for hand-offs.
    pub reserved: u64,
    pub arena_bytes: u64,
}

/// Chunks that a request, or what is left of a lost session, has pinned.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LeaseInfo {
    pub node: NodeId,
    pub incarnation: u64,
    /// `None`: its session was lost, and its workers may still be reading.
    pub request: Option<String>,
    pub chunks: usize,
    pub age_seconds: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HandoffInfo {
    pub id: String,
    /// The prefill node.
    pub node: NodeId,
    pub incarnation: u64,
    pub stage: Stage,
    /// Chunks that it has.
    pub chunks: u32,
    /// How many of them are not in the store yet.
    pub missing: usize,
    /// Slots that are set aside for chunks to come.
    pub reserved: u32,
    pub age_seconds: f64,
}

/// What a flush did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Flushed {
    /// Chunks that are gone.
    pub evicted: u32,
    /// Chunks that stayed, because somebody writes, reads or waits for them.
    pub held: u32,
}
