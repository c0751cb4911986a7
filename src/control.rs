//! The control API: HTTP on a Unix socket in the run directory, for `pegaflow kv` and for scripts.
//!
//! ```text
//! curl --unix-socket $RUN/control.sock http://pegaflow/v1/kv
//! ```
//!
//! | path | |
//! |---|---|
//! | `GET /v1/fleet` | the nodes: role, phase, address, pid, why |
//! | `GET /v1/kv` | the store's figures |
//! | `GET /v1/kv/namespaces` | what makes stored bytes interchangeable, and who uses it |
//! | `GET /v1/kv/inspect` | sessions, oldest leases, open hand-offs |
//! | `POST /v1/kv/flush` | evicts every chunk that nothing holds |
//!
//! The socket is 0600 in a 0700 directory: whoever reaches it may do all this. It answers from before
//! the nodes start until everything else has stopped.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::StatusCode;
use serde_json::json;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::engine::Engine;
use crate::fleet::FleetWatch;

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
    pub fleet: FleetWatch,
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
        let serving = axum::serve(listener, routes(deps))
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

fn routes(deps: ControlDeps) -> Router {
    Router::new()
        .route("/v1/fleet", get(fleet))
        .route("/v1/kv", get(|state| kv(state, Engine::stats)))
        .route(
            "/v1/kv/namespaces",
            get(|state| kv(state, Engine::namespaces)),
        )
        .route("/v1/kv/inspect", get(|state| kv(state, Engine::inspect)))
        .route("/v1/kv/flush", post(|state| kv(state, Engine::flush)))
        .with_state(deps)
}

async fn fleet(State(deps): State<ControlDeps>) -> Response {
    let fleet = deps.fleet.borrow().clone();
    Json(&*fleet).into_response()
}

async fn kv<T: serde::Serialize>(
    State(deps): State<ControlDeps>,
    read: impl FnOnce(&Engine) -> T,
) -> Response {
    match &deps.engine {
        None => {
            let error = "this topology has no store: all of its nodes are unified";
            (StatusCode::NOT_FOUND, Json(json!({ "error": error }))).into_response()
        }
        Some(engine) if !engine.is_running() => {
            let error = "the store is turned off after a fault; pegaflow's log says which";
            let body = Json(json!({ "error": error }));
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
        Some(engine) => Json(read(engine)).into_response(),
    }
}
