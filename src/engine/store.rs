//! The whole state of the engine behind its socket: index, hand-offs and sessions. Pure.
//!
//! One owner calls it, one message at a time; what is to be done outside (write a generation, tell
//! the hand-off board, close a session) comes back as [`Action`]s, in order, and is done before
//! the answer is sent.
//!
//! ```text
//!              hello                 ended, broken, replaced
//!   (nobody) ─────────▶ connected ─────────────────────────▶ lost, and its siblings with it
//!                           ▲                                     │ hello      │ reaped
//!                           └─────────────────────────────────────┘            ▼
//!                                                                            gone
//! ```
//!
//! The sessions of one incarnation stand and fall together: when one is lost, nobody can say which
//! of its words to the others were lost with it, so the others are closed, what is Pending is given
//! up, its hand-offs fail at once, and all of them say hello again. A second hello of the same
//! worker or scheduler replaces the first, which is the same loss.
//!
//! Two promises shape it:
//! - **No slot is reused under a living reader or writer.** What a lost incarnation leaves behind
//!   (Pending chunks, leases) is invisible or kept, but not freed, until every rank that may still be
//!   copying has said hello again, or [`Store::incarnation_gone`].
//! - **What is reserved stays available**: `index.available() >= handoffs.reserved()` holds after
//!   every message, so a hand-off that was opened is never starved by another one half way.

mod admission;
mod damage;
mod finding;
mod report;
mod saving;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::mem;
use std::time::{Duration, Instant};

use serde_bytes::ByteBuf;

use self::admission::Terms;
use super::arena::Shape;
use super::handoffs::{Handoff, Handoffs, NewHandoff, Number, Stage};
use super::index::{Committed, Discarded, Index, Owner, Waiter, Writer};
use super::protocol::{
    ClientMessage, Commit, Damaged, Discard, Found, GROUP_LEN, KeyQuery, KeyState, Namespace, Open,
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
    /// Workers keep checksums in it.
    pub verify: bool,
    pub handoff_deadline: Duration,
    /// The first arena's epoch.
    pub first_epoch: u64,
    /// The first session's number, and how far apart they are.
    pub sessions: (SessionId, u64),
}

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// The peer closed it, or the connection failed.
    Closed,
    /// What came was not the protocol.
    Broken,
    /// Nothing was read, or the rest of a frame did not come, in time.
    Slow,
    /// Another session of its incarnation was lost.
    Sibling,
    /// The same worker or scheduler said hello again.
    Replaced,
    /// Its processes are gone.
    Reaped,
}

impl Lost {
    /// A stable label for metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Broken => "broken",
            Self::Slow => "slow",
            Self::Sibling => "sibling",
            Self::Replaced => "replaced",
            Self::Reaped => "reaped",
        }
    }
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
    /// What all sessions agree on.
    terms: Option<Terms>,
    shape: Option<Shape>,
    index: Index,
    handoffs: Handoffs,
    sessions: BTreeMap<SessionId, Session>,
    next_session: SessionId,
    /// Leases of incarnations that were lost and may still be reading.
    departed: HashMap<Owner, Departed>,
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
struct Departed {
    leases: Vec<SlotRef>,
    /// When the first of them was given.
    since: Option<Instant>,
    /// Ranks that have not said hello since, a bit each.
    reading: u64,
}

#[derive(Debug, Default)]
struct Request {
    leases: Vec<SlotRef>,
    /// When they were given.
    since: Option<Instant>,
    /// The last chunk known of each KV group: the parent of the next one.
    tails: Tails,
    handoff: Option<Number>,
}

/// A chunk of each KV group.
#[derive(Debug, Default)]
struct Tails {
    /// Of the group that was asked for last, which is most often the next one, too.
    last: Option<(Group, SlotRef)>,
    others: HashMap<Group, SlotRef>,
}

impl Tails {
    fn get(&self, group: Group) -> Option<SlotRef> {
        match self.last {
            Some((last, at)) if last == group => Some(at),
            _ => self.others.get(&group).copied(),
        }
    }

    fn insert(&mut self, group: Group, at: SlotRef) {
        if let Some((last, before)) = self.last.replace((group, at))
            && last != group
        {
            self.others.insert(last, before);
        }
    }

    /// One of each group.
    fn all(&self) -> impl Iterator<Item = SlotRef> {
        let is_last = |group: &Group| self.last.is_some_and(|(last, _)| last == *group);
        let others = self.others.iter().filter(move |(group, _)| !is_last(group));
        let last = self.last.map(|(_, at)| at);
        last.into_iter().chain(others.map(|(_, &at)| at))
    }
}

type Group = [u8; GROUP_LEN];

fn group(key: &[u8]) -> Group {
    key.last_chunk().copied().unwrap_or_default()
}

