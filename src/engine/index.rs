//! Which chunk is in which slot. Pure: no I/O, no clock (the caller passes the time).
//!
//! ```text
//!          insert              every rank committed
//!  Free ──────────▶ Pending ───────────────────────▶ Ready ──┐
//!   ▲                  │ a rank discarded, the         │     │ lease / unlease
//!   │                  │ session was lost, or          │  ◀──┘
//!   │                  ▼ it took too long              │
//!   ├──────────── Quarantined                          │ (damaged: found no more,
//!   │  every rank is done, or reaped                   │  but otherwise Ready)
//!   └──────────────────────────────── evict ───────────┘ (not held)
//! ```
//!
//! A chunk's *parent* is the one before it in its prompt. A chunk is *held* when it is Pending,
//! leased, or has a held child; what is not held can be evicted, leaves first, so that no chunk
//! outlives the prefix that makes it findable. `available` counts exactly that. `order` says which
//! one goes first; `writes` knows who may still be writing where; `table` finds a key's slot.
//!
//! A slot's generation rises whenever a chunk leaves it, so (slot, generation) names one chunk for
//! ever, and whoever holds a stale ref is refused. Nothing here walks over all slots: what a call
//! costs depends on the chunks that it is about.

#[cfg(test)]
mod check;
mod chunk;
mod condemn;
#[cfg(test)]
mod cost;
mod order;
mod table;
#[cfg(test)]
mod traces;
mod writes;

use std::hash::BuildHasher;
use std::time::Instant;

use foldhash::quality::RandomState;

pub use self::chunk::{
    Census, Committed, Condemned, Discarded, NewChunk, Owner, Resident, Waiter, Writer,
};
use self::chunk::{Chunk, Key, NONE, Parent, Place, Slot};
use self::order::Order;
use self::table::Table;
use self::writes::{Done, Writes};
use super::arena::FIRST_GENERATION;
use super::protocol::SlotRef;

#[derive(Debug)]
pub struct Index {
    /// Those that have ever been used; the others follow.
    slots: Vec<Slot>,
    capacity: u32,
    /// Of `slots`.
    free: Vec<u32>,
    by_key: Table,
    /// Keys are hashes already (vLLM's), so a fast hash will do; seeded, so that nobody outside this
    /// process knows which keys collide.
    hasher: RandomState,
    writes: Writes,
    order: Order,
    /// Slots with a lease.
    leased: u32,
    /// Slots of damaged chunks.
    damaged: u32,
    evictions: u64,
    /// Generations that rose since they were last taken.
    risen: Vec<SlotRef>,
}

impl Index {
    /// For chunks that the first `writers` ranks write.
    pub fn new(slots: u32, writers: u32) -> Self {
        Self {
            slots: Vec::with_capacity(slots as usize),
            capacity: slots,
            free: Vec::new(),
            by_key: Table::new(slots),
            hasher: RandomState::default(),
            writes: Writes::new(writers),
            order: Order::new(slots),
            leased: 0,
            damaged: 0,
            evictions: 0,
            risen: Vec::new(),
        }
    }

    pub fn slots(&self) -> u32 {
        self.capacity
    }

    /// Slots that new chunks can have: free ones and those of chunks that nothing holds.
    pub fn available(&self) -> u64 {
        u64::from(self.free()) + u64::from(self.order.evictable())
    }

    /// Slots under a lease.
    pub fn leased(&self) -> u32 {
        self.leased
    }

    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    pub fn census(&self) -> Census {
        let pending = self.writes.pending();
        Census {
            free: self.free(),
            pending,
            ready: self.by_key.len() - pending,
            quarantined: self.writes.quarantined(),
            damaged: self.damaged,
        }
    }

    pub fn find(&self, key: &[u8]) -> Option<Resident> {
        let slot = self.position(self.hash(key), key)?;
        let chunk = self.chunk(slot)?;
        Some(Resident {
            at: self.reference(slot),
            ready: chunk.ready,
            leased: chunk.leases > 0,
        })
    }

