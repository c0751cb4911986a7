//! An OpenAI endpoint whose timing is known.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::net::TcpListener;

pub const TTFT: Duration = Duration::from_millis(60);
pub const ITL: Duration = Duration::from_millis(12);
/// An OpenAI endpoint with a timer instead of a model.
#[derive(Default)]
pub struct Fake {
    /// Of these requests every third is answered 503.
    pub is_flaky: bool,
    /// Ends no stream.
    pub hangs: bool,
    /// Says more than it was asked for, without an end and without a pause.
    pub floods: bool,
    pub bodies: Mutex<Vec<Value>>,
    pub keys: Mutex<Vec<String>>,
    pub under_way: AtomicUsize,
    pub most: AtomicUsize,
    /// Between the pieces, as they were really sent, in ms.
    pub gaps: Mutex<Vec<f64>>,
}

impl Fake {
    pub async fn start(self) -> (SocketAddr, Arc<Self>) {
        let fake = Arc::new(self);
        let app = Router::new()
            .route(
                "/v1/models",
                get(async || axum::Json(json!({"data": [{"id": "timer"}]}))),
            )
            .route("/v1/completions", post(answer))
            .route("/v1/chat/completions", post(answer))
            .with_state(fake.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        (addr, fake)
    }

    /// Without the two that ask how many tokens a word has.
    pub fn load(&self) -> Vec<Value> {
        let bodies = self.bodies.lock().unwrap();
        bodies
            .iter()
            .filter(|body| body["stream"] == true)
            .cloned()
            .collect()
    }
}

/// Five tokens of template, two for each word.
pub fn tokens(body: &Value) -> usize {
    let prompt = body["prompt"].as_str().map(str::to_owned).or_else(|| {
        let messages = body["messages"].as_array()?;
        let said = messages.iter().map(|message| message["content"].as_str());
        Some(said.collect::<Option<Vec<_>>>()?.join(" "))
    });
    5 + 2 * prompt.unwrap().split(' ').count()
}

async fn answer(State(fake): State<Arc<Fake>>, headers: HeaderMap, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap();
    let key = headers
        .get("authorization")
        .map(|key| key.to_str().unwrap().to_owned());
    fake.keys.lock().unwrap().extend(key);
    let number = {
        let mut bodies = fake.bodies.lock().unwrap();
        bodies.push(body.clone());
        bodies.len()
    };
    let input = tokens(&body);
    let usage = json!({"prompt_tokens": input, "completion_tokens": body["max_tokens"]});
    if body["stream"] != true {
        return axum::Json(json!({"choices": [], "usage": usage})).into_response();
    }
    if fake.is_flaky && number % 3 == 0 {
        return (StatusCode::SERVICE_UNAVAILABLE, "busy").into_response();
    }
    let most = fake.under_way.fetch_add(1, Ordering::SeqCst) + 1;
    fake.most.fetch_max(most, Ordering::SeqCst);
    let total = body["max_tokens"].as_u64().unwrap();
    let is_chat = body["messages"].is_array();
    let pieces = stream::unfold((0, Instant::now()), move |(sent, before)| {
        let (fake, usage) = (fake.clone(), usage.clone());
        async move {
            let event = |event: Value| format!("data: {event}\n\n");
            let text = match sent {
                _ if sent < total || fake.floods => {
                    if !fake.floods {
                        tokio::time::sleep(if sent == 0 { TTFT } else { ITL }).await;
                    }
                    if sent > 0 {
                        fake.gaps
                            .lock()
                            .unwrap()
                            .push(before.elapsed().as_secs_f64() * 1e3);
                    }
                    let choice = match is_chat {
                        true => json!({"delta": {"content": "x"}}),
                        false => json!({"text": "x"}),
                    };
                    event(json!({"choices": [choice], "usage": null}))
                }
                _ if fake.hangs => std::future::pending().await,
                _ if sent == total => event(json!({"choices": [], "usage": usage})),
                _ if sent == total + 1 => {
                    fake.under_way.fetch_sub(1, Ordering::SeqCst);
                    "data: [DONE]\n\n".to_owned()
                }
                _ => return None,
            };
            Some((Ok::<_, Infallible>(text), (sent + 1, Instant::now())))
        }
    });
    (
        [("content-type", "text/event-stream")],
        Body::from_stream(pieces),
    )
        .into_response()
}
