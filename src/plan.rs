//! The plan: a topology with every question answered.
//!
//! A [`crate::topology::Topology`] is what a person wrote; a [`Plan`] is what will run. It has no
//! optional settings left, names concrete GPUs, CPU cores, ports and arguments, and can be printed.
//! Making it is pure: it looks at a [`crate::host::HostSnapshot`], never at the machine.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::fleet::{NodeId, NodeKey, Role};
use crate::host::{HostSnapshot, PORTS_PER_NODE};
use crate::topology::{
    Connector, Launcher, ModelFacts, ModelRef, NodeSettings, NodeUrl, Secrets, Topology,
};
pub use crate::topology::{
    Device, RouterSettings as RouterPlan, SupervisorSettings as SupervisorPlan,
};

mod cpu;
mod gpu;
mod kv;
mod launch;
mod memory;
mod model_check;
mod problem;
mod redact;
mod render;
mod report;

pub use gpu::holders;
pub use kv::{ArenaPlan, KvPlan, NumaPlan, PageKind, PoolPlan};
pub use memory::MemoryEstimate;
use problem::Found;
pub use problem::{PlanErrors, PlanProblem};
pub use render::ranges;
pub use report::Report;

/// Everything that `up` needs.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The instance's name; two runs of one name exclude each other.
    pub name: String,
    pub device: Device,
    pub model: ModelPlan,
    pub kv: KvPlan,
    pub router: RouterPlan,
    pub supervisor: SupervisorPlan,
    /// Ordered as in the topology.
    pub nodes: Vec<NodePlan>,
    /// Likewise; others started them.
    pub others: Vec<ExternalNode>,
    /// What must not be shown of `argv` and `env`, and in the nodes' logs.
    pub secrets: Secrets,
    /// What a person should know although it does not prevent the start.
    pub warnings: Vec<String>,
}

/// The model that nodes serve which name no other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPlan {
    /// What clients write in `model`.
    pub served_name: String,
    /// What vLLM gets as `--model`: a directory or a Hugging Face id.
    pub load_from: String,
    /// Tokens per KV block, equal on all nodes that share KV.
    pub block_size: u32,
}

/// One node that others started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalNode {
    pub id: NodeId,
    pub role: Role,
    /// Whose KV it may load.
    pub pool: String,
    /// How much it can do beside others.
    pub weight: u32,
    pub url: NodeUrl,
    /// What it wants to be shown; `None`: the client's own key is passed on.
    pub key_file: Option<PathBuf>,
    /// Who vouches for its certificate; `None`: whom this machine trusts.
    pub ca_file: Option<PathBuf>,
}

/// One vLLM server.
#[derive(Clone, PartialEq, Eq)]
pub struct NodePlan {
    pub id: NodeId,
    pub role: Role,
    /// What clients write in `model` to reach it.
    pub served_model: String,
    /// Whose KV it may load.
    pub pool: String,
    /// How much it can do beside others.
    pub weight: u32,
    pub addr: SocketAddr,
    /// GPU indices in PCI bus order; empty on CPU.
    pub gpus: Vec<u32>,
    /// CPU cores for the node's threads; empty: no pinning.
    pub cpus: Vec<usize>,
    /// The NUMA nodes that its memory comes from while they have any; empty: the kernel's choice.
    pub numa: Vec<u32>,
    pub tensor_parallel: u32,
    /// What each rank takes, where the model's configuration is known.
    pub memory: Option<MemoryEstimate>,
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Added to pegaflow's own environment. Holds secrets: never log it.
    pub env: BTreeMap<String, String>,
}

impl fmt::Debug for NodePlan {
    /// Without the values of `env`, and without `argv`: both can hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodePlan")
            .field("id", &self.id)
            .field("role", &self.role)
            .field("pool", &self.pool)
            .field("addr", &self.addr)
            .field("gpus", &self.gpus)
            .field("cpus", &self.cpus)
            .field("numa", &self.numa)
            .field("tensor_parallel", &self.tensor_parallel)
            .field("env", &self.env.keys())
            .finish_non_exhaustive()
    }
}

