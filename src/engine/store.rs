//! The whole state of the engine behind its socket: index, hand-offs and sessions. Pure.
//!
//! One owner calls it, one message at a time; what is to be done outside (write a generation, tell
//! the hand-off board, close a session) comes back as [`Action`]s, in order, and is done before
//! the answer is sent.
//!
//! Two promises shape it:
//! - **No slot is reused under a living reader or writer.** What a session leaves behind (Pending
//!   chunks, leases) is invisible or kept, but not freed, until [`Store::incarnation_gone`].
//! - **What is reserved stays available**: `index.available() >= handoffs.reserved()` holds after
//!   every message, so a hand-off that was opened is never starved by another one half way.

mod admission;
mod saving;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::mem;
use std::time::{Duration, Instant};

use serde_bytes::ByteBuf;

use super::arena::Shape;
use super::handoffs::{Handoffs, NewHandoff, Number, Stage};
use super::index::{Committed, Discarded, Index, Owner, Waiter, Writer};
use super::protocol::{
    ClientMessage, Commit, Discard, Found, GROUP_LEN, KeyQuery, KeyState, Namespace, Open,
    ProtocolError, ServerMessage, SessionKind, SlotRef,
};
use super::stats::{Counters, EngineStats, SessionStats};
use crate::fleet::NodeId;
use crate::handoff::{HandoffFailure, HandoffId, HandoffOutcome};

/// Names a connection.
pub type SessionId = u64;
/// The longest name of a request or hand-off, in bytes.
const MAX_NAME: usize = 1024;
/// The most requests of a session that are not finished.
const MAX_REQUESTS: usize = 65_536;
/// The share of the slots that requests may pin, in percent.
const LEASE_PERCENT: u64 = 80;

/// What the store does not decide.
pub struct StoreConfig {
    pub token: String,
    /// The arena's size in bytes, at most.
    pub capacity: u64,
    pub handoff_deadline: Duration,
    /// The first arena's epoch.
    pub first_epoch: u64,
}

/// What is to be done outside, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Generation(SlotRef),
    Opened(HandoffId),
    Settled(HandoffId, HandoffOutcome),
    Close(SessionId),
}

pub struct Store {
    config: StoreConfig,
    /// Of the arena; meaningless while there is none.
    epoch: u64,
    /// What all sessions agree on, with the number of ranks.
    namespace: Option<(Namespace, u32)>,
    shape: Option<Shape>,
    index: Index,
    handoffs: Handoffs,
    sessions: BTreeMap<SessionId, Session>,
    next_session: SessionId,
    /// Leases of incarnations that lost their session and may still be reading.
    departed: HashMap<Owner, Vec<SlotRef>>,
    /// The last incarnation of each node of which no process is left.
    gone: HashMap<NodeId, u64>,
    counters: Counters,
    actions: Vec<Action>,
}

#[derive(Debug)]
struct Session {
    owner: Owner,
    kind: SessionKind,
    rank: u32,
    pid: u32,
    requests: HashMap<String, Request>,
}

#[derive(Debug, Default)]
struct Request {
    leases: Vec<SlotRef>,
    /// The last chunk known of each KV group: the parent of the next one.
    tails: Tails,
    handoff: Option<Number>,
}

type Tails = HashMap<[u8; GROUP_LEN], SlotRef>;

fn group(key: &[u8]) -> [u8; GROUP_LEN] {
    key.last_chunk().copied().unwrap_or_default()
}

impl Store {
    pub fn new(config: StoreConfig) -> Self {
        Self {
            epoch: config.first_epoch.saturating_sub(1),
            namespace: None,
            shape: None,
            index: Index::new(0, 1),
            handoffs: Handoffs::new(config.handoff_deadline),
            sessions: BTreeMap::new(),
            next_session: 1,
            departed: HashMap::new(),
            gone: HashMap::new(),
            counters: Counters::default(),
            actions: Vec::new(),
            config,
        }
    }

