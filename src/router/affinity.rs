//! Which node has computed the beginning of which prompt: what its GPU's prefix cache probably still holds.
//!
//! ```text
//! sent to a node: every beginning of the prompt (1 KiB, 2 KiB, ...) ─▶ that node
//! next prompt:    its longest beginning that is known ─▶ the node, if it is the same incarnation
//! ```
//!
//! A table and not a hash of the prefix: a new prompt goes where the load is least, and only one that was seen goes
//! back to where it was. The table forgets what was not looked for while [`HALF`] other beginnings were learned.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use foldhash::fast::RandomState;

use super::demand::Prefix;
use crate::fleet::NodeId;
use crate::traffic::Warm;

/// Beginnings; twice as many are kept. As many as a hash table of 4096 buckets takes.
const HALF: usize = 3583;

/// For which leg a node was chosen. What prefill nodes hold and what answering nodes hold are two things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Prefill,
    Answer,
}

#[derive(Debug, Default)]
pub(super) struct Affinity {
    prefill: Mutex<Table>,
    answer: Mutex<Table>,
}

/// Both halves keep their memory.
#[derive(Debug, Default)]
struct Table {
    young: HashMap<u64, Holder, RandomState>,
    old: HashMap<u64, Holder, RandomState>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Holder {
    node: NodeId,
    incarnation: u64,
}

impl Affinity {
    /// Who holds the longest known beginning of this prompt.
    pub(super) fn find(&self, place: Place, prefix: &Prefix) -> Option<Warm> {
        let mut known = prefix.longest_first().peekable();
        known.peek()?;
        let mut table = self.lock(place);
        known.find_map(|(hash, tokens)| {
            let holder = table.get(hash)?;
            Some(Warm {
                node: holder.node.clone(),
                incarnation: holder.incarnation,
                tokens,
            })
        })
    }

    pub(super) fn learn(&self, place: Place, prefix: &Prefix, node: &NodeId, incarnation: u64) {
        let mut known = prefix.longest_first().peekable();
        if known.peek().is_none() {
            return;
        }
        let mut table = self.lock(place);
        for (hash, _) in known {
            let holder = Holder {
                node: node.clone(),
                incarnation,
            };
            table.put(hash, holder);
        }
    }

    fn lock(&self, place: Place) -> std::sync::MutexGuard<'_, Table> {
        let table = match place {
            Place::Prefill => &self.prefill,
            Place::Answer => &self.answer,
        };
        // A half-made change forgets something, no more.
        table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn get(&mut self, hash: u64) -> Option<&Holder> {
        if let Some(holder) = self.old.remove(&hash) {
            self.put(hash, holder);
        }
        self.young.get(&hash).or_else(|| self.old.get(&hash))
    }

    fn put(&mut self, hash: u64, holder: Holder) {
        self.young.insert(hash, holder);
        self.old.remove(&hash);
        if self.young.len() > HALF {
            std::mem::swap(&mut self.old, &mut self.young);
            self.young.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::body::Fields;
    use super::super::demand::Demand;
    use super::*;

    fn prefix(text: &str) -> Prefix {
        let body = serde_json::json!({ "prompt": text }).to_string();
        let fields = Fields::parse(body.as_bytes()).unwrap();
        *Demand::of(&fields, body.len(), None).prefix()
    }

    #[test]
    fn a_prompt_finds_who_computed_its_beginning() {
        let affinity = Affinity::default();
        let [a, b] = ["a", "b"].map(NodeId::from);
        let long = prefix(&"x".repeat(9_000));
        assert!(affinity.find(Place::Prefill, &long).is_none());
        affinity.learn(Place::Prefill, &long, &a, 3);
        let found = affinity.find(Place::Prefill, &long).unwrap();
        assert_eq!(
            (&found.node, found.incarnation, found.tokens),
            (&a, 3, 2_048)
        );
        assert!(affinity.find(Place::Answer, &long).is_none());

        let begins_so = prefix(&format!("{}{}", "x".repeat(3_000), "y".repeat(9_000)));
        let found = affinity.find(Place::Prefill, &begins_so).unwrap();
        assert_eq!((&found.node, found.tokens), (&a, 512));
        affinity.learn(Place::Prefill, &begins_so, &b, 1);
        assert_eq!(affinity.find(Place::Prefill, &begins_so).unwrap().node, b);
        assert_eq!(affinity.find(Place::Prefill, &long).unwrap().node, a);
        assert!(affinity.find(Place::Prefill, &prefix("short")).is_none());
    }

    #[test]
    fn the_table_is_bounded_and_keeps_what_is_looked_for() {
        let mut table = Table::default();
        let holder = |node: &str| Holder {
            node: node.into(),
            incarnation: 1,
        };
        table.put(0, holder("kept"));
        for hash in 1..20 * HALF as u64 {
            table.put(hash, holder("n"));
            if hash % 1_000 == 0 {
                assert_eq!(table.get(0), Some(&holder("kept")));
            }
            assert!(table.young.len() <= HALF && table.old.len() <= HALF + 1);
        }
        assert!(table.get(1).is_none(), "forgotten");
    }
}
