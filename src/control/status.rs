//! What `GET /v1/status` and `pegaflow status --json` say: stable, only ever added to.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::fleet::{FleetSnapshot, KvTrust, NodeId, NodeView, Role, Service};
use crate::host::GpuFigures;

/// What does not change while an instance runs.
#[derive(Debug, Clone)]
pub struct About {
    pub name: String,
    pub url: String,
    pub model: String,
    pub topology: PathBuf,
    pub logs: PathBuf,
    /// pegaflow writes one there, too.
    pub has_own_log: bool,
    pub started: SystemTime,
    /// How long a restart waits for running requests.
    pub drain_timeout: Duration,
    pub devices: BTreeMap<NodeId, Devices>,
}

/// What a node computes on.
#[derive(Debug, Clone, Default)]
pub struct Devices {
    pub gpus: Vec<u32>,
    pub cpus: Vec<usize>,
}

/// One instance at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub name: String,
    /// Of pegaflow.
    pub version: String,
    pub pid: u32,
    pub state: State,
    /// Where clients connect.
    pub url: Option<String>,
    /// What clients write in `model`.
    pub model: Option<String>,
    pub topology: PathBuf,
    pub logs: Option<PathBuf>,
    /// RFC 3339, UTC.
    pub started: String,
    pub uptime_seconds: u64,
    /// Ordered by name.
    pub nodes: Vec<NodeStatus>,
    /// Those that nodes run on, by index.
    #[serde(default)]
    pub gpus: Vec<GpuFigures>,
}

/// What an instance amounts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Installs the runtime, fetches the model: no node runs yet.
    Preparing,
    /// Nodes are on their way for the first time.
    Starting,
    /// Serves all that the topology asks for.
    Ready,
    /// Serves, but not all.
    Degraded,
    /// Nothing serves now.
    Down,
    Stopping,
}

/// One node at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub name: String,
    pub role: Role,
    /// A word of [`crate::fleet::Phase::label`].
    pub phase: String,
    /// `none`, `unproven`, `proven`, `refused`.
    pub kv: String,
    /// When the phase was entered: RFC 3339, UTC.
    pub since: String,
    pub seconds_in_phase: u64,
    pub restarts: u32,
    /// Counts spawns, from 1.
    pub incarnation: u64,
    /// Of vLLM's API server, while it lives.
    pub pid: Option<u32>,
    pub address: SocketAddr,
    pub pool: String,
    pub gpus: Vec<u32>,
    pub cpus: Vec<usize>,
    /// Requests of clients that the router has sent there and that are not over.
    pub in_flight: usize,
    /// Why it died last, or why it is not ready.
    pub reason: Option<String>,
    /// Others started it, and others end it.
    #[serde(default)]
    pub external: bool,
}

impl Status {
    pub(super) fn new(
        about: &About,
        state: State,
        fleet: &FleetSnapshot,
        in_flight: &BTreeMap<NodeId, usize>,
    ) -> Self {
        let now = SystemTime::now();
        let node = |view: &NodeView| {
            let devices = about.devices.get(&view.id).cloned().unwrap_or_default();
            let in_flight = in_flight.get(&view.id).copied().unwrap_or(0);
            NodeStatus::new(view, devices, in_flight, now)
        };
        Self {
            name: about.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            state,
            url: Some(about.url.clone()),
            model: Some(about.model.clone()),
            topology: about.topology.clone(),
            logs: Some(about.logs.clone()),
            started: rfc3339(about.started),
            uptime_seconds: seconds(about.started, now),
            nodes: fleet.nodes().map(node).collect(),
            gpus: Vec::new(),
        }
    }
}

impl NodeStatus {
    fn new(view: &NodeView, devices: Devices, in_flight: usize, now: SystemTime) -> Self {
        let (kv, refusal) = match &view.trust {
            KvTrust::None => ("none", None),
            KvTrust::Unproven => ("unproven", None),
            KvTrust::Proven => ("proven", None),
            KvTrust::Assumed => ("assumed", None),
            KvTrust::Refused(why) => ("refused", Some(why.clone())),
        };
        Self {
            name: view.id.to_string(),
            role: view.role,
            phase: view.phase.label().to_owned(),
            kv: kv.to_owned(),
            since: rfc3339(view.since),
            seconds_in_phase: seconds(view.since, now),
            restarts: view.restarts,
            incarnation: view.incarnation,
            pid: view.pid,
            address: view.addr,
            pool: view.pool.to_string(),
            gpus: devices.gpus,
            cpus: devices.cpus,
            in_flight,
            reason: refusal.or_else(|| view.reason.clone()),
            external: view.external,
        }
    }
}

impl State {
    pub(super) fn of(service: Service) -> Self {
        match service {
            Service::Full => Self::Ready,
            Service::Degraded => Self::Degraded,
            Service::Down => Self::Down,
        }
    }

    /// The word that JSON has.
    pub fn label(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Degraded => "degraded",
            Self::Down => "down",
            Self::Stopping => "stopping",
        }
    }
}

/// UTC, in whole seconds.
pub fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// 0 where the clock was set back.
pub fn seconds(from: SystemTime, to: SystemTime) -> u64 {
    to.duration_since(from).unwrap_or_default().as_secs()
}