    /// What is to be done outside since the last call.
    pub fn take_actions(&mut self) -> Vec<Action> {
        mem::take(&mut self.actions)
    }

    /// The arena that the index describes, with its epoch.
    pub fn arena(&self) -> Option<(u64, Shape)> {
        Some((self.epoch, self.shape?))
    }

    /// One message of a session that was admitted. An error ends the session.
    pub fn handle(
        &mut self,
        session: SessionId,
        message: ClientMessage,
        now: Instant,
    ) -> Result<Option<ServerMessage>, ProtocolError> {
        let misplaced = ProtocolError::Misplaced(message.op());
        let Some(kind) = self.sessions.get(&session).map(|session| session.kind) else {
            return Err(misplaced);
        };
        use ClientMessage as M;
        match (kind, message) {
            (SessionKind::Scheduler, M::Lookup(query)) => {
                let found = self.lookup(session, &query, now)?;
                return Ok(Some(ServerMessage::Found(found)));
            }
            (SessionKind::Scheduler, M::Store(query)) => {
                let granted = self.save(session, &query)?;
                return Ok(Some(ServerMessage::Granted(granted)));
            }
            (SessionKind::Scheduler, M::Open(open)) => self.open(session, open, now)?,
            (SessionKind::Scheduler, M::Seal(name)) => self.seal(session, &name.handoff, now),
            (SessionKind::Scheduler, M::Abort(name)) => self.abort(session, &name.handoff),
            (SessionKind::Scheduler, M::Release(name)) => self.release(session, &name.request),
            (SessionKind::Scheduler, M::Finish(name)) => self.finish(session, &name.request),
            (SessionKind::Worker, M::Commit(commit)) => self.commit(session, &commit, now)?,
            (SessionKind::Worker, M::Discard(discard)) => self.discard(session, &discard)?,
            (SessionKind::Worker, M::Loaded(loaded)) => self.counters.loaded(loaded),
            _ => return Err(misplaced),
        }
        Ok(None)
    }

    /// A connection ended.
    pub fn disconnect(&mut self, id: SessionId) {
        let Some(session) = self.sessions.remove(&id) else {
            return;
        };
        let leases: Vec<_> = session
            .requests
            .into_values()
            .flat_map(|request| request.leases)
            .collect();
        if !leases.is_empty() {
            let kept = self.departed.entry(session.owner.clone()).or_default();
            kept.extend(leases);
        }
        let waiters = self.index.discard_all(&session.owner);
        self.sync_generations();
        let running = self.handoffs.running_of(&session.owner);
        for number in running.into_iter().chain(waiters) {
            self.fail(number, HandoffFailure::ProducerDied);
        }
    }

    /// Counts a session that broke the protocol or did not read its answers.
    pub fn count_broken(&mut self) {
        self.counters.sessions_broken += 1;
    }

