//! One examination of one pair: three fresh prompts, handed over and computed.
//!
//! ```text
//!  prefill leg ─┬─ store: hand-off Ready ─────────────────┬─▶ decode leg ─▶ loaded? ─▶ the same as computed alone?
//!               └─ NIXL: the reply's kv_transfer_params ──┘
//! ```

use std::net::SocketAddr;
use std::time::Duration;

use rand::RngExt;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::fleet::NodeId;
use crate::handoff::{
    HandoffBoard, HandoffFailure, HandoffId, HandoffOutcome, HandoffState, HandoffTicket,
};
use crate::topology::Connector;
use crate::traffic::{Glance, Traffic};

use super::super::CanaryPlan;
use super::super::probe::{CallError, NodeClient};
use super::compare::{Continuation, Difference, external_hits};

const PROMPTS: u32 = 3;
const CHUNKS: u32 = 3;
/// Beyond the last full chunk, so that the decode node also computes something.
const REST: u32 = 7;
const TOKENS: u32 = 16;
/// For the engine's report, which comes on another way than the reply.
const OPEN_GRACE: Duration = Duration::from_secs(1);
/// Counters are published a little after the reply.
const COUNTER_LIMIT: Duration = Duration::from_secs(3);
const COUNTER_POLL: Duration = Duration::from_millis(100);

/// How far logprobs may be apart on nodes that serve others meanwhile: how a sum is rounded depends on
/// what else is in the batch, on CPU too. Wrong KV is much further off.
const BUSY_TOLERANCE: f64 = 0.05;