impl Store {
    pub fn new(config: StoreConfig) -> Self {
        Self {
            epoch: config.first_epoch.saturating_sub(1),
            terms: None,
            shape: None,
            index: Index::new(0, 1),
            handoffs: Handoffs::new(config.handoff_deadline),
            sessions: BTreeMap::new(),
            next_session: config.sessions.0,
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
                let granted = self.save(session, &query, now)?;
                return Ok(Some(ServerMessage::Granted(granted)));
            }
            (SessionKind::Scheduler, M::Open(open)) => self.open(session, open, now)?,
            (SessionKind::Scheduler, M::Seal(name)) => self.seal(session, &name.handoff, now),
            (SessionKind::Scheduler, M::Abort(name)) => self.abort(session, &name.handoff),
            (SessionKind::Scheduler, M::Release(name)) => self.release(session, &name.request),
            (SessionKind::Scheduler, M::Finish(name)) => self.finish(session, &name.request),
            (SessionKind::Worker, M::Commit(commit)) => self.commit(session, &commit, now)?,
            (SessionKind::Worker, M::Discard(discard)) => self.discard(session, &discard)?,
            (SessionKind::Worker, M::Loaded(loaded)) => self.loaded(session, loaded),
            (SessionKind::Worker, M::Damaged(damaged)) => self.damaged(session, &damaged)?,
            _ => return Err(misplaced),
        }
        Ok(None)
    }

    /// A connection ended. Its siblings are closed with it.
    pub fn disconnect(&mut self, id: SessionId, why: Lost) {
        let Some(owner) = self.owner_of(id) else {
            return;
        };
        let siblings = self
            .sessions
            .iter()
            .filter(|(other, session)| **other != id && session.owner == owner)
            .map(|(&other, _)| other);
        let siblings: Vec<_> = siblings.collect();
        let mut requests = self.lose(id, why);
        for sibling in siblings {
            requests.extend(self.lose(sibling, Lost::Sibling));
            self.actions.push(Action::Close(sibling));
        }
        requests.retain(|request| !request.leases.is_empty());
        if !requests.is_empty() {
            let departed = self.departed.entry(owner.clone()).or_default();
            for request in requests {
                departed.since = departed.since.into_iter().chain(request.since).min();
                departed.leases.extend(request.leases);
            }
            departed.reading = all_ranks(self.terms.as_ref().map_or(1, |terms| terms.world));
        }
        let waiters = self.index.discard_all(&owner);
        self.sync_generations();
        let running = self.handoffs.running_of(&owner);
        for number in running.into_iter().chain(waiters) {
            self.fail(number, HandoffFailure::ProducerDied);
        }
    }

    /// A worker says hello: no copy of its earlier sessions is running any more.
    fn returned(&mut self, by: &Writer) {
        self.index.returned(by);
        if let Some(departed) = self.departed.get_mut(&by.owner) {
            departed.reading &= !rank_bit(by.rank);
            if departed.reading == 0
                && let Some(departed) = self.departed.remove(&by.owner)
            {
                self.unlease_all(departed.leases);
            }
        }
    }

    /// Takes a session out; its requests are left.
    fn lose(&mut self, id: SessionId, why: Lost) -> Vec<Request> {
        let Some(session) = self.sessions.remove(&id) else {
            return Vec::new();
        };
        *self.counters.sessions_lost.entry(why.label()).or_default() += 1;
        session.requests.into_values().collect()
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
            self.disconnect(id, Lost::Reaped);
            self.actions.push(Action::Close(id));
        }
        self.index.release(reaped);
        let over = self
            .departed
            .extract_if(|owner, _| owner.is_covered_by(reaped));
        let over: Vec<_> = over.map(|(_, departed)| departed.leases).collect();
        self.unlease_all(over.into_iter().flatten());
    }

    pub fn has_handoff(&self, id: &HandoffId) -> bool {
        self.handoffs.number(id).is_some()
    }

    /// Nobody waits for this hand-off any more.
    pub fn abandon(&mut self, id: &HandoffId) {
        match self.handoffs.number(id) {
            Some(number) => self.fail(number, HandoffFailure::Abandoned),
            None => self.handoffs.will_not_open(id),
        }
    }

    /// Ends what has lasted too long.
    pub fn expire(&mut self, now: Instant) {
        while let Some(number) = self.handoffs.overdue(now) {
            let stuck = self.give_up_stuck(number, now);
            self.fail(number, HandoffFailure::Deadline);
            // Those that came later wait for the same chunks.
            for waiter in stuck {
                self.fail(waiter, HandoffFailure::SaveFailed);
            }
        }
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

fn rank_bit(rank: u32) -> u64 {
    1u64.checked_shl(rank).unwrap_or(0)
}

fn all_ranks(world: u32) -> u64 {
    u64::MAX.checked_shr(64 - world.min(64)).unwrap_or(0)
}

fn check_name(name: &str) -> Result<(), ProtocolError> {
    if name.len() > MAX_NAME {
        return Err(ProtocolError::Name(name.len()));
    }
    Ok(())
}
