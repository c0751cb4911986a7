//! What the store says about itself, and what an operator may do to it.

use super::*;
use crate::engine::inspect::{Flushed, HandoffInfo, Inspection, LeaseInfo, NamespaceInfo};
use crate::engine::protocol::Loaded;

impl Store {
    pub fn stats(&self, now: Instant) -> EngineStats {
        let census = self.index.census();
        let oldest = self.leases(now).map(|lease| lease.age_seconds);
        let pending = self.index.oldest_pending();
        EngineStats {
            epoch: self.arena().map_or(0, |(epoch, _)| epoch),
            slots: self.index.slots(),
            used: self.index.slots() - census.free,
            ready: census.ready,
            pending: census.pending,
            leased: self.index.leased(),
            quarantined: census.quarantined,
            damaged: census.damaged,
            reserved: self.handoffs.reserved(),
            handoffs_open: self.handoffs.len() as u64,
            arena_bytes: self.shape.map_or(0, |shape| shape.arena_bytes),
            evictions: self.index.evictions(),
            oldest_lease_seconds: oldest.fold(0.0, f64::max),
            oldest_pending_seconds: pending.map_or(0.0, |since| age(since, now).as_secs_f64()),
            namespace: self.terms.clone().unwrap_or_default().namespace,
            sessions: self.sessions.values().map(Session::stats).collect(),
            counters: self.counters.clone(),
            pools: BTreeMap::new(),
        }
    }

    /// `None` while there is none.
    pub fn namespace(&self) -> Option<NamespaceInfo> {
        let terms = self.terms.as_ref()?;
        let census = self.index.census();
        Some(NamespaceInfo {
            pool: String::new(),
            epoch: self.arena().map_or(0, |(epoch, _)| epoch),
            fields: terms.namespace.clone(),
            world: terms.world,
            sessions: self.sessions.len(),
            slots: self.index.slots(),
            free: census.free,
            ready: census.ready,
            pending: census.pending,
            quarantined: census.quarantined,
            damaged: census.damaged,
            leased: self.index.leased(),
            reserved: self.handoffs.reserved(),
            arena_bytes: self.shape.map_or(0, |shape| shape.arena_bytes),
        })
    }

    /// Adds its sessions, leases and hand-offs.
    pub fn inspect(&self, now: Instant, all: &mut Inspection) {
        let handoff = |handoff: &Handoff| HandoffInfo {
            id: handoff.id.to_string(),
            node: handoff.owner.node.clone(),
            incarnation: handoff.owner.incarnation,
            stage: handoff.stage,
            chunks: handoff.chunks(),
            missing: handoff.missing(),
            reserved: handoff.reserved(),
            age_seconds: age(handoff.opened, now).as_secs_f64(),
        };
        all.sessions
            .extend(self.sessions.values().map(Session::stats));
        all.leases.extend(self.leases(now));
        all.handoffs.extend(self.handoffs.iter().map(handoff));
    }

    /// Evicts every chunk that nobody writes, reads or waits for.
    pub fn flush(&mut self) -> Flushed {
        let evicted = self.index.flush();
        self.sync_generations();
        let census = self.index.census();
        Flushed {
            evicted,
            held: census.ready + census.pending + census.damaged,
        }
    }

    pub(super) fn loaded(&mut self, session: SessionId, loaded: Loaded) {
        if let Some(session) = self.sessions.get(&session) {
            self.counters.loaded(&session.owner.node, loaded);
        }
    }

    fn leases(&self, now: Instant) -> impl Iterator<Item = LeaseInfo> {
        let of_requests = self.sessions.values().flat_map(move |session| {
            let with_leases = move |(name, request): (&String, &Request)| {
                let since = request.since?;
                Some(lease(
                    &session.owner,
                    Some(name),
                    &request.leases,
                    age(since, now),
                ))
            };
            session.requests.iter().filter_map(with_leases)
        });
        let of_departed = self.departed.iter().filter_map(move |(owner, departed)| {
            let since = departed.since?;
            Some(lease(owner, None, &departed.leases, age(since, now)))
        });
        let held = |lease: &LeaseInfo| lease.chunks > 0;
        of_requests.chain(of_departed).filter(held)
    }
}

impl Session {
    fn stats(&self) -> SessionStats {
        SessionStats {
            node: self.owner.node.clone(),
            incarnation: self.owner.incarnation,
            kind: self.kind,
            rank: self.rank,
            pid: self.pid,
        }
    }
}

fn age(since: Instant, now: Instant) -> Duration {
    now.saturating_duration_since(since)
}

fn lease(owner: &Owner, request: Option<&String>, chunks: &[SlotRef], age: Duration) -> LeaseInfo {
    LeaseInfo {
        node: owner.node.clone(),
        incarnation: owner.incarnation,
        request: request.cloned(),
        chunks: chunks.len(),
        age_seconds: age.as_secs_f64(),
    }
}
