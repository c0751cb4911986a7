//! Slots that somebody may be writing: of whom, and which ranks are done.
//!
//! ```text
//!                    every rank committed
//!   Pending ───────────────────────────────────▶ (Ready, no longer here)
//!      │ a rank discarded, the session was lost, or it took too long
//!      ▼
//!   Quarantined ── every rank committed, discarded or said hello again ──▶ (Free, no longer here)
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use super::chunk::{Owner, Waiter, Writer};
use crate::engine::protocol::SlotRef;

#[derive(Debug)]
pub struct Writes {
    slots: HashMap<u32, Write>,
    /// The same slots.
    owners: BTreeMap<Owner, BTreeSet<u32>>,
    quarantined: u32,
    /// A bit per rank that writes.
    all: u64,
}

#[derive(Debug)]
struct Write {
    owner: Owner,
    /// As granted; a Quarantined slot's own generation has risen since.
    generation: u32,
    since: Instant,
    done: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    Pending(Vec<Waiter>),
    Quarantined,
}

/// What became of a slot when a rank was done with it.
#[derive(Debug)]
pub enum Done {
    /// Not being written, or not by this rank of this owner.
    Unknown,
    Partly,
    /// Every rank has committed; these waited.
    Complete(Vec<Waiter>),
    /// The chunk is given up, and other ranks may still be writing.
    Abandoned,
    /// The chunk is given up, and nobody is writing any more.
    Freed,
}

impl Writes {
    pub fn new(writers: u32) -> Self {
        Self {
            slots: HashMap::new(),
            owners: BTreeMap::new(),
            quarantined: 0,
            all: u64::MAX.checked_shr(64 - writers.min(64)).unwrap_or(0),
        }
    }

