//! The plan: a topology with every question answered.
//!
//! A [`crate::topology::Topology`] is what a person wrote; a [`Plan`] is what will run. It has no
//! optional settings left, names concrete GPUs, CPU cores, ports and arguments, and can be printed.
//! Making it is pure: it looks at a [`crate::host::HostSnapshot`], never at the machine.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::fleet::{NodeId, Role};
pub use crate::topology::Device;

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
    /// What a person should know although it does not prevent the start.
    pub warnings: Vec<String>,
}

/// The model that all nodes serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPlan {
    /// What clients write in `model`.
    pub served_name: String,
    /// What vLLM gets as `--model`: a directory or a Hugging Face id.
    pub load_from: String,
    /// Tokens per KV block, equal on all nodes that share KV.
    pub block_size: u32,
}

/// PegaEngine's settings.
#[derive(Debug, Clone, PartialEq)]
pub struct KvPlan {
    /// No node shares KV (all are unified): the engine is not started.
    pub enabled: bool,
    /// Bytes of the arena.
    pub capacity: u64,
    /// A hand-off that is open for longer fails.
    pub handoff_deadline: Duration,
    /// How far the canary's logprobs may be apart (0.0: bit-exact).
    pub canary_logprob_tolerance: f64,
}

/// The router's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterPlan {
    pub listen: SocketAddr,
    pub connect_timeout: Duration,
    /// From sending a leg to its response head (for a stream) or whole reply.
    pub first_byte_timeout: Duration,
    /// Between two pieces of a stream.
    pub chunk_timeout: Duration,
    /// From sending the prefill leg to the engine's "KV ready"; then decode recomputes.
    pub handoff_timeout: Duration,
    /// Bytes of a request body.
    pub max_body: usize,
    /// Requests in flight, over all nodes.
    pub max_in_flight: usize,
    /// Requests that may wait for a place; more get 429.
    pub max_queue: usize,
    /// How long a request waits for a place, or for a node to come back.
    pub queue_timeout: Duration,
    /// After the stop signal, how long running requests may finish.
    pub drain_timeout: Duration,
}

/// The supervisor's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SupervisorPlan {
    /// From spawn to ready; extended while the log grows.
    pub start_timeout: Duration,
    pub health_interval: Duration,
    /// No answer for this long, with no other sign of life: the node is restarted.
    pub hang_timeout: Duration,
    /// Between TERM and KILL.
    pub stop_grace: Duration,
    /// The second restart's delay; doubles up to `backoff_max`.
    pub backoff_first: Duration,
    pub backoff_max: Duration,
    /// Deaths within `crash_window` after which the node stays down.
    pub crash_limit: u32,
    pub crash_window: Duration,
    /// Bytes of one log file before it is rotated; three old ones are kept.
    pub log_bytes: u64,
}

/// One vLLM server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    pub id: NodeId,
    pub role: Role,
    pub addr: SocketAddr,
    /// GPU indices in PCI bus order; empty on CPU.
    pub gpus: Vec<u32>,
    /// CPU cores for the node's threads; empty: no pinning.
    pub cpus: Vec<usize>,
    pub tensor_parallel: u32,
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Added to pegaflow's own environment. Holds secrets: never log it.
    pub env: BTreeMap<String, String>,
}
