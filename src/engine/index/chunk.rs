//! What a slot holds, and what is asked and answered about it.

use std::time::Instant;

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

/// One worker of an owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writer {
    pub owner: Owner,
    pub rank: u32,
}

/// Who waits for a Pending chunk (a hand-off's number).
pub type Waiter = u64;

/// Where no slot is.
pub const NONE: u32 = u32::MAX;

/// A slot that has ever been in use. Kept small: there is one per chunk of the arena.
#[derive(Debug)]
pub struct Slot {
    /// Of the chunk in it, or of the next one.
    pub generation: u32,
    pub chunk: Option<Chunk>,
}

#[derive(Debug)]
pub struct Chunk {
    pub key: Key,
    pub parent: Option<Parent>,
    pub children: u32,
    pub held_children: u32,
    pub leases: u32,
    /// Neighbours in the list of `place`.
    pub before: u32,
    pub after: u32,
    pub place: Place,
    pub ready: bool,
    /// Asked for again since it was written.
    pub hot: bool,
    /// Not what was saved: nobody finds it any more.
    pub damaged: bool,
}

impl Chunk {
    pub fn is_held(&self) -> bool {
        !self.ready || self.leases > 0 || self.held_children > 0
    }
}

/// A [`SlotRef`] that is never [`SlotRef::NONE`], so that an absent one takes no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    slot: u32,
    generation: std::num::NonZeroU32,
}

impl Parent {
    pub fn new(at: SlotRef) -> Option<Self> {
        let generation = std::num::NonZeroU32::new(at.generation)?;
        Some(Self {
            slot: at.slot,
            generation,
        })
    }

    pub fn at(self) -> SlotRef {
        SlotRef {
            slot: self.slot,
            generation: self.generation.get(),
        }
    }
}

/// Which list of evictable chunks a chunk is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In none.
    Held,
    Once,
    Hot,
}

/// A key, without an allocation of its own for those that vLLM makes (36 bytes).
#[derive(Debug)]
pub enum Key {
    Short { len: u8, bytes: [u8; SHORT] },
    Long(Box<[u8]>),
}

/// What fits beside a length and a tag into five words.
const SHORT: usize = 38;

impl Key {
    pub fn new(key: &[u8]) -> Self {
        let mut bytes = [0; SHORT];
        match (u8::try_from(key.len()), bytes.get_mut(..key.len())) {
            (Ok(len), Some(place)) => {
                place.copy_from_slice(key);
                Self::Short { len, bytes }
            }
            _ => Self::Long(key.into()),
        }
    }

    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Short { len, bytes } => bytes.get(..usize::from(*len)).unwrap_or_default(),
            Self::Long(bytes) => bytes,
        }
    }
}

/// A new chunk.
#[derive(Debug)]
pub struct NewChunk<'a> {
    pub key: &'a [u8],
    pub parent: Option<SlotRef>,
    pub owner: &'a Owner,
    /// From when on it is Pending.
    pub since: Instant,
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
    /// The chunk was given up before; its slot has one writer less.
    Late,
}

/// What a discard did.
#[derive(Debug, PartialEq, Eq)]
pub enum Discarded {
    /// A stale ref, or not this owner's.
    Ignored,
    /// The chunk is given up; these waited for it.
    Now(Vec<Waiter>),
    /// The chunk was given up before; its slot has one writer less.
    Late,
}

/// What a report of damage did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condemned {
    /// A stale ref, or a Pending chunk: nobody can have loaded it.
    Ignored,
    /// The chunk cannot be found any more.
    Now,
    /// It was reported before.
    Already,
}

/// How many slots are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    pub free: u32,
    pub pending: u32,
    pub ready: u32,
    pub quarantined: u32,
    /// Until their turn to be evicted.
    pub damaged: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_small_and_keys_of_any_length_come_back() {
        assert_eq!(size_of::<Slot>(), 80);
        for len in [1, 8, 36, SHORT, SHORT + 1, 256] {
            let key: Vec<u8> = (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect();
            assert_eq!(Key::new(&key).as_bytes(), key);
        }
    }
}
