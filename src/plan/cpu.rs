//! CPU cores to nodes, the way GPUs are given. Pure.
//!
//! Nodes that name cores get those, each core once. The others share what is left equally, in whole cores per rank;
//! what does not divide is left to the router and the store. With more ranks than cores, cores are
//! shared in turn, with a warning.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::problem::{Found, PlanProblem};
use super::{Placement, Replica};
use crate::fleet::NodeId;
use crate::topology::CpuRequest;

/// One placement per replica, complete only if no problem was found.
pub(super) fn pin(replicas: &[Replica<'_>], cores: &[usize], found: &mut Found) -> Vec<Placement> {
    let mut named: BTreeMap<usize, &NodeId> = BTreeMap::new();
    for replica in replicas {
        if let CpuRequest::Listed(listed) = &replica.settings.cpus {
            check(replica, listed, cores, found);
            for &core in listed {
                match named.entry(core) {
                    Entry::Vacant(place) => _ = place.insert(&replica.id),
                    Entry::Occupied(taken) => found.problem(
                        format!("{}.cpus", replica.key),
                        PlanProblem::CoreDoubleBooked {
                            node: replica.id.clone(),
                            core,
                            other: NodeId::clone(taken.get()),
                        },
                    ),
                }
            }
        }
    }
    let left: Vec<usize> = cores
        .iter()
        .copied()
        .filter(|core| !named.contains_key(core))
        .collect();
    let ranks: usize = replicas
        .iter()
        .filter(|replica| !matches!(replica.settings.cpus, CpuRequest::Listed(_)))
        .map(|replica| replica.settings.tensor_parallel as usize)
        .sum();
    if ranks > left.len() {
        found.warning(format!(
            "{ranks} ranks share {} CPU cores: expect them to slow each other down",
            if left.is_empty() {
                cores.len()
            } else {
                left.len()
            },
        ));
    }
    let mut shares = Shares {
        cores: if left.is_empty() {
            cores.to_vec()
        } else {
            left
        },
        per_rank: 1,
        next: 0,
    };
    shares.per_rank = (shares.cores.len() / ranks.max(1)).max(1);
    replicas
        .iter()
        .map(|replica| Placement {
            cpus: match &replica.settings.cpus {
                CpuRequest::Listed(listed) => listed.clone(),
                CpuRequest::Auto | CpuRequest::All => {
                    shares.take(replica.settings.tensor_parallel as usize)
                }
            },
            ..Placement::default()
        })
        .collect()
}

/// The cores of each rank of a node, as `VLLM_CPU_OMP_THREADS_BIND` wants them: `0,1|2,3`.
pub(super) fn threads_bind(cpus: &[usize], tensor_parallel: u32) -> String {
    let per_rank = (cpus.len() / tensor_parallel.max(1) as usize).max(1);
    let ranks: Vec<String> = cpus
        .chunks(per_rank)
        .map(|cores| {
            let cores: Vec<String> = cores.iter().map(usize::to_string).collect();
            cores.join(",")
        })
        .collect();
    ranks.join("|")
}

/// The cores that a node names are ours.
pub(super) fn check(replica: &Replica<'_>, listed: &[usize], cores: &[usize], found: &mut Found) {
    for core in listed.iter().filter(|core| !cores.contains(core)) {
        let problem = PlanProblem::UnknownCore {
            node: replica.id.clone(),
            core: *core,
            cores: cores.to_vec(),
        };
        found.problem(format!("{}.cpus", replica.key), problem);
    }
}

struct Shares {
    cores: Vec<usize>,
    per_rank: usize,
    next: usize,
}

impl Shares {
    /// Cores for some ranks; a core comes twice only when there are fewer cores than ranks.
    fn take(&mut self, ranks: usize) -> Vec<usize> {
        let count = ranks * self.per_rank;
        let start = self.next;
        self.next += count;
        let turn = self
            .cores
            .iter()
            .cycle()
            .skip(start % self.cores.len().max(1));
        turn.take(count).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::tests::{node, replicas_of};
    use crate::topology::NodeSettings;

    fn pinned(nodes: &[NodeSettings], cores: &[usize]) -> (Vec<Vec<usize>>, Found) {
        let mut found = Found::default();
        let placements = pin(&replicas_of(nodes), cores, &mut found);
        (placements.into_iter().map(|p| p.cpus).collect(), found)
    }

    fn listed(name: &str, cores: &[usize]) -> NodeSettings {
        let mut node = node(name);
        node.cpus = CpuRequest::Listed(cores.to_vec());
        node
    }

    #[test]
    fn cores_are_shared_equally_after_the_named_ones() {
        let nodes = [node("a"), listed("b", &[1]), node("c")];
        let (cpus, found) = pinned(&nodes, &[0, 1, 2, 3, 4, 5]);
        assert_eq!(cpus, [vec![0, 2], vec![1], vec![3, 4]]);
        assert!(found.problems().is_empty());
    }

    #[test]
    fn more_nodes_than_cores_share_with_a_warning() {
        let nodes = [node("a"), node("b"), node("c")];
        let (cpus, found) = pinned(&nodes, &[4, 7]);
        assert_eq!(cpus, [vec![4], vec![7], vec![4]]);
        assert!(found.has_warnings());
        let (_, found) = pinned(&nodes, &[1, 2, 3]);
        assert!(!found.has_warnings());
    }

    #[test]
    fn a_core_that_is_not_ours_is_refused() {
        let (_, found) = pinned(&[listed("a", &[0, 9])], &[0, 1]);
        assert!(matches!(
            found.problems()[..],
            [PlanProblem::UnknownCore { core: 9, .. }]
        ));
    }

    #[test]
    fn a_core_is_given_to_one_node_only() {
        let nodes = [listed("a", &[0, 1]), listed("b", &[1])];
        let (_, found) = pinned(&nodes, &[0, 1]);
        assert!(matches!(
            found.problems()[..],
            [PlanProblem::CoreDoubleBooked { core: 1, .. }]
        ));
    }

    #[test]
    fn ranks_are_bound_apart() {
        assert_eq!(threads_bind(&[0], 1), "0");
        assert_eq!(threads_bind(&[0, 1, 2, 3], 2), "0,1|2,3");
        assert_eq!(threads_bind(&[3, 3], 2), "3|3");
    }

    proptest! {
        #[test]
        fn every_rank_gets_a_core_and_none_twice_while_they_last(
            cores in 1usize..12,
            ranks in prop::collection::vec(1u32..=3, 1..6),
        ) {
            let cores: Vec<usize> = (0..cores).collect();
            let nodes: Vec<_> = ranks.iter().enumerate().map(|(i, ranks)| {
                let mut node = node(&format!("n{i}"));
                node.tensor_parallel = *ranks;
                node
            }).collect();
            let (cpus, found) = pinned(&nodes, &cores);
            prop_assert!(found.problems().is_empty());
            for (cpus, ranks) in cpus.iter().zip(&ranks) {
                prop_assert!(!cpus.is_empty() && cpus.len().is_multiple_of(*ranks as usize));
                let bind = threads_bind(cpus, *ranks);
                prop_assert_eq!(bind.split('|').count(), *ranks as usize);
            }
            if ranks.iter().sum::<u32>() as usize <= cores.len() {
                let mut all = cpus.concat();
                let given = all.len();
                all.sort_unstable();
                all.dedup();
                prop_assert_eq!(all.len(), given);
            }
        }
    }
}
