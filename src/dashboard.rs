//! The dashboard: a page, and the events that it draws, for who runs the fleet.
//!
//! ```text
//!  router ──▶ Live ─┐ each second                     ┌─▶ GET  /dashboard/api/events    begin, tick, tick, ...
//!  fleet  ──▶ watch ┼────▶ sampler ─▶ Feed (bounded) ─┤
//!  store  ──▶ stats ┘  and when a node's phase changes└─▶ (each page: its own place in the feed)
//!  nodes' logs, orders ◀── the control API's own handlers ◀── /dashboard/api/logs, /dashboard/api/nodes/...
//! ```
//!
//! | path | |
//! |---|---|
//! | `GET /dashboard/`, `app.js`, `app.css`, `icon.svg` | the page, the same for everybody: built from `web/`, see `dist/` |
//! | `GET /dashboard/api/events` | server-sent events: see [`feed`] |
//! | `GET /dashboard/api/logs[/NODE]` | as `/v1/logs` of the control API |
//! | `POST /dashboard/api/nodes/TARGET/restart`, `drain`, `undrain` | as there |
//!
//! Everything below `api` wants the instance's [`Key`] in an `Authorization` header. A browser sends that header for
//! nobody but our own page, so no other site can press a button or read a line, also where it gets a name of its own
//! resolved to this machine; and other users of the machine, who reach the same port, do not have the key.
//! At most [`MOST_PAGES`] pages at a time.

mod assets;
mod feed;
mod happening;
mod key;
mod tick;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::{HeaderMap, StatusCode, header};
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::control::{self, ControlDeps};
use crate::live::Live;
use crate::router::RouterMetrics;

pub use key::{Key, KeyError};

use feed::Feed;
use tick::Sampler;

/// How often pages hear of the figures.
const INTERVAL: Duration = Duration::from_secs(1);
/// Pages that may look at the same time.
const MOST_PAGES: usize = 32;

/// What it shows.
pub struct DashboardDeps {
    pub control: ControlDeps,
    pub live: Live,
    pub metrics: RouterMetrics,
    pub key: Key,
}

/// The running dashboard; it ends with the `end` that it was started with.
pub struct Dashboard {
    /// To be served by the router.
    pub routes: Router,
    pub sampler: JoinHandle<()>,
}

impl Dashboard {
    /// `end`: pages are told, and their streams end, so that a drain does not wait for them.
    pub fn start(deps: DashboardDeps, end: CancellationToken) -> Self {
        let DashboardDeps {
            control,
            live,
            metrics,
            key,
        } = deps;
        let sampler = Sampler::new(live, metrics, control.engine.clone());
        let feed = Arc::new(Feed::new(control.status()));
        let api = Router::new()
            .route("/dashboard/api/events", get(feed::events))
            .with_state(feed.clone())
            .merge(control::operations("/dashboard/api", &control, end.clone()))
            .layer(from_fn_with_state(key, check));
        let routes = assets::routes().merge(api);
        let sampler = tokio::spawn(sample(control, sampler, feed, end));
        Self { routes, sampler }
    }
}

async fn check(State(key): State<Key>, request: Request, next: Next) -> Response {
    if key.admits(bearer(request.headers())) {
        return next.run(request).await;
    }
    let error =
        "this needs the dashboard's key: `pegaflow dashboard` prints an address that has it";
    (StatusCode::UNAUTHORIZED, Json(json!({ "error": error }))).into_response()
}

fn bearer(headers: &HeaderMap) -> &str {
    let value = headers.get(header::AUTHORIZATION);
    let text = value.and_then(|value| value.to_str().ok());
    text.and_then(|text| text.strip_prefix("Bearer "))
        .unwrap_or_default()
}

/// Feeds the pages until the end.
async fn sample(
    control: ControlDeps,
    mut sampler: Sampler,
    feed: Arc<Feed>,
    end: CancellationToken,
) {
    let mut fleet = control.fleet.clone();
    let mut seconds = tokio::time::interval(INTERVAL);
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first one comes at once, and there was no second before it.
    seconds.tick().await;
    loop {
        tokio::select! {
            () = end.cancelled() => break,
            changed = fleet.changed() => {
                if changed.is_err() {
                    break;
                }
                let now = fleet.latest();
                feed.nodes(&now, control.status());
            }
            _ = seconds.tick() => {
                let (tick, requests) = sampler.tick(&control.traffic);
                feed.tick(tick, requests, control.status());
            }
        }
    }
    feed.end();
}
