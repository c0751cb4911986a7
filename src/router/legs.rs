//! One leg: a request to one node, up to the moment its answer can be committed to the client.

mod aside;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use tokio::time::timeout;

use super::balance::Pick;
use super::pool::{Broken, Failure, NodeBody, Pool, Request, Way};
use super::split::Endpoint;
use super::stream::{EventStream, FirstEvents, Last};
use super::wire::{ReplyHead, request_head};
use crate::fleet::{FleetSnapshot, FleetWatch, NodeKey, Phase};
use crate::reach::{Reaches, TlsFailure};

/// Bytes of a reply that is not streamed.
const MAX_REPLY: usize = 64 << 20;
/// How much of a node's error text is quoted.
const EXCERPT: usize = 300;
const API_KEY: header::HeaderName = header::HeaderName::from_static("x-api-key");
const PASSED_ON: [header::HeaderName; 8] = [
    header::ACCEPT,
    header::AUTHORIZATION,
    header::CONTENT_TYPE,
    header::HeaderName::from_static("anthropic-beta"),
    header::HeaderName::from_static("anthropic-version"),
    API_KEY,
    header::HeaderName::from_static("traceparent"),
    header::HeaderName::from_static("tracestate"),
];
const REQUEST_ID: header::HeaderName = header::HeaderName::from_static("x-request-id");

/// Why a leg gave no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum LegError {
    #[error("could not connect")]
    Connect(#[source] io::Error),
    #[error("could not connect: {0}")]
    Tls(#[source] TlsFailure),
    #[error("the connection broke: {0}")]
    Transport(#[source] Broken),
    #[error("no answer within {0:?}")]
    FirstByteTimeout(Duration),
    #[error("nothing came for {0:?}")]
    ChunkTimeout(Duration),
    #[error("it answered {status}")]
    Status { status: StatusCode, excerpt: String },
    #[error("it is no longer ready ({phase})")]
    NodeLost { phase: &'static str },
    #[error("the reply has more than {limit} bytes")]
    TooLarge { limit: usize },
    #[error("the stream ended too early")]
    Truncated,
    #[error("the stream began with an error")]
    InStream(String),
}

impl LegError {
    /// What the node said, for the client: it may quote the prompt, so it is in no log.
    pub(super) fn quote(&self) -> String {
        match self {
            Self::Status { excerpt, .. } | Self::InStream(excerpt) => format!(": {excerpt}"),
            _ => String::new(),
        }
    }

    /// A stable word for clients and metrics.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Connect(_) => "connect",
            Self::Tls(_) => "tls",
            Self::Transport(_) => "transport",
            Self::FirstByteTimeout(_) => "first_byte_timeout",
            Self::ChunkTimeout(_) => "chunk_timeout",
            Self::Status { .. } => "status",
            Self::NodeLost { .. } => "node_lost",
            Self::TooLarge { .. } => "too_large",
            Self::Truncated => "truncated",
            Self::InStream(_) => "in_stream",
        }
    }

    pub(super) fn is_timeout(&self) -> bool {
        matches!(self, Self::FirstByteTimeout(_) | Self::ChunkTimeout(_))
    }

    /// Nothing was sent: there was no connection.
    pub(super) fn is_unreached(&self) -> bool {
        matches!(self, Self::Connect(_) | Self::Tls(_))
    }

    /// The node looks dead, so the supervisor will soon say so, and bring it back.
    pub(super) fn is_death(&self) -> bool {
        matches!(
            self,
            Self::Connect(_)
                | Self::Tls(_)
                | Self::Transport(_)
                | Self::NodeLost { .. }
                | Self::Truncated
        )
    }

    /// The node answered, but a node whose engine has just died answers so too.
    pub(super) fn may_be_dying(&self) -> bool {
        matches!(self, Self::Status { .. } | Self::InStream(_))
    }
}

impl From<Failure> for LegError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Connect(error) => Self::Connect(error),
            Failure::Tls(error) => Self::Tls(error),
            Failure::Broken(error) => Self::Transport(error),
        }
    }
}

/// What the client said besides its body, as the legs need it.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) id: Arc<str>,
    /// As the client sent them.
    pub(super) headers: HeaderMap,
    /// Its key is ours, and no node's.
    admitted: bool,
    /// Its body is JSON for sure.
    is_json: bool,
}

