//! Nodes that others started: looked at and shown in the fleet, never spawned or killed.
//!
//! ```text
//!            2xx                     late three times
//! Pending ────────▶ Ready ◀────────────────────────────▶ Unreachable
//!    │                ▲ │ refused, 503, ...   2xx            │
//!    │            2xx │ ▼                                    │
//!    └──────────────▶ Down ◀───────── refused, 503, ... ─────┘
//! ```
//!
//! A look is `GET /health` on a connection of its own ([`ask`]), every `health_interval`, and at once when the router
//! was refused a connection. Nobody tells us that a process has been replaced, so each way up from `Down`
//! counts as a new incarnation. A person may drain it: it is Draining then where it would be Ready, and gets nothing new.

use std::net::SocketAddr;
use std::time::Duration;

use http::StatusCode;
use tokio::net::lookup_host;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::models::{MAX_MODELS, names};
use super::orders::{Order, OrderDesk};
use super::state::{Command, Refusal};
use crate::fleet::{FleetPublisher, NodeView, Phase};
use crate::notify::{Beat, Vitals};
use crate::plan::ExternalNode;
use crate::reach::{Reach, Reaches};
use crate::topology::NodeUrl;
use crate::traffic::Traffic;
use ask::{Silence, ask};

mod ask;

/// For the whole look.
const LOOK: Duration = Duration::from_secs(1);
/// Looks in a row that a ready node may be late for: a busy API server stalls for seconds.
const LATE_LOOKS: u32 = 3;

impl ExternalNode {
    /// Before the first look. Where the URL has a name, its address comes with the first look.
    pub fn view(&self) -> NodeView {
        let unknown = std::net::Ipv4Addr::UNSPECIFIED.into();
        let ip = self.url.host().parse().unwrap_or(unknown);
        let addr = SocketAddr::new(ip, self.url.port());
        NodeView::external(self.id.clone(), self.role, addr)
            .in_pool(&self.pool)
            .weighing(self.weight)
    }
}

/// What watching takes.
pub struct ExternalDeps {
    pub health_interval: Duration,
    pub fleet: FleetPublisher,
    pub traffic: Traffic,
    pub vitals: Vitals,
    pub reaches: Reaches,
    /// What people ask of them.
    pub orders: OrderDesk,
}

/// Watches the nodes until `end`.
pub async fn watch_external(
    nodes: Vec<ExternalNode>,
    mut deps: ExternalDeps,
    end: CancellationToken,
) {
    let mut watchers = JoinSet::new();
    for node in nodes {
        let beat = deps.vitals.part(format!("the watch of {}", node.id));
        let watcher = Watcher {
            reach: deps.reaches.of(&node.id).clone(),
            orders: deps.orders.take(&node.id),
            is_drained: false,
            interval: deps.health_interval,
            fleet: deps.fleet.clone(),
            traffic: deps.traffic.clone(),
            addr: node.view().addr,
            standing: Standing::default(),
            models: None,
            node,
        };
        watchers.spawn(watcher.run(beat));
    }
    end.cancelled().await;
    watchers.shutdown().await;
}

struct Watcher {
    node: ExternalNode,
    reach: Reach,
    orders: mpsc::Receiver<Order>,
    /// A person has asked for that: it gets nothing new.
    is_drained: bool,
    interval: Duration,
    fleet: FleetPublisher,
    traffic: Traffic,
    addr: SocketAddr,
    standing: Standing,
    /// `None`: not asked yet since it came up.
    models: Option<Vec<String>>,
}

