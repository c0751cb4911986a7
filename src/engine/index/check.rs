//! The index's own bookkeeping, computed anew: for tests.

use std::collections::BTreeSet;

use super::*;

impl Index {
    /// Panics unless everything that is kept equals what follows from the slots.
    pub fn check(&self) {
        let all = || 0..u32::try_from(self.slots.len()).unwrap();
        let (pending, quarantined) = self.writes.check();
        let used: Vec<u32> = all().filter(|&at| self.chunk(at).is_some()).collect();
        let mut free = self.free.clone();
        free.sort_unstable();
        let empty = all().filter(|at| self.chunk(*at).is_none() && !quarantined.contains(at));
        assert_eq!(free, empty.collect::<Vec<_>>(), "free list");

        let is_damaged = |&&at: &&u32| self.chunk(at).unwrap().damaged;
        let damaged = used.iter().filter(is_damaged).count();
        assert_eq!(
            self.by_key.len() as usize,
            used.len() - damaged,
            "a slot per key"
        );
        let (mut leased, mut evictable) = (0, BTreeSet::new());
        for &at in &used {
            let chunk = self.chunk(at).unwrap();
            let key = chunk.key.as_bytes();
            let found = self.find(key).map(|found| found.at);
            assert_eq!(
                found == Some(self.reference(at)),
                !chunk.damaged,
                "found by its key"
            );
            assert!(
                chunk.ready || !chunk.damaged,
                "damaged before it was written"
            );
            assert_eq!(chunk.ready, !pending.contains(&at), "ready");
            let here = Parent::new(self.reference(at));
            let children: Vec<_> = used
                .iter()
                .filter_map(|&other| self.chunk(other))
                .filter(|other| other.parent == here)
                .collect();
            let held = children.iter().filter(|child| child.is_held()).count();
            assert_eq!(chunk.children as usize, children.len(), "children");
            assert_eq!(chunk.held_children as usize, held, "held children");
            leased += u32::from(chunk.leases > 0);
            if !chunk.is_held() {
                evictable.insert(at);
            }
        }
        assert_eq!(self.leased, leased, "leased");

        let (once, hot) = (self.listed(Place::Once), self.listed(Place::Hot));
        let order: Vec<u32> = once.iter().chain(&hot).copied().collect();
        assert_eq!(order.iter().copied().collect::<BTreeSet<_>>(), evictable);
        let place = |at: SlotRef| order.iter().position(|&other| other == at.slot);
        for (turn, &at) in order.iter().enumerate() {
            let parent = self.chunk(at).unwrap().parent.map(Parent::at);
            if let Some(parent) = parent.filter(|&parent| self.current(parent).is_some()) {
                let later = place(parent).is_none_or(|parents| parents > turn);
                assert!(later, "slot {at} would outlive its parent");
            }
        }

        let ready = used.len() - pending.len() - damaged;
        let counts = [
            free.len() + self.slots_never_used(),
            pending.len(),
            ready,
            quarantined.len(),
            damaged,
        ];
        let [free, pending, ready, quarantined, damaged] =
            counts.map(|n| u32::try_from(n).unwrap());
        let scanned = Census {
            free,
            pending,
            ready,
            quarantined,
            damaged,
        };
        assert_eq!(self.census(), scanned);
        assert_eq!(free + pending + ready + quarantined + damaged, self.slots());
    }

    pub fn is_leased(&self, at: SlotRef) -> bool {
        self.current(at).is_some_and(|chunk| chunk.leases > 0)
    }

    /// The sum of all pins.
    pub fn leases(&self) -> u32 {
        let chunks = self.slots.iter().filter_map(|slot| slot.chunk.as_ref());
        chunks.map(|chunk| chunk.leases).sum()
    }

    fn slots_never_used(&self) -> usize {
        self.capacity as usize - self.slots.len()
    }
}
