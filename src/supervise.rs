//! Keeps the nodes alive, and proves that their KV is right. The only writer of the fleet.
//!
//! ```text
//!                     verdicts
//!  canary ◀── fleet ──────────────▶ one actor per node ── phase, pid, trust ──▶ fleet
//!                                    │  machine: state.rs (pure), backoff.rs (pure)
//!                                    │  HTTP:    probe.rs
//!                          commands  ▼  ▲ reports, log
//!                                   guard ── vLLM API server ── EngineCore ── Workers
//! ```
//!
//! - [`state`](self) (drawn in `state.rs`): what happens next, as a pure function.
//! - `liveness.rs`: whether a node still works, out of its figures and one token now and then.
//! - `clock.rs`: the time in which pegaflow itself stood still does not count against a node.
//! - `external.rs`: nodes that others started; no machine, no guard.
//! - `gate.rs`: what must be free again before the next incarnation is spawned.
//! - `guard.rs`: the process that promises that nothing of a node is left, whoever dies.
//! - `cgroup.rs`: a control group for each node, where that may be: the kernel ends all of it at once.
//! - `sweep.rs`: does the same if the guard itself was killed; and reaps, as a container's first process.
//! - `orphans.rs`: ends what was left when both were killed, at the next start.
//! - `canary.rs`: before a node that shares KV is ready, and after each of its restarts, a prompt
//!   goes P -> store -> D and is compared with what D computes alone.
//!
//! The supervisor's stop begins with its shutdown token: whoever wants to drain first, hands it a
//! token that is cancelled after the drain.
//!
//! Not here yet, and room is left for it:
//!
//! - *Scaling and reloading while it runs*: [`run`] spawns one actor for each plan and keeps no list
//!   beside the actors and the canary's channels; an actor can be added, or stopped alone, at any time.
//! - *A warm standby*: one more phase between `Verifying` and `Ready`, left by an event when a node of
//!   its role dies. Machine, canary and liveness treat it as a node that is ready and gets no requests.
//! - *A supervisor that comes back and adopts running nodes*: the guard's end of the control socket
//!   would be named in the run directory, its death would start a timer instead of the stop, and an
//!   actor would begin in `Verifying` with what the guard says of its tree.

mod backoff;
mod canary;
mod cgroup;
mod child;
mod clock;
mod external;
mod gate;
mod guard;
mod liveness;
mod logs;
mod metrics;
mod models;
mod node;
mod obituary;
mod oom;
mod orders;
mod orphans;
mod probe;
mod state;
mod sweep;
#[cfg(test)]
mod testing;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::prctl;
use nix::unistd::{Pid, getpid};
use tokio::sync::mpsc;
use tokio::task::{self, JoinSet};

use crate::fleet::{FleetPublisher, KvTrust, NodeId, NodeKey, Phase};
use crate::handoff::HandoffBoard;
use crate::notify::Vitals;
use crate::plan::{NodePlan, SupervisorPlan};
use crate::shutdown::Shutdown;
use crate::topology::{Connector, Secrets};
use crate::traffic::Traffic;

pub use cgroup::{CgroupError, Groups};
pub use external::{ExternalDeps, watch_external};
pub use gate::StoreSessions;
pub use guard::{GuardArgs, guard_main};
pub use logs::LogSink;
pub use metrics::SupervisorMetrics;
pub use orders::{OrderDesk, Orders, orders};
pub use orphans::{end_orphans, mentions};
pub use state::{Command, Refusal};

use canary::{Canary, Pace};
use node::{Inbox, NodeActor, Shared};
use probe::NodeClient;

/// Verdicts for one node that wait for its actor.
const VERDICTS: usize = 8;

