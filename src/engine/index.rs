//! Which chunk is in which slot. Pure: no I/O, no clock.
//!
//! ```text
//!          insert              every rank committed
//!  Free ──────────▶ Pending ───────────────────────▶ Ready ──┐
//!   ▲                  │ producer gone, discarded      │     │ lease / unlease
//!   │   release        ▼                               │  ◀──┘
//!   ├──────────── Quarantined                          │
//!   └──────────────────────────────── evict ───────────┘ (not held, no children)
//! ```
//!
//! A chunk's *parent* is the one before it in its prompt. A chunk is *held* when it is Pending,
//! leased, or has a held child; what is not held can be freed, leaves first, so that no chunk
//! outlives the prefix that makes it findable. `available` counts exactly that.
//!
//! A slot's generation rises whenever a chunk leaves it, so (slot, generation) names one chunk for
//! ever, and whoever holds a stale ref is refused.

#[cfg(test)]
mod check;
mod chunk;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

pub use self::chunk::{Census, Committed, NewChunk, Owner, Resident, Waiter};
use self::chunk::{Chunk, Slot, State};
use super::arena::FIRST_GENERATION;
use super::protocol::SlotRef;

#[derive(Debug)]
pub struct Index {
    slots: Vec<Slot>,
    generations: Vec<u32>,
    free: Vec<u32>,
    by_key: HashMap<Arc<[u8]>, u32>,
    /// Ready, not held, no children: by last use.
    victims: BTreeSet<(u64, u32)>,
    /// Chunks that are not held.
    evictable: u32,
    /// Slots with a lease.
    leased: u32,
    tick: u64,
    evictions: u64,
    /// Generations that rose since they were last taken.
    risen: Vec<SlotRef>,
}

impl Index {
    pub fn new(slots: u32) -> Self {
        let len = slots as usize;
        Self {
            slots: std::iter::repeat_with(|| Slot::Free).take(len).collect(),
            generations: vec![FIRST_GENERATION; len],
            free: (0..slots).rev().collect(),
            by_key: HashMap::new(),
            victims: BTreeSet::new(),
            evictable: 0,
            leased: 0,
            tick: 0,
            evictions: 0,
            risen: Vec::new(),
        }
    }

