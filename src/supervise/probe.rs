//! HTTP to one node, each call under a deadline and with a bounded reply.

use std::net::SocketAddr;
use std::time::Duration;

use http::{HeaderValue, StatusCode, header};
use reqwest::redirect::Policy;
use serde_json::{Value, json};

use super::liveness::{Canary, Pulse};
use super::models::{MAX_MODELS, names};
use super::state::{Probe, Warmth};
use crate::fleet::NodeKey;

const CONNECT: Duration = Duration::from_secs(1);
const HEALTH: Duration = Duration::from_secs(1);
const MODELS: Duration = Duration::from_secs(5);
/// Long: a busy server renders its figures slowly, and being late is no evidence against it.
const PULSE: Duration = Duration::from_secs(10);
const MAX_REPLY: usize = 16 << 20;
/// Bytes of an error reply that are worth quoting.
const QUOTE: usize = 300;

#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("no connection, or it broke")]
    Transport(#[source] reqwest::Error),
    #[error("HTTP {status}: {body}")]
    Status { status: StatusCode, body: String },
    #[error("the reply is longer than {MAX_REPLY} bytes")]
    TooLong,
    #[error("the reply is not JSON")]
    Json(#[source] serde_json::Error),
}

impl CallError {
    /// The node may just be busy, or dying, which its supervisor will see: a server whose engine has died
    /// answers 500 to all it has, for seconds.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Timeout(_) | Self::Transport(_))
            || matches!(self, Self::Status { status, .. } if status.is_server_error())
    }
}

/// Talks to the nodes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct NodeClient {
    http: reqwest::Client,
    /// For what is below `/v1`; `/health` and `/metrics` are open.
    authorization: Option<HeaderValue>,
}

impl NodeClient {
    pub fn new(key: Option<&NodeKey>) -> reqwest::Result<Self> {
        let http = reqwest::Client::builder()
            // The user's proxy knows nothing about our loopback.
            .no_proxy()
            .redirect(Policy::none())
            .connect_timeout(CONNECT)
            .pool_max_idle_per_host(2)
            .build()?;
        Ok(Self {
            http,
            authorization: key.and_then(NodeKey::authorization),
        })
    }

    pub async fn health(&self, addr: SocketAddr) -> Probe {
        let request = self.http.get(format!("http://{addr}/health"));
        match tokio::time::timeout(HEALTH, request.send()).await {
            Ok(Ok(reply)) if reply.status().is_success() => Probe::Healthy,
            Ok(Ok(reply)) if reply.status() == StatusCode::SERVICE_UNAVAILABLE => Probe::EngineDead,
            Ok(_) => Probe::Miss,
            Err(_) => Probe::Late,
        }
    }

    /// What it serves; `None` where it does not say so in time.
    pub async fn models(&self, addr: SocketAddr) -> Option<Vec<String>> {
        let request = self.http.get(format!("http://{addr}/v1/models"));
        let reply = call(self.authorized(request), MODELS).await.ok()?;
        names(reply.get(..MAX_MODELS).unwrap_or(&reply))
    }

    /// One token: kernels compile, memory is touched.
    pub async fn warm_up(&self, addr: SocketAddr, model: &str, limit: Duration) -> Warmth {
        match self.one_token(addr, model, limit).await {
            Ok(_) => Warmth::Warm,
            Err(error) => Warmth::Failed(error.to_string()),
        }
    }

    /// One token, to see whether the engine still works.
    pub async fn canary(&self, addr: SocketAddr, model: &str, limit: Duration) -> Canary {
        match self.one_token(addr, model, limit).await {
            Ok(_) => Canary::Answered,
            // It did not like the question, and says so.
            Err(CallError::Status { status, .. }) if status.is_client_error() => Canary::Answered,
            Err(CallError::Timeout(_)) => Canary::Late,
            // A full backlog, not a closed port.
            Err(CallError::Transport(error)) if error.is_timeout() => Canary::Late,
            Err(error) => Canary::Refused(error.to_string()),
        }
    }

    async fn one_token(
        &self,
        addr: SocketAddr,
        model: &str,
        limit: Duration,
    ) -> Result<Value, CallError> {
        let body = json!({
            "model": model,
            "prompt": (20..28).collect::<Vec<u32>>(),
            "max_tokens": 1,
            "temperature": 0,
        });
        self.complete(addr, &body, limit).await
    }

    /// What the engine reports; `None` where there is no answer in time.
    pub async fn pulse(&self, addr: SocketAddr) -> Option<Pulse> {
        let metrics = self.metrics(addr, PULSE).await.ok()?;
        Pulse::parse(&metrics)
    }

    pub async fn complete(
        &self,
        addr: SocketAddr,
        body: &Value,
        limit: Duration,
    ) -> Result<Value, CallError> {
        let request = self
            .http
            .post(format!("http://{addr}/v1/completions"))
            .header(header::CONTENT_TYPE, "application/json")
            .body(body.to_string());
        let reply = call(self.authorized(request), limit).await?;
        serde_json::from_slice(&reply).map_err(CallError::Json)
    }

    fn authorized(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.authorization {
            Some(key) => request.header(header::AUTHORIZATION, key.clone()),
            None => request,
        }
    }

    pub async fn metrics(&self, addr: SocketAddr, limit: Duration) -> Result<String, CallError> {
        let request = self.http.get(format!("http://{addr}/metrics"));
        let reply = call(request, limit).await?;
        Ok(String::from_utf8_lossy(&reply).into_owned())
    }
}

/// The sum of a metric over its labels, in Prometheus text; `None` if it is not there.
pub fn metric(metrics: &str, name: &str) -> Option<f64> {
    metrics
        .lines()
        .filter_map(|line| sample(line.strip_prefix(name)?))
        .reduce(|sum, value| sum + value)
}

/// The value of `{labels} value` or ` value`.
fn sample(rest: &str) -> Option<f64> {
    let value = match rest.strip_prefix('{') {
        Some(labels) => labels.rsplit_once('}')?.1,
        None => rest.strip_prefix(' ')?,
    };
    value.split_whitespace().next()?.parse().ok()
}

async fn call(request: reqwest::RequestBuilder, limit: Duration) -> Result<Vec<u8>, CallError> {
    let calling = async {
        let mut reply = request.send().await.map_err(CallError::Transport)?;
        let mut body = Vec::new();
        while let Some(piece) = reply.chunk().await.map_err(CallError::Transport)? {
            body.extend_from_slice(&piece);
            if body.len() > MAX_REPLY {
                return Err(CallError::TooLong);
            }
        }
        let status = reply.status();
        if status.is_success() {
            return Ok(body);
        }
        let body = String::from_utf8_lossy(&body).chars().take(QUOTE).collect();
        Err(CallError::Status { status, body })
    };
    tokio::time::timeout(limit, calling)
        .await
        .unwrap_or(Err(CallError::Timeout(limit)))
}
