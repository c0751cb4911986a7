//! A scripted vLLM whose streams look like the real one's, token ids included, and end as the test says.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use futures_util::stream;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// How a node's stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Well,
    Reset,
    /// A clean end of the body without `[DONE]`.
    Cut,
    Stall,
    /// As vLLM whose engine has died: an error event, then `[DONE]`.
    EngineDead,
}

/// A node whose tokens depend on all tokens before them, as a model's do. It ends so after as many.
#[derive(Clone)]
struct Storyteller {
    dies: Arc<dyn Fn(usize) -> (usize, End) + Send + Sync>,
    seen: Arc<Mutex<Vec<(String, Value)>>>,
}

pub struct Node {
    pub addr: SocketAddr,
    seen: Arc<Mutex<Vec<(String, Value)>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub const MODEL_LEN: usize = 64;

impl Node {
    /// `dies` gets the number of the request.
    pub async fn start(dies: impl Fn(usize) -> (usize, End) + Send + Sync + 'static) -> Self {
        let teller = Storyteller {
            dies: Arc::new(dies),
            seen: Arc::default(),
        };
        let seen = teller.seen.clone();
        let models = axum::Json(json!({"data": [{"id": "tiny", "max_model_len": MODEL_LEN}]}));
        let app = axum::Router::new()
            .route("/health", get(async || ()))
            .route("/v1/models", get(async move || models.clone()))
            .route("/v1/completions", post(tell))
            .route("/v1/chat/completions", post(tell))
            .with_state(teller);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { addr, seen, task }
    }

    pub async fn well() -> Self {
        Self::start(|_| (usize::MAX, End::Well)).await
    }

    pub async fn dying(after: usize, end: End) -> Self {
        Self::start(move |_| (after, end)).await
    }

    pub fn seen(&self) -> Vec<(String, Value)> {
        self.seen.lock().unwrap().clone()
    }
}

fn prompt_of(body: &Value) -> Vec<u32> {
    let bytes = |text: &str| text.bytes().map(u32::from).collect();
    match &body["prompt"] {
        Value::String(text) => bytes(text),
        Value::Array(ids) => ids
            .iter()
            .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
            .collect(),
        _ => bytes(body["messages"][0]["content"].as_str().unwrap()),
    }
}

fn next_token(sequence: &[u32]) -> u32 {
    sequence
        .iter()
        .fold(17_u32, |hash, id| hash.wrapping_mul(31).wrapping_add(*id))
        % 1000
}

async fn tell(State(teller): State<Storyteller>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let is_chat = path.contains("chat");
    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await;
    let body: Value = serde_json::from_slice(&body.unwrap()).unwrap();
    let number = {
        let mut seen = teller.seen.lock().unwrap();
        seen.push((path, body.clone()));
        seen.len() - 1
    };
    let prompt = prompt_of(&body);
    let limit = body["max_completion_tokens"].as_u64();
    let limit = limit.or(body["max_tokens"].as_u64());
    let default = if is_chat {
        MODEL_LEN - prompt.len()
    } else {
        16
    };
    let limit = limit.map_or(default, |limit| usize::try_from(limit).unwrap());
    if prompt.len() + limit > MODEL_LEN {
        return (http::StatusCode::BAD_REQUEST, "too long").into_response();
    }
    let (after, end) = (teller.dies)(number);
    let events = events(&body, is_chat, &prompt, limit, number);
    let told = events.len().min(after + usize::from(is_chat));
    let end = if told == events.len() { End::Well } else { end };
    let mut chunks: Vec<_> = events.into_iter().take(told).map(Ok).collect();
    let dead = json!({"error": {"message": "EngineCore is dead", "type": "InternalServerError", "code": 500}});
    match end {
        End::Well => chunks.push(Ok(tail(&body, is_chat, prompt.len(), limit, number))),
        End::EngineDead => chunks.push(Ok(format!("data: {dead}\n\ndata: [DONE]\n\n").into())),
        End::Reset => chunks.push(Err(std::io::Error::other("scripted reset"))),
        End::Cut | End::Stall => {}
    }
    // In chunks of their own, as vLLM writes them.
    let chunks = stream::unfold((chunks.into_iter(), end), |(mut chunks, end)| async move {
        match chunks.next() {
            Some(chunk) => {
                tokio::time::sleep(Duration::from_millis(1)).await;
                Some((chunk, (chunks, end)))
            }
            None if end == End::Stall => std::future::pending().await,
            None => None,
        }
    });
    let kind = [("content-type", "text/event-stream; charset=utf-8")];
    (kind, Body::from_stream(chunks)).into_response()
}

fn envelope(is_chat: bool, number: usize, choices: Value) -> Value {
    let object = if is_chat {
        "chat.completion.chunk"
    } else {
        "text_completion"
    };
    json!({"id": format!("node-{number}"), "object": object, "created": 100 + number, "model": "tiny", "choices": choices})
}

fn events(body: &Value, is_chat: bool, prompt: &[u32], limit: usize, number: usize) -> Vec<Bytes> {
    let ids = body["return_token_ids"] == true;
    let mut events = Vec::new();
    if is_chat {
        let delta = json!({"role": "assistant", "content": ""});
        let mut role = envelope(true, number, json!([{"index": 0, "delta": delta}]));
        role["prompt_token_ids"] = if ids { json!(prompt) } else { Value::Null };
        events.push(format!("data: {role}\n\n").into());
    }
    let mut sequence = prompt.to_vec();
    for position in 0..limit {
        let id = next_token(&sequence);
        sequence.push(id);
        let finish = (position + 1 == limit).then_some("length");
        let text = format!("t{id} ");
        let mut choice = json!({"index": 0, "finish_reason": finish});
        match is_chat {
            true => choice["delta"] = json!({"content": text}),
            false => choice["text"] = json!(text),
        }
        // The fields are there whether or not anybody asks for ids.
        choice["token_ids"] = if ids { json!([id]) } else { Value::Null };
        if !is_chat {
            let told = ids && position == 0;
            choice["prompt_token_ids"] = if told { json!(prompt) } else { Value::Null };
        }
        let chunk = envelope(is_chat, number, json!([choice]));
        events.push(format!("data: {chunk}\n\n").into());
    }
    events
}

fn tail(body: &Value, is_chat: bool, prompt: usize, generated: usize, number: usize) -> Bytes {
    let mut text = String::new();
    if body["stream_options"]["include_usage"] == true {
        let mut usage = envelope(is_chat, number, json!([]));
        usage["usage"] = json!({"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated});
        text = format!("data: {usage}\n\n");
    }
    (text + "data: [DONE]\n\n").into()
}

/// What a node that lives tells.
pub fn right(prompt: &str, tokens: usize) -> String {
    let mut sequence: Vec<u32> = prompt.bytes().map(u32::from).collect();
    let mut text = String::new();
    for _ in 0..tokens {
        let id = next_token(&sequence);
        sequence.push(id);
        text += &format!("t{id} ");
    }
    text
}