    pub fn slots(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    /// Slots that new chunks can have: free ones and those of chunks that nothing holds.
    pub fn available(&self) -> u64 {
        self.free.len() as u64 + u64::from(self.evictable)
    }

    /// Slots under a lease.
    pub fn leased(&self) -> u32 {
        self.leased
    }

    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    pub fn find(&self, key: &[u8]) -> Option<Resident> {
        let &slot = self.by_key.get(key)?;
        let chunk = self.chunk(slot)?;
        Some(Resident {
            at: self.reference(slot),
            ready: chunk.is_ready(),
            leased: chunk.leases > 0,
        })
    }

    /// Takes a slot for a Pending chunk, evicting if it must. `None`: nothing is available, or
    /// the key is there already.
    pub fn insert(&mut self, new: NewChunk<'_>) -> Option<SlotRef> {
        if self.by_key.contains_key(new.key) {
            return None;
        }
        if self.free.is_empty() {
            let &(_, victim) = self.victims.first()?;
            self.remove(victim, Slot::Free);
            self.evictions += 1;
        }
        let slot = self.free.pop()?;
        let key: Arc<[u8]> = new.key.into();
        self.tick += 1;
        let chunk = Chunk {
            key: key.clone(),
            parent: None,
            children: 0,
            held_children: 0,
            leases: 0,
            used: self.tick,
            state: State::Pending {
                owner: new.owner,
                committed: 0,
                waiters: Vec::new(),
            },
        };
        *self.slots.get_mut(slot as usize)? = Slot::Used(chunk);
        self.by_key.insert(key, slot);
        let at = self.reference(slot);
        if let Some(parent) = new.parent {
            self.adopt(at, parent);
        }
        Some(at)
    }

    /// Makes `parent` the parent of a chunk that has none and is nobody's parent itself (so no
    /// circle can arise, whatever order the keys came in).
    pub fn adopt(&mut self, child: SlotRef, parent: SlotRef) {
        if child == parent || self.current(parent).is_none() {
            return;
        }
        let Some(orphan) = self.current(child) else {
            return;
        };
        let known = orphan.parent.and_then(|parent| self.current(parent));
        if known.is_some() || orphan.children > 0 {
            return;
        }
        let held = orphan.is_held();
        if let Some(orphan) = self.chunk_mut(child.slot) {
            orphan.parent = Some(parent);
        }
        self.change(parent.slot, |parent| {
            parent.children += 1;
            parent.held_children += u32::from(held);
        });
    }

    /// Pins a chunk. False: the ref is stale.
    pub fn lease(&mut self, at: SlotRef) -> bool {
        let live = self.current(at).is_some();
        if live {
            self.tick += 1;
            let tick = self.tick;
            self.change(at.slot, |chunk| {
                chunk.leases += 1;
                chunk.used = tick;
            });
        }
        live
    }

    /// Ends one pin. Of a chunk that is gone, nothing is left to end.
    pub fn unlease(&mut self, at: SlotRef) {
        if self.current(at).is_some() {
            self.change(at.slot, |chunk| {
                chunk.leases = chunk.leases.saturating_sub(1);
            });
        }
    }

    /// Tells `waiter` when the chunk is Ready or dead. False: it is Ready, or the ref is stale.
    pub fn wait(&mut self, at: SlotRef, waiter: Waiter) -> bool {
        match self.current_mut(at).map(|chunk| &mut chunk.state) {
            Some(State::Pending { waiters, .. }) => {
                waiters.push(waiter);
                true
            }
            _ => false,
        }
    }

    /// `rank` (of `world`) of `by` has written its part.
    pub fn commit(&mut self, at: SlotRef, by: &Owner, rank: u32, world: u32) -> Committed {
        let all = u64::MAX.checked_shr(64 - world.min(64)).unwrap_or(0);
        let ready = match self.current_mut(at).map(|chunk| &mut chunk.state) {
            Some(State::Pending {
                owner,
                committed,
                waiters,
            }) if owner == by => {
                *committed |= 1u64.checked_shl(rank).unwrap_or(0);
                if *committed != all {
                    return Committed::Partly;
                }
                std::mem::take(waiters)
            }
            _ => return Committed::Ignored,
        };
        self.tick += 1;
        let tick = self.tick;
        self.change(at.slot, |chunk| {
            chunk.state = State::Ready;
            chunk.used = tick;
        });
        Committed::Ready(ready)
    }

    /// A Pending chunk of `by` will never be complete. Its slot is out of use until
    /// [`Index::release`]. `None`: a stale ref, or not this owner's.
    pub fn discard(&mut self, at: SlotRef, by: &Owner) -> Option<Vec<Waiter>> {
        match &self.current(at)?.state {
            State::Pending { owner, .. } if owner == by => self.quarantine(at.slot),
            _ => None,
        }
    }

    /// [`Index::discard`] for every Pending chunk of `by`.
    pub fn discard_all(&mut self, by: &Owner) -> Vec<Waiter> {
        let theirs = |slot: &Slot| match slot {
            Slot::Used(chunk) => {
                matches!(&chunk.state, State::Pending { owner, .. } if owner == by)
            }
            _ => false,
        };
        let slots = self.positions(theirs);
        slots
            .into_iter()
            .filter_map(|slot| self.quarantine(slot))
            .flatten()
            .collect()
    }

    /// Nobody of `reaped` or before it can write any more: their quarantined slots are free.
    pub fn release(&mut self, reaped: &Owner) {
        let covered =
            |slot: &Slot| matches!(slot, Slot::Quarantined(owner) if owner.is_covered_by(reaped));
        for slot in self.positions(covered) {
            if let Some(place) = self.slots.get_mut(slot as usize) {
                *place = Slot::Free;
                self.free.push(slot);
            }
        }
    }

    /// Slots whose generation rose since the last call, with the new one.
    pub fn take_risen(&mut self) -> Vec<SlotRef> {
        std::mem::take(&mut self.risen)
    }

    pub fn census(&self) -> Census {
        let mut census = Census::default();
        for slot in &self.slots {
            *match slot {
                Slot::Free => &mut census.free,
                Slot::Quarantined(_) => &mut census.quarantined,
                Slot::Used(chunk) if chunk.is_ready() => &mut census.ready,
                Slot::Used(_) => &mut census.pending,
            } += 1;
        }
        census
    }

    fn positions(&self, wanted: impl Fn(&Slot) -> bool) -> Vec<u32> {
        (0..)
            .zip(&self.slots)
            .filter_map(|(at, slot)| wanted(slot).then_some(at))
            .collect()
    }

    fn quarantine(&mut self, slot: u32) -> Option<Vec<Waiter>> {
        let State::Pending { owner, .. } = &self.chunk(slot)?.state else {
            return None;
        };
        let owner = owner.clone();
        match self.remove(slot, Slot::Quarantined(owner))?.state {
            State::Pending { waiters, .. } => Some(waiters),
            State::Ready => None,
        }
    }

    /// Takes the chunk out of its slot. Its children, if any, go on as orphans.
    fn remove(&mut self, slot: u32, next: Slot) -> Option<Chunk> {
        self.chunk(slot)?;
        let freed = matches!(next, Slot::Free);
        let place = self.slots.get_mut(slot as usize)?;
        let Slot::Used(chunk) = std::mem::replace(place, next) else {
            return None;
        };
        if freed {
            self.free.push(slot);
        }
        self.raise(slot);
        self.by_key.remove(&chunk.key);
        self.victims.remove(&(chunk.used, slot));
        self.leased -= u32::from(chunk.leases > 0);
        let held = chunk.is_held();
        self.evictable -= u32::from(!held);
        if let Some(parent) = chunk.parent
            && self.current(parent).is_some()
        {
            self.change(parent.slot, |parent| {
                parent.children = parent.children.saturating_sub(1);
                parent.held_children = parent.held_children.saturating_sub(u32::from(held));
            });
        }
        Some(chunk)
    }

    fn raise(&mut self, slot: u32) {
        if let Some(generation) = self.generations.get_mut(slot as usize) {
            *generation = generation.checked_add(1).unwrap_or(FIRST_GENERATION);
        }
        let risen = self.reference(slot);
        self.risen.push(risen);
    }

    /// Changes a chunk and carries what that means for `held` up to its ancestors.
    fn change(&mut self, slot: u32, change: impl FnOnce(&mut Chunk)) {
        let mut above = self.change_one(slot, change);
        while let Some((parent, held)) = above {
            above = self.change_one(parent, |parent| {
                parent.held_children = if held {
                    parent.held_children + 1
                } else {
                    parent.held_children.saturating_sub(1)
                };
            });
        }
    }

    /// The parent to tell, and whether this child is held now, if that changed.
    fn change_one(&mut self, slot: u32, change: impl FnOnce(&mut Chunk)) -> Option<(u32, bool)> {
        let chunk = self.chunk_mut(slot)?;
        let (was_held, was_leased) = (chunk.is_held(), chunk.leases > 0);
        let was_victim = chunk.is_victim().then_some((chunk.used, slot));
        change(chunk);
        let (held, leased) = (chunk.is_held(), chunk.leases > 0);
        let victim = chunk.is_victim().then_some((chunk.used, slot));
        let parent = chunk.parent;
        if was_victim != victim {
            if let Some(old) = was_victim {
                self.victims.remove(&old);
            }
            self.victims.extend(victim);
        }
        self.leased = self.leased + u32::from(leased) - u32::from(was_leased);
        self.evictable = self.evictable + u32::from(!held) - u32::from(!was_held);
        let parent = parent.filter(|&parent| self.current(parent).is_some())?;
        (held != was_held).then_some((parent.slot, held))
    }

    fn reference(&self, slot: u32) -> SlotRef {
        let generation = self.generations.get(slot as usize).copied();
        SlotRef {
            slot,
            generation: generation.unwrap_or_default(),
        }
    }

    fn chunk(&self, slot: u32) -> Option<&Chunk> {
        match self.slots.get(slot as usize)? {
            Slot::Used(chunk) => Some(chunk),
            _ => None,
        }
    }

    fn chunk_mut(&mut self, slot: u32) -> Option<&mut Chunk> {
        match self.slots.get_mut(slot as usize)? {
            Slot::Used(chunk) => Some(chunk),
            _ => None,
        }
    }

    fn current(&self, at: SlotRef) -> Option<&Chunk> {
        (self.reference(at.slot) == at)
            .then(|| self.chunk(at.slot))
            .flatten()
    }

    fn current_mut(&mut self, at: SlotRef) -> Option<&mut Chunk> {
        if self.reference(at.slot) == at {
            self.chunk_mut(at.slot)
        } else {
            None
        }
    }
}
