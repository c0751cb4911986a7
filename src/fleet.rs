//! Who exists, in which phase, at which address: the one picture that all parts share.
//!
//! The supervisor is the only writer ([`FleetPublisher`]); the router, the engine's glue and the
//! status page read a [`FleetWatch`]. A snapshot is immutable; readers never block the writer.
//!
//! ```text
//! Pending ─▶ Starting ─▶ WarmingUp ─▶ Verifying ─▶ Ready ◀─▶ Unreachable
//!    ▲           │           │            │           │           │
//!    │           └───────────┴──── died ──┴───────────┴───────────┘
//!    │                              │
//!    └────────── Backoff ◀──────────┤        CrashLoop (too many deaths; needs a hand)
//!                                   └──────▶ Failed    (a reason that a retry cannot mend)
//! Ready, Unreachable ─▶ Draining ─▶ Ready, or Stopping ─▶ Pending      (a person's drain, or restart)
//! any ─▶ Stopping ─▶ Stopped
//!
//! A node that others started:  Pending ─▶ Ready ◀─▶ Unreachable, Down
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

mod key;

pub use key::{KeyError, NodeKey};

/// A node's name, unique in its topology: the `name` of its `[[node]]`, with `-0`, `-1`, ...
/// appended when `count` is above one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct NodeId(Arc<str>);

impl NodeId {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for NodeId {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Where nodes exchange KV of which the topology says nothing else.
pub const DEFAULT_POOL: &str = "default";

/// What a node does in the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Computes prompts and saves their KV.
    Prefill,
    /// Loads KV and generates.
    Decode,
    /// Does both for itself; has no connector to the store.
    Unified,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Unified => "unified",
        })
    }
}

/// Where a node is in its life. Only [`Phase::Ready`] nodes get requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    /// Not spawned yet.
    Pending,
    /// Spawned; `/health` does not answer yet.
    Starting,
    /// Healthy; the first request compiles kernels.
    WarmingUp,
    /// Warm; waits for, or takes part in, the canary.
    Verifying,
    /// Serves.
    Ready,
    /// Ready, but the last health probe got no answer.
    Unreachable,
    /// Started by others, and it is not there, or says that it cannot serve.
    Down,
    /// Ready, but a person has asked for a drain or a restart: finishes what it has.
    Draining,
    /// Died; is started again after the delay.
    Backoff {
        #[serde(serialize_with = "as_millis")]
        delay: Duration,
    },
    /// Died too often; stays down until a person restarts it.
    CrashLoop,
    /// Died for a reason that a retry cannot mend, or was refused by the canary.
    Failed,
    Stopping,
    Stopped,
}

fn as_millis<S: serde::Serializer>(value: &Duration, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_u64(u64::try_from(value.as_millis()).unwrap_or(u64::MAX))
}

impl Phase {
    /// What [`Phase::label`] can say.
    pub const LABELS: [&str; 13] = [
        "pending",
        "starting",
        "warming_up",
        "verifying",
        "ready",
        "unreachable",
        "down",
        "draining",
        "backoff",
        "crash_loop",
        "failed",
        "stopping",
        "stopped",
    ];

    /// A stable word for tables, logs and metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::WarmingUp => "warming_up",
            Self::Verifying => "verifying",
            Self::Ready => "ready",
            Self::Unreachable => "unreachable",
            Self::Down => "down",
            Self::Draining => "draining",
            Self::Backoff { .. } => "backoff",
            Self::CrashLoop => "crash_loop",
            Self::Failed => "failed",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }

    /// No event but a person's command leaves this phase.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::CrashLoop | Self::Failed | Self::Stopped)
    }
}

/// Whether KV that this node saves or loads may be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kv", content = "reason", rename_all = "snake_case")]
pub enum KvTrust {
    /// The node has no connector.
    None,
    /// The canary has not run on this incarnation: the node serves whole requests only.
    Unproven,
    /// The canary compared loaded with computed KV and found them equal.
    Proven,
    /// Others started the node and say that it takes part; no canary runs there.
    Assumed,
    /// The canary found a difference, or nothing was loaded.
    Refused(String),
}

