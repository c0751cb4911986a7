//! For who runs the fleet: what is going on, as JSON and as OpenMetrics.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::{HeaderValue, StatusCode, header};
use serde_json::json;

use super::breaker::Duty;
use super::{Context, node_metrics};

/// The last line of an OpenMetrics text.
const END: &str = "# EOF\n";

type Shared = State<Arc<Context>>;

pub(super) fn add(routes: Router<Arc<Context>>, cx: &Context) -> Router<Arc<Context>> {
    let routes = routes
        .route("/status", get(status))
        .route("/metrics", get(metrics))
        .route("/metrics/all", get(all_metrics));
    match &cx.dashboard {
        Some(dashboard) => routes.merge(dashboard.clone().with_state(())),
        None => routes,
    }
}

async fn status(State(cx): Shared) -> Response {
    let fleet = cx.fleet.now();
    Json(json!({
        "fleet": *fleet,
        "in_flight": cx.admission.in_flight(),
        "queued": cx.admission.queued(),
        "in_flight_by_node": cx.traffic.in_flight(),
        "load_by_node": cx.traffic.loads(),
        "breakers": cx.breakers(),
        "retries_left": cx.retries.left(),
        "handoffs_waiting": cx.board.waiting(),
        "draining": cx.draining.is_cancelled(),
    }))
    .into_response()
}

async fn metrics(State(cx): Shared) -> Response {
    openmetrics(cx.figures())
}

async fn all_metrics(State(cx): Shared) -> Response {
    let of_nodes = node_metrics::of_nodes(&cx).await;
    openmetrics(cx.figures().map(|own| {
        // The end comes once.
        let own = own.strip_suffix(END).unwrap_or(&own);
        format!("{own}{of_nodes}{END}")
    }))
}

fn openmetrics(text: Option<String>) -> Response {
    let Some(text) = text else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let kind = HeaderValue::from_static(kind);
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

impl Context {
    /// Our own, as OpenMetrics. `None`: one of them could not be written.
    fn figures(&self) -> Option<String> {
        for (node, load) in self.traffic.loads() {
            self.metrics.set_node(&node, load);
        }
        let states = self.breakers.states(Instant::now());
        for node in self.fleet.now().nodes() {
            for duty in Duty::of(node.role) {
                let state = states.get(&(node.id.clone(), *duty));
                self.metrics
                    .set_breaker(&node.id, *duty, state.unwrap_or(&"closed"));
            }
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).ok()?;
        Some(text)
    }

    /// By node and leg, those that are open or have failed lately.
    fn breakers(&self) -> BTreeMap<String, BTreeMap<&'static str, &'static str>> {
        let mut shown = BTreeMap::<_, BTreeMap<_, _>>::new();
        for ((node, duty), state) in self.breakers.states(Instant::now()) {
            let legs = shown.entry(node.to_string()).or_default();
            legs.insert(duty.label(), state);
        }
        shown
    }
}
