//! The index's own bookkeeping, computed anew: for tests.

use super::*;

impl Index {
    /// Panics unless everything that is kept equals what follows from the slots.
    pub fn check(&self) {
        let mut free: Vec<_> = self.free.clone();
        free.sort_unstable();
        let is_free = |slot: &Slot| matches!(slot, Slot::Free);
        assert_eq!(free, self.positions(is_free), "free list");

        let used = self.positions(|slot| matches!(slot, Slot::Used(_)));
        assert_eq!(self.by_key.len(), used.len(), "a slot per key");
        let (mut evictable, mut leased, mut victims) = (0, 0, BTreeSet::new());
        for &at in &used {
            let chunk = self.chunk(at).unwrap();
            assert_eq!(self.by_key.get(&chunk.key), Some(&at));
            let children: Vec<_> = used
                .iter()
                .filter_map(|&other| self.chunk(other))
                .filter(|other| other.parent == Some(self.reference(at)))
                .collect();
            let held = children.iter().filter(|child| child.is_held()).count();
            assert_eq!(chunk.children as usize, children.len(), "children");
            assert_eq!(chunk.held_children as usize, held, "held children");
            evictable += u32::from(!chunk.is_held());
            leased += u32::from(chunk.leases > 0);
            if chunk.is_victim() {
                victims.insert((chunk.used, at));
            }
        }
        assert_eq!(self.evictable, evictable, "evictable");
        assert_eq!(self.leased, leased, "leased");
        assert_eq!(self.victims, victims, "victims");
        let census = self.census();
        let sum = census.free + census.pending + census.ready + census.quarantined;
        assert_eq!(sum, self.slots());
    }

    /// The sum of all pins.
    pub fn leases(&self) -> u32 {
        let all = (0..self.slots()).filter_map(|slot| self.chunk(slot));
        all.map(|chunk| chunk.leases).sum()
    }
}
