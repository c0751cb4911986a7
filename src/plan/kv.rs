//! `[kv]` on this machine: how much memory the store takes, in which pages, on which NUMA nodes. Pure.
//!
//! ```text
//! capacity ─▶ bytes ─┬─ enough 2 MiB pages? ─▶ those, from their own pool
//! numa ─▶ nodes ─────┤
//!                    └─ else ─ enough memory? ─▶ (transparent huge or) normal pages
//! ```

use std::time::Duration;

use bytesize::ByteSize;

use super::problem::{Found, PlanProblem};
use super::{Placement, Replica};
use crate::fleet::{DEFAULT_POOL, NodeId};
use crate::host::{HUGE_PAGE, HostSnapshot, HugePages, NumaNode, ShmemThp};
use crate::topology::{Connector, Device, HugepageRequest, NodeSettings, NumaRequest, Topology};

/// What one vLLM on CPU took beside its KV cache and the model's weights.
const CPU_NODE: u64 = 4 << 30;
/// The smallest store; a smaller share of the memory is raised to it.
const LEAST: u64 = 16 << 20;
/// The most threads that touch the arena before it is used.
const PREFAULT_THREADS: usize = 4;

/// PegaEngine's settings.
#[derive(Debug, Clone, PartialEq)]
pub struct KvPlan {
    /// False: no node shares KV (all are unified), or something else carries it; the engine is not started.
    pub enabled: bool,
    /// Bytes of all arenas, whole 2 MiB.
    pub capacity: u64,
    /// Whose KV is kept apart; at least one.
    pub pools: Vec<PoolPlan>,
    pub arena: ArenaPlan,
    /// Why the arena has other pages than it might have; for the log.
    pub page_note: Option<String>,
    /// A hand-off that is open for longer fails.
    pub handoff_deadline: Duration,
    /// How far the canary's logprobs may be apart (0.0: bit-exact).
    pub canary_logprob_tolerance: f64,
}

/// Nodes that exchange KV, and the part of the store that is theirs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolPlan {
    /// `pool` of its nodes in the topology.
    pub name: String,
    /// A node of no pool is in the first.
    pub nodes: Vec<NodeId>,
    /// Bytes of its arena, at most; whole 2 MiB.
    pub capacity: u64,
}

impl PoolPlan {
    /// One for everybody.
    pub fn only(capacity: u64) -> Self {
        Self {
            name: DEFAULT_POOL.to_owned(),
            nodes: Vec::new(),
            capacity,
        }
    }
}

/// What the arena is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArenaPlan {
    /// The kinds of pages to try, in this order; at least one.
    pub pages: Vec<PageKind>,
    pub numa: NumaPlan,
    /// How many threads touch it before it is used; 0: none does.
    pub prefault_threads: usize,
    /// It has room for a checksum of every row.
    pub verify: bool,
}