/// What the examination did not like.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error("the prefill request failed")]
    Prefill(#[source] CallError),
    #[error("the decode request failed")]
    Decode(#[source] CallError),
    #[error("the hand-off failed")]
    Handoff(#[source] HandoffFailure),
    #[error("the prefill node never opened the hand-off; look for its connector in its log")]
    NeverOpened,
    #[error("the reply has no usable logprobs: {0}")]
    Reply(&'static str),
    #[error("only {stored} of the prompt's {CHUNKS} chunks reached the store")]
    NotStored { stored: u32 },
    #[error("the decode node loaded {loaded} of {expected} stored tokens")]
    NotLoaded { loaded: f64, expected: f64 },
    #[error("loaded and computed KV give different answers")]
    Different(#[source] Difference),
}

/// What follows from an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Not all of it is handed over.
    Wrong,
    /// The answers differ. May have been a near tie.
    Different,
    /// May have been an accident.
    Fault,
    /// The hand-off was not even begun.
    Silent,
    /// A node is dying, which its supervisor will see, or the nodes or the store are busy.
    Broken,
    StoreOff,
}

impl CheckError {
    pub fn severity(&self) -> Severity {
        match self {
            Self::Prefill(call) | Self::Decode(call) if call.may_pass() => Severity::Broken,
            Self::Handoff(failure) => match failure {
                HandoffFailure::EngineDown => Severity::StoreOff,
                HandoffFailure::SaveFailed | HandoffFailure::Damaged => Severity::Fault,
                HandoffFailure::ProducerDied
                | HandoffFailure::NoSpace
                | HandoffFailure::Aborted
                | HandoffFailure::Deadline
                | HandoffFailure::Abandoned => Severity::Broken,
            },
            Self::NeverOpened => Severity::Silent,
            Self::Prefill(_) | Self::Decode(_) | Self::Reply(_) | Self::NotLoaded { .. } => {
                Severity::Fault
            }
            Self::NotStored { .. } => Severity::Wrong,
            Self::Different(_) => Severity::Different,
        }
    }
}

/// The error with its causes, in one line.
pub fn explain(error: &CheckError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

pub struct Check<'a> {
    pub plan: &'a CanaryPlan,
    pub client: &'a NodeClient,
    pub board: &'a HandoffBoard,
    pub traffic: &'a Traffic,
    /// What both serve.
    pub model: Option<&'a str>,
    pub prefill: (&'a NodeId, SocketAddr),
    pub decode: (&'a NodeId, SocketAddr),
}

impl Check<'_> {
    pub async fn run(&self) -> Result<(), CheckError> {
        for _ in 0..PROMPTS {
            self.prompt().await?;
        }
        Ok(())
    }

    async fn prompt(&self) -> Result<(), CheckError> {
        let before = self.glance();
        let prompt = self.random_prompt();
        let salt = HandoffId::random();
        let mut ticket = self.board.register(HandoffId::random());
        let second_leg = match self.plan.connector {
            Connector::Pegaflow => self.save(&prompt, &salt, &mut ticket).await?,
            Connector::Nixl => self.keep(&prompt, &salt).await?,
        };

        let hits = self.hits().await?;
        let mut body = self.body(&prompt, &salt);
        set(&mut body, "kv_transfer_params", second_leg);
        let loaded = self.generate(&body).await?;
        self.require_hits(hits).await?;
        // Another salt: nothing of the above may be reused.
        let alone = self.body(&prompt, &HandoffId::random());
        let computed = self.generate(&alone).await?;
        let after = self.glance();
        let busy = before
            .iter()
            .zip(after)
            .any(|(before, after)| before.busy_until(after));
        let tolerance = self
            .plan
            .tolerance
            .max(if busy { BUSY_TOLERANCE } else { 0.0 });
        loaded
            .compare(&computed, tolerance)
            .map_err(CheckError::Different)
    }

    /// Into the store; what decode is told.
    async fn save(
        &self,
        prompt: &[u32],
        salt: &HandoffId,
        ticket: &mut HandoffTicket,
    ) -> Result<Value, CheckError> {
        let limit = self.plan.deadline;
        let id = ticket.id().clone();
        let leg = |leg: &str| json!({"pegaflow": {"handoff": id.as_str(), "leg": leg}});
        self.prefill(prompt, salt, leg("prefill")).await?;
        let _ = ticket.settled_within(OPEN_GRACE.min(limit)).await;
        if ticket.state() == HandoffState::Expected {
            return Err(CheckError::NeverOpened);
        }
        match ticket.settled_within(limit).await {
            HandoffOutcome::Ready { chunks, .. } if chunks >= CHUNKS => Ok(leg("decode")),
            HandoffOutcome::Ready { chunks, .. } => Err(CheckError::NotStored { stored: chunks }),
            HandoffOutcome::Failed(failure) => Err(CheckError::Handoff(failure)),
        }
    }

    /// In the prefill node's own cache; what its connector has to say to decode's.
    async fn keep(&self, prompt: &[u32], salt: &HandoffId) -> Result<Value, CheckError> {
        let keep = json!({"do_remote_decode": true, "do_remote_prefill": false});
        let mut reply = self.prefill(prompt, salt, keep).await?;
        match reply.get_mut("kv_transfer_params").map(Value::take) {
            Some(params @ Value::Object(_)) => Ok(params),
            _ => Err(CheckError::NeverOpened),
        }
    }

    async fn prefill(
        &self,
        prompt: &[u32],
        salt: &HandoffId,
        params: Value,
    ) -> Result<Value, CheckError> {
        let mut body = self.body(prompt, salt);
        set(&mut body, "max_tokens", json!(1));
        set(&mut body, "kv_transfer_params", params);
        let limit = self.plan.deadline;
        let saved = self.client.complete(self.prefill.1, &body, limit).await;
        saved.map_err(CheckError::Prefill)
    }

    fn glance(&self) -> [Glance; 2] {
        [self.prefill.0, self.decode.0].map(|node| self.traffic.glance(node))
    }

    fn random_prompt(&self) -> Vec<u32> {
        let length = self.plan.block_size.saturating_mul(CHUNKS) + REST;
        let mut rng = rand::rng();
        (0..length).map(|_| rng.random_range(20..1000)).collect()
    }

    fn body(&self, prompt: &[u32], salt: &HandoffId) -> Value {
        json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": TOKENS,
            "ignore_eos": true,
            "temperature": 0,
            "logprobs": 1,
            "cache_salt": salt.as_str(),
        })
    }

    async fn generate(&self, body: &Value) -> Result<Continuation, CheckError> {
        let reply = self
            .client
            .complete(self.decode.1, body, self.plan.deadline)
            .await
            .map_err(CheckError::Decode)?;
        Continuation::parse(&reply).map_err(CheckError::Reply)
    }

    async fn hits(&self) -> Result<f64, CheckError> {
        let metrics = self.client.metrics(self.decode.1, self.plan.deadline).await;
        Ok(external_hits(&metrics.map_err(CheckError::Decode)?))
    }

    async fn require_hits(&self, before: f64) -> Result<(), CheckError> {
        let expected = f64::from(self.plan.block_size.saturating_mul(CHUNKS));
        let until = Instant::now() + COUNTER_LIMIT;
        loop {
            let loaded = self.hits().await? - before;
            if loaded >= expected {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(CheckError::NotLoaded { loaded, expected });
            }
            tokio::time::sleep(COUNTER_POLL).await;
        }
    }
}

fn set(body: &mut Value, key: &str, value: Value) {
    if let Some(object) = body.as_object_mut() {
        object.insert(key.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use reqwest::StatusCode;

    use super::*;

    /// Three faults refuse a node for good.
    #[test]
    fn a_server_error_is_no_fault_of_the_pair_and_a_refused_request_is() {
        for (status, severity) in [
            (StatusCode::INTERNAL_SERVER_ERROR, Severity::Broken),
            (StatusCode::SERVICE_UNAVAILABLE, Severity::Broken),
            (StatusCode::BAD_REQUEST, Severity::Fault),
        ] {
            let body = "engine core died".to_owned();
            let error = CheckError::Decode(CallError::Status { status, body });
            assert_eq!(error.severity(), severity, "{status}");
        }
    }
}
