//! GPUs to nodes. Pure: no GPU twice, none that is split or busy.
//!
//! Nodes that name GPUs are served first. The others take those with the most free memory, the most
//! demanding node first, so that a modest node does not take the only GPU that would do for it.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::PathBuf;

use bytesize::ByteSize;

use super::problem::{Found, PlanProblem};
use super::{Placement, PlanInputs, Replica};
use crate::fleet::NodeId;
use crate::host::{Gpu, HostSnapshot, NvmlStatus};
use crate::topology::{GpuRequest, GpuSelector};

/// Without GPUs there is nothing to pin; says what to run instead.
pub(super) fn none(host: &HostSnapshot, inputs: &PlanInputs) -> PlanProblem {
    PlanProblem::NoGpu {
        reason: match &host.nvml {
            NvmlStatus::Available => "the NVIDIA driver shows none".to_owned(),
            NvmlStatus::Missing(reason) => format!("no NVIDIA driver: {reason}"),
            NvmlStatus::Failed(reason) => format!("the NVIDIA driver does not work: {reason}"),
        },
        cpu_config: inputs
            .cpu_config
            .clone()
            .unwrap_or_else(|| PathBuf::from("configs/1p1d-cpu.toml")),
    }
}

/// One placement per replica, complete only if no problem was found.
pub(super) fn pin(replicas: &[Replica<'_>], gpus: &[Gpu], found: &mut Found) -> Vec<Placement> {
    let mut booking = Booking {
        gpus,
        owners: BTreeMap::new(),
    };
    let mut placements = vec![Placement::default(); replicas.len()];
    let mut auto = Vec::new();
    for (replica, placement) in replicas.iter().zip(&mut placements) {
        match &replica.settings.gpus {
            GpuRequest::Auto => auto.push((replica, placement)),
            GpuRequest::Listed(selectors) => {
                for selector in selectors {
                    match booking.book(replica, selector) {
                        Ok(index) => placement.gpus.push(index),
                        Err(problem) => found.problem(format!("{}.gpus", replica.key), problem),
                    }
                }
            }
        }
    }
    auto.sort_by(|(a, _), (b, _)| {
        let fraction = |replica: &Replica<'_>| replica.settings.gpu_memory_fraction;
        fraction(b).total_cmp(&fraction(a))
    });
    for (replica, placement) in auto {
        match booking.choose(replica) {
            Some(chosen) => placement.gpus = chosen,
            None => {
                // The list that it prints covers all nodes, so one is enough.
                found.problem(&replica.key, booking.too_few(replica, replicas));
                break;
            }
        }
    }
    placements
}

struct Booking<'h> {
    gpus: &'h [Gpu],
    owners: BTreeMap<u32, NodeId>,
}

