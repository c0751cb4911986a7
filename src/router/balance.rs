//! Which node: the one with the fewest of our requests in flight; ties go round.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::fleet::{NodeId, NodeView, Role};

#[derive(Debug, Default)]
struct Loads {
    in_flight: BTreeMap<NodeId, usize>,
    turn: usize,
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
    pub(super) addr: SocketAddr,
    pub(super) incarnation: u64,
    balancer: Balancer,
}

impl Balancer {
    /// Choosing and counting are one step, so requests that arrive together spread.
    pub(super) fn pick<'a>(&self, candidates: impl Iterator<Item = &'a NodeView>) -> Option<Pick> {
        let mut loads = self.lock();
        let load = |node: &NodeView| loads.in_flight.get(&node.id).copied().unwrap_or(0);
        let mut least = usize::MAX;
        let mut tied: Vec<&NodeView> = Vec::new();
        for node in candidates {
            let load = load(node);
            if load < least {
                least = load;
                tied.clear();
            }
            if load == least {
                tied.push(node);
            }
        }
        let node = *tied.get(loads.turn.checked_rem(tied.len())?)?;
        loads.turn = loads.turn.wrapping_add(1);
        *loads.in_flight.entry(node.id.clone()).or_default() += 1;
        Some(Pick {
            id: node.id.clone(),
            role: node.role,
            addr: node.addr,
            incarnation: node.incarnation,
            balancer: self.clone(),
        })
    }

    /// Nodes that serve something now, with how much.
    pub(super) fn in_flight(&self) -> BTreeMap<NodeId, usize> {
        self.lock().in_flight.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Loads> {
        // Every critical section leaves the counts consistent at each step.
        self.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pick {
    fn drop(&mut self) {
        let mut loads = self.balancer.lock();
        if let Some(count) = loads.in_flight.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                loads.in_flight.remove(&self.id);
            }
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
    fn no_candidates_no_pick() {
        assert!(Balancer::default().pick(nodes(&[]).iter()).is_none());
    }
}
