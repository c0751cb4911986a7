//! vLLM's HTTP API, as far as pegaflow and its clients use it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use crate::generation::{Generation, Order, Piece};
use crate::leader::Server;
use crate::script::{FailKind, Health};
use crate::tokens;
use crate::wire::Leg;

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
        .with_state(server)
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
    text += &format!("vllm:num_requests_waiting{{{labels}}} 0.0\n");
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
        reply.stream(generation)
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

/// How the answer to one request looks.
#[derive(Debug, Clone)]
struct Reply {
    kind: Kind,
    id: String,
    model: String,
    logprobs: bool,
    token_ids: bool,
    usage_chunk: bool,
    prompts: Vec<Vec<u32>>,
    max_tokens: usize,
}

impl Reply {
    fn read(
        server: &Server,
        kind: Kind,
        headers: &HeaderMap,
        body: &Value,
    ) -> Result<Self, Box<Response>> {
        let model = body["model"].as_str().unwrap_or(&server.args.served_name);
        if model != server.args.served_name {
            let message = format!("The model `{model}` does not exist.");
            return Err(Box::new(error(
                StatusCode::NOT_FOUND,
                "NotFoundError",
                &message,
            )));
        }
        let prompts = match kind {
            Kind::Completion => tokens::prompts(&body["prompt"]),
            Kind::Chat => body["messages"]
                .as_array()
                .map(|messages| vec![tokens::tokenize(&tokens::render(messages))]),
        };
        let Some(prompts) = prompts.filter(|all| all.iter().all(|prompt| !prompt.is_empty()))
        else {
            return Err(Box::new(bad(
                "the prompt is missing, empty or of a wrong type",
            )));
        };
        let number = |name: &str| {
            body[name]
                .as_u64()
                .and_then(|value| usize::try_from(value).ok())
        };
        let default = if kind == Kind::Chat { 32 } else { 16 };
        let max_tokens = number("max_completion_tokens")
            .or(number("max_tokens"))
            .unwrap_or(default);
        if max_tokens == 0 {
            return Err(Box::new(bad("max_tokens must be at least 1, got 0.")));
        }
        if number("min_tokens").is_some_and(|min| min > max_tokens) {
            return Err(Box::new(bad(
                "min_tokens must be less than or equal to max_tokens",
            )));
        }
        if !body["stream_options"].is_null() && body["stream"] != true {
            return Err(Box::new(bad(
                "Stream options can only be defined when `stream=True`.",
            )));
        }
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        if longest + max_tokens > server.args.max_model_len {
            let limit = server.args.max_model_len;
            return Err(Box::new(bad(&format!(
                "This model's maximum context length is {limit} tokens."
            ))));
        }
        let prefix = if kind == Kind::Chat {
            "chatcmpl"
        } else {
            "cmpl"
        };
        let request = headers
            .get("x-request-id")
            .and_then(|value| value.to_str().ok());
        let request =
            request.map_or_else(|| format!("{:032x}", rand::random::<u128>()), str::to_owned);
        Ok(Self {
            kind,
            id: format!("{prefix}-{request}"),
            model: model.to_owned(),
            logprobs: body["logprobs"].is_u64() || body["logprobs"] == true,
            token_ids: body["return_token_ids"] == true,
            usage_chunk: body["stream_options"]["include_usage"] == true,
            prompts,
            max_tokens,
        })
    }

    fn order(&self, body: &Value) -> Order {
        let leg = body["kv_transfer_params"]["pegaflow"].clone();
        Order {
            request: self.id.clone(),
            prompts: self.prompts.clone(),
            n: body["n"]
                .as_u64()
                .map_or(1, |n| usize::try_from(n).unwrap()),
            max_tokens: self.max_tokens,
            salt: body["cache_salt"].as_str().unwrap_or("").to_owned(),
            leg: serde_json::from_value::<Option<Leg>>(leg).ok().flatten(),
        }
    }

    fn envelope(&self, object: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": object, "created": 1, "model": self.model, "choices": choices})
    }

    fn usage(&self, generated: usize) -> Value {
        let prompt: usize = self.prompts.iter().map(Vec::len).sum();
        json!({
            "prompt_tokens": prompt, "completion_tokens": generated,
            "total_tokens": prompt + generated, "prompt_tokens_details": null,
        })
    }

    fn logprobs(&self, pieces: &[Piece]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        if self.kind == Kind::Chat {
            let content = pieces.iter().map(|Piece { token, .. }| {
                let (text, logprob) = (token.text(), token.logprob);
                json!({"token": text, "logprob": logprob, "bytes": text.as_bytes(), "top_logprobs": []})
            });
            return json!({"content": content.collect::<Vec<_>>()});
        }
        let text = |piece: &Piece| piece.token.text();
        json!({
            "tokens": pieces.iter().map(text).collect::<Vec<_>>(),
            "token_logprobs": pieces.iter().map(|piece| piece.token.logprob).collect::<Vec<_>>(),
            "top_logprobs": pieces.iter().map(|piece| json!({text(piece): piece.token.logprob})).collect::<Vec<_>>(),
            "text_offset": pieces.iter().map(|piece| piece.position * 7).collect::<Vec<_>>(),
        })
    }