impl Watcher {
    async fn run(mut self, mut beat: Beat) {
        loop {
            let mut look = beat.during(self.look()).await;
            if look == Look::Healthy && self.models.is_none() {
                // Before anybody is told that it is ready: requests for another model must not get there.
                match beat.during(self.ask_models()).await {
                    Models::Listed(models) => self.learn(models),
                    Models::Unknown => {}
                    Models::Refused(why) => look = Look::Down(why),
                }
            }
            let before = self.standing.clone();
            self.standing.see(look);
            if self.standing.phase != Phase::Ready {
                self.models = None;
            }
            self.publish(&before);
            beat.mark();
            let order = beat.during(async {
                tokio::select! {
                    () = sleep(self.interval) => None,
                    () = self.traffic.suspected(&self.node.id) => None,
                    Some(order) = self.orders.recv() => Some(order),
                }
            });
            if let Some(order) = order.await {
                self.obey(order);
            }
        }
    }

    /// What becomes of the node itself is not ours: only what is sent to it.
    fn obey(&mut self, order: Order) {
        let done = match order.command {
            Command::Drain => {
                self.is_drained = true;
                self.traffic.close(&self.node.id);
                Ok(())
            }
            Command::Undrain => {
                self.is_drained = false;
                self.traffic.open(&self.node.id);
                Ok(())
            }
            Command::Restart { .. } => Err(Refusal::Others),
        };
        let phase = self.phase();
        self.fleet.update(&self.node.id, |view| view.phase = phase);
        // Who asked may be gone.
        let _ = order.reply.send(done);
    }

    /// Of a node that is drained, or not.
    fn phase(&self) -> Phase {
        match (&self.standing.phase, self.is_drained) {
            (Phase::Ready, true) => Phase::Draining,
            (phase, _) => phase.clone(),
        }
    }

    async fn look(&mut self) -> Look {
        let looking = async {
            self.addr = match resolve(&self.node.url, self.addr).await {
                Ok(addr) => addr,
                Err(why) => return Look::Down(why),
            };
            match ask(self.addr, &self.reach, "/health", None).await {
                Ok(reply) if reply.status.is_success() => Look::Healthy,
                Ok(reply) => Look::Down(format!("GET /health was answered {}", reply.status)),
                Err(Silence::Unreached(why)) => Look::Down(format!("cannot connect: {why}")),
                // It hung up in the middle; the next look says more.
                Err(Silence::Broken) => Look::Late,
            }
        };
        timeout(LOOK, looking).await.unwrap_or(Look::Late)
    }

    fn publish(&self, before: &Standing) {
        let (node, now) = (&self.node.id, &self.standing);
        let snapshot = self.fleet.snapshot();
        let moved = snapshot
            .node(node)
            .is_some_and(|view| view.addr != self.addr);
        if now == before && !moved {
            return;
        }
        if now.phase != before.phase {
            match (&now.phase, &now.reason) {
                (Phase::Ready, _) => tracing::info!(%node, "{} is ready", self.node.url),
                (phase, Some(why)) => {
                    tracing::warn!(%node, "{} is {}: {why}", self.node.url, phase.label());
                }
                _ => {}
            }
        }
        self.fleet.update(node, |view| {
            view.addr = self.addr;
            view.phase = self.phase();
            view.incarnation = now.incarnation;
            view.reason = now.reason.clone();
        });
    }

    /// A node that has no list of models is not asked again.
    async fn ask_models(&self) -> Models {
        let asked = ask(self.addr, &self.reach, "/v1/models", Some(MAX_MODELS));
        let Ok(Ok(reply)) = timeout(LOOK, asked).await else {
            return Models::Unknown;
        };
        match (reply.status, reply.body) {
            // Whose key is not ours is asked with the clients' own.
            (status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN), _)
                if self.reach.authorization().is_some() =>
            {
                Models::Refused(format!(
                    "GET /v1/models was answered {status}: it does not take the key that it is shown"
                ))
            }
            // In the latter case it is longer than any list.
            (StatusCode::NOT_FOUND, _) | (_, None) => Models::Listed(Vec::new()),
            (_, Some(body)) => names(&body).map_or(Models::Unknown, Models::Listed),
        }
    }

    fn learn(&mut self, models: Vec<String>) {
        self.fleet.update(&self.node.id, |view| {
            view.models = models.as_slice().into();
        });
        self.models = Some(models);
    }
}

