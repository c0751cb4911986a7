//! From key to slot: a hash table that is made once, for as many entries as there are slots.
//!
//! Linear probing over `hash << 32 | slot + 1`, at most two thirds full. Removal moves later
//! entries back instead of leaving tombstones, so the table never has to be rebuilt: a store that
//! has evicted for weeks looks up as fast as a new one, and no single call is slow.

/// Twelve bytes an entry; untouched pages cost nothing.
#[derive(Debug)]
pub struct Table {
    /// 0 where there is none.
    entries: Vec<u64>,
    len: u32,
}

impl Table {
    pub fn new(slots: u32) -> Self {
        let slots = slots as usize;
        Self {
            entries: vec![0; slots + slots / 2 + 8],
            len: 0,
        }
    }

    pub fn len(&self) -> u32 {
        self.len
    }

    /// The slot with this hash that `is_it` confirms.
    pub fn find(&self, hash: u32, is_it: impl Fn(u32) -> bool) -> Option<u32> {
        self.position(hash, is_it).map(|(_, slot)| slot)
    }

    /// The caller has seen that the key is not there, and adds no more than one per slot.
    pub fn insert(&mut self, hash: u32, slot: u32) {
        let mut at = self.home(hash);
        while self.entry(at) != 0 {
            at = self.next(at);
        }
        self.set(at, u64::from(hash) << 32 | (u64::from(slot) + 1));
        self.len += 1;
    }

    pub fn remove(&mut self, hash: u32, slot: u32) {
        let Some((mut hole, _)) = self.position(hash, |other| other == slot) else {
            return;
        };
        self.len -= 1;
        let mut at = hole;
        loop {
            at = self.next(at);
            let entry = self.entry(at);
            if entry == 0 {
                break;
            }
            // An entry may move back to the hole unless that is before its home.
            let home = self.home(hash_of(entry));
            if self.distance(home, at) >= self.distance(hole, at) {
                self.set(hole, entry);
                hole = at;
            }
        }
        self.set(hole, 0);
    }

    fn position(&self, hash: u32, is_it: impl Fn(u32) -> bool) -> Option<(usize, u32)> {
        let mut at = self.home(hash);
        loop {
            let entry = self.entry(at);
            let slot = slot_of(entry)?;
            if hash_of(entry) == hash && is_it(slot) {
                return Some((at, slot));
            }
            at = self.next(at);
        }
    }

    /// Spreads the hashes evenly over the table, whatever its length.
    fn home(&self, hash: u32) -> usize {
        let home = (u128::from(hash) * self.entries.len() as u128) >> 32;
        usize::try_from(home).unwrap_or_default()
    }

    fn next(&self, at: usize) -> usize {
        let next = at + 1;
        if next == self.entries.len() { 0 } else { next }
    }

    /// From `from` on to `to`, in steps of [`Table::next`].
    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from {
            to - from
        } else {
            to + self.entries.len() - from
        }
    }

    fn entry(&self, at: usize) -> u64 {
        self.entries.get(at).copied().unwrap_or_default()
    }

    fn set(&mut self, at: usize, entry: u64) {
        if let Some(place) = self.entries.get_mut(at) {
            *place = entry;
        }
    }
}

fn hash_of(entry: u64) -> u32 {
    (entry >> 32) as u32
}

/// `None`: the place is empty.
fn slot_of(entry: u64) -> Option<u32> {
    (entry as u32).checked_sub(1)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use proptest::prelude::*;

    proptest! {
        // Few distinct hashes, so that runs are long and wrap around the end.
        #[test]
        fn it_finds_what_a_map_finds(ops in prop::collection::vec((0..24u32, 0..6u32), 0..400)) {
            let mut table = Table::new(24);
            let mut model: HashMap<u32, u32> = HashMap::new();
            for (slot, hash) in ops {
                let hash = u32::MAX - hash * (u32::MAX / 12);
                match model.remove(&slot) {
                    Some(hash) => table.remove(hash, slot),
                    None => {
                        table.insert(hash, slot);
                        model.insert(slot, hash);
                    }
                }
                prop_assert_eq!(table.len() as usize, model.len());
                for slot in 0..24 {
                    let found = model.get(&slot).map(|&hash| table.find(hash, |s| s == slot));
                    prop_assert_eq!(found.unwrap_or(Some(slot)), Some(slot));
                }
                prop_assert_eq!(table.find(5, |_| true), None);
            }
        }
    }
}