impl Caller {
    /// `admitted`: its key is ours, and no node's.
    pub(super) fn new(
        id: Arc<str>,
        headers: HeaderMap,
        endpoint: Endpoint,
        admitted: bool,
    ) -> Self {
        Self {
            id,
            headers,
            admitted,
            is_json: endpoint != Endpoint::Other,
        }
    }

    /// What a node sees of the client's headers.
    fn pass_on(&self, to: &mut HeaderMap) {
        for name in PASSED_ON {
            if self.admitted && (name == header::AUTHORIZATION || name == API_KEY) {
                continue;
            }
            if let Some(value) = self.headers.get(&name) {
                to.insert(name, value.clone());
            }
        }
        // Whatever the client called it: we have read it as JSON.
        if self.is_json {
            let json = HeaderValue::from_static("application/json");
            to.insert(header::CONTENT_TYPE, json);
        }
    }
}

/// The client's `X-Request-Id` if it is usable as a part of ours, else one that we make.
pub(super) fn request_id(headers: &HeaderMap) -> Arc<str> {
    let usable =
        |id: &&str| (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic());
    let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
    match given.filter(usable) {
        Some(id) => id.into(),
        None => format!("{:016x}", rand::random::<u64>()).into(),
    }
}

/// Names the request to the client.
pub(super) fn echo_id(id: &str, headers: &mut HeaderMap) {
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(REQUEST_ID, id);
    }
}

/// Where at a node.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) method: &'a Method,
    /// With the query.
    pub(super) path: &'a str,
    /// How a streamed answer to this ends.
    pub(super) last: Last,
}

/// What is sent to a node.
pub(super) struct Leg<'a> {
    pub(super) caller: &'a Caller,
    pub(super) target: Target<'a>,
    /// Appended to the caller's id.
    pub(super) suffix: &'a str,
    pub(super) body: Bytes,
}

/// An answer that can be committed: nothing of it has been sent to the client yet.
pub(super) enum Reply {
    Complete(CompleteReply),
    Streamed(Box<StreamedReply>),
}

#[derive(Debug)]
pub(super) struct CompleteReply {
    pub(super) status: StatusCode,
    content_type: Option<HeaderValue>,
    body: Bytes,
}

impl CompleteReply {
    pub(super) fn body(&self) -> &[u8] {
        &self.body
    }

    pub(super) fn excerpt(&self) -> String {
        excerpt(&self.body)
    }

    pub(super) fn into_response(self) -> http::Response<Body> {
        head(self.status, self.content_type, Body::from(self.body))
    }
}

/// An event stream whose first events have arrived.
pub(super) struct StreamedReply {
    pub(super) status: StatusCode,
    pub(super) content_type: Option<HeaderValue>,
    pub(super) first: Bytes,
    pub(super) rest: EventStream,
}

pub(super) fn head(
    status: StatusCode,
    content_type: Option<HeaderValue>,
    body: Body,
) -> http::Response<Body> {
    let mut response = http::Response::new(body);
    *response.status_mut() = status;
    if let Some(content_type) = content_type {
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, content_type);
    }
    response
}

/// The HTTP client for all nodes.
#[derive(Debug, Clone)]
pub(super) struct Client {
    pool: Pool,
    first_byte_timeout: Duration,
    /// What nodes of ours want to be shown.
    node_key: Option<HeaderValue>,
    /// How those of others are reached.
    reaches: Reaches,
}

impl Client {
    pub(super) fn new(
        plan: &crate::plan::RouterPlan,
        node_key: Option<&NodeKey>,
        reaches: Reaches,
    ) -> Self {
        Self {
            pool: Pool::new(plan.connect_timeout, plan.max_in_flight),
            first_byte_timeout: plan.first_byte_timeout,
            node_key: node_key.and_then(NodeKey::authorization),
            reaches,
        }
    }

