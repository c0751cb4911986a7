//! Scripted nodes and a router over real sockets. The test plays the supervisor (the fleet) and
//! the fake prefill nodes play the engine (the board).
#![allow(dead_code)]

pub mod command;
mod rig;
pub mod storyteller;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use http::{HeaderMap, StatusCode};
use pegaflow::handoff::{HandoffBoard, HandoffId, HandoffOutcome};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use rig::*;

/// Nothing here takes this long unless it hangs.
pub const HANG: Duration = Duration::from_secs(20);
pub const READY: HandoffOutcome = HandoffOutcome::Ready {
    chunks: 2,
    already_stored: false,
};
pub const STORED: HandoffOutcome = HandoffOutcome::Ready {
    chunks: 2,
    already_stored: true,
};

pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(HANG, future).await {
        Ok(value) => value,
        Err(_) => panic!("hung: {what}"),
    }
}

/// What a fake node answers.
#[derive(Debug, Clone)]
pub enum Answer {
    /// Eight tokens, as JSON or as events.
    Tokens,
    /// The same as events, this many milliseconds apart.
    Paced(u64),
    Status(u16, &'static str),
    /// Never, until the caller goes away.
    Hang,
    /// The connection is dropped before the head.
    Reset,
    /// This many events, then the connection breaks.
    BreakAfter(usize),
    /// The role of a chat, which says nothing yet, then the connection breaks.
    BreakAfterRole,
    /// The role of a chat and an error.
    ErrorAfterRole(u16),
    /// This many events, then a clean end without `[DONE]`.
    EndAfter(usize),
    /// This many events, then silence.
    StallAfter(usize),
    /// Events of 64 KiB, far more than any buffer should hold; see [`flooded`].
    Flood,
    /// A 200 whose first event is this error.
    ErrorEvent(u16),
}

/// What a fake prefill node's engine does before the answer.
#[derive(Debug, Clone, Copy)]
pub enum Kv {
    Nothing,
    Open,
    Settle(HandoffOutcome),
}

#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub query: Option<String>,
    pub headers: HeaderMap,
    pub body: Value,
}

impl Seen {
    pub fn mark(&self) -> &Value {
        &self.body["kv_transfer_params"]["pegaflow"]
    }
}

type Script = Arc<dyn Fn(usize, &Seen) -> (Kv, Answer) + Send + Sync>;

/// A scripted vLLM.
pub struct Fake {
    pub addr: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    active: watch::Sender<usize>,
    task: JoinHandle<()>,
}

struct Active(watch::Sender<usize>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.send_modify(|active| *active -= 1);
    }
}

impl Fake {
    pub async fn always(board: &HandoffBoard, kv: Kv, answer: Answer) -> Self {
        Self::scripted(board, move |_, _| (kv, answer.clone())).await
    }

