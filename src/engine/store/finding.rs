//! Lookups: a hit is leased in the same call.

use super::*;

impl Store {
    pub(super) fn lookup(
        &mut self,
        id: SessionId,
        query: &KeyQuery,
        now: Instant,
    ) -> Result<Found, ProtocolError> {
        let keys = query.keys()?;
        let mut request = self.take_request(id, &query.request)?;
        self.unlease_all(mem::take(&mut request.leases));
        let handoff = self.named_handoff(query)?;
        let producing = handoff.filter(|&number| self.produces(id, number));
        // That a prompt goes on to its decode node does not make it one that comes again.
        let is_handed_over = query.handoff.is_some() && producing.is_none();

        let mut states = Vec::with_capacity(keys.len());
        let mut refs = Vec::with_capacity(keys.len());
        let mut tails = Tails::default();
        let mut broken = HashSet::new();
        for key in &keys {
            let group = group(key);
            let found = self.index.find(key);
            let state = match found {
                None => KeyState::Miss,
                Some(found) => {
                    // Only what is held becomes a parent here, so nothing that was available
                    // stops being so.
                    if let Some(parent) = tails.get(group) {
                        self.index.adopt(found.at, parent);
                    }
                    let leased = found.ready && self.lease_for(producing, found.at);
                    match (found.ready, leased) {
                        (false, _) => KeyState::Pending,
                        (true, false) => KeyState::Miss,
                        (true, true) => {
                            request.leases.push(found.at);
                            if !is_handed_over {
                                self.index.reuse(found.at);
                            }
                            KeyState::Hit
                        }
                    }
                }
            };
            let hit = found.filter(|_| state == KeyState::Hit);
            refs.push(hit.map_or(SlotRef::NONE, |found| found.at));
            match found {
                Some(found) if state != KeyState::Miss && !broken.contains(&group) => {
                    tails.insert(group, found.at);
                }
                _ => {
                    broken.insert(group);
                }
            }
            states.push(state as u8);
        }
        if let Some(node) = self.sessions.get(&id).map(|s| &s.owner.node) {
            self.counters.looked_up(node, &states);
        }
        request.since = (!request.leases.is_empty()).then_some(now);
        request.tails = tails;
        let complete = !states.is_empty() && states.iter().all(|&s| s == KeyState::Hit as u8);
        self.put_request(id, &query.request, request);
        match (handoff, producing) {
            (_, Some(number)) if complete => self.fire_if_complete(number, now),
            (Some(number), None) => self.consume(number, id),
            _ => {}
        }
        Ok(Found {
            seq: query.seq,
            states: ByteBuf::from(states),
            refs: SlotRef::encode_all(refs),
        })
    }

    /// Leases a Ready chunk to a request, unless too much is leased or what is left is reserved.
    /// A prefill node's find also counts for its hand-off.
    fn lease_for(&mut self, handoff: Option<Number>, at: SlotRef) -> bool {
        if let Some(number) = handoff
            && self.handoffs.get(number).is_some_and(|h| !h.holds(at))
        {
            let reserved = self.handoffs.get(number).map_or(0, |h| h.reserved().min(1));
            if !self.index.lease(at) {
                return false;
            }
            if self.index.available() < self.handoffs.reserved() - u64::from(reserved) {
                self.index.unlease(at);
                return false;
            }
            self.handoffs.add(number, at, true);
        }
        let before = self.index.leased();
        if !self.index.lease(at) {
            return false;
        }
        let cap = (u64::from(self.index.slots()) * LEASE_PERCENT / 100).max(1);
        let too_many = self.index.leased() > before && u64::from(self.index.leased()) > cap;
        if too_many || self.index.available() < self.handoffs.reserved() {
            self.index.unlease(at);
            return false;
        }
        true
    }
}
