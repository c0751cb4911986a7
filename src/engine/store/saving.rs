//! How chunks come in, and how a hand-off goes from `open` to its outcome.

use super::*;
use crate::engine::index::{NewChunk, Resident};
use crate::engine::protocol::Granted;

/// How a fired hand-off should end.
const LOOKED_UP: &str = "looked_up";

impl Store {
    pub(super) fn open(
        &mut self,
        session: SessionId,
        open: Open,
        now: Instant,
    ) -> Result<(), ProtocolError> {
        check_name(&open.handoff)?;
        let mut request = self.take_request(session, &open.request)?;
        let id = HandoffId::from(open.handoff.as_str());
        if let Some(owner) = self.owner_of(session)
            && self.handoffs.number(&id).is_none()
        {
            self.actions.push(Action::Opened(id.clone()));
            let wanted = self.handoffs.reserved() + u64::from(open.chunks);
            if self.handoffs.is_unwanted(&id) {
                self.settle(id, HandoffOutcome::Failed(HandoffFailure::Abandoned));
            } else if self.handoffs.is_full() || self.index.available() < wanted {
                self.settle(id, HandoffOutcome::Failed(HandoffFailure::NoSpace));
            } else {
                let chunks = open.chunks;
                let new = NewHandoff { id, owner, chunks };
                request.handoff = Some(self.handoffs.open(new, now));
            }
        }
        self.put_request(session, &open.request, request);
        Ok(())
    }

    pub(super) fn seal(&mut self, session: SessionId, name: &str, now: Instant) {
        if let Some(number) = self.own_handoff(session, name) {
            self.handoffs.seal(number);
            self.fire_if_complete(number, now);
        }
    }

    pub(super) fn abort(&mut self, session: SessionId, name: &str) {
        if let Some(number) = self.own_handoff(session, name) {
            self.fail_unsealed(number);
        }
    }

    /// `store`: all new keys get slots, or none does.
    pub(super) fn save(
        &mut self,
        session: SessionId,
        query: &KeyQuery,
        now: Instant,
    ) -> Result<Granted, ProtocolError> {
        let keys = query.keys()?;
        let handoff = self.named_handoff(query)?;
        let handoff = handoff.filter(|&number| self.produces(session, number));
        let request = self.take_request(session, &query.request)?;
        let owner = self.owner_of(session);

        let found: Vec<Option<Resident>> = keys.iter().map(|key| self.index.find(key)).collect();
        // Whatever the new chunks will hold is held first: then `available` is exact.
        let parents = request.tails.all();
        let resident = found.iter().flatten().map(|resident| resident.at);
        let mut pins: Vec<_> = parents.chain(resident).collect();
        pins.retain(|&pin| self.index.lease(pin));

        let granted = match owner {
            Some(owner) if self.has_room(&keys, &found, handoff) => {
                let batch = Batch {
                    keys: &keys,
                    owner,
                    handoff,
                    since: now,
                };
                Some(self.insert_all(batch, request.tails))
            }
            _ => None,
        };
        self.unlease_all(pins);
        self.sync_generations();

        let ok = granted.is_some();
        let (tails, new) = granted.unwrap_or_default();
        self.put_request(session, &query.request, Request { tails, ..request });
        if !ok {
            self.counters.stores_refused += 1;
            if let Some(number) = handoff {
                self.fail(number, HandoffFailure::NoSpace);
            }
        }
        let indices = new.iter().flat_map(|(at, _)| at.to_le_bytes());
        Ok(Granted {
            seq: query.seq,
            ok,
            new: ByteBuf::from(indices.collect::<Vec<_>>()),
            refs: SlotRef::encode_all(new.iter().map(|&(_, at)| at)),
        })
    }

    /// Slots for all new keys, without those that other hand-offs have reserved.
    fn has_room(
        &self,
        keys: &[&[u8]],
        found: &[Option<Resident>],
        handoff: Option<Number>,
    ) -> bool {
        let handoff = handoff.and_then(|number| self.handoffs.get(number));
        let mut new = std::collections::HashSet::new();
        let mut added = std::collections::HashSet::new();
        for (key, found) in keys.iter().zip(found) {
            match found {
                None => {
                    new.insert(key);
                }
                Some(resident) if handoff.is_some_and(|h| !h.holds(resident.at)) => {
                    added.insert(resident.at);
                }
                Some(_) => {}
            }
        }
        let fulfilled = handoff.map_or(0, |h| {
            u64::from(h.reserved()).min((new.len() + added.len()) as u64)
        });
        let others = self.handoffs.reserved() - fulfilled;
        self.shape.is_some() && self.index.available() >= new.len() as u64 + others
    }

