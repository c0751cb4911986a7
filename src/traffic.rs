//! Which node has how many requests of clients, of about how many tokens, and which takes none for now: shared by
//! the router, which sends them, and the supervisor, which waits for them before it stops a node.
//!
//! ```text
//! router:      choose ─▶ Passage (counted) ─▶ dropped with the request's last byte
//! supervisor:  close ─▶ no new Passage ─▶ drained: the count is zero ─▶ restart, or hold ─▶ open
//! ```
//!
//! Choosing looks whether a node is closed, and counts, under one lock: after [`Traffic::close`] has
//! returned the node's count cannot grow, whatever picture of the fleet the router still holds.

mod choice;

use std::collections::BTreeMap;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::fast::FixedState;
use serde::Serialize;
use tokio::sync::Notify;

use crate::fleet::{NodeId, NodeView};

/// The board. Cheap to clone; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Traffic {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    loads: Mutex<Loads>,
    /// Some closed node has become idle.
    idle: Notify,
    /// Some node has refused a connection.
    suspected: Notify,
}

/// Of every node that was ever chosen or closed; as many as the topology has.
#[derive(Debug, Default)]
struct Loads {
    nodes: BTreeMap<NodeId, Load>,
    turn: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Load {
    in_flight: usize,
    /// Of those, by estimate.
    tokens: u64,
    /// When it was chosen last, in choices.
    turn: u64,
    closed: bool,
    suspect: bool,
}

/// What a request asks of a node.
#[derive(Debug, Clone, Default)]
pub struct Ask {
    /// About how many, for as long as it is there.
    pub tokens: u64,
    /// A hash of its session, if it has one.
    pub session: Option<u64>,
    pub warm: Option<Warm>,
}

/// A node that holds the beginning of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warm {
    pub node: NodeId,
    pub incarnation: u64,
    /// That it need not compute again.
    pub tokens: u64,
}

/// What a node has in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct NodeLoad {
    pub requests: usize,
    /// By estimate.
    pub tokens: u64,
}

/// How busy a node is at one moment, to be compared with another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Glance {
    in_flight: usize,
    turn: u64,
}

impl Glance {
    /// The node had a request of a client at some moment from this glance to the `later` one.
    pub fn busy_until(self, later: Self) -> bool {
        self.in_flight > 0 || later.in_flight > 0 || self.turn != later.turn
    }
}

/// One request at one node; counted until this is dropped.
#[derive(Debug)]
pub struct Passage {
    node: NodeId,
    tokens: u64,
    traffic: Traffic,
}

