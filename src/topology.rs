//! The topology: what a person wrote in the TOML file (`docs/topology.md` explains every key).
//!
//! ```text
//! text ─ toml ─▶ spanned document ─ overrides, interpolate ─▶ the same, with --set and ${VARIABLES}
//!       ─ read ─▶ Topology + problems ─ validate ─▶ Topology | problems
//! ```
//!
//! [`load`] walks that way. [`read`] turns keys into types and fills in defaults, [`validate`] looks at combinations. Both
//! add to one list, so that a person sees every problem of a file at once, each with its place.
//! What depends on the machine (which GPU, which port) is not decided here but in
//! [`crate::plan`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::fleet::{NodeId, Role};

mod flags;
mod gpus;
mod interpolate;
mod keys;
mod kv;
mod load;
mod memory;
mod overrides;
mod problem;
mod read;

mod schema;
mod section;
mod source;
mod supervisor;
mod url;
mod validate;
mod value;

pub use gpus::{GpuRequest, GpuSelector, PciAddress};
pub use interpolate::Secrets;
pub use kv::{Connector, KvSettings};
pub use load::Surroundings;
pub use memory::{Capacity, HugepageRequest, NumaRequest};
pub use problem::{Problem, ProblemKind, write_problems};
pub use schema::{reference, schema};
pub use source::{Place, Source};
pub use supervisor::{CgroupRequest, SupervisorSettings};
pub use url::{NodeUrl, UrlError};
pub use validate::{OWN_LOG, is_origin};

/// A file with all defaults filled in and no contradiction.
#[derive(Debug, Clone, PartialEq)]
pub struct Topology {
    /// Where the keys stand in the file, for errors that are found later.
    pub source: Source,
    /// What the environment gave, to be hidden from logs.
    pub secrets: Secrets,
    /// `[a-z0-9-]{1,40}`; two runs of one name exclude each other.
    pub name: String,
    pub device: Device,
    pub model: ModelRef,
    /// What clients write in `model`.
    pub served_model_name: String,
    /// As vLLM's `--dtype`.
    pub dtype: String,
    /// Tokens per KV block.
    pub block_size: u32,
    pub max_model_len: Option<u32>,
    pub runtime: RuntimeSettings,
    pub kv: KvSettings,
    pub router: RouterSettings,
    pub supervisor: SupervisorSettings,
    /// In the file's order, at least one; `count` is not expanded.
    pub nodes: Vec<NodeSettings>,
}

/// Where the nodes compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    Cuda,
    Cpu,
}

/// Which Python and vLLM serve the nodes (`[runtime]`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuntimeSettings {
    /// The `vllm` program found on PATH.
    Path,
    /// An interpreter, or the directory of a virtual environment; already joined to the topology
    /// file's directory.
    Python(PathBuf),
    /// A virtual environment that pegaflow makes and keeps in its cache.
    Managed {
        /// As `uv venv --python` takes it, like `3.11`.
        python_version: String,
        /// Requirement specifiers to install, at least one.
        requirements: Vec<String>,
        /// Requirement specifiers that replace what the requirements ask for.
        overrides: Vec<String>,
    },
}

/// How a vLLM API server is started: what `[runtime]` became on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Launcher {
    /// The `vllm` program: `vllm serve MODEL ...`.
    Vllm(PathBuf),
    /// An interpreter: `python -m vllm.entrypoints.openai.api_server --model MODEL ...`.
    Python(PathBuf),
}

/// Which model all nodes serve (`model`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelRef {
    /// `builtin:tiny`: a small seeded random model that pegaflow generates.
    BuiltinTiny,
    /// A directory, already joined to the topology file's directory.
    Path(PathBuf),
    /// A Hugging Face id, `owner/name`.
    HuggingFace(String),
}

/// What a node serves instead of the topology's model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeModel {
    pub model: ModelRef,
    /// What clients write in `model`.
    pub served_name: String,
}

/// The model as it was found on this machine.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelFacts {
    /// What vLLM gets as its model: a directory or a Hugging Face id.
    pub load_from: String,
    /// Differs when the weights differ (a revision, or a fingerprint of the files).
    pub identity: String,
    /// The model's `config.json`, where it could be read.
    pub config: Option<serde_json::Value>,
    /// Bytes of the weight files, where they are here.
    pub weights: Option<u64>,
}