    pub fn pending(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX) - self.quarantined
    }

    pub fn quarantined(&self) -> u32 {
        self.quarantined
    }

    pub fn begin(&mut self, at: SlotRef, owner: &Owner, since: Instant) {
        let slots = self.owners.entry(owner.clone()).or_default();
        slots.insert(at.slot);
        let write = Write {
            owner: owner.clone(),
            generation: at.generation,
            since,
            done: 0,
            state: State::Pending(Vec::new()),
        };
        self.slots.insert(at.slot, write);
    }

    /// False: the slot is not Pending.
    pub fn wait(&mut self, slot: u32, waiter: Waiter) -> bool {
        match self.slots.get_mut(&slot).map(|write| &mut write.state) {
            Some(State::Pending(waiters)) => {
                waiters.push(waiter);
                true
            }
            _ => false,
        }
    }

    /// Whether the chunk that `at` names is being written by `owner` and wanted.
    pub fn is_pending(&self, at: SlotRef, owner: &Owner) -> bool {
        self.slots
            .get(&at.slot)
            .is_some_and(|write| write.is(at, owner) && write.is_pending())
    }

    /// Whether the chunk that `at` names has been Pending since `before` or longer.
    pub fn is_pending_since(&self, at: SlotRef, before: Instant) -> bool {
        let write = self.slots.get(&at.slot);
        write.is_some_and(|write| {
            write.is_pending() && write.generation == at.generation && write.since <= before
        })
    }

    pub fn oldest_pending(&self) -> Option<Instant> {
        let pending = self.slots.values().filter(|write| write.is_pending());
        pending.map(|write| write.since).min()
    }

    pub fn done(&mut self, at: SlotRef, by: &Writer) -> Done {
        let Some(write) = self.slots.get_mut(&at.slot) else {
            return Done::Unknown;
        };
        let writer = bit(by.rank) & self.all;
        if !write.is(at, &by.owner) || writer == 0 {
            return Done::Unknown;
        }
        write.done |= writer;
        match (&mut write.state, write.done == self.all) {
            (State::Pending(_), false) => Done::Partly,
            (State::Quarantined, false) => Done::Abandoned,
            (State::Pending(waiters), true) => {
                let waiters = std::mem::take(waiters);
                self.end(at.slot);
                Done::Complete(waiters)
            }
            (State::Quarantined, true) => {
                self.end(at.slot);
                Done::Freed
            }
        }
    }

    /// Gives a Pending chunk up. Its slot waits for the ranks that are not done.
    pub fn quarantine(&mut self, slot: u32) -> Vec<Waiter> {
        let Some(write) = self.slots.get_mut(&slot) else {
            return Vec::new();
        };
        match std::mem::replace(&mut write.state, State::Quarantined) {
            State::Pending(waiters) => {
                self.quarantined += 1;
                waiters
            }
            State::Quarantined => Vec::new(),
        }
    }

    pub fn pending_of(&self, owner: &Owner) -> Vec<u32> {
        let slots = self.owners.get(owner).into_iter().flatten().copied();
        let pending = |slot: &u32| {
            let write = self.slots.get(slot);
            write.is_some_and(Write::is_pending)
        };
        slots.filter(pending).collect()
    }

    /// No earlier copy of `by` is running: it is done with every quarantined slot of its owner.
    /// Those that are free now.
    pub fn returned(&mut self, by: &Writer) -> Vec<u32> {
        let mut freed = Vec::new();
        for &slot in self.owners.get(&by.owner).into_iter().flatten() {
            if let Some(write) = self.slots.get_mut(&slot)
                && matches!(write.state, State::Quarantined)
            {
                write.done |= bit(by.rank) & self.all;
                if write.done == self.all {
                    freed.push(slot);
                }
            }
        }
        freed.iter().for_each(|&slot| self.end(slot));
        freed
    }

    /// Nobody of `reaped` or before it writes any more. Their quarantined slots, free now.
    pub fn reaped(&mut self, reaped: &Owner) -> Vec<u32> {
        let first = Owner {
            node: reaped.node.clone(),
            incarnation: 0,
        };
        let covered = self.owners.range(first..=reaped.clone());
        let mut freed: Vec<u32> = covered.flat_map(|(_, slots)| slots).copied().collect();
        freed.retain(|slot| {
            let write = self.slots.get(slot);
            write.is_some_and(|write| matches!(write.state, State::Quarantined))
        });
        freed.iter().for_each(|&slot| self.end(slot));
        freed
    }

    /// Every slot here, with its state: for tests.
    #[cfg(test)]
    pub fn check(&self) -> (BTreeSet<u32>, BTreeSet<u32>) {
        let listed: Vec<u32> = self.owners.values().flatten().copied().collect();
        let mut known: Vec<u32> = self.slots.keys().copied().collect();
        known.sort_unstable();
        let mut sorted = listed.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, known, "slots by owner");
        for (owner, slots) in &self.owners {
            assert!(!slots.is_empty(), "{owner:?} is kept without slots");
            assert!(slots.iter().all(|slot| self.slots[slot].owner == *owner));
        }
        let (pending, quarantined): (BTreeSet<u32>, BTreeSet<u32>) = known
            .into_iter()
            .partition(|slot| matches!(self.slots[slot].state, State::Pending(_)));
        assert_eq!(self.pending() as usize, pending.len());
        assert_eq!(self.quarantined as usize, quarantined.len());
        assert!(self.slots.values().all(|write| write.done != self.all));
        (pending, quarantined)
    }

    fn end(&mut self, slot: u32) {
        let Some(write) = self.slots.remove(&slot) else {
            return;
        };
        self.quarantined -= u32::from(matches!(write.state, State::Quarantined));
        if let Some(slots) = self.owners.get_mut(&write.owner) {
            slots.remove(&slot);
            if slots.is_empty() {
                self.owners.remove(&write.owner);
            }
        }
    }
}

impl Write {
    fn is_pending(&self) -> bool {
        matches!(self.state, State::Pending(_))
    }

    fn is(&self, at: SlotRef, owner: &Owner) -> bool {
        self.generation == at.generation && self.owner == *owner
    }
}

fn bit(rank: u32) -> u64 {
    1u64.checked_shl(rank).unwrap_or(0)
}