impl Traffic {
    /// The open node that suits best, as [`choice`] says: by load, weight, warmth and session. Choosing and
    /// counting are one step, so requests that arrive together spread.
    pub fn choose<'a>(
        &self,
        candidates: impl Iterator<Item = &'a NodeView>,
        ask: &Ask,
    ) -> Option<(&'a NodeView, Passage)> {
        let mut loads = self.lock();
        let open = candidates.filter_map(|node| {
            let load = loads.nodes.get(&node.id).copied().unwrap_or_default();
            (!load.closed).then(|| (node, candidate(node, load, ask)))
        });
        let (nodes, candidates): (Vec<_>, Vec<_>) = open.unzip();
        let node = *nodes.get(choice::choose(&candidates, ask.tokens)?)?;
        loads.turn += 1;
        let turn = loads.turn;
        let load = loads.nodes.entry(node.id.clone()).or_default();
        load.in_flight += 1;
        load.tokens = load.tokens.saturating_add(ask.tokens);
        load.turn = turn;
        let passage = Passage {
            node: node.id.clone(),
            tokens: ask.tokens,
            traffic: self.clone(),
        };
        Some((node, passage))
    }

    /// From here on nothing is sent to the node.
    pub fn close(&self, node: &NodeId) {
        self.lock().nodes.entry(node.clone()).or_default().closed = true;
        self.shared.idle.notify_waiters();
    }

    pub fn open(&self, node: &NodeId) {
        if let Some(load) = self.lock().nodes.get_mut(node) {
            load.closed = false;
        }
    }

    /// Waits until the node is closed and serves nothing. Cancel-safe.
    pub async fn drained(&self, node: &NodeId) {
        loop {
            let mut idle = std::pin::pin!(self.shared.idle.notified());
            // Listens from here on, so that nothing is missed between the look and the wait.
            idle.as_mut().enable();
            let load = self.lock().nodes.get(node).copied().unwrap_or_default();
            if load.closed && load.in_flight == 0 {
                return;
            }
            idle.await;
        }
    }

    /// The node has refused a connection: whoever watches it should look now.
    pub fn suspect(&self, node: &NodeId) {
        self.lock().nodes.entry(node.clone()).or_default().suspect = true;
        self.shared.suspected.notify_waiters();
    }

    /// Waits until the node is suspected, and takes that back. Cancel-safe.
    pub async fn suspected(&self, node: &NodeId) {
        loop {
            let mut suspected = std::pin::pin!(self.shared.suspected.notified());
            suspected.as_mut().enable();
            if let Some(load) = self.lock().nodes.get_mut(node)
                && std::mem::take(&mut load.suspect)
            {
                return;
            }
            suspected.await;
        }
    }

    pub fn glance(&self, node: &NodeId) -> Glance {
        let load = self.lock().nodes.get(node).copied().unwrap_or_default();
        Glance {
            in_flight: load.in_flight,
            turn: load.turn,
        }
    }

    /// `None`: the node is closed.
    pub fn open_load(&self, node: &NodeId) -> Option<NodeLoad> {
        let load = self.lock().nodes.get(node).copied().unwrap_or_default();
        (!load.closed).then(|| load.shown())
    }

    /// Of every node that was ever chosen or closed.
    pub fn loads(&self) -> BTreeMap<NodeId, NodeLoad> {
        let loads = self.lock();
        let shown = |(id, load): (&NodeId, &Load)| (id.clone(), load.shown());
        loads.nodes.iter().map(shown).collect()
    }

    /// Nodes that serve something now, with how much.
    pub fn in_flight(&self) -> BTreeMap<NodeId, usize> {
        let busy = |(id, load): (&NodeId, &Load)| {
            (load.in_flight > 0).then(|| (id.clone(), load.in_flight))
        };
        self.lock().nodes.iter().filter_map(busy).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Loads> {
        // Every critical section leaves the counts consistent at each step.
        self.shared
            .loads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Load {
    fn shown(&self) -> NodeLoad {
        NodeLoad {
            requests: self.in_flight,
            tokens: self.tokens,
        }
    }
}

fn candidate(node: &NodeView, load: Load, ask: &Ask) -> choice::Candidate {
    let warm = ask.warm.as_ref();
    let warm = warm.filter(|warm| warm.node == node.id && warm.incarnation == node.incarnation);
    let weight = u64::from(node.weight.max(1));
    choice::Candidate {
        tokens: load.tokens,
        requests: load.in_flight as u64,
        turn: load.turn,
        weight,
        warm: warm.map_or(0, |warm| warm.tokens),
        rank: ask.session.map(|session| {
            // The same in every run and for every role: a session keeps its nodes.
            let hash = FixedState::default().hash_one((session, node.id.as_str()));
            choice::rank(hash, weight)
        }),
    }
}

impl Passage {
    pub fn node(&self) -> &NodeId {
        &self.node
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        let mut loads = self.traffic.lock();
        let Some(load) = loads.nodes.get_mut(&self.node) else {
            return;
        };
        load.in_flight = load.in_flight.saturating_sub(1);
        load.tokens = load.tokens.saturating_sub(self.tokens);
        if load.in_flight == 0 && load.closed {
            self.traffic.shared.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests;