/// One node as everybody but its own actor sees it.
#[derive(Debug, Clone, Serialize)]
pub struct NodeView {
    pub id: NodeId,
    pub role: Role,
    /// Only nodes of one pool hand off to each other.
    pub pool: Arc<str>,
    /// How much it can do beside others; at least 1.
    pub weight: u32,
    pub addr: SocketAddr,
    #[serde(flatten)]
    pub phase: Phase,
    #[serde(flatten)]
    pub trust: KvTrust,
    /// Counts spawns, from 1; 0 before the first.
    pub incarnation: u64,
    /// Every process of this incarnation and of all before it is gone.
    pub reaped: u64,
    /// The pid of the vLLM API server, while it lives.
    pub pid: Option<u32>,
    /// Restarts since pegaflow started.
    pub restarts: u32,
    /// Why the node died last, or why it is not ready.
    pub reason: Option<String>,
    /// When the phase was entered.
    pub since: SystemTime,
    /// What clients may write in `model` to reach it, its model's own name first; empty: it has not said.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub models: Arc<[String]>,
    /// Others started it: nothing of this run is its to know.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub external: bool,
}

impl NodeView {
    /// A node before its first spawn.
    pub fn pending(id: NodeId, role: Role, addr: SocketAddr) -> Self {
        let trust = if role == Role::Unified {
            KvTrust::None
        } else {
            KvTrust::Unproven
        };
        Self {
            id,
            role,
            pool: DEFAULT_POOL.into(),
            weight: 1,
            addr,
            phase: Phase::Pending,
            trust,
            incarnation: 0,
            reaped: 0,
            pid: None,
            restarts: 0,
            reason: None,
            since: SystemTime::now(),
            models: [].into(),
            external: false,
        }
    }

    /// A node that others started, before the first look at it.
    pub fn external(id: NodeId, role: Role, addr: SocketAddr) -> Self {
        let mut node = Self::pending(id, role, addr);
        node.external = true;
        if node.trust == KvTrust::Unproven {
            node.trust = KvTrust::Assumed;
        }
        node
    }

    pub fn weighing(self, weight: u32) -> Self {
        Self { weight, ..self }
    }

    pub fn in_pool(self, pool: &str) -> Self {
        Self {
            pool: pool.into(),
            ..self
        }
    }

    pub fn serving(self, models: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            models: models.into_iter().map(Into::into).collect(),
            ..self
        }
    }

    /// It serves this model, as far as is known; `None`: whatever it is.
    pub fn serves(&self, model: Option<&str>) -> bool {
        let Some(model) = model else { return true };
        self.models.is_empty() || self.models.iter().any(|served| served == model)
    }

    /// When it is started again, if it waits for that.
    pub fn next_start(&self) -> Option<SystemTime> {
        match self.phase {
            Phase::Backoff { delay } => self.since.checked_add(delay),
            _ => None,
        }
    }

    /// Why it does not serve, and when it will be tried again: a clause for people.
    pub fn absence(&self, now: SystemTime) -> String {
        let mut text = format!("{}: {}", self.id, self.phase.label());
        if let Some(reason) = &self.reason {
            text.push_str(&format!(" ({reason})"));
        }
        if let Some(at) = self.next_start() {
            match at.duration_since(now).map_or(0, whole_seconds) {
                0 => text.push_str(", is started again now"),
                seconds => text.push_str(&format!(", next try in {seconds} s")),
            }
        }
        text
    }

    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// May take part in a hand-off.
    pub fn can_hand_off(&self) -> bool {
        self.is_ready() && matches!(self.trust, KvTrust::Proven | KvTrust::Assumed)
    }
}

/// See [`FleetSnapshot::service`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// Hand-offs, or every unified node where there is nothing to hand off.
    Full,
    Degraded,
    Down,
}

/// Rounded up: nobody should come back too early.
pub fn whole_seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

/// All nodes at one moment, ordered by name.
#[derive(Debug, Clone, Default, Serialize)]
pub struct FleetSnapshot {
    nodes: BTreeMap<NodeId, NodeView>,
}

