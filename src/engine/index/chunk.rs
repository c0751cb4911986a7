//! What a slot holds, and what is asked and answered about it.

use std::sync::Arc;

use crate::engine::protocol::SlotRef;
use crate::fleet::NodeId;

/// One life of one node: who writes a chunk, who holds a lease.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner {
    pub node: NodeId,
    pub incarnation: u64,
}

impl Owner {
    /// Every process of `self` is gone once those of `reaped` and all before it are.
    pub fn is_covered_by(&self, reaped: &Self) -> bool {
        self.node == reaped.node && self.incarnation <= reaped.incarnation
    }
}

/// Who waits for a Pending chunk (a hand-off's number).
pub type Waiter = u64;

#[derive(Debug)]
pub enum Slot {
    Free,
    Quarantined(Owner),
    Used(Chunk),
}

#[derive(Debug)]
pub struct Chunk {
    pub key: Arc<[u8]>,
    pub parent: Option<SlotRef>,
    pub children: u32,
    pub held_children: u32,
    pub leases: u32,
    /// The tick of the last use.
    pub used: u64,
    pub state: State,
}

#[derive(Debug)]
pub enum State {
    Pending {
        owner: Owner,
        /// A bit per rank.
        committed: u64,
        waiters: Vec<Waiter>,
    },
    Ready,
}

impl Chunk {
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready)
    }

    pub fn is_held(&self) -> bool {
        !self.is_ready() || self.leases > 0 || self.held_children > 0
    }

    pub fn is_victim(&self) -> bool {
        !self.is_held() && self.children == 0
    }
}

/// A new chunk.
#[derive(Debug)]
pub struct NewChunk<'a> {
    pub key: &'a [u8],
    pub parent: Option<SlotRef>,
    pub owner: Owner,
}

/// A chunk that is in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    pub at: SlotRef,
    pub ready: bool,
    pub leased: bool,
}

/// What a commit did.
#[derive(Debug, PartialEq, Eq)]
pub enum Committed {
    /// A stale ref, or not this owner's.
    Ignored,
    /// Other ranks are to follow.
    Partly,
    /// The chunk is visible now; these waited for it.
    Ready(Vec<Waiter>),
}

/// How many slots are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    pub free: u32,
    pub pending: u32,
    pub ready: u32,
    pub quarantined: u32,
}