impl Default for ArenaPlan {
    /// Normal pages, anywhere, touched by one thread; no checksums.
    fn default() -> Self {
        Self {
            pages: vec![PageKind::Normal],
            numa: NumaPlan::Anywhere,
            prefault_threads: 1,
            verify: false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageKind {
    /// Of 2 MiB, out of the pool that the machine's owner has set aside.
    Huge,
    /// Normal ones, which the kernel is asked to join to 2 MiB.
    Transparent,
    Normal,
}

/// On which NUMA nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NumaPlan {
    /// No choice to make, or none made.
    Anywhere,
    /// On this one only.
    Bind(u32),
    /// Spread over these; more than one.
    Interleave(Vec<u32>),
}

/// How far equal answers may be apart. With AMX, vLLM on the CPU is not equal to itself bit by bit: the
/// pieces in which a prompt is computed decide how sums are rounded.
fn rounding(topology: &Topology, host: &HostSnapshot) -> f64 {
    match topology.device {
        // NIXL carries the last, partial block too: decode computes one token by itself, where a node that
        // computes all has many at once. Wrong KV is further off by far (tests/real/test_nixl.py).
        _ if topology.kv.connector == Connector::Nixl => 0.2,
        Device::Cpu if !host.amx => 0.0,
        Device::Cpu | Device::Cuda => 0.05,
    }
}

/// The plan of the store; meaningful only if no problem was found.
pub(super) fn plan(
    topology: &Topology,
    host: &HostSnapshot,
    replicas: &[Replica<'_>],
    sharing: &[&Placement],
    found: &mut Found,
) -> KvPlan {
    let settings = &topology.kv;
    let enabled = settings.connector == Connector::Pegaflow
        && topology.nodes.iter().any(NodeSettings::shares_kv);
    let capacity = settings.capacity.bytes(host.memory_total).max(LEAST);
    let pools = pools(replicas, capacity);
    let mut plan = KvPlan {
        enabled,
        capacity: pools.iter().map(|pool| pool.capacity).sum(),
        pools,
        arena: ArenaPlan {
            prefault_threads: (host.cpus.len() / 2).clamp(1, PREFAULT_THREADS),
            verify: settings.verify,
            ..ArenaPlan::default()
        },
        page_note: None,
        handoff_deadline: settings.handoff_deadline,
        canary_logprob_tolerance: settings
            .canary_logprob_tolerance
            .unwrap_or(rounding(topology, host)),
    };
    let store = Store {
        topology,
        host,
        capacity: plan.capacity,
    };
    if enabled {
        plan.arena.numa = store.numa(sharing, found);
        plan.page_note = store.pages(&mut plan.arena, found);
        store.locking(found);
    }
    let from_pool = plan.arena.pages.first() == Some(&PageKind::Huge);
    store.estimate(
        if enabled && !from_pool {
            plan.capacity
        } else {
            0
        },
        found,
    );
    plan
}

/// The store that is asked for, and the machine that it is asked of.
struct Store<'a> {
    topology: &'a Topology,
    host: &'a HostSnapshot,
    capacity: u64,
}

impl Store<'_> {
    /// Where the memory should lie, whether or not it fits there.
    fn numa(&self, sharing: &[&Placement], found: &mut Found) -> NumaPlan {
        let here = &self.host.memory.numa;
        let all: Vec<u32> = here.iter().map(|node| node.id).collect();
        let wanted = match &self.topology.kv.numa {
            NumaRequest::None => return NumaPlan::Anywhere,
            NumaRequest::Interleave => all.clone(),
            NumaRequest::Nodes(listed) => {
                for node in listed.iter().filter(|node| !all.contains(node)) {
                    let problem = PlanProblem::UnknownNumaNode {
                        node: *node,
                        nodes: all.clone(),
                    };
                    found.problem("kv.numa", problem);
                }
                listed.clone()
            }
            NumaRequest::Auto => match near(here, self.host, sharing) {
                near if near.is_empty() => all.clone(),
                near => near,
            },
        };
        match wanted[..] {
            _ if all.len() < 2 => NumaPlan::Anywhere,
            [] => NumaPlan::Anywhere,
            [node] => NumaPlan::Bind(node),
            _ => NumaPlan::Interleave(wanted),
        }
    }

    /// Decides on the pages, moves the arena where it fits, and returns what there is to say.
    fn pages(&self, arena: &mut ArenaPlan, found: &mut Found) -> Option<String> {
        let request = self.topology.kv.hugepages;
        let normal = match self.host.memory.shmem_thp {
            ShmemThp::Advise if request != HugepageRequest::Off => PageKind::Transparent,
            _ => PageKind::Normal,
        };
        let needed = self.capacity / HUGE_PAGE;
        let pool = self.pool(&arena.numa);
        if request != HugepageRequest::Off && needed <= pool.free {
            arena.pages = vec![PageKind::Huge];
            // Others may take them before the arena is made.
            if request == HugepageRequest::Auto && self.capacity <= self.host.memory_available {
                arena.pages.push(normal);
            }
            return None;
        }
        let command = reserve(&arena.numa, self.node(&arena.numa), pool, needed);
        if request == HugepageRequest::On {
            let free = pool.free;
            let problem = PlanProblem::TooFewHugePages {
                needed,
                free,
                command,
            };
            found.problem("kv.hugepages", problem);
            return None;
        }
        arena.pages = vec![normal];
        if self.fits(found) {
            self.fit_node(&mut arena.numa, found);
        }
        (request == HugepageRequest::Auto).then(|| {
            format!(
                "the store takes {} pages: of the {needed} huge pages that it needs, {} are free; \
                 `{command}` before the start sets them aside",
                match normal {
                    PageKind::Transparent => "transparent huge",
                    _ => "normal",
                },
                pool.free,
            )
        })
    }

    /// There is memory for it.
    fn fits(&self, found: &mut Found) -> bool {
        let available = self.host.memory_available;
        if self.capacity <= available {
            return true;
        }
        let left = available.saturating_sub(self.nodes());
        let problem = PlanProblem::StoreTooLarge {
            capacity: self.capacity,
            available,
            total: self.host.memory_total,
            limited: self.host.memory.limited,
            instead: Some(left - left / 10).filter(|instead| *instead >= LEAST),
        };
        found.problem("kv.capacity", problem);
        false
    }

    /// Memory that is bound to a node without room for it would get processes killed.
    fn fit_node(&self, numa: &mut NumaPlan, found: &mut Found) {
        let Some(node) = self.node(numa) else {
            return;
        };
        if self.capacity <= node.available {
            return;
        }
        if let NumaRequest::Nodes(_) = self.topology.kv.numa {
            let problem = PlanProblem::NumaNodeTooSmall {
                node: node.id,
                capacity: self.capacity,
                available: node.available,
            };
            found.problem("kv.numa", problem);
            return;
        }
        found.warning(format!(
            "the store is spread over all NUMA nodes: its {} do not fit into the {} that node {}, \
             where its GPUs or cores are, has free; write a smaller `capacity` in [kv] to keep it \
             there",
            ByteSize(self.capacity),
            ByteSize(node.available),
            node.id
        ));
        let all = self.host.memory.numa.iter().map(|node| node.id);
        *numa = NumaPlan::Interleave(all.collect());
    }

    /// A GPU can be given only memory that may be locked.
    fn locking(&self, found: &mut Found) {
        let memlock = self.host.memory.memlock;
        let Some(hard) = memlock.hard.filter(|hard| *hard < self.capacity) else {
            return;
        };
        if self.topology.device == Device::Cuda && !memlock.exempt {
            found.warning(format!(
                "the store of {} is registered with the GPUs, but a process here may lock only {}: \
                 if a node reports that it cannot, write LimitMEMLOCK=infinity in the systemd unit, \
                 or `* - memlock unlimited` in /etc/security/limits.conf, and check with \
                 `ulimit -H -l`",
                ByteSize(self.capacity),
                ByteSize(hard)
            ));
        }
    }

    /// The store must fit; the rest of what will be used is an estimate, so it only warns.
    fn estimate(&self, store: u64, found: &mut Found) {
        let total = store.saturating_add(self.nodes());
        if store <= self.host.memory_available && total > self.host.memory_available {
            found.warning(format!(
                "the nodes and the store will take about {}, but {} of memory are free",
                ByteSize(total),
                ByteSize(self.host.memory_available),
            ));
        }
    }

    /// What the nodes will take, without their weights.
    fn nodes(&self) -> u64 {
        let nodes = self.topology.nodes.iter().filter(|node| node.is_own());
        match self.topology.device {
            Device::Cuda => 0,
            Device::Cpu => nodes
                .map(|node| {
                    u64::from(node.count)
                        .saturating_mul(CPU_NODE.saturating_add(node.kv_cache.unwrap_or(0)))
                })
                .fold(0, u64::saturating_add),
        }
    }

    /// The one NUMA node that memory is bound to.
    fn node(&self, numa: &NumaPlan) -> Option<&NumaNode> {
        let NumaPlan::Bind(id) = numa else {
            return None;
        };
        self.host.memory.numa.iter().find(|node| node.id == *id)
    }

    /// The huge pages that the arena could take.
    fn pool(&self, numa: &NumaPlan) -> HugePages {
        let all = self.host.memory.hugepages;
        match self.node(numa) {
            Some(node) => HugePages {
                total: node.hugepages.total,
                free: node.hugepages.free.min(all.free),
            },
            None => all,
        }
    }
}

/// What sets enough huge pages aside.
fn reserve(numa: &NumaPlan, node: Option<&NumaNode>, pool: HugePages, needed: u64) -> String {
    let total = (pool.total - pool.free.min(pool.total)).saturating_add(needed);
    match (numa, node) {
        (NumaPlan::Bind(_), Some(NumaNode { id, .. })) => format!(
            "echo {total} | sudo tee \
             /sys/devices/system/node/node{id}/hugepages/hugepages-2048kB/nr_hugepages"
        ),
        _ => format!("sudo sysctl -w vm.nr_hugepages={total}"),
    }
}

/// The NUMA nodes with memory of the GPUs and cores that share the store, ascending.
fn near(nodes: &[NumaNode], host: &HostSnapshot, sharing: &[&Placement]) -> Vec<u32> {
    let is_near = |node: &&NumaNode| {
        let gpus = sharing.iter().flat_map(|placement| &placement.gpus);
        let mut gpus = host
            .gpus
            .iter()
            .filter(|gpu| gpus.clone().any(|index| *index == gpu.index));
        // A node with GPUs has its memory beside those, wherever its threads may run.
        let on_cpu = sharing.iter().filter(|placement| placement.gpus.is_empty());
        let mut cpus = on_cpu.flat_map(|placement| &placement.cpus);
        gpus.any(|gpu| gpu.numa_node == Some(node.id)) || cpus.any(|cpu| node.cpus.contains(cpu))
    };
    nodes.iter().filter(is_near).map(|node| node.id).collect()
}

/// Equal parts of the capacity, one for each `pool` that a node names.
fn pools(replicas: &[Replica<'_>], capacity: u64) -> Vec<PoolPlan> {
    let mut pools: Vec<PoolPlan> = Vec::new();
    let sharing = replicas.iter().filter(|r| r.settings.shares_kv());
    for replica in sharing {
        let name = &replica.settings.pool;
        let at = pools.iter().position(|pool| pool.name == *name);
        let at = at.unwrap_or_else(|| {
            pools.push(PoolPlan {
                name: name.clone(),
                ..PoolPlan::only(0)
            });
            pools.len() - 1
        });
        if let Some(pool) = pools.get_mut(at) {
            pool.nodes.push(replica.id.clone());
        }
    }
    if pools.is_empty() {
        pools.push(PoolPlan::only(0));
    }
    let each = capacity / pools.len() as u64;
    for pool in &mut pools {
        pool.capacity = each - each % HUGE_PAGE;
    }
    pools
}

/// The placements of the nodes that share KV.
pub(super) fn sharing<'p>(
    replicas: &[Replica<'_>],
    placements: &'p [Placement],
) -> Vec<&'p Placement> {
    replicas
        .iter()
        .zip(placements)
        .filter(|(replica, _)| replica.settings.shares_kv())
        .map(|(_, placement)| placement)
        .collect()
}

#[cfg(test)]
mod tests;