    /// Takes a slot for a Pending chunk, evicting if it must. `None`: nothing is available, or
    /// the key is there already.
    pub fn insert(&mut self, new: NewChunk<'_>) -> Option<SlotRef> {
        let hash = self.hash(new.key);
        if self.position(hash, new.key).is_some() {
            return None;
        }
        if self.free() == 0 {
            self.evict()?;
        }
        let slot = self.take_free()?;
        self.slots.get_mut(slot as usize)?.chunk = Some(Chunk {
            key: Key::new(new.key),
            parent: None,
            children: 0,
            held_children: 0,
            leases: 0,
            before: NONE,
            after: NONE,
            place: Place::Held,
            ready: false,
            hot: false,
            damaged: false,
        });
        self.by_key.insert(hash, slot);
        let at = self.reference(slot);
        self.writes.begin(at, new.owner, new.since);
        if let Some(parent) = new.parent {
            self.adopt(at, parent);
        }
        Some(at)
    }

    /// Makes `parent` the parent of a chunk that has none and is nobody's parent itself (so no
    /// circle can arise, whatever order the keys came in). The parent is held: what is not has
    /// its turn among the evictable ones already, and a child must not come after it.
    pub fn adopt(&mut self, child: SlotRef, parent: SlotRef) {
        let can_be_parent = |chunk: &Chunk| chunk.is_held() && !chunk.damaged;
        if child == parent || !self.current(parent).is_some_and(can_be_parent) {
            return;
        }
        let Some(orphan) = self.current(child) else {
            return;
        };
        let known = orphan.parent.and_then(|parent| self.current(parent.at()));
        if known.is_some() || orphan.children > 0 {
            return;
        }
        let (held, hot) = (orphan.is_held(), orphan.hot);
        if let Some(orphan) = self.chunk_mut(child.slot) {
            orphan.parent = Parent::new(parent);
        }
        self.change(parent.slot, |parent| {
            parent.children += 1;
            parent.held_children += u32::from(held);
            parent.hot |= hot;
        });
    }