/// What the node says that it serves.
enum Models {
    Listed(Vec<String>),
    /// Not this time.
    Unknown,
    /// It would refuse every request, and this is why.
    Refused(String),
}

/// The address now. A name may have several, and may move: the known one is kept while it is among them.
async fn resolve(url: &NodeUrl, known: SocketAddr) -> Result<SocketAddr, String> {
    if let Ok(ip) = url.host().parse() {
        return Ok(SocketAddr::new(ip, url.port()));
    }
    let found = lookup_host((url.host(), url.port())).await;
    let found: Vec<_> = found
        .map_err(|error| format!("cannot resolve {}: {error}", url.host()))?
        .collect();
    if found.contains(&known) {
        return Ok(known);
    }
    let first = found.first().copied();
    first.ok_or_else(|| format!("{} has no address", url.host()))
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Look {
    Healthy,
    Down(String),
    /// No answer in time.
    Late,
}

/// Where the node stands, as far as the looks tell.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Standing {
    phase: Phase,
    incarnation: u64,
    late: u32,
    reason: Option<String>,
}

impl Default for Standing {
    fn default() -> Self {
        Self {
            phase: Phase::Pending,
            incarnation: 0,
            late: 0,
            reason: None,
        }
    }
}

impl Standing {
    fn see(&mut self, look: Look) {
        self.late = match look {
            Look::Late => self.late.saturating_add(1).min(LATE_LOOKS),
            _ => 0,
        };
        match look {
            Look::Healthy => {
                if matches!(self.phase, Phase::Pending | Phase::Down) {
                    self.incarnation += 1;
                }
                (self.phase, self.reason) = (Phase::Ready, None);
            }
            Look::Down(why) => (self.phase, self.reason) = (Phase::Down, Some(why)),
            Look::Late if self.phase == Phase::Ready && self.late < LATE_LOOKS => {}
            Look::Late => {
                if self.phase == Phase::Ready {
                    self.phase = Phase::Unreachable;
                }
                let why = format!("GET /health is not answered within {LOOK:?}");
                self.reason = Some(why);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(looks: &[Look]) -> Standing {
        let mut standing = Standing::default();
        for look in looks {
            standing.see(look.clone());
        }
        standing
    }

    fn down() -> Look {
        Look::Down("refused".to_owned())
    }

    #[test]
    fn a_refusal_counts_at_once_and_lateness_only_when_it_lasts() {
        use Look::{Healthy, Late};
        for (looks, phase, incarnation) in [
            (&[][..], Phase::Pending, 0),
            (&[Late, Late, Late, Late], Phase::Pending, 0),
            (&[Healthy], Phase::Ready, 1),
            (&[Healthy, Late, Late], Phase::Ready, 1),
            (&[Healthy, Late, Late, Healthy, Late], Phase::Ready, 1),
            (&[Healthy, Late, Late, Late], Phase::Unreachable, 1),
            (&[Healthy, Late, Late, Late, Healthy], Phase::Ready, 1),
            (&[Healthy, down()], Phase::Down, 1),
            (&[Healthy, down(), Late], Phase::Down, 1),
            (&[Healthy, Late, Late, Late, down()], Phase::Down, 1),
            (&[Healthy, down(), Healthy], Phase::Ready, 2),
        ] {
            let standing = seen(looks);
            assert_eq!((standing.phase, standing.incarnation), (phase, incarnation));
        }
    }

    #[test]
    fn a_node_that_serves_has_no_reason_and_every_other_has_one() {
        use Look::{Healthy, Late};
        assert!(seen(&[Late]).reason.is_some());
        assert!(seen(&[Healthy, down()]).reason.is_some());
        assert_eq!(seen(&[Healthy, down(), Healthy]).reason, None);
    }
}