impl FleetSnapshot {
    pub fn nodes(&self) -> impl Iterator<Item = &NodeView> + Clone {
        self.nodes.values()
    }

    pub fn node(&self, id: &NodeId) -> Option<&NodeView> {
        self.nodes.get(id)
    }

    pub fn ready(&self, role: Role) -> impl Iterator<Item = &NodeView> + Clone {
        self.nodes()
            .filter(move |node| node.role == role && node.is_ready())
    }

    /// A prefill and a decode node can hand off now.
    pub fn can_split(&self) -> bool {
        self.can_split_for(None)
    }

    /// A prefill and a decode node that serve this model can hand off now.
    pub fn can_split_for(&self, model: Option<&str>) -> bool {
        let mut prefill = self.proven(Role::Prefill);
        prefill.any(|node| node.serves(model) && self.has_decode_for(node, model))
    }

    /// A decode node that can load what this prefill node saves, and serves the model.
    pub fn has_decode_for(&self, prefill: &NodeView, model: Option<&str>) -> bool {
        let mut decode = self.proven(Role::Decode);
        decode.any(|node| node.pool == prefill.pool && node.serves(model))
    }

    /// How much of what the topology asks for is served now.
    pub fn service(&self) -> Service {
        let unified_only = self.nodes().all(|node| node.role == Role::Unified);
        if self.can_split() || unified_only && self.nodes().all(NodeView::is_ready) {
            Service::Full
        } else if self.nodes().any(NodeView::is_ready) {
            Service::Degraded
        } else {
            Service::Down
        }
    }

    fn proven(&self, role: Role) -> impl Iterator<Item = &NodeView> {
        self.ready(role).filter(|node| node.can_hand_off())
    }
}

/// The supervisor's end of the fleet.
#[derive(Debug, Clone)]
pub struct FleetPublisher {
    sender: Arc<watch::Sender<Arc<FleetSnapshot>>>,
}

/// A reader's end of the fleet. A snapshot cannot be looked at in place: who did so twice at a time would wait for
/// ever once a writer waited in between, and everybody else behind them.
#[derive(Debug, Clone)]
pub struct FleetWatch(watch::Receiver<Arc<FleetSnapshot>>);

impl FleetWatch {
    /// As it is now.
    pub fn now(&self) -> Arc<FleetSnapshot> {
        self.0.borrow().clone()
    }

    /// As it is now; [`FleetWatch::changed`] waits for what comes after it.
    pub fn latest(&mut self) -> Arc<FleetSnapshot> {
        self.0.borrow_and_update().clone()
    }

    /// An error: nobody will publish any more.
    pub async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        self.0.changed().await
    }

    /// The first that is so, from now on.
    pub async fn wait_for(
        &mut self,
        mut condition: impl FnMut(&FleetSnapshot) -> bool,
    ) -> Result<Arc<FleetSnapshot>, watch::error::RecvError> {
        let found = self.0.wait_for(|snapshot| condition(snapshot)).await;
        found.map(|snapshot| snapshot.clone())
    }
}

impl FleetPublisher {
    pub fn new(nodes: impl IntoIterator<Item = NodeView>) -> Self {
        let nodes = nodes
            .into_iter()
            .map(|node| (node.id.clone(), node))
            .collect();
        let (sender, _) = watch::channel(Arc::new(FleetSnapshot { nodes }));
        Self {
            sender: Arc::new(sender),
        }
    }

    pub fn watch(&self) -> FleetWatch {
        FleetWatch(self.sender.subscribe())
    }

    pub fn snapshot(&self) -> Arc<FleetSnapshot> {
        self.sender.borrow().clone()
    }

    /// Changes one node and wakes the readers. A change of phase stamps `since`.
    pub fn update(&self, id: &NodeId, change: impl FnOnce(&mut NodeView)) {
        self.sender.send_if_modified(|current| {
            let Some(old) = current.node(id) else {
                return false;
            };
            let mut node = old.clone();
            change(&mut node);
            if node.phase != old.phase {
                node.since = SystemTime::now();
            }
            Arc::make_mut(current).nodes.insert(id.clone(), node);
            true
        });
    }
}

#[cfg(test)]
mod tests;
