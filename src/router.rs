//! The router: one OpenAI-compatible HTTP endpoint in front of the fleet.
//!
//! A request's way, with who decides what:
//!
//! ```text
//!            admission          body, split             handoff                dispatch
//! client ─▶ place or queue ─▶ parse once, shallowly ─▶ P leg, wait for KV ─▶ D leg, first piece
//!            │ 429/503          │ 400      │ whole        │ P's 4xx             │      │
//!            ▼                  ▼          └──────────────┼───────────────▶ any node   │ commit
//!          refused            refused                     ▼                     │      ▼
//!                                                       client              error JSON  stream
//! ```
//!
//! - Only nodes that serve the request's `model` are asked: see [`models`](self) (`models.rs`).
//! - Before the commit every failure is tried again elsewhere, unseen by the client; after it a
//!   broken stream goes on elsewhere, see [`replay`], or ends with an explicit error event.
//! - A request is one future: when the client goes away hyper drops it, and with it both legs, the
//!   hand-off's ticket, the node's count and the place. Nothing has to be cleaned up by hand.
//! - Decode is dispatched when the engine says that the KV is complete ([`HandoffBoard`]), not when
//!   the prefill node has answered. Where there is no engine, see [`KvReady`](crate::topology::KvReady).
//! - The router changes no state but its own; nodes come and go in the [`FleetWatch`].

mod access;
mod admission;
mod affinity;
mod balance;
mod body;
mod breaker;
mod budget;
mod claim;
mod cors;
mod demand;
mod dispatch;
mod error;
mod figures;
mod front;
mod handoff;
mod keys;
mod kv_ready;
mod legs;
mod metrics;
mod models;
mod node_metrics;
mod observation;
mod pace;
mod pool;
mod private_file;
mod proxy;
mod replay;
mod reply;
mod routes;
mod server;
mod split;
mod stream;
mod timeline;
mod tls;
mod wire;
mod worth;

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::fleet::{FleetWatch, NodeKey};
use crate::handoff::HandoffBoard;
use crate::live::Live;
use crate::notify::Vitals;
use crate::plan::RouterPlan;
use crate::reach::Reaches;
use crate::shutdown::Shutdown;
use crate::traffic::Traffic;

pub use error::RouterError;
pub use keys::{ApiKeys, KeysError, KeysSource};
pub use legs::LegError;
pub use metrics::RouterMetrics;
pub use private_file::{read_open, read_private};
pub use tls::{Tls, TlsError};

/// What the router needs from the rest of the program.
#[derive(Debug, Clone)]
pub struct RouterDeps {
    pub plan: RouterPlan,
    pub fleet: FleetWatch,
    pub board: HandoffBoard,
    pub traffic: Traffic,
    /// Whom to let in; `None`: everybody.
    pub keys: Option<ApiKeys>,
    /// Who may announce that KV is ready; `None`: nobody.
    pub admin: Option<ApiKeys>,
    /// What clients speak; `None`: plain HTTP.
    pub tls: Option<Tls>,
    /// What the nodes want to be shown, but those that others started.
    pub node_key: Option<NodeKey>,
    /// How those are reached.
    pub reaches: Reaches,
    pub metrics: RouterMetrics,
    /// What `GET /metrics` prints.
    pub registry: Arc<Registry>,
    /// Where the accept loop shows that it makes progress.
    pub vitals: Vitals,
    /// What is told of each request, for who watches.
    pub live: Live,
    /// Served beside `/metrics`, for who runs the fleet: below `/dashboard`, with a key of its own.
    pub dashboard: Option<axum::Router>,
}

/// Where the router is reached.
#[derive(Debug)]
pub struct Listeners {
    pub clients: TcpListener,
    /// For `/metrics` and `/status`, which clients then do not get.
    pub metrics: Option<TcpListener>,
}

impl From<TcpListener> for Listeners {
    fn from(clients: TcpListener) -> Self {
        Self {
            clients,
            metrics: None,
        }
    }
}