    /// Pins a chunk. False: the ref is stale.
    pub fn lease(&mut self, at: SlotRef) -> bool {
        let live = self.current(at).is_some();
        if live {
            self.change(at.slot, |chunk| chunk.leases += 1);
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

    /// Another request has asked for a leased or Pending chunk: it outlives those that are only
    /// written.
    pub fn reuse(&mut self, at: SlotRef) {
        if let Some(chunk) = self.current_mut(at)
            && chunk.is_held()
        {
            chunk.hot = true;
        }
    }

    /// Tells `waiter` when the chunk is Ready or dead. False: it is Ready, or the ref is stale.
    pub fn wait(&mut self, at: SlotRef, waiter: Waiter) -> bool {
        self.current(at).is_some() && self.writes.wait(at.slot, waiter)
    }

    /// A rank has written its part.
    pub fn commit(&mut self, at: SlotRef, by: &Writer) -> Committed {
        match self.writes.done(at, by) {
            Done::Unknown => Committed::Ignored,
            Done::Partly => Committed::Partly,
            Done::Abandoned => Committed::Late,
            Done::Freed => {
                self.free.push(at.slot);
                Committed::Late
            }
            Done::Complete(waiters) => {
                self.change(at.slot, |chunk| chunk.ready = true);
                Committed::Ready(waiters)
            }
        }
    }

    /// A rank will not write its part, now or later: the chunk will never be complete. Its slot is
    /// out of use until all ranks are done with it.
    pub fn discard(&mut self, at: SlotRef, by: &Writer) -> Discarded {
        let waiters = self
            .writes
            .is_pending(at, &by.owner)
            .then(|| self.quarantine(at.slot));
        let done = self.writes.done(at, by);
        if matches!(done, Done::Freed) {
            self.free.push(at.slot);
        }
        match (waiters, done) {
            (Some(waiters), _) => Discarded::Now(waiters),
            (None, Done::Unknown) => Discarded::Ignored,
            (None, _) => Discarded::Late,
        }
    }

    /// Gives up every Pending chunk of `by`.
    pub fn discard_all(&mut self, by: &Owner) -> Vec<Waiter> {
        let pending = self.writes.pending_of(by).into_iter();
        pending.flat_map(|slot| self.quarantine(slot)).collect()
    }

    /// Gives up a chunk that has been Pending since `before` or longer; who waited for it. `None`: it
    /// is Ready, younger, or gone.
    pub fn give_up(&mut self, at: SlotRef, before: Instant) -> Option<Vec<Waiter>> {
        let stuck = self.writes.is_pending_since(at, before);
        stuck.then(|| self.quarantine(at.slot))
    }

    /// Since when the oldest Pending chunk is.
    pub fn oldest_pending(&self) -> Option<Instant> {
        self.writes.oldest_pending()
    }

    /// `by` has ended every copy of its earlier sessions: it writes no quarantined slot any more.
    pub fn returned(&mut self, by: &Writer) {
        self.free.extend(self.writes.returned(by));
    }

    /// Nobody of `reaped` or before it can write any more: their quarantined slots are free.
    pub fn release(&mut self, reaped: &Owner) {
        self.free.extend(self.writes.reaped(reaped));
    }

    /// Evicts everything that is not held. How many chunks that were.
    pub fn flush(&mut self) -> u32 {
        let mut evicted = 0;
        while self.evict().is_some() {
            evicted += 1;
        }
        evicted
    }

    /// Slots whose generation rose since the last call, with the new one.
    pub fn take_risen(&mut self) -> Vec<SlotRef> {
        std::mem::take(&mut self.risen)
    }

    fn free(&self) -> u32 {
        let used = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        let freed = u32::try_from(self.free.len()).unwrap_or(u32::MAX);
        self.capacity - used + freed
    }

    fn take_free(&mut self) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let slot = u32::try_from(self.slots.len()).ok()?;
        if slot >= self.capacity {
            return None;
        }
        self.slots.push(Slot {
            generation: FIRST_GENERATION,
            chunk: None,
        });
        Some(slot)
    }

    fn evict(&mut self) -> Option<()> {
        let victim = self.order.victim()?;
        self.remove(victim)?;
        self.free.push(victim);
        self.evictions += 1;
        Some(())
    }

    fn quarantine(&mut self, slot: u32) -> Vec<Waiter> {
        self.remove(slot);
        self.writes.quarantine(slot)
    }

    /// Takes the chunk out of its slot, which is nobody's then. Its children go on as orphans.
    fn remove(&mut self, slot: u32) -> Option<()> {
        self.unlist(slot);
        let chunk = self.slots.get_mut(slot as usize)?.chunk.take()?;
        self.raise(slot);
        if chunk.damaged {
            self.damaged -= 1;
        } else {
            self.by_key.remove(self.hash(chunk.key.as_bytes()), slot);
        }
        self.leased -= u32::from(chunk.leases > 0);
        let held = chunk.is_held();
        if let Some(parent) = chunk.parent.map(Parent::at)
            && self.current(parent).is_some()
        {
            self.change(parent.slot, |parent| {
                parent.children = parent.children.saturating_sub(1);
                parent.held_children = parent.held_children.saturating_sub(u32::from(held));
            });
        }
        Some(())
    }

    fn raise(&mut self, slot: u32) {
        if let Some(slot) = self.slots.get_mut(slot as usize) {
            let next = slot.generation.checked_add(1);
            slot.generation = next.unwrap_or(FIRST_GENERATION);
        }
        let risen = self.reference(slot);
        self.risen.push(risen);
    }

    fn hash(&self, key: &[u8]) -> u32 {
        (self.hasher.hash_one(key) >> 32) as u32
    }

    fn position(&self, hash: u32, key: &[u8]) -> Option<u32> {
        let is_it = |slot| self.chunk(slot).is_some_and(|c| c.key.as_bytes() == key);
        self.by_key.find(hash, is_it)
    }

    fn reference(&self, slot: u32) -> SlotRef {
        let known = self.slots.get(slot as usize);
        SlotRef {
            slot,
            generation: known.map_or(FIRST_GENERATION, |slot| slot.generation),
        }
    }

    fn chunk(&self, slot: u32) -> Option<&Chunk> {
        self.slots.get(slot as usize)?.chunk.as_ref()
    }

    fn chunk_mut(&mut self, slot: u32) -> Option<&mut Chunk> {
        self.slots.get_mut(slot as usize)?.chunk.as_mut()
    }

    fn current(&self, at: SlotRef) -> Option<&Chunk> {
        let slot = self.slots.get(at.slot as usize)?;
        slot.chunk
            .as_ref()
            .filter(|_| slot.generation == at.generation)
    }

    fn current_mut(&mut self, at: SlotRef) -> Option<&mut Chunk> {
        let slot = self.slots.get_mut(at.slot as usize)?;
        let current = slot.generation == at.generation;
        slot.chunk.as_mut().filter(|_| current)
    }
}
