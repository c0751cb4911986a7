//! Which node has how many requests of clients, and which takes none for now: shared by the router,
//! which sends them, and the supervisor, which waits for them before it stops a node.
//!
//! ```text
//! router:      choose ─▶ Passage (counted) ─▶ dropped with the request's last byte
//! supervisor:  close ─▶ no new Passage ─▶ drained: the count is zero ─▶ restart, or hold ─▶ open
//! ```
//!
//! Choosing looks whether a node is closed, and counts, under one lock: after [`Traffic::close`] has
//! returned the node's count cannot grow, whatever picture of the fleet the router still holds.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    /// When it was chosen last, in choices.
    turn: u64,
    closed: bool,
    suspect: bool,
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
    traffic: Traffic,
}

impl Traffic {
    /// The open node with the fewest requests; of those with equally few, the one that was not chosen
    /// for the longest time. Choosing and counting are one step, so requests that arrive together
    /// spread.
    pub fn choose<'a>(
        &self,
        candidates: impl Iterator<Item = &'a NodeView>,
    ) -> Option<(&'a NodeView, Passage)> {
        let mut loads = self.lock();
        let load = |node: &NodeView| loads.nodes.get(&node.id).copied().unwrap_or_default();
        let node = candidates
            .filter(|node| !load(node).closed)
            .min_by_key(|node| (load(node).in_flight, load(node).turn))?;
        loads.turn += 1;
        let turn = loads.turn;
        let load = loads.nodes.entry(node.id.clone()).or_default();
        load.in_flight += 1;
        load.turn = turn;
        let passage = Passage {
            node: node.id.clone(),
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
        if load.in_flight == 0 && load.closed {
            self.traffic.shared.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::fleet::Role;

    fn nodes(names: &[&str]) -> Vec<NodeView> {
        let addr = SocketAddr::from(([127, 0, 0, 1], 1));
        names
            .iter()
            .map(|name| NodeView::pending((*name).into(), Role::Unified, addr))
            .collect()
    }

    fn choose(traffic: &Traffic, nodes: &[NodeView]) -> (NodeId, Passage) {
        let (node, passage) = traffic.choose(nodes.iter()).unwrap();
        (node.id.clone(), passage)
    }

    #[test]
    fn the_least_loaded_wins_and_ties_go_round() {
        let (traffic, nodes) = (Traffic::default(), nodes(&["a", "b"]));
        let (first, held) = choose(&traffic, &nodes);
        let (second, other) = choose(&traffic, &nodes);
        assert_ne!(first, second);
        drop(held);
        assert_eq!(choose(&traffic, &nodes).0, first);
        drop(other);
        assert!(traffic.in_flight().is_empty());
        assert_ne!(
            choose(&traffic, &nodes).0,
            choose(&traffic, &nodes).0,
            "idle nodes take turns"
        );
    }

    #[test]
    fn the_turn_of_one_role_is_not_moved_by_another() {
        let (traffic, nodes) = (Traffic::default(), nodes(&["a", "b", "p"]));
        let picked: Vec<_> = (0..4)
            .map(|_| {
                choose(&traffic, &nodes[2..]);
                choose(&traffic, &nodes[..2]).0
            })
            .collect();
        assert_eq!(picked[..2], picked[2..]);
        assert_ne!(picked[0], picked[1]);
    }

    #[tokio::test]
    async fn a_closed_node_gets_nothing_and_is_drained_when_its_last_request_ends() {
        let (traffic, nodes) = (Traffic::default(), nodes(&["a", "b"]));
        let a = nodes[0].id.clone();
        let (_, first) = choose(&traffic, &nodes[..1]);
        let (_, second) = choose(&traffic, &nodes[..1]);
        traffic.close(&a);
        for _ in 0..3 {
            assert_eq!(choose(&traffic, &nodes).0, nodes[1].id);
        }
        assert!(traffic.choose(nodes[..1].iter()).is_none());
        let waiting = tokio::spawn({
            let (traffic, a) = (traffic.clone(), a.clone());
            async move { traffic.drained(&a).await }
        });
        tokio::task::yield_now().await;
        drop(first);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "one request is left");
        drop(second);
        waiting.await.unwrap();
        traffic.open(&a);
        assert_eq!(choose(&traffic, &nodes[..1]).0, a);
    }

    #[tokio::test]
    async fn a_suspicion_is_seen_once_by_the_node_s_own_watcher() {
        let (traffic, nodes) = (Traffic::default(), nodes(&["a", "b"]));
        let [a, b] = [&nodes[0].id, &nodes[1].id];
        traffic.suspect(a);
        let soon = std::time::Duration::from_secs(60);
        tokio::time::timeout(soon, traffic.suspected(a))
            .await
            .unwrap();
        for id in [a, b] {
            let again = futures_util::FutureExt::now_or_never(traffic.suspected(id));
            assert!(again.is_none());
        }
    }

    #[test]
    fn a_request_between_two_glances_is_seen() {
        let (traffic, nodes) = (Traffic::default(), nodes(&["a"]));
        let a = nodes[0].id.clone();
        let idle = traffic.glance(&a);
        assert!(!idle.busy_until(traffic.glance(&a)));
        let (_, held) = choose(&traffic, &nodes);
        let during = traffic.glance(&a);
        drop(held);
        let after = traffic.glance(&a);
        assert!(idle.busy_until(during) && during.busy_until(after) && idle.busy_until(after));
        assert!(!after.busy_until(traffic.glance(&a)));
    }

    #[test]
    fn no_candidates_no_choice() {
        assert!(Traffic::default().choose(nodes(&[]).iter()).is_none());
    }
}