/// Serves until `shutdown.graceful()`, then lets running requests finish for
/// [`RouterPlan::drain_timeout`] (or until `shutdown.forced()`), then drops what is left and returns.
pub async fn serve(
    listeners: impl Into<Listeners>,
    deps: RouterDeps,
    shutdown: Shutdown,
) -> Result<(), RouterError> {
    let Listeners { clients, metrics } = listeners.into();
    let mut beat = deps.vitals.part("the router");
    let tls = deps.tls.clone();
    let figures = metrics.map(|listener| (listener, deps.vitals.part("the router's metrics")));
    let cx = Arc::new(Context::new(deps, &shutdown));
    for keys in [&cx.keys, &cx.admin].into_iter().flatten().cloned() {
        let stop = cx.stop.clone();
        cx.background
            .spawn(async move { stop.run_until_cancelled(keys.follow()).await });
    }
    let (stop, sweep) = (cx.stop.clone(), cx.client.sweep());
    cx.background
        .spawn(async move { stop.run_until_cancelled(sweep).await });
    if let Some(tls) = tls.clone() {
        let stop = cx.stop.clone();
        cx.background
            .spawn(async move { stop.run_until_cancelled(tls.follow()).await });
    }
    let own = async {
        let Some((listener, mut beat)) = figures else {
            return Ok(());
        };
        let routes = routes::own(cx.clone());
        let door = server::Door {
            listener,
            tls: None,
        };
        server::run(door, routes, &cx.plan, &shutdown, &mut beat).await
    };
    let door = server::Door {
        listener: clients,
        tls,
    };
    let routes = routes::routes(cx.clone());
    let public = server::run(door, routes, &cx.plan, &shutdown, &mut beat);
    tokio::try_join!(public, own)?;
    cx.stop.cancel();
    cx.background.close();
    beat.during(cx.background.wait()).await;
    Ok(())
}

/// What all requests share.
struct Context {
    plan: RouterPlan,
    keys: Option<ApiKeys>,
    admin: Option<ApiKeys>,
    fleet: FleetWatch,
    board: HandoffBoard,
    metrics: RouterMetrics,
    registry: Arc<Registry>,
    live: Live,
    dashboard: Option<axum::Router>,
    traffic: Traffic,
    affinity: affinity::Affinity,
    breakers: breaker::Breakers,
    retries: budget::RetryBudget,
    admission: admission::Admission,
    client: legs::Client,
    /// Prefill replies that are read after their hand-off.
    background: TaskTracker,
    /// Ends what is in `background`.
    stop: CancellationToken,
    draining: CancellationToken,
    /// Seconds since 1970.
    started: u64,
}

impl Context {
    fn new(deps: RouterDeps, shutdown: &Shutdown) -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            admission: admission::Admission::new(&deps.plan, &deps.metrics),
            client: legs::Client::new(&deps.plan, deps.node_key.as_ref(), deps.reaches),
            affinity: affinity::Affinity::default(),
            breakers: breaker::Breakers::new(&deps.metrics),
            retries: budget::RetryBudget::new(deps.plan.max_in_flight),
            background: TaskTracker::new(),
            stop: CancellationToken::new(),
            draining: shutdown.graceful().clone(),
            started: since.map_or(0, |since| since.as_secs()),
            plan: deps.plan,
            keys: deps.keys,
            admin: deps.admin,
            fleet: deps.fleet,
            board: deps.board,
            traffic: deps.traffic,
            metrics: deps.metrics,
            registry: deps.registry,
            live: deps.live,
            dashboard: deps.dashboard,
        }
    }
}

/// One request, parsed.
struct Call<'a> {
    target: legs::Target<'a>,
    caller: &'a legs::Caller,
    /// As the nodes that serve it call it; `None`: every node will do.
    model: Option<&'a str>,
    fields: &'a body::Fields<'a>,
    original: &'a Bytes,
    demand: &'a demand::Demand<'a>,
    timeline: &'a timeline::Timeline,
    /// See [`replay`].
    asks_ids: bool,
}
