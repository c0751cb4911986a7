//! vLLM's HTTP API, as far as pegaflow and its clients use it.

mod reply;
mod stream;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use crate::generation::Generation;
use crate::leader::Server;
use crate::script::{FailKind, Health};
use crate::tokens;

use reply::Reply;

pub fn routes(server: Arc<Server>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/v1/models", get(models))
        .route("/metrics", get(metrics))
        .route("/tokenize", post(tokenize))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/_fake/env", get(environment))
        .layer(axum::extract::DefaultBodyLimit::max(64 << 20))
        .layer(axum::middleware::from_fn(authenticate))
        .with_state(server)
}

/// As vLLM does where `VLLM_API_KEY` is set: below these paths only.
async fn authenticate(request: Request, next: Next) -> Response {
    let wanted = std::env::var("VLLM_API_KEY").unwrap_or_default();
    let path = request.uri().path();
    let guarded = ["/v1", "/v2", "/inference", "/cohere"]
        .iter()
        .any(|prefix| path.starts_with(prefix));
    let given = request.headers().get("authorization");
    let shown =
        given.is_some_and(|given| given.as_bytes() == format!("Bearer {wanted}").as_bytes());
    if wanted.is_empty() || !guarded || shown {
        return next.run(request).await;
    }
    let body = axum::Json(json!({"error": "Unauthorized"}));
    (StatusCode::UNAUTHORIZED, body).into_response()
}

async fn health(State(server): State<Arc<Server>>) -> StatusCode {
    match server.script.current().health {
        _ if server.is_dead() => StatusCode::SERVICE_UNAVAILABLE,
        Health::Ok => StatusCode::OK,
        Health::Dead => StatusCode::SERVICE_UNAVAILABLE,
        Health::Hang => std::future::pending().await,
    }
}

async fn models(State(server): State<Arc<Server>>) -> Response {
    let model = json!({
        "id": server.args.served_name, "object": "model", "created": 1, "owned_by": "vllm",
        "root": server.args.model, "parent": null, "max_model_len": server.args.max_model_len,
    });
    axum::Json(json!({"object": "list", "data": [model]})).into_response()
}

async fn metrics(State(server): State<Arc<Server>>) -> String {
    let counters = &server.counters;
    let figures = [
        ("num_requests_running", "gauge", &counters.running),
        ("num_requests_waiting", "gauge", &counters.waiting),
        ("prompt_tokens_total", "counter", &counters.prompt_tokens),
        (
            "generation_tokens_total",
            "counter",
            &counters.generated_tokens,
        ),
        (
            "external_prefix_cache_queries_total",
            "counter",
            &counters.external_queries,
        ),
        (
            "external_prefix_cache_hits_total",
            "counter",
            &counters.external_hits,
        ),
        ("fake_requests_total", "counter", &counters.requests),
        ("fake_aborted_total", "counter", &counters.aborted),
    ];
    let labels = format!("engine=\"0\",model_name=\"{}\"", server.args.served_name);
    let mut text = String::new();
    for (name, kind, value) in figures {
        let value = value.load(Ordering::Relaxed);
        text += &format!("# HELP vllm:{name} .\n# TYPE vllm:{name} {kind}\n");
        text += &format!("vllm:{name}{{{labels}}} {value}.0\n");
    }
    for (leg, count) in counters.legs.lock().unwrap().iter() {
        text += &format!("vllm:fake_legs_total{{{labels},leg=\"{leg}\"}} {count}.0\n");
    }
    text
}

async fn tokenize(body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let ids = match body["messages"].as_array() {
        Some(messages) => tokens::tokenize(&tokens::render(messages)),
        None => tokens::tokenize(body["prompt"].as_str().unwrap_or("")),
    };
    axum::Json(json!({"count": ids.len(), "tokens": ids})).into_response()
}

async fn environment(State(server): State<Arc<Server>>) -> Response {
    let env: std::collections::BTreeMap<String, String> = std::env::vars().collect();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let cpus = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    axum::Json(json!({
        "argv": server.argv,
        "pid": std::process::id(),
        "cpus": cpus.map(str::trim),
        "CUDA_VISIBLE_DEVICES": env.get("CUDA_VISIBLE_DEVICES"),
        "CUDA_DEVICE_ORDER": env.get("CUDA_DEVICE_ORDER"),
        "env": env,
    }))
    .into_response()
}

/// Which of the two generating endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Completion,
    Chat,
}

async fn completions(server: State<Arc<Server>>, headers: HeaderMap, body: Bytes) -> Response {
    generate(server.0, Kind::Completion, &headers, &body).await
}

async fn chat(server: State<Arc<Server>>, headers: HeaderMap, body: Bytes) -> Response {
    generate(server.0, Kind::Chat, &headers, &body).await
}

async fn generate(server: Arc<Server>, kind: Kind, headers: &HeaderMap, body: &[u8]) -> Response {
    match server.script.failure(&server.script.current()) {
        Some(FailKind::Error) => {
            return error(
                StatusCode::INTERNAL_SERVER_ERROR,
                "InternalServerError",
                "scripted",
            );
        }
        // Ends the connection's task, hence the connection.
        Some(FailKind::Reset) => std::panic::resume_unwind(Box::new("scripted reset")),
        Some(FailKind::Hang) => std::future::pending().await,
        Some(FailKind::Refuse) | None => {}
    }
    let Ok(body) = serde_json::from_slice::<Value>(body) else {
        return bad("invalid JSON");
    };
    let reply = match Reply::read(&server, kind, headers, &body) {
        Ok(reply) => reply,
        Err(response) => return *response,
    };
    let generation = Generation::new(server, reply.order(&body));
    if body["stream"] == true {
        stream::respond(reply, generation)
    } else {
        reply.collect(generation).await
    }
}

fn error(status: StatusCode, kind: &str, message: &str) -> Response {
    (status, axum::Json(error_body(status, kind, message))).into_response()
}

fn error_body(status: StatusCode, kind: &str, message: &str) -> Value {
    json!({"error": {"message": message, "type": kind, "param": null, "code": status.as_u16()}})
}

fn bad(message: &str) -> Response {
    error(StatusCode::BAD_REQUEST, "BadRequestError", message)
}

fn engine_dead() -> Value {
    let message = "EngineCore encountered an issue. See stack trace (above) for the root cause.";
    error_body(
        StatusCode::INTERNAL_SERVER_ERROR,
        "InternalServerError",
        message,
    )
}