    /// Closes connections that nobody has used for too long, for ever.
    pub(super) fn sweep(&self) -> impl Future<Output = ()> + Send + 'static {
        self.pool.clone().sweep()
    }

    /// Sends the leg and reads its answer as far as it must be known before it is committed: a
    /// stream's first events, anything else whole. A status of 500 or above is an error.
    pub(super) fn fetch(
        &self,
        pick: &Pick,
        leg: Leg<'_>,
    ) -> impl Future<Output = Result<Reply, LegError>> + Send + 'static {
        let (pool, last) = (self.pool.clone(), leg.target.last);
        let node = Way::new(pick.addr, self.reaches.of(pick.node()));
        let request = self.request(pick, leg);
        let limit = self.first_byte_timeout;
        async move {
            let reply = async move {
                let (head, body) = pool.send(&node, request).await?;
                read_reply(head, body, last).await
            };
            timeout(limit, reply)
                .await
                .unwrap_or(Err(LegError::FirstByteTimeout(limit)))
        }
    }

    fn request(&self, pick: &Pick, leg: Leg<'_>) -> Request {
        let mut headers = HeaderMap::with_capacity(PASSED_ON.len() + 2);
        let reach = self.reaches.of(pick.node());
        if let Some(host) = reach.host(pick.addr) {
            headers.insert(header::HOST, host);
        }
        leg.caller.pass_on(&mut headers);
        let id = format!("{}{}", leg.caller.id, leg.suffix);
        if let Ok(id) = HeaderValue::try_from(id) {
            headers.insert(REQUEST_ID, id);
        }
        let key = match pick.is_external {
            true => reach.authorization(),
            false => self.node_key.as_ref(),
        };
        // Nothing of a client's own has a meaning there.
        if let Some(key) = key {
            headers.remove(API_KEY);
            headers.insert(header::AUTHORIZATION, key.clone());
        }
        let Target { method, path, .. } = leg.target;
        Request {
            method: method.clone(),
            head: request_head(method, path, &headers, leg.body.len()),
            body: leg.body,
        }
    }
}

async fn read_reply(head: ReplyHead, body: NodeBody, last: Last) -> Result<Reply, LegError> {
    let (status, content_type) = (head.status, head.content_type);
    let is_events = content_type
        .as_ref()
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    if is_events && status.is_success() {
        let mut rest = EventStream::new(body, last);
        return match rest.first().await? {
            FirstEvents::Error { code, text } if !(400..500).contains(&code) => {
                Err(LegError::InStream(excerpt(&text)))
            }
            FirstEvents::Error { text: first, .. } | FirstEvents::Content(first) => {
                Ok(Reply::Streamed(Box::new(StreamedReply {
                    status,
                    content_type,
                    first,
                    rest,
                })))
            }
        };
    }
    let body = read_whole(body, MAX_REPLY).await?;
    if status.is_server_error() {
        return Err(LegError::Status {
            status,
            excerpt: excerpt(&body),
        });
    }
    Ok(Reply::Complete(CompleteReply {
        status,
        content_type,
        body,
    }))
}

async fn read_whole(body: NodeBody, limit: usize) -> Result<Bytes, LegError> {
    match Limited::new(body, limit).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) => Err(match error.downcast::<Broken>() {
            Ok(error) => LegError::Transport(*error),
            Err(_) => LegError::TooLarge { limit },
        }),
    }
}

/// The beginning of what a node said, for a message.
pub(super) fn excerpt(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.trim().chars().take(EXCERPT).collect()
}

/// Resolves when the picked node can no longer be expected to answer, with its new phase. A node
/// that is being stopped finishes what it has; one that misses its health probes is given `silence`.
pub(super) async fn lost(mut fleet: FleetWatch, pick: &Pick, silence: Duration) -> &'static str {
    loop {
        let seen = fleet.wait_for(|fleet| departure(fleet, pick).is_some());
        let Ok(phase) = seen.await.map(|fleet| departure(&fleet, pick)) else {
            // The supervisor is gone; only the timeouts are left.
            return std::future::pending().await;
        };
        let Some(phase) = phase else { continue };
        if phase != Phase::Unreachable.label() {
            return phase;
        }
        // It may only be busy: see whether that lasts.
        let change = fleet.wait_for(|fleet| departure(fleet, pick) != Some(phase));
        if tokio::time::timeout(silence, change).await.is_err() {
            return phase;
        }
    }
}

fn departure(fleet: &FleetSnapshot, pick: &Pick) -> Option<&'static str> {
    match fleet.node(pick.node()) {
        None => Some("removed"),
        Some(node) if node.incarnation != pick.incarnation => Some("restarted"),
        Some(node) => match node.phase {
            Phase::Ready | Phase::Draining | Phase::Stopping => None,
            ref phase => Some(phase.label()),
        },
    }
}
