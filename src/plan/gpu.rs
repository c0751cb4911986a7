//! GPUs to nodes, and the cores and the memory beside them. Pure: no GPU twice unless both nodes share it,
//! none that is split or busy.
//!
//! Nodes that name GPUs are served first; `place.rs` chooses for the others.

use std::collections::BTreeSet;
use std::path::PathBuf;

use bytesize::ByteSize;

use super::problem::{Found, PlanProblem, list};
use super::{Placement, PlanInputs, Replica};
use crate::fleet::NodeId;
use crate::host::{Gpu, GpuHolder, GpuPath, HostSnapshot, NvmlStatus};
use crate::topology::{CpuRequest, GpuRequest, GpuSelector, NumaRequest, Topology};

mod place;
#[cfg(test)]
mod tests;

/// Sums of fractions as people write them, like 0.3 + 0.6 + 0.1.
const ROUNDING: f64 = 1e-9;

/// Without GPUs there is nothing to pin; says what to run instead.
pub(super) fn none(host: &HostSnapshot, inputs: &PlanInputs) -> PlanProblem {
    PlanProblem::NoGpu {
        reason: match &host.nvml {
            NvmlStatus::Available if !host.lost_gpus.is_empty() => {
                format!("{} not answer", lost(host))
            }
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
pub(super) fn pin(
    topology: &Topology,
    replicas: &[Replica<'_>],
    host: &HostSnapshot,
    found: &mut Found,
) -> Vec<Placement> {
    let arena = match &topology.kv.numa {
        NumaRequest::Nodes(nodes) => nodes.as_slice(),
        NumaRequest::Auto | NumaRequest::Interleave | NumaRequest::None => &[],
    };
    let mut booking = Booking {
        replicas,
        gpus: &host.gpus,
        paths: &host.gpu_paths,
        arena,
        given: vec![Vec::new(); replicas.len()],
    };
    let mut waiting = Vec::new();
    for (at, replica) in replicas.iter().enumerate() {
        match &replica.settings.gpus {
            GpuRequest::Auto => waiting.push(at),
            GpuRequest::Listed(selectors) => {
                for selector in selectors {
                    if let Err(problem) = booking.book(at, selector, host) {
                        found.problem(format!("{}.gpus", replica.key), problem);
                    }
                }
            }
        }
    }
    match place::place(&booking, &waiting) {
        Ok(placed) => booking = placed,
        Err((at, stuck)) => {
            // The list that it prints covers all nodes, so one is enough.
            let key = replicas.get(at).map_or("node", |replica| &replica.key);
            found.problem(key, stuck.too_few(at, host));
        }
    }
    booking.warn(host, found);
    let placement = |(replica, gpus): (&Replica<'_>, Vec<u32>)| {
        let numa = numa_nodes(&gpus, host);
        Placement {
            cpus: cores(replica, &numa, host, found),
            // One node is no choice.
            numa: numa
                .filter(|_| host.memory.numa.len() > 1)
                .unwrap_or_default(),
            gpus,
            ..Placement::default()
        }
    };
    replicas.iter().zip(booking.given).map(placement).collect()
}

/// The NUMA nodes that the GPUs are attached to, if all of that is known and their memory is ours.
fn numa_nodes(gpus: &[u32], host: &HostSnapshot) -> Option<Vec<u32>> {
    let of = |index: &u32| {
        let gpu = host.gpus.iter().find(|gpu| gpu.index == *index)?;
        let here = |node: &u32| host.memory.numa.iter().any(|numa| numa.id == *node);
        gpu.numa_node.filter(here)
    };
    let nodes = gpus.iter().map(of).collect::<Option<BTreeSet<u32>>>()?;
    (!nodes.is_empty()).then(|| nodes.into_iter().collect())
}

/// The cores that a node's threads may run on; empty: all.
fn cores(
    replica: &Replica<'_>,
    numa: &Option<Vec<u32>>,
    host: &HostSnapshot,
    found: &mut Found,
) -> Vec<usize> {
    match &replica.settings.cpus {
        CpuRequest::All => Vec::new(),
        CpuRequest::Listed(listed) => {
            super::cpu::check(replica, listed, &host.cpus, found);
            listed.clone()
        }
        CpuRequest::Auto => {
            let near = |core: &usize| {
                let nodes = host.memory.numa.iter().filter(|node| {
                    let near = numa.as_ref().is_some_and(|near| near.contains(&node.id));
                    near && node.cpus.contains(core)
                });
                nodes.count() > 0
            };
            let near: Vec<usize> = host.cpus.iter().copied().filter(near).collect();
            if near.len() == host.cpus.len() {
                return Vec::new();
            }
            near
        }
    }
}

fn lost(host: &HostSnapshot) -> String {
    match host.lost_gpus[..] {
        [one] => format!("GPU {one} does"),
        _ => format!("GPUs {} do", list(&host.lost_gpus)),
    }
}

/// Who has which GPUs so far.
#[derive(Clone)]
struct Booking<'h> {
    replicas: &'h [Replica<'h>],
    gpus: &'h [Gpu],
    paths: &'h [GpuPath],
    /// The NUMA nodes that the topology names for the store.
    arena: &'h [u32],
    /// For each replica.
    given: Vec<Vec<u32>>,
}

/// What stands against giving a GPU to a node.
enum Objection {
    Mig,
    Taken(NodeId),
    /// Both share, but their fractions add up to more than the GPU.
    Full {
        others: String,
        left: f64,
    },
    Busy(Shortage),
}

/// Less memory is free than a node will take.
struct Shortage {
    needed: u64,
    free: u64,
    total: u64,
}

impl Booking<'_> {
    fn gpu(&self, index: u32) -> Option<&Gpu> {
        self.gpus.iter().find(|gpu| gpu.index == index)
    }

    /// How many GPUs a replica wants.
    fn count(&self, at: usize) -> usize {
        let replica = self.replicas.get(at);
        replica.map_or(0, |replica| replica.settings.tensor_parallel as usize)
    }

    fn give(&mut self, at: usize, gpus: Vec<u32>) {
        if let Some(given) = self.given.get_mut(at) {
            *given = gpus;
        }
    }

    fn owners(&self, index: u32) -> impl Iterator<Item = (usize, &Replica<'_>)> {
        let all = self.replicas.iter().zip(&self.given).enumerate();
        all.filter(move |(_, (_, given))| given.contains(&index))
            .map(|(at, (replica, _))| (at, replica))
    }

    fn usable(&self, at: usize) -> Vec<u32> {
        let usable = self
            .gpus
            .iter()
            .filter(|gpu| self.objection(gpu, at).is_none());
        usable.map(|gpu| gpu.index).collect()
    }

    fn objection(&self, gpu: &Gpu, at: usize) -> Option<Objection> {
        let settings = self.replicas.get(at)?.settings;
        if gpu.mig {
            return Some(Objection::Mig);
        }
        let mut taken = 0.0;
        let mut others = Vec::new();
        for (owner, other) in self.owners(gpu.index) {
            if owner == at || !settings.share_gpus || !other.settings.share_gpus {
                return Some(Objection::Taken(other.id.clone()));
            }
            taken += other.settings.gpu_memory_fraction;
            others.push(format!(
                "{} {}",
                other.id, other.settings.gpu_memory_fraction
            ));
        }
        if taken + settings.gpu_memory_fraction > 1.0 + ROUNDING {
            return Some(Objection::Full {
                others: others.join(", "),
                left: (1.0 - taken).max(0.0),
            });
        }
        let needed = taken + settings.gpu_memory_fraction;
        shortage(gpu, needed, settings.gpu_memory_free.unwrap_or(0)).map(Objection::Busy)
    }

    /// A GPU that the topology names.
    fn book(
        &mut self,
        at: usize,
        selector: &GpuSelector,
        host: &HostSnapshot,
    ) -> Result<(), PlanProblem> {
        let Some(replica) = self.replicas.get(at) else {
            return Ok(());
        };
        let node = replica.id.clone();
        let named = self.gpus.iter().find(|gpu| match selector {
            GpuSelector::Index(index) => gpu.index == *index,
            GpuSelector::Uuid(uuid) => gpu.uuid == *uuid,
            GpuSelector::Pci(address) => gpu.pci == Some(*address),
        });
        let Some(gpu) = named else {
            return Err(match selector {
                GpuSelector::Index(index) if host.lost_gpus.contains(index) => {
                    PlanProblem::LostGpu {
                        node,
                        index: *index,
                    }
                }
                selector => PlanProblem::UnknownGpu {
                    node,
                    selector: selector.clone(),
                    gpus: self.describe(at, host),
                },
            });
        };
        let index = gpu.index;
        match self.objection(gpu, at) {
            None => {
                if let Some(given) = self.given.get_mut(at) {
                    given.push(index);
                }
                Ok(())
            }
            Some(Objection::Mig) => Err(PlanProblem::MigGpu { node, index }),
            Some(Objection::Taken(other)) => Err(PlanProblem::DoubleBooked { node, index, other }),
            Some(Objection::Full { others, left }) => Err(PlanProblem::FullGpu {
                node,
                index,
                fraction: replica.settings.gpu_memory_fraction,
                others,
                left,
            }),
            Some(Objection::Busy(shortage)) => Err(PlanProblem::BusyGpu {
                node,
                index,
                needed: shortage.needed,
                free: shortage.free,
                total: shortage.total,
                holders: holders(gpu),
            }),
        }
    }

    fn too_few(&self, at: usize, host: &HostSnapshot) -> PlanProblem {
        let wants = self.replicas.iter().map(|other| {
            let settings = other.settings;
            format!("{} {}", other.id, settings.tensor_parallel)
        });
        PlanProblem::TooFewGpus {
            wanted: self.count(at),
            usable: self.usable(at).len(),
            wants: wants.collect::<Vec<_>>().join(", "),
            gpus: self.describe(at, host),
        }
    }

    /// Every GPU, and what stands against it for this replica.
    fn describe(&self, at: usize, host: &HostSnapshot) -> String {
        let describe = |gpu: &Gpu| {
            let state = match self.objection(gpu, at) {
                Some(Objection::Taken(owner)) => format!("taken by {owner}"),
                Some(Objection::Full { others, .. }) => format!("shared by {others}"),
                Some(Objection::Mig) => "split into MIG instances".to_owned(),
                Some(Objection::Busy(Shortage { free, total, .. })) => {
                    let free = format!("busy: {} of {} free", ByteSize(free), ByteSize(total));
                    match holders(gpu) {
                        who if who.is_empty() => free,
                        who => format!("{free}, held by {who}"),
                    }
                }
                None => "free".to_owned(),
            };
            format!("{} {} {} ({state})", gpu.index, gpu.uuid, gpu.name)
        };
        let lost = |index: &u32| format!("{index} (does not answer)");
        let gpus = self.gpus.iter().map(describe);
        let gpus: Vec<String> = gpus.chain(host.lost_gpus.iter().map(lost)).collect();
        gpus.join("; ")
    }

    fn warn(&self, host: &HostSnapshot, found: &mut Found) {
        if !host.lost_gpus.is_empty() {
            found.warning(format!(
                "{} not answer: look for Xid in the kernel's log (dmesg), and reset or reboot",
                lost(host)
            ));
        }
        let nodes = || self.replicas.iter().zip(&self.given);
        for (replica, given) in nodes() {
            let gpus = given.iter().filter_map(|index| self.gpu(*index));
            let names: BTreeSet<&str> = gpus.map(|gpu| gpu.name.as_str()).collect();
            if names.len() > 1 {
                let names: Vec<&str> = names.into_iter().collect();
                found.warning(format!(
                    "{} runs on unequal GPUs ({}): its ranks wait for the slowest",
                    replica.id,
                    list(&names)
                ));
            }
            let shared = given.iter().find(|index| self.owners(**index).count() > 1);
            if let (Some(index), None) = (shared, replica.settings.kv_cache) {
                found.warning(format!(
                    "{} shares GPU {index}, and vLLM measures there what memory is left while \
                     others start: write `kv_cache` for it",
                    replica.id
                ));
            }
        }
        self.warn_of_distance(
            nodes().filter(|(replica, _)| replica.settings.shares_kv()),
            found,
        );
    }

    /// KV would cross from one processor to the other although it need not.
    fn warn_of_distance<'r>(
        &self,
        sharing: impl Iterator<Item = (&'r Replica<'r>, &'r Vec<u32>)>,
        found: &mut Found,
    ) {
        let gpus: BTreeSet<u32> = sharing
            .flat_map(|(_, given)| given.iter().copied())
            .collect();
        let node = |index: &u32| self.gpu(*index).and_then(|gpu| gpu.numa_node);
        let nodes: BTreeSet<u32> = gpus.iter().filter_map(node).collect();
        let room = |wanted: &u32| {
            let there = self
                .gpus
                .iter()
                .filter(|gpu| gpu.numa_node == Some(*wanted));
            there.count() >= gpus.len()
        };
        if let (2.., Some(better)) = (nodes.len(), nodes.iter().find(|node| room(node))) {
            let nodes: Vec<u32> = nodes.iter().copied().collect();
            found.warning(format!(
                "the GPUs that share KV lie on NUMA nodes {}, so that KV crosses between processors; \
                 NUMA node {better} has enough GPUs for all",
                list(&nodes)
            ));
        }
    }
}

/// Who holds a GPU's memory, and how much.
pub fn holders(gpu: &Gpu) -> String {
    let describe = |holder: &GpuHolder| {
        let who = match &holder.name {
            Some(name) => format!("{name} (pid {})", holder.pid),
            None => format!("pid {}", holder.pid),
        };
        match holder.memory {
            Some(bytes) => format!("{who} {}", ByteSize(bytes)),
            None => who,
        }
    };
    let holders: Vec<String> = gpu.holders.iter().map(describe).collect();
    holders.join(", ")
}

/// Unknown memory counts as enough: vLLM itself will tell.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a fraction of a memory size; a few bytes do not matter"
)]
fn shortage(gpu: &Gpu, fraction: f64, least: u64) -> Option<Shortage> {
    let (total, free) = (gpu.memory_total?, gpu.memory_free?);
    let needed = ((total as f64 * fraction) as u64).max(least);
    (free < needed).then_some(Shortage {
        needed,
        free,
        total,
    })
}