    /// Every process of this incarnation and all before it is gone: nobody reads or writes their
    /// slots any more.
    pub fn incarnation_gone(&mut self, reaped: &Owner) {
        let last = self.gone.entry(reaped.node.clone()).or_default();
        *last = reaped.incarnation.max(*last);
        let late: Vec<_> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.owner.is_covered_by(reaped))
            .map(|(&id, _)| id)
            .collect();
        for id in late {
            self.disconnect(id);
            self.actions.push(Action::Close(id));
        }
        self.index.release(reaped);
        let (over, rest) = mem::take(&mut self.departed)
            .into_iter()
            .partition(|(owner, _)| owner.is_covered_by(reaped));
        self.departed = rest;
        let over: HashMap<Owner, Vec<SlotRef>> = over;
        self.unlease_all(over.into_values().flatten());
    }

    /// Ends what has lasted too long.
    pub fn expire(&mut self, now: Instant) {
        while let Some(number) = self.handoffs.overdue(now) {
            self.fail(number, HandoffFailure::Deadline);
        }
    }

    pub fn stats(&self) -> EngineStats {
        let census = self.index.census();
        let session = |session: &Session| SessionStats {
            node: session.owner.node.clone(),
            incarnation: session.owner.incarnation,
            kind: session.kind,
            rank: session.rank,
            pid: session.pid,
        };
        EngineStats {
            epoch: self.arena().map_or(0, |(epoch, _)| epoch),
            slots: self.index.slots(),
            used: self.index.slots() - census.free,
            ready: census.ready,
            pending: census.pending,
            leased: self.index.leased(),
            quarantined: census.quarantined,
            reserved: self.handoffs.reserved(),
            handoffs_open: self.handoffs.len() as u64,
            arena_bytes: self.shape.map_or(0, |shape| shape.arena_bytes),
            evictions: self.index.evictions(),
            namespace: self.namespace.clone().unwrap_or_default().0,
            sessions: self.sessions.values().map(session).collect(),
            counters: self.counters.clone(),
        }
    }

    fn lookup(
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
        let mut tails = Tails::new();
        let mut broken = HashSet::new();
        for key in &keys {
            let group = group(key);
            let state = match self.index.find(key) {
                None => KeyState::Miss,
                Some(found) => {
                    // Only what is held becomes a parent here, so nothing that was available
                    // stops being so.
                    if let Some(&parent) = tails.get(&group) {
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
                            refs.push(found.at);
                            KeyState::Hit
                        }
                    }
                }
            };
            match self.index.find(key) {
                Some(found) if state != KeyState::Miss && !broken.contains(&group) => {
                    tails.insert(group, found.at);
                }
                _ => {
                    broken.insert(group);
                }
            }
            if state != KeyState::Hit {
                refs.push(SlotRef::NONE);
            }
            states.push(state as u8);
        }
        self.counters.lookups += 1;
        for &state in &states {
            *match state {
                0 => &mut self.counters.misses,
                1 => &mut self.counters.hits,
                _ => &mut self.counters.pending_hits,
            } += 1;
        }
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

    fn release(&mut self, id: SessionId, name: &str) {
        let request = self.sessions.get_mut(&id).and_then(|session| {
            let request = session.requests.get_mut(name)?;
            Some(mem::take(&mut request.leases))
        });
        self.unlease_all(request.unwrap_or_default());
    }

    fn finish(&mut self, id: SessionId, name: &str) {
        let session = self.sessions.get_mut(&id);
        let Some(request) = session.and_then(|session| session.requests.remove(name)) else {
            return;
        };
        self.unlease_all(request.leases);
        if let Some(number) = request.handoff {
            self.fail_unsealed(number);
        }
    }

    /// Takes a request's state out of its session, for [`Store::put_request`].
    fn take_request(&mut self, id: SessionId, name: &str) -> Result<Request, ProtocolError> {
        check_name(name)?;
        let Some(session) = self.sessions.get_mut(&id) else {
            return Ok(Request::default());
        };
        match session.requests.remove(name) {
            None if session.requests.len() >= MAX_REQUESTS => {
                Err(ProtocolError::TooManyRequests(MAX_REQUESTS))
            }
            known => Ok(known.unwrap_or_default()),
        }
    }

    fn put_request(&mut self, id: SessionId, name: &str, request: Request) {
        match self.sessions.get_mut(&id) {
            Some(session) => {
                session.requests.insert(name.to_owned(), request);
            }
            None => self.unlease_all(request.leases),
        }
    }

    /// Leases end from the last to the first, so that a prefix is freed after what follows it.
    fn unlease_all(&mut self, leases: impl IntoIterator<Item = SlotRef>) {
        let leases: Vec<_> = leases.into_iter().collect();
        for lease in leases.into_iter().rev() {
            self.index.unlease(lease);
        }
    }

    fn sync_generations(&mut self) {
        let risen = self.index.take_risen();
        self.actions
            .extend(risen.into_iter().map(Action::Generation));
    }
}

fn check_name(name: &str) -> Result<(), ProtocolError> {
    if name.len() > MAX_NAME {
        return Err(ProtocolError::Name(name.len()));
    }
    Ok(())
}
