//! The pools of the store: one for each group of nodes that exchange KV.
//!
//! ```text
//!             hello of node ──▶ its pool ──▶ session number (says its pool) ──▶ Store
//! capacity ── split by the plan ──▶ pool 0: Store + arena │ pool 1: Store + arena │ ..
//! ```
//!
//! A pool is a [`Store`] with an arena of its own, because a chunk's size is its namespace's: TP 2
//! and TP 1, or two cache dtypes, cannot share slots. Which node belongs where is the topology's
//! word, not the namespace's: a node that differs from its pool by accident is refused with the
//! fields that differ, instead of being given an empty pool in which it never finds anything.
//!
//! Pools share nothing but the capacity, so a full one never evicts another's chunks, and every
//! promise of [`Store`] holds in each. Pure, like it.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use super::arena::Shape;
use super::index::Owner;
use super::inspect::{Flushed, Inspection, MAX_LISTED, NamespaceInfo};
use super::protocol::{
    ClientMessage, Hello, ProtocolError, Refused, ServerMessage, Watch, Welcome,
};
use super::stats::{EngineStats, PoolStats};
use super::store::{Action, Lost, SessionId, Store, StoreConfig};
use crate::fleet::NodeId;
use crate::handoff::HandoffId;
use crate::plan::PoolPlan;

/// Which pool: its place in the plan.
pub type PoolNumber = usize;

/// What all pools have in common.
pub struct PoolsConfig {
    pub token: String,
    pub verify: bool,
    pub handoff_deadline: Duration,
    /// Of each pool's first arena.
    pub first_epoch: u64,
}

pub struct Pools {
    /// At least one.
    pools: Vec<Pool>,
    /// Nodes that are not here belong to the first.
    of_node: HashMap<NodeId, PoolNumber>,
}

struct Pool {
    name: String,
    capacity: u64,
    store: Store,
}

impl Pools {
    pub fn new(config: &PoolsConfig, plans: &[PoolPlan]) -> Self {
        let all = [PoolPlan::only(0)];
        let plans = if plans.is_empty() { &all } else { plans };
        let step = plans.len() as u64;
        let pool = |(number, plan): (u64, &PoolPlan)| Pool {
            name: plan.name.clone(),
            capacity: plan.capacity,
            store: Store::new(StoreConfig {
                token: config.token.clone(),
                capacity: plan.capacity,
                verify: config.verify,
                handoff_deadline: config.handoff_deadline,
                first_epoch: config.first_epoch,
                // Their remainder is their pool's number.
                sessions: (step + number, step),
            }),
        };
        let nodes = plans.iter().enumerate();
        let nodes = nodes
            .flat_map(|(number, plan)| plan.nodes.iter().map(move |node| (node.clone(), number)));
        Self {
            of_node: nodes.collect(),
            pools: (0..).zip(plans).map(pool).collect(),
        }
    }

    pub fn len(&self) -> usize {
        self.pools.len()
    }

    /// What is to be done outside since the last call, and in which pool.
    pub fn take_actions(&mut self) -> Vec<(PoolNumber, Action)> {
        let pools = self.pools.iter_mut().enumerate();
        let actions = pools.flat_map(|(number, pool)| {
            let actions = pool.store.take_actions().into_iter();
            actions.map(move |action| (number, action))
        });
        actions.collect()
    }

    /// The arena that a pool's index describes, with its epoch.
    pub fn arena(&self, pool: PoolNumber) -> Option<(u64, Shape)> {
        self.pools.get(pool)?.store.arena()
    }

    pub fn of_session(&self, session: SessionId) -> PoolNumber {
        usize::try_from(session % self.pools.len().max(1) as u64).unwrap_or_default()
    }

    /// See [`Store::admit`].
    pub fn admit(&mut self, hello: Hello) -> Result<Welcome, Refused> {
        let known = self
            .of_node
            .get(&NodeId::from(hello.node.as_str()))
            .copied();
        match self.pools.get_mut(known.unwrap_or_default()) {
            Some(pool) => pool.store.admit(hello),
            None => Err(Refused::down()),
        }
    }