/// How a pair of nodes is examined.
#[derive(Debug, Clone, PartialEq)]
pub struct CanaryPlan {
    /// What carries the KV.
    pub connector: Connector,
    /// Tokens per chunk.
    pub block_size: u32,
    /// How far logprobs may be apart; 0.0: bit-exact.
    pub tolerance: f64,
    /// For each request of the canary, and for the hand-off.
    pub deadline: Duration,
    /// How long a node waits for a partner before it serves whole requests, unproven.
    pub partner_grace: Duration,
}

/// What the supervisor works with.
pub struct SupervisorDeps {
    pub nodes: Vec<NodePlan>,
    pub plan: SupervisorPlan,
    pub canary: CanaryPlan,
    pub fleet: FleetPublisher,
    pub board: HandoffBoard,
    /// Closed for a node that drains; tells when nothing is left there.
    pub traffic: Traffic,
    /// What people ask of the nodes.
    pub orders: OrderDesk,
    pub log_dir: PathBuf,
    /// Removed by a guard if pegaflow is killed.
    pub run_dir: PathBuf,
    /// Executed as `<program> __guard ...`; normally pegaflow itself.
    pub guard_program: PathBuf,
    pub console: Arc<dyn LogSink>,
    /// Where each actor shows that it makes progress.
    pub vitals: Vitals,
    /// What the nodes want to be shown.
    pub node_key: Option<NodeKey>,
    /// What the nodes' logs must not show.
    pub secrets: Secrets,
    pub metrics: SupervisorMetrics,
    /// `None`: there is no store.
    pub store: Option<Arc<dyn StoreSessions>>,
    /// `None`: nodes have no control groups of their own.
    pub groups: Option<Groups>,
}