/// The variable for API keys, with commas between them; beside [`RouterSettings::api_keys`].
pub const API_KEYS: &str = "PEGAFLOW_API_KEYS";

/// The variable for the admin key; instead of [`RouterSettings::admin_key_file`].
pub const ADMIN_KEY: &str = "PEGAFLOW_ADMIN_KEY";

/// What says that the KV of a prefill node of others is complete. Of one that the canary has proven the engine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum KvReady {
    /// Its HTTP reply: its connector saves, or holds, the KV before. What the engine opened is waited for.
    #[default]
    Reply,
    /// What it says at `POST /kv_ready`; its reply may come before.
    Callback,
    /// The engine of `pegaflow router --engine`.
    #[value(skip)]
    Store,
}

/// `[router]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterSettings {
    pub listen: SocketAddr,
    /// A file of API keys, one a line; without it, and without the variable, everybody may come.
    pub api_keys: Option<PathBuf>,
    /// A file with the key of who may announce that KV is ready.
    pub admin_key_file: Option<PathBuf>,
    /// Of prefill nodes that others started.
    pub kv_ready: KvReady,
    /// What carries KV from prefill to decode.
    pub connector: Connector,
    /// `None`: clients speak plain HTTP.
    pub tls: Option<TlsFiles>,
    /// Origins of web pages that may use it, or `*`.
    pub cors_origins: Vec<String>,
    /// Other names for models, each with the model's own.
    pub aliases: BTreeMap<String, String>,
    /// Where `/metrics` and `/status` are, if not where clients come in.
    pub metrics_listen: Option<SocketAddr>,
    pub connect_timeout: Duration,
    /// From sending a leg to its response head (for a stream) or whole reply.
    pub first_byte_timeout: Duration,
    /// Between two pieces of a stream.
    pub chunk_timeout: Duration,
    /// From sending the prefill leg to the engine's "KV ready"; then decode recomputes.
    pub handoff_timeout: Duration,
    /// How long a client's connection may be idle, or take to send a request's head.
    pub head_timeout: Duration,
    /// From a request's head to the end of its body.
    pub body_timeout: Duration,
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
    /// A line for every request at level info, not debug.
    pub access_log: bool,
    /// A stream whose node fails goes on at another one.
    pub replay: bool,
    /// The client's header that names its session, in lower case; `None`: there are no sessions.
    pub session_header: Option<String>,
    /// Prompts of fewer tokens are not split.
    pub split_min_tokens: u64,
    /// Tokens that every prefill node has to do before an idle decode node computes a prompt itself; 0: it never does.
    pub split_max_backlog: u64,
}

impl Default for RouterSettings {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            listen: ([127, 0, 0, 1], 8000).into(),
            api_keys: None,
            admin_key_file: None,
            kv_ready: KvReady::default(),
            connector: Connector::default(),
            tls: None,
            cors_origins: Vec::new(),
            aliases: BTreeMap::new(),
            metrics_listen: None,
            connect_timeout: seconds(5),
            first_byte_timeout: seconds(600),
            chunk_timeout: seconds(120),
            handoff_timeout: seconds(60),
            head_timeout: seconds(120),
            body_timeout: seconds(60),
            max_body: 64 << 20,
            max_in_flight: 1024,
            max_queue: 1024,
            queue_timeout: seconds(60),
            drain_timeout: seconds(30),
            access_log: false,
            replay: true,
            session_header: Some("x-session-id".to_owned()),
            split_min_tokens: 0,
            split_max_backlog: 65_536,
        }
    }
}

impl RouterSettings {
    /// Where clients find it.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.listen)
    }

    /// Where `/metrics` and `/status` are.
    pub fn metrics_url(&self) -> String {
        match self.metrics_listen {
            Some(listen) => format!("http://{listen}"),
            None => self.url(),
        }
    }
}

