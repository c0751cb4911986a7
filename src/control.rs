//! The control API: HTTP on a Unix socket in the run directory, for `pegaflow status` and its like,
//! and for scripts.
//!
//! ```text
//! curl --unix-socket $RUN/control.sock http://pegaflow/v1/status
//! ```
//!
//! | path | |
//! |---|---|
//! | `GET /v1/status` | the instance and its nodes: see [`Status`] |
//! | `GET /v1/logs`, `GET /v1/logs/NODE` | their last lines; `?lines=100&follow=true` |
//! | `POST /v1/nodes/TARGET/restart`, `.../drain`, `.../undrain` | a node, or all of a role; `?force=true`, `?limit=30s` |
//! | `GET /v1/dashboard` | the address of the dashboard, with its key |
//! | `POST /v1/stop` | as Ctrl-C does; with `?force=true` as the second one does |
//! | `GET /v1/fleet` | the nodes: role, phase, address, pid, why; the GPUs' figures |
//! | `GET /v1/kv` | the store's figures |
//! | `GET /v1/kv/namespaces` | what makes stored bytes interchangeable, and who uses it |
//! | `GET /v1/kv/inspect` | sessions, oldest leases, open hand-offs |
//! | `POST /v1/kv/flush` | evicts every chunk that nothing holds |
//!
//! The socket is 0600 in a 0700 directory: whoever reaches it may do all this. It answers from before
//! the nodes start until everything else has stopped. A refusal is `{"error": "..."}`.

mod logs;
mod orders;
mod status;

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::extract::{Path as PathParameter, Query, State as Shared};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::engine::Engine;
use crate::fleet::{FleetSnapshot, FleetWatch};
use crate::host::{GpuFigures, GpuWatch};
use crate::shutdown::Shutdown;
use crate::supervise::Orders;
use crate::topology::OWN_LOG;
use crate::traffic::Traffic;

pub use logs::LogFeed;
pub use orders::{Accepted, AcceptedNode};
pub use status::{About, Devices, NodeStatus, State, Status, rfc3339, seconds};

/// How long a request that runs may still take when everything ends.
const LAST_REQUESTS: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("cannot listen at {}", path.display())]
    Listen { path: PathBuf, source: io::Error },
}

/// What the API speaks of.
#[derive(Clone)]
pub struct ControlDeps {
    pub about: Arc<About>,
    pub fleet: FleetWatch,
    pub traffic: Traffic,
    /// Where commands for nodes go.
    pub orders: Orders,
    /// Where a stop goes.
    pub shutdown: Shutdown,
    /// The first start has been settled.
    pub started: Arc<AtomicBool>,
    pub gpus: GpuWatch,
    /// Where the dashboard is, with its key.
    pub dashboard: Arc<str>,
    /// `None`: the topology shares no KV.
    pub engine: Option<Arc<Engine>>,
}

/// The running API. Dropping it ends it at once; [`Control::shutdown`] lets requests finish.
#[derive(Debug)]
pub struct Control {
    stop: CancellationToken,
    task: JoinHandle<()>,
    path: PathBuf,
}