    /// The last chunk of each group, and what is to be written: its position and its place.
    fn insert_all(&mut self, batch: Batch<'_>, mut tails: Tails) -> (Tails, Vec<(u32, SlotRef)>) {
        let mut new = Vec::new();
        for (position, key) in (0..).zip(batch.keys) {
            let parent = tails.get(group(key));
            let (at, ready) = match self.index.find(key) {
                Some(resident) => {
                    if let Some(parent) = parent {
                        self.index.adopt(resident.at, parent);
                    }
                    if self.is_news(batch.handoff, resident.at) {
                        self.index.reuse(resident.at);
                    }
                    (resident.at, resident.ready)
                }
                None => {
                    let chunk = NewChunk {
                        key,
                        parent,
                        owner: &batch.owner,
                        since: batch.since,
                    };
                    let Some(at) = self.index.insert(chunk) else {
                        tracing::error!("no slot where one was counted; a chunk is not saved");
                        continue;
                    };
                    new.push((position, at));
                    (at, false)
                }
            };
            tails.insert(group(key), at);
            if let Some(number) = batch.handoff
                && self.is_news(batch.handoff, at)
            {
                self.index.lease(at);
                self.handoffs.add(number, at, ready);
                if !ready {
                    self.index.wait(at, number);
                }
            }
        }
        (tails, new)
    }