/// What other parts found out before the plan is made. Holds a secret: has no `Debug`.
#[derive(Clone)]
pub struct PlanInputs {
    pub launcher: Launcher,
    pub model: ModelFacts,
    /// What [`Topology::other_models`] are.
    pub other_models: Vec<(ModelRef, ModelFacts)>,
    /// The first ports of as many free ranges as [`Plan::ports_needed`] says
    /// ([`crate::host::claim_ports`]).
    pub ports: Vec<u16>,
    /// Where PegaEngine listens.
    pub engine_socket: PathBuf,
    /// The directory that holds `pegaflow_vllm`.
    pub shim_dir: PathBuf,
    /// What a node must show to PegaEngine.
    pub kv_token: String,
    /// What the nodes must be shown.
    pub node_key: NodeKey,
    /// Differs between runs.
    pub run_id: String,
    /// `PYTHONPATH` of pegaflow's own environment.
    pub inherited_pythonpath: Option<String>,
    /// A CPU variant beside the topology file ([`crate::topology::cpu_sibling`]).
    pub cpu_config: Option<PathBuf>,
}

impl PlanInputs {
    /// What is known of the model that the node serves.
    fn facts(&self, node: &NodeSettings) -> &ModelFacts {
        let own = node.model.as_ref();
        let other = own.and_then(|own| {
            let mut others = self.other_models.iter();
            others.find(|(model, _)| *model == own.model)
        });
        other.map_or(&self.model, |(_, facts)| facts)
    }
}

/// One node to be: a `[[node]]` with `count` expanded.
struct Replica<'t> {
    id: NodeId,
    /// The key of its `[[node]]`, like `node[1]`.
    key: String,
    settings: &'t NodeSettings,
}

/// Where a node computes and listens.
#[derive(Debug, Clone, Default)]
struct Placement {
    gpus: Vec<u32>,
    cpus: Vec<usize>,
    /// NUMA nodes to take memory from; empty: the kernel's choice.
    numa: Vec<u32>,
    port: u16,
    /// The first of the ports for vLLM's own sockets.
    internal_port: u16,
    /// The last of them: what NIXL's side channel listens on.
    side_channel_port: u16,
}

impl Plan {
    /// How many port ranges a plan takes.
    pub fn ports_needed(topology: &Topology) -> usize {
        let own = topology.nodes.iter().filter(|node| node.is_own());
        own.map(|node| node.count as usize).sum()
    }

    /// Answers every question that the topology left open, or says all that stands against it.
    pub fn make(
        topology: &Topology,
        host: &HostSnapshot,
        inputs: &PlanInputs,
    ) -> Result<Self, PlanErrors> {
        let replicas = replicas(topology);
        let mut found = Found::default();
        let facts = |node: &NodeSettings| inputs.facts(node);
        model_check::check(topology, facts, &mut found);
        let mut placements = match topology.device {
            Device::Cuda if host.gpus.is_empty() => {
                found.problem("device", gpu::none(host, inputs));
                Vec::new()
            }
            Device::Cuda => gpu::pin(topology, &replicas, host, &mut found),
            Device::Cpu => cpu::pin(&replicas, &host.cpus, &mut found),
        };
        ports(&replicas, inputs, &mut placements, &mut found);
        warn_of_keys(topology, &mut found);
        let placed = (&replicas[..], &placements[..]);
        let memory = memory::estimate(topology, facts, placed, host, &mut found);
        let sharing = kv::sharing(&replicas, &placements);
        let kv = kv::plan(topology, host, &replicas, &sharing, &mut found);
        side_channel(topology, &mut found);
        let warnings = found.into_warnings(topology)?;

        let launch = launch::Launch { topology, inputs };
        let nodes = replicas
            .iter()
            .zip(placements)
            .zip(memory)
            .map(|((replica, placement), memory)| NodePlan {
                memory,
                ..launch.node(replica, placement)
            })
            .collect();
        let mut secrets = topology.secrets.clone();
        secrets.add(inputs.node_key.reveal());
        Ok(Self {
            name: topology.name.clone(),
            device: topology.device,
            model: ModelPlan {
                served_name: topology.served_model_name.clone(),
                load_from: inputs.model.load_from.clone(),
                block_size: topology.block_size,
            },
            kv,
            router: topology.router.clone(),
            supervisor: topology.supervisor.clone(),
            nodes,
            others: others(topology),
            secrets,
            warnings,
        })
    }

    /// What clients may write in `model`, without adapters and aliases.
    pub fn served_names(&self) -> BTreeSet<&str> {
        self.nodes
            .iter()
            .map(|node| node.served_model.as_str())
            .collect()
    }

    /// A table of the nodes, without secrets.
    pub fn table(&self) -> String {
        render::table(self)
    }
}

