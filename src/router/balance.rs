//! Which node: the one with the fewest of our requests in flight; of those with equally few, the one
//! that was not picked for the longest time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::fleet::{NodeId, NodeView, Role};

/// Of every node that was ever picked; as many as the topology has.
#[derive(Debug, Default)]
struct Loads {
    nodes: BTreeMap<NodeId, Load>,
    turn: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Load {
    in_flight: usize,
    /// When it was picked last, in picks.
    turn: u64,
}

/// Counts the requests in flight per node. Cheap to clone; clones share the counts.
#[derive(Debug, Clone, Default)]
pub(super) struct Balancer {
    loads: Arc<Mutex<Loads>>,
}

/// A chosen node; counted as in flight until this is dropped.
#[derive(Debug)]
pub(super) struct Pick {
    pub(super) id: NodeId,
    pub(super) role: Role,
    pub(super) pool: Arc<str>,
    pub(super) addr: SocketAddr,
    pub(super) incarnation: u64,
    /// Its KV was proven: it may take part in a hand-off.
    pub(super) can_hand_off: bool,
    balancer: Balancer,
}

impl Balancer {
    /// Choosing and counting are one step, so requests that arrive together spread.
    pub(super) fn pick<'a>(&self, candidates: impl Iterator<Item = &'a NodeView>) -> Option<Pick> {
        let mut loads = self.lock();
        let load = |node: &&NodeView| {
            let load = loads.nodes.get(&node.id).copied().unwrap_or_default();
            (load.in_flight, load.turn)
        };
        let node = candidates.min_by_key(load)?;
        loads.turn += 1;
        let turn = loads.turn;
        let load = loads.nodes.entry(node.id.clone()).or_default();
        load.in_flight += 1;
        load.turn = turn;
        Some(Pick {
            id: node.id.clone(),
            role: node.role,
            pool: node.pool.clone(),
            addr: node.addr,
            incarnation: node.incarnation,
            can_hand_off: node.can_hand_off(),
            balancer: self.clone(),
        })
    }

    /// Nodes that serve something now, with how much.
    pub(super) fn in_flight(&self) -> BTreeMap<NodeId, usize> {
        let busy = |(id, load): (&NodeId, &Load)| {
            (load.in_flight > 0).then(|| (id.clone(), load.in_flight))
        };
        self.lock().nodes.iter().filter_map(busy).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Loads> {
        // Every critical section leaves the counts consistent at each step.
        self.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pick {
    fn drop(&mut self) {
        let mut loads = self.balancer.lock();
        if let Some(load) = loads.nodes.get_mut(&self.id) {
            load.in_flight -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(names: &[&str]) -> Vec<NodeView> {
        let addr = SocketAddr::from(([127, 0, 0, 1], 1));
        names
            .iter()
            .map(|name| NodeView::pending((*name).into(), Role::Unified, addr))
            .collect()
    }

    #[test]
    fn the_least_loaded_wins_and_ties_go_round() {
        let (balancer, nodes) = (Balancer::default(), nodes(&["a", "b"]));
        let first = balancer.pick(nodes.iter()).unwrap();
        let second = balancer.pick(nodes.iter()).unwrap();
        assert_ne!(first.id, second.id);
        let freed = first.id.clone();
        drop(first);
        assert_eq!(balancer.pick(nodes.iter()).unwrap().id, freed);
        drop(second);
        assert!(balancer.in_flight().is_empty());
        let one = balancer.pick(nodes.iter()).unwrap().id.clone();
        let other = balancer.pick(nodes.iter()).unwrap().id.clone();
        assert_ne!(one, other, "idle nodes take turns");
    }

    #[test]
    fn the_turn_of_one_role_is_not_moved_by_another() {
        let (balancer, nodes) = (Balancer::default(), nodes(&["a", "b", "p"]));
        let picked: Vec<_> = (0..4)
            .map(|_| {
                balancer.pick(nodes[2..].iter()).unwrap();
                balancer.pick(nodes[..2].iter()).unwrap().id.clone()
            })
            .collect();
        assert_eq!(picked[..2], picked[2..]);
        assert_ne!(picked[0], picked[1]);
    }

    #[test]
    fn no_candidates_no_pick() {
        assert!(Balancer::default().pick(nodes(&[]).iter()).is_none());
    }
}