impl Control {
    /// Listens before this returns. The directory of `path` is private and holds nothing of that name.
    pub fn start(path: &Path, deps: ControlDeps) -> Result<Self, ControlError> {
        let failed = |source| ControlError::Listen {
            path: path.to_owned(),
            source,
        };
        let listener = UnixListener::bind(path).map_err(failed)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
        let stop = CancellationToken::new();
        let api = Api {
            deps,
            end: stop.clone(),
        };
        let serving = axum::serve(listener, routes(api))
            .with_graceful_shutdown(stop.clone().cancelled_owned());
        let task = tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "the control API ended");
            }
        });
        Ok(Self {
            stop,
            task,
            path: path.to_owned(),
        })
    }

    pub async fn shutdown(mut self) {
        self.stop.cancel();
        if tokio::time::timeout(LAST_REQUESTS, &mut self.task)
            .await
            .is_err()
        {
            tracing::debug!("a control request was still running");
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.task.abort();
        // Already gone when the run directory was swept first.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[derive(Clone)]
struct Api {
    deps: ControlDeps,
    /// Ends what would never end by itself.
    end: CancellationToken,
}

fn routes(api: Api) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/logs", get(all_logs))
        .route("/v1/logs/{node}", get(node_logs))
        .route("/v1/nodes/{target}/restart", post(orders::restart))
        .route("/v1/nodes/{target}/drain", post(orders::drain))
        .route("/v1/nodes/{target}/undrain", post(orders::undrain))
        .route("/v1/dashboard", get(dashboard))
        .route("/v1/stop", post(stop))
        .route("/v1/fleet", get(fleet))
        .route("/v1/kv", get(|state| kv(state, Engine::stats)))
        .route(
            "/v1/kv/namespaces",
            get(|state| kv(state, Engine::namespaces)),
        )
        .route("/v1/kv/inspect", get(|state| kv(state, Engine::inspect)))
        .route("/v1/kv/flush", post(|state| kv(state, Engine::flush)))
        .with_state(api)
}

/// Logs, and commands for nodes, with paths that begin with `at`: for a listener of another kind, which has to see
/// to it who may. Logs that are followed end with `end`.
pub fn operations(at: &str, deps: &ControlDeps, end: CancellationToken) -> Router {
    let api = Api {
        deps: deps.clone(),
        end,
    };
    let node = |verb| format!("{at}/nodes/{{target}}/{verb}");
    Router::new()
        .route(&format!("{at}/logs"), get(all_logs))
        .route(&format!("{at}/logs/{{node}}"), get(node_logs))
        .route(&node("restart"), post(orders::restart))
        .route(&node("drain"), post(orders::drain))
        .route(&node("undrain"), post(orders::undrain))
        .with_state(api)
}

impl ControlDeps {
    /// Everything at this moment.
    pub fn status(&self) -> Status {
        let (fleet, in_flight) = (self.fleet.now(), self.traffic.in_flight());
        let mut status = Status::new(&self.about, self.state(), &fleet, &in_flight);
        status.gpus = self.gpus.latest();
        status
    }

    fn state(&self) -> State {
        if self.shutdown.graceful().is_cancelled() {
            State::Stopping
        } else if self.started.load(Ordering::Relaxed) {
            State::of(self.fleet.now().service())
        } else {
            State::Starting
        }
    }
}

async fn status(Shared(api): Shared<Api>) -> Response {
    Json(api.deps.status()).into_response()
}

async fn dashboard(Shared(api): Shared<Api>) -> Response {
    Json(json!({ "url": api.deps.dashboard })).into_response()
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct LogQuery {
    lines: usize,
    follow: bool,
}

impl Default for LogQuery {
    fn default() -> Self {
        Self {
            lines: 100,
            follow: false,
        }
    }
}

async fn all_logs(Shared(api): Shared<Api>, Query(query): Query<LogQuery>) -> Response {
    let mut names = node_names(&api);
    if api.deps.about.has_own_log {
        names.push(OWN_LOG.to_owned());
    }
    send_logs(&api, names, &query).await
}

async fn node_logs(
    Shared(api): Shared<Api>,
    PathParameter(node): PathParameter<String>,
    Query(query): Query<LogQuery>,
) -> Response {
    let nodes = node_names(&api);
    // A detached pegaflow logs beside its nodes.
    if !nodes.contains(&node) && node != OWN_LOG {
        let known = nodes.join(", ");
        let error = format!("there is no node `{node}`; there are: {known}");
        return refuse(StatusCode::NOT_FOUND, &error);
    }
    send_logs(&api, vec![node], &query).await
}

fn node_names(api: &Api) -> Vec<String> {
    let fleet = api.deps.fleet.now();
    fleet.nodes().map(|node| node.id.to_string()).collect()
}

async fn send_logs(api: &Api, nodes: Vec<String>, query: &LogQuery) -> Response {
    let (about, lines) = (api.deps.about.clone(), query.lines);
    let open = move || LogFeed::open(&about.logs, &nodes, lines);
    match tokio::task::spawn_blocking(open).await {
        Ok(Ok((feed, history))) => {
            let follow = query.follow.then(|| api.end.clone());
            logs::reply(feed, history, follow)
        }
        Ok(Err(error)) => {
            let dir = api.deps.about.logs.display();
            let error = format!("cannot read the logs in {dir}: {error}");
            refuse(StatusCode::INTERNAL_SERVER_ERROR, &error)
        }
        Err(panic) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &panic.to_string()),
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct StopQuery {
    force: bool,
}

async fn stop(Shared(api): Shared<Api>, Query(query): Query<StopQuery>) -> Response {
    let shutdown = &api.deps.shutdown;
    shutdown.begin();
    if query.force {
        tracing::warn!("told to stop, by force: killing everything now");
        shutdown.advance();
    } else {
        tracing::info!("told to stop: stopping");
    }
    let body = Json(json!({ "state": State::Stopping }));
    (StatusCode::ACCEPTED, body).into_response()
}

async fn fleet(Shared(api): Shared<Api>) -> Response {
    #[derive(Serialize)]
    struct Answer<'a> {
        #[serde(flatten)]
        fleet: &'a FleetSnapshot,
        gpus: Vec<GpuFigures>,
    }
    let fleet = api.deps.fleet.now();
    let gpus = api.deps.gpus.latest();
    let fleet = &*fleet;
    Json(Answer { fleet, gpus }).into_response()
}

async fn kv<T: serde::Serialize>(
    Shared(api): Shared<Api>,
    read: impl FnOnce(&Engine) -> T,
) -> Response {
    match &api.deps.engine {
        None => {
            let error = "this topology has no store: all of its nodes are unified";
            refuse(StatusCode::NOT_FOUND, error)
        }
        Some(engine) if !engine.is_running() => {
            let error = "the store is turned off after a fault; pegaflow's log says which";
            refuse(StatusCode::SERVICE_UNAVAILABLE, error)
        }
        Some(engine) => Json(read(engine)).into_response(),
    }
}

fn refuse(status: StatusCode, error: &str) -> Response {
    (status, Json(json!({ "error": error }))).into_response()
}