fn replicas(topology: &Topology) -> Vec<Replica<'_>> {
    let nodes = topology.nodes.iter().enumerate();
    nodes
        .filter(|(_, settings)| settings.is_own())
        .flat_map(|(index, settings)| {
            settings.ids().map(move |id| Replica {
                id,
                key: format!("node[{index}]"),
                settings,
            })
        })
        .collect()
}

/// The nodes that others started, in the topology's order.
pub fn others(topology: &Topology) -> Vec<ExternalNode> {
    let nodes = topology.nodes.iter();
    nodes
        .filter_map(|settings| {
            Some(ExternalNode {
                id: settings.name.as_str().into(),
                role: settings.role,
                pool: settings.pool.clone(),
                weight: settings.weight,
                url: settings.url.clone()?,
                key_file: settings.key_file.clone(),
                ca_file: settings.ca_file.clone(),
            })
        })
        .collect()
}

/// Nodes of other machines ask ours what they hold.
fn side_channel(topology: &Topology, found: &mut Found) {
    let is_far = |node: &NodeSettings| {
        let host = node.url.as_ref().map(NodeUrl::host);
        host.is_some_and(|host| !matches!(host, "localhost" | "127.0.0.1" | "::1"))
    };
    let nixl = topology.kv.connector == Connector::Nixl;
    if nixl && topology.kv.side_channel_host.is_loopback() && topology.nodes.iter().any(is_far) {
        found.warning(
            "NIXL's side channel is on loopback, where nodes on other machines cannot ask for KV: write \
             `side_channel_host` in [kv]"
                .to_owned(),
        );
    }
}

fn ports(
    replicas: &[Replica<'_>],
    inputs: &PlanInputs,
    placements: &mut [Placement],
    found: &mut Found,
) {
    if inputs.ports.len() < replicas.len() {
        let problem = PlanProblem::TooFewPorts {
            wanted: replicas.len(),
            given: inputs.ports.len(),
        };
        found.problem("node", problem);
    }
    for ((replica, first), placement) in replicas.iter().zip(&inputs.ports).zip(placements) {
        placement.port = replica.settings.port.unwrap_or(*first);
        placement.internal_port = first.saturating_add(1);
        placement.side_channel_port = first.saturating_add(PORTS_PER_NODE - 1);
    }
}

/// Where a node of ours listens, and is asked.
fn address(node: &NodeSettings, port: u16) -> SocketAddr {
    SocketAddr::new(node.host, port)
}

/// Whoever is to use a node from elsewhere needs its key.
fn warn_of_keys(topology: &Topology, found: &mut Found) {
    if topology.supervisor.node_key_file.is_some() {
        return;
    }
    let open = topology
        .nodes
        .iter()
        .filter(|node| !node.host.is_loopback());
    let mut open = open.map(|node| format!("{} (`host = \"{}\"`)", node.name, node.host));
    if let Some(first) = open.next() {
        let names = open.fold(first, |names, name| format!("{names}, {name}"));
        found.warning(format!(
            "nobody else can use {names}: the key that nodes ask for is made new for each run; write `node_key_file` \
             in [supervisor] to choose it"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::Replica;
    use crate::fleet::Role;
    use crate::topology::{CpuRequest, GpuRequest, NodeSettings};

    pub(super) fn node(name: &str) -> NodeSettings {
        NodeSettings {
            name: name.to_owned(),
            role: Role::Unified,
            pool: crate::fleet::DEFAULT_POOL.to_owned(),
            url: None,
            key_file: None,
            ca_file: None,
            host: std::net::Ipv4Addr::LOCALHOST.into(),
            model: None,
            weight: 1,
            count: 1,
            gpus: GpuRequest::Auto,
            cpus: CpuRequest::Auto,
            tensor_parallel: 1,
            args: Vec::new(),
            env: std::collections::BTreeMap::new(),
            port: None,
            gpu_memory_fraction: 0.9,
            gpu_memory_free: None,
            share_gpus: false,
            kv_cache: Some(1 << 30),
        }
    }

    pub(super) fn replicas_of(nodes: &[NodeSettings]) -> Vec<Replica<'_>> {
        nodes
            .iter()
            .enumerate()
            .map(|(index, settings)| Replica {
                id: settings.name.as_str().into(),
                key: format!("node[{index}]"),
                settings,
            })
            .collect()
    }
}