    pub(super) fn commit(
        &mut self,
        session: SessionId,
        commit: &Commit,
        now: Instant,
    ) -> Result<(), ProtocolError> {
        let refs = SlotRef::decode_all(&commit.refs)?;
        let Some(writer) = self.writer(session) else {
            return Ok(());
        };
        self.counters.saved(&writer.owner.node, commit);
        for at in refs {
            match self.index.commit(at, &writer) {
                Committed::Ignored => self.counters.stale_refs += 1,
                Committed::Late => {}
                Committed::Partly => self.counters.saved_chunks += 1,
                Committed::Ready(waiters) => {
                    self.counters.saved_chunks += 1;
                    for number in waiters {
                        self.arrived(number, now);
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn discard(
        &mut self,
        session: SessionId,
        discard: &Discard,
    ) -> Result<(), ProtocolError> {
        let refs = SlotRef::decode_all(&discard.refs)?;
        let Some(writer) = self.writer(session) else {
            return Ok(());
        };
        for at in refs {
            match self.index.discard(at, &writer) {
                Discarded::Ignored => self.counters.stale_refs += 1,
                Discarded::Late => {}
                Discarded::Now(waiters) => {
                    self.counters.discarded_chunks += 1;
                    for number in waiters {
                        self.fail(number, HandoffFailure::SaveFailed);
                    }
                }
            }
        }
        self.sync_generations();
        Ok(())
    }

    fn arrived(&mut self, number: Waiter, now: Instant) {
        let sealed = |h: &Handoff| h.stage == Stage::Sealed;
        if self.handoffs.arrived(number) && self.handoffs.get(number).is_some_and(sealed) {
            self.fire_if_complete(number, now);
        }
    }

    /// Settles a hand-off as Ready if every key that has come is. The caller knows that no more
    /// will come.
    pub(super) fn fire_if_complete(&mut self, number: Number, now: Instant) {
        let Some(handoff) = self.handoffs.get(number) else {
            return;
        };
        if !handoff.is_running() || !handoff.is_complete() {
            return;
        }
        let id = handoff.id.clone();
        let chunks = handoff.chunks();
        let already_stored = !handoff.wrote;
        let took = now.saturating_duration_since(handoff.opened);
        self.counters.handoff_seconds.record(took);
        if handoff.consumed || chunks == 0 {
            self.drop_handoff(number);
            self.counters.released(LOOKED_UP);
        } else {
            self.handoffs.fire(number, now);
        }
        self.counters.handoffs_fired += 1;
        self.counters.handoffs_already_stored += u64::from(already_stored);
        let outcome = HandoffOutcome::Ready {
            chunks,
            already_stored,
        };
        self.actions.push(Action::Settled(id, outcome));
    }

    /// A decode node has looked the hand-off up: its own leases hold the chunks from now on.
    pub(super) fn consume(&mut self, number: Number, session: SessionId) {
        let decode = self.owner_of(session);
        let Some(handoff) = self.handoffs.get(number) else {
            return;
        };
        if decode.is_none_or(|decode| decode.node == handoff.owner.node) {
            return;
        }
        if handoff.is_running() {
            self.handoffs.consume(number);
        } else {
            self.drop_handoff(number);
            self.counters.released(LOOKED_UP);
        }
    }

    /// The hand-off's time is over. A chunk of it that has been written for half of that time will
    /// never be: without this, every later prompt with that chunk would wait for it, too.
    pub(super) fn give_up_stuck(&mut self, number: Number, now: Instant) -> Vec<Waiter> {
        let Some(handoff) = self.handoffs.get(number).filter(|h| h.is_running()) else {
            return Vec::new();
        };
        let Some(before) = now.checked_sub(self.config.handoff_deadline / 2) else {
            return Vec::new();
        };
        let keys: Vec<_> = handoff.keys().collect();
        let mut waiters = Vec::new();
        for key in keys {
            if let Some(waited) = self.index.give_up(key, before) {
                self.counters.stuck_chunks += 1;
                waiters.extend(waited);
            }
        }
        self.sync_generations();
        waiters
    }

    pub(super) fn fail_unsealed(&mut self, number: Number) {
        let open = self.handoffs.get(number).map(|handoff| handoff.stage);
        if open == Some(Stage::Open) {
            self.fail(number, HandoffFailure::Aborted);
        }
    }

    /// Ends a hand-off; one that has fired only loses its leases.
    pub(super) fn fail(&mut self, number: Number, why: HandoffFailure) {
        let running = |h: &Handoff| (h.is_running(), h.id.clone());
        let Some((running, id)) = self.handoffs.get(number).map(running) else {
            return;
        };
        self.drop_handoff(number);
        if running {
            self.settle(id, HandoffOutcome::Failed(why));
        } else {
            self.counters.released(why.label());
        }
    }

    fn settle(&mut self, id: HandoffId, outcome: HandoffOutcome) {
        if let HandoffOutcome::Failed(why) = outcome {
            *self
                .counters
                .handoffs_failed
                .entry(why.label())
                .or_default() += 1;
        }
        self.actions.push(Action::Settled(id, outcome));
    }

    fn drop_handoff(&mut self, number: Number) {
        if let Some(handoff) = self.handoffs.remove(number) {
            for lease in handoff.into_leases() {
                self.index.unlease(lease);
            }
        }
    }

    fn own_handoff(&self, session: SessionId, name: &str) -> Option<Number> {
        let number = self.handoffs.number(&HandoffId::from(name))?;
        self.produces(session, number).then_some(number)
    }

    pub(super) fn named_handoff(&self, query: &KeyQuery) -> Result<Option<Number>, ProtocolError> {
        let Some(name) = &query.handoff else {
            return Ok(None);
        };
        check_name(name)?;
        Ok(self.handoffs.number(&HandoffId::from(name.as_str())))
    }

    /// The session belongs to the hand-off's prefill node, and the hand-off still takes keys.
    pub(super) fn produces(&self, session: SessionId, number: Number) -> bool {
        let owner = self.sessions.get(&session).map(|session| &session.owner);
        self.handoffs
            .get(number)
            .is_some_and(|handoff| handoff.is_running() && owner == Some(&handoff.owner))
    }

    /// The chunk does not count for the hand-off yet.
    fn is_news(&self, handoff: Option<Number>, at: SlotRef) -> bool {
        let known = handoff.and_then(|number| self.handoffs.get(number));
        known.is_some_and(|handoff| !handoff.holds(at))
    }

    fn writer(&self, session: SessionId) -> Option<Writer> {
        let session = self.sessions.get(&session)?;
        Some(Writer {
            owner: session.owner.clone(),
            rank: session.rank,
        })
    }

    pub(super) fn owner_of(&self, session: SessionId) -> Option<Owner> {
        Some(self.sessions.get(&session)?.owner.clone())
    }
}

/// What `store` brings.
struct Batch<'a> {
    keys: &'a [&'a [u8]],
    owner: Owner,
    handoff: Option<Number>,
    since: Instant,
}