    /// See [`Store::check_watcher`].
    pub fn check_watcher(&self, watch: &Watch) -> Result<(), Refused> {
        match self.pools.first() {
            Some(pool) => pool.store.check_watcher(watch),
            None => Err(Refused::down()),
        }
    }

    /// See [`Store::retract`].
    pub fn retract(&mut self, session: SessionId, why: &str) -> Refused {
        match self.session_store(session) {
            Some(store) => store.retract(session, why),
            None => Refused::down(),
        }
    }

    /// See [`Store::handle`].
    pub fn handle(
        &mut self,
        session: SessionId,
        message: ClientMessage,
        now: Instant,
    ) -> Result<Option<ServerMessage>, ProtocolError> {
        let misplaced = ProtocolError::Misplaced(message.op());
        let store = self.session_store(session).ok_or(misplaced)?;
        store.handle(session, message, now)
    }

    /// See [`Store::disconnect`].
    pub fn disconnect(&mut self, session: SessionId, why: Lost) {
        if let Some(store) = self.session_store(session) {
            store.disconnect(session, why);
        }
    }

    /// A connection broke the protocol or did not read its answers.
    pub fn count_broken(&mut self) {
        if let Some(first) = self.pools.first_mut() {
            first.store.count_broken();
        }
    }

    /// See [`Store::incarnation_gone`]. Every pool: a stranger's name may be known in any.
    pub fn incarnation_gone(&mut self, reaped: &Owner) {
        self.stores()
            .for_each(|store| store.incarnation_gone(reaped));
    }

    /// See [`Store::abandon`]. Where it is not known yet, it is not to be opened.
    pub fn abandon(&mut self, id: &HandoffId) {
        let is_known = self.pools.iter().any(|pool| pool.store.has_handoff(id));
        self.stores()
            .filter(|store| !is_known || store.has_handoff(id))
            .for_each(|store| store.abandon(id));
    }

    /// See [`Store::expire`].
    pub fn expire(&mut self, now: Instant) {
        self.stores().for_each(|store| store.expire(now));
    }

    /// All pools as one; each one's occupancy in `pools`.
    pub fn stats(&self, now: Instant) -> EngineStats {
        let mut all = EngineStats::default();
        let mut pools = BTreeMap::new();
        for pool in &self.pools {
            let stats = pool.store.stats(now);
            let figures = PoolStats {
                capacity_bytes: pool.capacity,
                arena_bytes: stats.arena_bytes,
                slots: stats.slots,
                used: stats.used,
            };
            pools.insert(pool.name.clone(), figures);
            all.add(stats);
        }
        all.pools = pools;
        all
    }

    pub fn namespaces(&self) -> Vec<NamespaceInfo> {
        let of_pool = |pool: &Pool| {
            let found = pool.store.namespace()?;
            Some(NamespaceInfo {
                pool: pool.name.clone(),
                ..found
            })
        };
        self.pools.iter().filter_map(of_pool).collect()
    }

    /// The oldest of all pools.
    pub fn inspect(&self, now: Instant) -> Inspection {
        let mut all = Inspection::default();
        for pool in &self.pools {
            pool.store.inspect(now, &mut all);
        }
        all.namespaces = self.namespaces();
        all.leases
            .sort_by(|a, b| b.age_seconds.total_cmp(&a.age_seconds));
        all.leases.truncate(MAX_LISTED);
        all.handoffs
            .sort_by(|a, b| b.age_seconds.total_cmp(&a.age_seconds));
        all.handoffs.truncate(MAX_LISTED);
        all
    }

    /// See [`Store::flush`].
    pub fn flush(&mut self) -> Flushed {
        let flushed = self.stores().map(Store::flush);
        flushed.fold(Flushed::default(), |all, one| Flushed {
            evicted: all.evicted + one.evicted,
            held: all.held + one.held,
        })
    }

    fn stores(&mut self) -> impl Iterator<Item = &mut Store> {
        self.pools.iter_mut().map(|pool| &mut pool.store)
    }

    fn session_store(&mut self, session: SessionId) -> Option<&mut Store> {
        let pool = self.of_session(session);
        self.pools.get_mut(pool).map(|pool| &mut pool.store)
    }
}