/// A certificate with its chain and its key, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// One `[[node]]`.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeSettings {
    pub name: String,
    pub role: Role,
    /// Nodes of one pool exchange KV.
    pub pool: String,
    /// Where it is, if others started it; then nothing below the next two counts.
    pub url: Option<NodeUrl>,
    /// A file with the API key of that node; without it the client's own goes there.
    pub key_file: Option<PathBuf>,
    /// Who vouches for that node's certificate; `None`: whom the machine trusts.
    pub ca_file: Option<PathBuf>,
    /// This machine's address to listen on.
    pub host: IpAddr,
    /// `None`: the topology's.
    pub model: Option<NodeModel>,
    /// How much it can do beside other nodes of its role.
    pub weight: u32,
    /// Replicas, at least one.
    pub count: u32,
    pub gpus: GpuRequest,
    pub cpus: CpuRequest,
    /// How many GPUs (or groups of cores) one replica takes.
    pub tensor_parallel: u32,
    /// Flags for vLLM, after pegaflow's own.
    pub args: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// `None`: pegaflow finds one.
    pub port: Option<u16>,
    /// Of a GPU's memory, for weights and KV; in (0, 1].
    pub gpu_memory_fraction: f64,
    /// Bytes that each of its GPUs must have free.
    pub gpu_memory_free: Option<u64>,
    /// Its GPUs may be other nodes' too that say the same, while their fractions fit.
    pub share_gpus: bool,
    /// Bytes of vLLM's own KV cache; always there on CPU, in whole GiB.
    pub kv_cache: Option<u64>,
}

impl NodeSettings {
    /// The node takes part in hand-offs.
    pub fn shares_kv(&self) -> bool {
        self.role != Role::Unified && self.is_own()
    }

    /// Pegaflow starts it.
    pub fn is_own(&self) -> bool {
        self.url.is_none()
    }

    /// The value of a flag in `args`, empty where it takes none; `None`: it is not there.
    pub fn flag(&self, name: &str) -> Option<String> {
        let mut flags = flags::flags(&self.args).into_iter();
        let found = flags.find(|flag| flag.name == name)?;
        Some(found.value.unwrap_or_default())
    }

    /// The names of the replicas.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> {
        (0..self.count).map(|replica| {
            if self.count == 1 {
                NodeId::from(self.name.as_str())
            } else {
                NodeId::from(format!("{}-{replica}", self.name).as_str())
            }
        })
    }
}

/// `cpus` of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CpuRequest {
    /// An equal share of the cores; with GPUs, those beside them.
    Auto,
    /// Every core that pegaflow itself may use.
    All,
    Listed(Vec<usize>),
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TopologyErrors {
    #[error("cannot read the topology {}: {source}", file.display())]
    Read { file: PathBuf, source: io::Error },
    /// Everything that is wrong with the file, in the file's order.
    #[error("{}", write_problems(file, problems))]
    Invalid {
        file: PathBuf,
        problems: Vec<Problem<ProblemKind>>,
    },
}

impl Topology {
    /// Ports that the file names, for [`crate::host::claim_ports`] to avoid.
    pub fn fixed_ports(&self) -> Vec<u16> {
        let nodes = self.nodes.iter().filter_map(|node| node.port);
        let router = &self.router;
        let own = [Some(router.listen), router.metrics_listen];
        nodes
            .chain(own.into_iter().flatten().map(|listen| listen.port()))
            .collect()
    }

    /// What the node serves.
    pub fn model_of<'t>(&'t self, node: &'t NodeSettings) -> &'t ModelRef {
        node.model.as_ref().map_or(&self.model, |own| &own.model)
    }

    /// What clients write in `model` to reach the node.
    pub fn served_by<'t>(&'t self, node: &'t NodeSettings) -> &'t str {
        let own = node.model.as_ref();
        own.map_or(&self.served_model_name, |own| &own.served_name)
    }

    /// The names of all models that pegaflow's own nodes serve.
    pub fn served_names(&self) -> BTreeSet<&str> {
        let own = self.nodes.iter().filter(|node| node.is_own());
        own.map(|node| self.served_by(node)).collect()
    }

    /// What nodes serve beside the topology's model, each once.
    pub fn other_models(&self) -> Vec<&ModelRef> {
        let own = self.nodes.iter().filter(|node| node.is_own());
        let mut others: Vec<&ModelRef> = Vec::new();
        for model in own.map(|node| self.model_of(node)) {
            if *model != self.model && !others.contains(&model) {
                others.push(model);
            }
        }
        others
    }

    /// Where a key like `node[1].gpus` stands in the file, or the nearest table around it.
    pub fn place(&self, key: &str) -> Place {
        self.source.value(key)
    }
}

/// The CPU variant that lies beside a topology: `1p1d-cpu.toml` for `1p1d.toml`.
pub fn cpu_sibling(file: &Path) -> Option<PathBuf> {
    let stem = file.file_stem()?.to_str()?;
    let sibling = file.with_file_name(format!("{stem}-cpu.toml"));
    sibling.is_file().then_some(sibling)
}