    fn choice(&self, pieces: &[Piece], streaming: bool) -> Value {
        let text: String = pieces.iter().map(|piece| piece.token.text()).collect();
        let (first, last) = (&pieces[0], &pieces[pieces.len() - 1]);
        let mut choice = json!({
            "index": first.choice,
            "logprobs": self.logprobs(pieces),
            "finish_reason": if last.last { json!("length") } else { Value::Null },
            "stop_reason": null,
        });
        match (self.kind, streaming) {
            (Kind::Completion, _) => choice["text"] = json!(text),
            (Kind::Chat, true) => choice["delta"] = json!({"content": text}),
            (Kind::Chat, false) => {
                choice["message"] = json!({"role": "assistant", "content": text})
            }
        }
        if self.token_ids {
            let ids: Vec<u32> = pieces.iter().map(|piece| piece.token.id).collect();
            choice["token_ids"] = json!(ids);
            if self.kind == Kind::Completion && first.position == 0 {
                let n = self.prompts.len();
                choice["prompt_token_ids"] = json!(self.prompts[first.choice.min(n - 1)]);
            }
        }
        choice
    }

    async fn collect(self, mut generation: Generation) -> Response {
        let mut choices: Vec<Vec<Piece>> = Vec::new();
        while let Some(piece) = generation.next().await {
            let Ok(piece) = piece else {
                return (StatusCode::INTERNAL_SERVER_ERROR, axum::Json(engine_dead()))
                    .into_response();
            };
            if piece.position == 0 {
                choices.push(Vec::new());
            }
            choices.last_mut().unwrap().push(piece);
        }
        let list: Vec<Value> = choices
            .iter()
            .map(|pieces| self.choice(pieces, false))
            .collect();
        let object = match self.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion",
        };
        let mut reply = self.envelope(object, json!(list));
        reply["usage"] = self.usage(choices.iter().map(Vec::len).sum());
        reply["kv_transfer_params"] = Value::Null;
        if self.kind == Kind::Chat && self.token_ids {
            reply["prompt_token_ids"] = json!(self.prompts[0]);
        }
        axum::Json(reply).into_response()
    }

    /// The response head goes out at once, as vLLM's does.
    fn stream(self, generation: Generation) -> Response {
        let stream = Stream {
            reply: self,
            generation,
            generated: 0,
            stage: Stage::Begin,
        };
        let body = futures_util::stream::unfold(stream, |mut stream| async {
            let text = stream.next().await?;
            Some((Ok::<_, std::convert::Infallible>(Bytes::from(text)), stream))
        });
        let kind = (header::CONTENT_TYPE, "text/event-stream; charset=utf-8");
        ([kind], Body::from_stream(body)).into_response()
    }
}

/// An event stream in progress.
struct Stream {
    reply: Reply,
    generation: Generation,
    generated: usize,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Begin,
    Tokens,
    Ended,
}

impl Stream {
    async fn next(&mut self) -> Option<String> {
        if self.stage == Stage::Ended {
            return None;
        }
        let Some(piece) = self.generation.next().await else {
            self.stage = Stage::Ended;
            let mut chunk = self.reply.envelope(self.object(), json!([]));
            chunk["usage"] = self.reply.usage(self.generated);
            let usage = if self.reply.usage_chunk {
                event(&chunk)
            } else {
                String::new()
            };
            return Some(usage + "data: [DONE]\n\n");
        };
        let Ok(piece) = piece else {
            self.stage = Stage::Ended;
            return Some(event(&engine_dead()) + "data: [DONE]\n\n");
        };
        let mut text = String::new();
        if self.stage == Stage::Begin && self.reply.kind == Kind::Chat {
            let delta = json!({"role": "assistant", "content": ""});
            let choice =
                json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": null}]);
            let mut chunk = self.reply.envelope(self.object(), choice);
            if self.reply.token_ids {
                chunk["prompt_token_ids"] = json!(self.reply.prompts[0]);
            }
            text += &event(&chunk);
        }
        self.stage = Stage::Tokens;
        self.generated += 1;
        let choice = self.reply.choice(&[piece], true);
        Some(text + &event(&self.reply.envelope(self.object(), json!([choice]))))
    }

    fn object(&self) -> &'static str {
        match self.reply.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion.chunk",
        }
    }
}

fn event(value: &Value) -> String {
    format!("data: {value}\n\n")
}