impl Booking<'_> {
    fn book(&mut self, replica: &Replica<'_>, selector: &GpuSelector) -> Result<u32, PlanProblem> {
        let node = replica.id.clone();
        let gpu = self
            .gpus
            .iter()
            .find(|gpu| match selector {
                GpuSelector::Index(index) => gpu.index == *index,
                GpuSelector::Uuid(uuid) => gpu.uuid == *uuid,
            })
            .ok_or_else(|| PlanProblem::UnknownGpu {
                node: node.clone(),
                selector: selector.clone(),
                gpus: self.describe(replica.settings.gpu_memory_fraction),
            })?;
        let index = gpu.index;
        if let Some(other) = self.owners.get(&index) {
            let other = other.clone();
            return Err(PlanProblem::DoubleBooked { node, index, other });
        }
        if gpu.mig {
            return Err(PlanProblem::MigGpu { node, index });
        }
        if let Some(Shortage {
            needed,
            free,
            total,
        }) = shortage(gpu, replica.settings.gpu_memory_fraction)
        {
            return Err(PlanProblem::BusyGpu {
                node,
                index,
                needed,
                free,
                total,
            });
        }
        self.owners.insert(index, node);
        Ok(index)
    }

    fn usable(&self, fraction: f64) -> Vec<&Gpu> {
        self.gpus
            .iter()
            .filter(|gpu| {
                !gpu.mig
                    && !self.owners.contains_key(&gpu.index)
                    && shortage(gpu, fraction).is_none()
            })
            .collect()
    }

    fn choose(&mut self, replica: &Replica<'_>) -> Option<Vec<u32>> {
        let count = replica.settings.tensor_parallel as usize;
        let mut usable = self.usable(replica.settings.gpu_memory_fraction);
        usable.sort_by_key(|gpu| (Reverse(gpu.memory_free), gpu.index));
        let mut chosen: Vec<u32> = usable.iter().take(count).map(|gpu| gpu.index).collect();
        if chosen.len() < count {
            return None;
        }
        chosen.sort_unstable();
        for index in &chosen {
            self.owners.insert(*index, replica.id.clone());
        }
        Some(chosen)
    }

    fn too_few(&self, replica: &Replica<'_>, all: &[Replica<'_>]) -> PlanProblem {
        let fraction = replica.settings.gpu_memory_fraction;
        let wants: Vec<String> = all
            .iter()
            .map(|other| format!("{} {}", other.id, other.settings.tensor_parallel))
            .collect();
        PlanProblem::TooFewGpus {
            wanted: replica.settings.tensor_parallel as usize,
            usable: self.usable(fraction).len(),
            wants: wants.join(", "),
            gpus: self.describe(fraction),
        }
    }

    /// Every GPU and what stands against it.
    fn describe(&self, fraction: f64) -> String {
        let describe = |gpu: &Gpu| {
            let state = match (self.owners.get(&gpu.index), shortage(gpu, fraction)) {
                (Some(owner), _) => format!("taken by {owner}"),
                (None, _) if gpu.mig => "split into MIG instances".to_owned(),
                (None, Some(Shortage { free, total, .. })) => {
                    format!("busy: {} of {} free", ByteSize(free), ByteSize(total))
                }
                (None, None) => "free".to_owned(),
            };
            format!("{} {} {} ({state})", gpu.index, gpu.uuid, gpu.name)
        };
        let gpus: Vec<String> = self.gpus.iter().map(describe).collect();
        gpus.join("; ")
    }
}

/// Less memory is free than a node will take.
struct Shortage {
    needed: u64,
    free: u64,
    total: u64,
}