    pub async fn scripted(
        board: &HandoffBoard,
        script: impl Fn(usize, &Seen) -> (Kv, Answer) + Send + Sync + 'static,
    ) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), board, script).await
    }

    /// At an address where another node was before, say.
    pub async fn at(
        addr: SocketAddr,
        board: &HandoffBoard,
        script: impl Fn(usize, &Seen) -> (Kv, Answer) + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let active = watch::Sender::new(0);
        let node = Node {
            board: board.clone(),
            seen: seen.clone(),
            active: active.clone(),
            script: Arc::new(script),
        };
        let models = axum::Json(json!({"data": [{"id": "tiny"}]}));
        let app = axum::Router::new()
            .route("/health", get(async || ()))
            .route("/v1/models", get(async move || models.clone()))
            .fallback(move |request| node.clone().answer(request));
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            addr,
            seen,
            active,
            task,
        }
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Waits until this many requests are being answered.
    pub async fn active_is(&self, count: usize) {
        let mut active = self.active.subscribe();
        soon("active requests", active.wait_for(|now| *now == count))
            .await
            .unwrap();
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Node {
    board: HandoffBoard,
    seen: Arc<Mutex<Vec<Seen>>>,
    active: watch::Sender<usize>,
    script: Script,
}

impl Node {
    async fn answer(self, request: Request) -> Response {
        let (parts, body) = request.into_parts();
        let body = axum::body::to_bytes(body, 1 << 26).await.unwrap();
        let seen = Seen {
            method: parts.method.to_string(),
            path: parts.uri.path().to_owned(),
            query: parts.uri.query().map(str::to_owned),
            headers: parts.headers,
            // Not every endpoint's is JSON.
            body: serde_json::from_slice(&body).unwrap_or_default(),
        };
        self.active.send_modify(|active| *active += 1);
        let active = Active(self.active.clone());
        let number = {
            let mut all = self.seen.lock().unwrap();
            all.push(seen.clone());
            all.len() - 1
        };
        let (kv, answer) = (self.script)(number, &seen);
        if let Some(id) = seen.mark()["handoff"].as_str() {
            let id = HandoffId::from(id);
            match kv {
                Kv::Nothing => {}
                Kv::Open => self.board.opened(&id),
                Kv::Settle(outcome) => {
                    self.board.opened(&id);
                    self.board.settle(&id, outcome);
                }
            }
        }
        reply(answer, &seen, active).await
    }
}

async fn reply(answer: Answer, seen: &Seen, active: Active) -> Response {
    let streams = seen.body["stream"] == true;
    let tag = seen.body["tag"].to_string();
    match answer {
        Answer::Tokens if streams => events(tag, 8, End::Done, active),
        Answer::Tokens => {
            drop(active);
            axum::Json(json!({"object": "text", "tag": tag})).into_response()
        }
        Answer::Paced(apart) => {
            let apart = Duration::from_millis(apart);
            let token = move |index| format!("data: {{\"token\":{index},\"tag\":{tag}}}\n\n");
            let done = "data: [DONE]\n\n".to_owned();
            let events = (0..8).map(token).chain([done]).enumerate();
            let events = stream::iter(events).then(move |(index, event)| async move {
                if (1..8).contains(&index) {
                    tokio::time::sleep(apart).await;
                }
                Ok::<_, std::io::Error>(Bytes::from(event))
            });
            let held = events.inspect(move |_| _ = &active);
            (
                [("content-type", "text/event-stream")],
                Body::from_stream(held),
            )
                .into_response()
        }
        Answer::Status(code, text) => {
            drop(active);
            (StatusCode::from_u16(code).unwrap(), text).into_response()
        }
        Answer::Hang => {
            let _active = active;
            std::future::pending().await
        }
        Answer::Reset => {
            drop(active);
            // Ends the connection's task, and so the connection.
            std::panic::resume_unwind(Box::new("reset"));
        }
        Answer::BreakAfter(count) => events(tag, count, End::Break, active),
        Answer::BreakAfterRole => stream_of(vec![ROLE.to_owned()], End::Break, active),
        Answer::ErrorAfterRole(code) => {
            let error = format!("data: {{\"error\": {{\"code\": {code}}}}}\n\n");
            stream_of(vec![ROLE.to_owned(), error], End::Done, active)
        }
        Answer::EndAfter(count) => events(tag, count, End::Clean, active),
        Answer::StallAfter(count) => events(tag, count, End::Stall, active),
        Answer::Flood => flood(active),
        Answer::ErrorEvent(code) => {
            drop(active);
            let text = format!("data: {{\"error\": {{\"code\": {code}}}}}\n\ndata: [DONE]\n\n");
            ([("content-type", "text/event-stream")], text).into_response()
        }
    }
}

/// How vLLM begins a chat.
pub const ROLE: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";

/// How much a flood would produce, if somebody took it all.
pub const FLOOD: usize = 512 << 20;
static FLOODED: AtomicUsize = AtomicUsize::new(0);

/// Bytes that floods have produced so far.
pub fn flooded() -> usize {
    FLOODED.load(Ordering::SeqCst)
}

fn flood(active: Active) -> Response {
    let event = Bytes::from(format!("data: {}\n\n", "x".repeat((64 << 10) - 8)));
    let events = (0..FLOOD / event.len()).map(move |_| {
        let _active = &active;
        FLOODED.fetch_add(event.len(), Ordering::SeqCst);
        Ok::<_, std::io::Error>(event.clone())
    });
    let body = Body::from_stream(stream::iter(events));
    ([("content-type", "text/event-stream")], body).into_response()
}

#[derive(Clone, Copy)]
enum End {
    Done,
    Clean,
    Break,
    Stall,
}

fn events(tag: String, count: usize, end: End, active: Active) -> Response {
    let token = |index| format!("data: {{\"token\":{index},\"tag\":{tag}}}\n\n");
    stream_of((0..count).map(token).collect(), end, active)
}

/// Each event by itself, as from a node that computes.
fn stream_of(events: Vec<String>, end: End, active: Active) -> Response {
    let events = events
        .into_iter()
        .map(|event| Ok::<_, std::io::Error>(Bytes::from(event)));
    let last = stream::once(async move {
        let _active = active;
        // What was said before is flushed first.
        tokio::task::yield_now().await;
        match end {
            End::Done => Some(Ok(Bytes::from_static(b"data: [DONE]\n\n"))),
            End::Clean => None,
            End::Break => Some(Err(std::io::Error::other("broken on purpose"))),
            End::Stall => std::future::pending().await,
        }
    });
    let events = stream::iter(events).then(|event| async {
        tokio::task::yield_now().await;
        event
    });
    let body = Body::from_stream(events.chain(last.filter_map(std::future::ready)));
    ([("content-type", "text/event-stream; charset=utf-8")], body).into_response()
}

/// An address where nobody listens.
pub async fn refusing() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}