#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    #[error("cannot become a subreaper, so orphans could not be found")]
    Subreaper(#[source] nix::errno::Errno),
    #[error("cannot create the log directory {}", path.display())]
    LogDir {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot create the HTTP client for probes")]
    Client(#[source] reqwest::Error),
    #[error("processes of {nodes:?} could not be killed; look for them with ps")]
    LeftBehind { nodes: Vec<String> },
    #[error("a part of the supervisor panicked; its node was stopped")]
    Panicked(#[source] tokio::task::JoinError),
}

/// Runs until `shutdown`, and then until every tree is gone (which takes a bounded time).
/// Nodes that fail for good do not end it.
pub async fn run(deps: SupervisorDeps, shutdown: Shutdown) -> Result<(), SupervisorError> {
    prctl::set_child_subreaper(true).map_err(SupervisorError::Subreaper)?;
    std::fs::create_dir_all(&deps.log_dir).map_err(|source| SupervisorError::LogDir {
        path: deps.log_dir.clone(),
        source,
    })?;
    let client = NodeClient::new(deps.node_key.as_ref()).map_err(SupervisorError::Client)?;
    let shared = Arc::new(Shared {
        plan: deps.plan,
        client: client.clone(),
        fleet: deps.fleet.clone(),
        traffic: deps.traffic.clone(),
        log_dir: deps.log_dir,
        run_dir: deps.run_dir,
        guard_program: deps.guard_program,
        console: deps.console,
        secrets: deps.secrets,
        store: deps.store,
        groups: deps.groups,
        metrics: deps.metrics,
    });
    let mut actors = Actors::new(deps.fleet.clone());
    let mut verdicts = BTreeMap::new();
    let mut orders = deps.orders;
    for plan in deps.nodes {
        let (sender, receiver) = mpsc::channel(VERDICTS);
        verdicts.insert(plan.id.clone(), sender);
        let id = plan.id.clone();
        let inbox = Inbox {
            verdicts: receiver,
            orders: orders.take(&id),
        };
        let beat = deps.vitals.part(format!("the supervisor of {id}"));
        let actor = NodeActor::new(shared.clone(), plan, inbox, beat);
        actors.spawn(id, actor.run(shutdown.clone()));
    }
    let canary = Canary {
        plan: deps.canary,
        client,
        board: deps.board,
        traffic: deps.traffic.clone(),
        watch: deps.fleet.watch(),
        verdicts,
        pace: Pace::default(),
        passed: BTreeSet::new(),
        store_off: false,
    };
    let mut helpers = JoinSet::new();
    let until = shutdown.graceful().clone();
    helpers.spawn(async move { until.run_until_cancelled(canary.run()).await });
    if getpid() == Pid::from_raw(1) {
        helpers.spawn(async {
            sweep::reap_adopted().await;
            None
        });
    }
    let result = actors.join().await;
    helpers.shutdown().await;
    result
}

/// The running actors, and whose they are: a panic tells only the task.
struct Actors {
    tasks: JoinSet<node::Ended>,
    nodes: HashMap<task::Id, NodeId>,
    fleet: FleetPublisher,
}

impl Actors {
    fn new(fleet: FleetPublisher) -> Self {
        Self {
            tasks: JoinSet::new(),
            nodes: HashMap::new(),
            fleet,
        }
    }

    fn spawn(&mut self, node: NodeId, actor: impl Future<Output = node::Ended> + Send + 'static) {
        let task = self.tasks.spawn(actor);
        self.nodes.insert(task.id(), node);
    }

    async fn join(mut self) -> Result<(), SupervisorError> {
        let mut left: Vec<NodeId> = Vec::new();
        let mut panicked = None;
        while let Some(ended) = self.tasks.join_next().await {
            match ended {
                Ok(node::Ended::Clean) => {}
                Ok(node::Ended::LeftBehind(node)) => left.push(node),
                Err(error) => {
                    tracing::error!("a node's supervisor failed: {error}");
                    self.lost(error.id());
                    panicked = Some(error);
                }
            }
        }
        if !left.is_empty() {
            let nodes = left.iter().map(ToString::to_string).collect();
            return Err(SupervisorError::LeftBehind { nodes });
        }
        panicked.map_or(Ok(()), |error| Err(SupervisorError::Panicked(error)))
    }

    /// Nobody watches the node any more: its guard has killed it, and it must not get requests.
    fn lost(&self, task: task::Id) {
        let Some(id) = self.nodes.get(&task) else {
            return;
        };
        self.fleet.update(id, |node| {
            node.phase = Phase::Failed;
            node.pid = None;
            if node.trust == KvTrust::Proven {
                node.trust = KvTrust::Unproven;
            }
            let why = "its supervisor panicked (a bug of pegaflow); restart pegaflow";
            node.reason = Some(why.to_owned());
        });
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use crate::fleet::{NodeView, Role};

    use super::*;

    #[tokio::test]
    async fn a_node_whose_actor_panicked_is_failed_and_the_others_are_left_alone() {
        let addr = SocketAddr::from(([127, 0, 0, 1], 1));
        let fleet = FleetPublisher::new(["a", "b"].map(|id| {
            let mut view = NodeView::pending(id.into(), Role::Decode, addr);
            (view.phase, view.trust) = (Phase::Ready, KvTrust::Proven);
            view
        }));
        let mut actors = Actors::new(fleet.clone());
        actors.spawn("a".into(), async { panic!("a bug") });
        let mut watch = fleet.watch();
        actors.spawn("b".into(), async move {
            let failed = |fleet: &crate::fleet::FleetSnapshot| {
                fleet
                    .node(&"a".into())
                    .is_some_and(|node| node.phase == Phase::Failed)
            };
            drop(watch.wait_for(failed).await);
            node::Ended::Clean
        });
        let joined = tokio::time::timeout(Duration::from_secs(20), actors.join()).await;
        assert!(matches!(joined, Ok(Err(SupervisorError::Panicked(_)))));
        let snapshot = fleet.snapshot();
        let lost = snapshot.node(&"a".into()).unwrap();
        assert!(lost.reason.is_some() && lost.trust == KvTrust::Unproven);
        assert!(snapshot.node(&"b".into()).unwrap().can_hand_off());
    }
}
