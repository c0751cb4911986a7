//! Reports of damage: a worker has loaded a chunk whose checksum is not the one that was saved with it.
//!
//! What is wrong with the memory is not for the store to find out; it sees to it that nobody else loads
//! the chunk. Only who holds a lease on a chunk can have loaded it, so nobody can condemn what is not his
//! to read. A lease that ended while the report was under way makes it a stale one: the next load
//! reports again.

use super::*;
use crate::engine::index::Condemned;

impl Store {
    pub(super) fn damaged(
        &mut self,
        session: SessionId,
        damaged: &Damaged,
    ) -> Result<(), ProtocolError> {
        let refs = SlotRef::decode_all(&damaged.refs)?;
        let Some(owner) = self.owner_of(session) else {
            return Ok(());
        };
        let leased = self.leased_among(&owner, &refs);
        let mut chunks = 0;
        for at in refs {
            let leased = self.config.verify && leased.contains(&at);
            match leased.then(|| self.index.condemn(at)) {
                None | Some(Condemned::Ignored) => self.counters.stale_refs += 1,
                // Another rank, or another reader, has seen it too.
                Some(Condemned::Already) => {}
                Some(Condemned::Now) => {
                    chunks += 1;
                    for number in self.handoffs.running_with(at) {
                        self.fail(number, HandoffFailure::Damaged);
                    }
                }
            }
        }
        self.counters.damaged_chunks += chunks;
        if chunks > 0 {
            let node = &owner.node;
            tracing::warn!(%node, chunks, "stored KV is not what was saved; it is computed again");
        }
        Ok(())
    }

    /// Those of `refs` that requests of this incarnation hold.
    fn leased_among(&self, owner: &Owner, refs: &[SlotRef]) -> HashSet<SlotRef> {
        let wanted: HashSet<_> = refs.iter().copied().collect();
        let sessions = self.sessions.values();
        sessions
            .filter(|session| session.owner == *owner)
            .flat_map(|session| session.requests.values())
            .flat_map(|request| request.leases.iter().copied())
            .filter(|at| wanted.contains(at))
            .collect()
    }
}
