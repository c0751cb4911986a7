//! What the figures are told apart by, and the values that are known beforehand: those are there from the start, at
//! zero, since a rate over a counter that does not exist yet is no rate.

use prometheus_client::encoding::EncodeLabelSet;

use crate::handoff::HandoffFailure;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(in super::super) struct RequestLabels {
    pub(in super::super) endpoint: &'static str,
    pub(in super::super) outcome: &'static str,
    pub(in super::super) path: &'static str,
    pub(in super::super) reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct PathLabels {
    pub(super) path: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RetryLabels {
    pub(super) leg: &'static str,
    pub(super) reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ReplayLabels {
    pub(super) outcome: &'static str,
    pub(super) reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct LegLabels {
    pub(super) leg: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ReasonLabels {
    pub(super) reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct StageLabels {
    pub(super) stage: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct NodeLabels {
    pub(super) node: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct BreakerLabels {
    pub(super) node: String,
    pub(super) leg: &'static str,
}

/// Why a prompt was not handed off, as far as it is known beforehand; a failed leg adds its own.
pub(super) const FALLBACKS: [&str; 14] = [
    "no_decode_node",
    "breaker_open",
    "not_opened",
    "no_params",
    "claim_used",
    "handoff_timeout",
    HandoffFailure::NoSpace.label(),
    HandoffFailure::ProducerDied.label(),
    HandoffFailure::Aborted.label(),
    HandoffFailure::SaveFailed.label(),
    HandoffFailure::Damaged.label(),
    HandoffFailure::Deadline.label(),
    HandoffFailure::Abandoned.label(),
    HandoffFailure::EngineDown.label(),
];

/// What became of streams whose node failed, and why; those that are refused have a reason each beside these.
pub(super) const REPLAYS: [(&str, &str); 3] = [("ok", ""), ("ok", "ended"), ("failed", "no_node")];

pub(super) const LEGS: [&str; 3] = ["prefill", "decode", "whole"];

/// Why a leg is sent once more.
pub(super) const RETRIES: [&str; 10] = [
    "connect",
    "tls",
    "transport",
    "first_byte_timeout",
    "chunk_timeout",
    "status",
    "node_lost",
    "too_large",
    "truncated",
    "in_stream",
];

/// What a request can wait for when its client goes away.
pub(super) const STAGES: [&str; 7] = [
    "queue", "body", "dispatch", "prefill", "decode", "whole", "stream",
];