/// Unknown memory counts as enough: vLLM itself will tell.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a fraction of a memory size; a few bytes do not matter"
)]
fn shortage(gpu: &Gpu, fraction: f64) -> Option<Shortage> {
    let (total, free) = (gpu.memory_total?, gpu.memory_free?);
    let needed = (total as f64 * fraction) as u64;
    (free < needed).then_some(Shortage {
        needed,
        free,
        total,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::tests::{node, replicas_of};

    const GB: u64 = 1 << 30;

    fn gpu(index: u32, free: u64) -> Gpu {
        Gpu {
            index,
            uuid: format!("GPU-{index}"),
            name: "H200".to_owned(),
            memory_total: Some(100 * GB),
            memory_free: Some(free * GB),
            mig: false,
            numa_node: None,
        }
    }

    fn pinned(
        nodes: &[crate::topology::NodeSettings],
        gpus: &[Gpu],
    ) -> Result<Vec<Vec<u32>>, Vec<PlanProblem>> {
        let mut found = Found::default();
        let placements = pin(&replicas_of(nodes), gpus, &mut found);
        let problems = found.problems();
        if problems.is_empty() {
            Ok(placements.into_iter().map(|p| p.gpus).collect())
        } else {
            Err(problems)
        }
    }

    fn listed(name: &str, selectors: &[GpuSelector]) -> crate::topology::NodeSettings {
        let mut node = node(name);
        node.tensor_parallel = u32::try_from(selectors.len()).unwrap();
        node.gpus = GpuRequest::Listed(selectors.to_vec());
        node
    }

    #[test]
    fn auto_takes_the_freest_and_leaves_the_named_ones() {
        let gpus = [gpu(0, 95), gpu(1, 100), gpu(2, 98), gpu(3, 10)];
        let nodes = [
            node("auto"),
            listed("uuid", &[GpuSelector::Uuid("GPU-1".to_owned())]),
            listed("index", &[GpuSelector::Index(0)]),
        ];
        assert_eq!(pinned(&nodes, &gpus).unwrap(), [vec![2], vec![1], vec![0]]);
    }

    #[test]
    fn a_demanding_node_gets_the_gpu_that_only_it_needs() {
        let gpus = [gpu(0, 95), gpu(1, 50)];
        let mut modest = node("modest");
        modest.gpu_memory_fraction = 0.4;
        assert_eq!(
            pinned(&[modest, node("demanding")], &gpus).unwrap(),
            [vec![1], vec![0]]
        );
    }

    #[test]
    fn what_cannot_be_had_is_refused_with_the_reason() {
        let mut mig = gpu(1, 100);
        mig.mig = true;
        let gpus = [gpu(0, 100), mig, gpu(2, 50)];
        let first = |nodes: &[_]| pinned(nodes, &gpus).unwrap_err().remove(0);
        let index = |name, index| listed(name, &[GpuSelector::Index(index)]);
        assert!(matches!(
            first(&[index("a", 9)]),
            PlanProblem::UnknownGpu {
                selector: GpuSelector::Index(9),
                ..
            }
        ));
        assert!(matches!(
            first(&[index("a", 1)]),
            PlanProblem::MigGpu { index: 1, .. }
        ));
        assert!(matches!(
            first(&[index("a", 2)]),
            PlanProblem::BusyGpu { index: 2, free, .. } if free == 50 * GB
        ));
        let uuid = listed("b", &[GpuSelector::Uuid("GPU-0".to_owned())]);
        assert!(matches!(
            first(&[index("a", 0), uuid]),
            PlanProblem::DoubleBooked { index: 0, other, .. } if other.as_str() == "a"
        ));
        assert!(matches!(
            first(&[node("a"), node("b")]),
            PlanProblem::TooFewGpus {
                wanted: 1,
                usable: 0,
                ..
            }
        ));
    }

    #[test]
    fn unknown_memory_is_not_a_failure_but_the_last_choice() {
        let mut unknown = gpu(0, 0);
        unknown.memory_free = None;
        let gpus = [unknown, gpu(1, 95)];
        assert_eq!(pinned(&[node("a")], &gpus).unwrap(), [vec![1]]);
        assert_eq!(
            pinned(&[node("a"), node("b")], &gpus).unwrap(),
            [vec![1], vec![0]]
        );
    }

    proptest! {
        #[test]
        fn no_gpu_is_booked_twice_or_unfit(
            free in prop::collection::vec((0u64..=100, prop::bool::weighted(0.1)), 0..8),
            wants in prop::collection::vec((1u32..=3, prop::option::of(0u32..8), 1u32..=100), 1..6),
        ) {
            let gpus: Vec<Gpu> = (0u32..).zip(&free).map(|(index, (free, mig))| {
                let mut gpu = gpu(index, *free);
                gpu.mig = *mig;
                gpu
            }).collect();
            let nodes: Vec<_> = wants.iter().enumerate().map(|(i, (count, index, percent))| {
                let mut node = match index {
                    Some(index) => listed(&format!("n{i}"), &[GpuSelector::Index(*index)]),
                    None => { let mut node = node(&format!("n{i}")); node.tensor_parallel = *count; node }
                };
                node.gpu_memory_fraction = f64::from(*percent) / 100.0;
                node
            }).collect();
            let wanted: usize = nodes.iter().map(|node| node.tensor_parallel as usize).sum();
            match pinned(&nodes, &gpus) {
                Ok(chosen) => {
                    let mut all: Vec<u32> = chosen.concat();
                    prop_assert_eq!(all.len(), wanted);
                    all.sort_unstable();
                    all.dedup();
                    prop_assert_eq!(all.len(), wanted, "booked twice");
                    for (node, indices) in nodes.iter().zip(&chosen) {
                        prop_assert_eq!(indices.len(), node.tensor_parallel as usize);
                        for index in indices {
                            let gpu = &gpus[*index as usize];
                            prop_assert!(!gpu.mig && shortage(gpu, node.gpu_memory_fraction).is_none());
                        }
                    }
                }
                Err(problems) => prop_assert!(!problems.is_empty()),
            }
            // With every GPU free and nobody choosy, enough GPUs are enough.
            let easy: Vec<Gpu> = (0u32..).take(wanted).map(|index| self::gpu(index, 100)).collect();
            let auto: Vec<_> = nodes.into_iter().map(|mut node| {
                node.gpus = GpuRequest::Auto;
                node
            }).collect();
            prop_assert!(pinned(&auto, &easy).is_ok());
        }
    }
}
