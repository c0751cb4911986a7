//! What workers say in `model`.

use super::*;

impl World {
    pub(super) fn commit(&mut self, n: usize, rank: u32) {
        let (&at, written) = self.written.iter().nth(n).unwrap();
        let found = self.store.index.find(&written.key);
        let pending = found.is_some_and(|found| found.at == at && !found.ready);
        let message = ClientMessage::Commit(Commit {
            refs: SlotRef::encode_all([at]),
            bytes: 1,
            micros: 1,
        });
        if self.done(at, rank, message) && pending {
            self.written.get_mut(&at).unwrap().committed.insert(rank);
        }
    }

    /// Sends a rank's word that it is done with a chunk. Only its own incarnation can be writing;
    /// what a later one says must be ignored.
    pub(super) fn done(&mut self, at: SlotRef, rank: u32, message: ClientMessage) -> bool {
        let owner = self.written[&at].owner.clone();
        let node = self.node_of(&owner);
        let own = self.owner(node) == owner;
        let connected = self.nodes[node].1[rank as usize + 1].is_some();
        self.send(node, rank as usize + 1, message);
        if own && connected {
            self.written.get_mut(&at).unwrap().writing.remove(&rank);
        }
        own && connected
    }

    /// A report about a chunk that the node has leased, or about any: only the first can be true.
    pub(super) fn damage(&mut self, node: usize, rank: u32, n: usize, leased: bool) {
        let own = self.leases.iter().filter(|((of, _), _)| *of == node);
        let own: BTreeSet<SlotRef> = own.flat_map(|(_, leases)| leases).copied().collect();
        let among: Vec<SlotRef> = match leased {
            true => own.iter().copied().collect(),
            false => self.written.keys().copied().collect(),
        };
        let Some(&at) = among.get(n % among.len().max(1)) else {
            return;
        };
        let before = (
            self.store.counters.damaged_chunks,
            self.store.counters.stale_refs,
        );
        let connected = self.nodes[node].1[rank as usize + 1].is_some();
        let refs = SlotRef::encode_all([at]);
        self.send(
            node,
            rank as usize + 1,
            ClientMessage::Damaged(Damaged { refs }),
        );
        let believed = connected && own.contains(&at);
        let news = believed && self.damaged.insert(at);
        let after = (
            self.store.counters.damaged_chunks,
            self.store.counters.stale_refs,
        );
        let ignored = connected && !believed;
        assert_eq!(
            after,
            (before.0 + u64::from(news), before.1 + u64::from(ignored))
        );
    }
}
