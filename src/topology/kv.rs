//! `[kv]`: what carries KV from prefill to decode, and the store where that is pegaflow's own.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use toml::de::DeValue;

use super::keys;
use super::memory::{Capacity, HugepageRequest, NumaRequest, capacity, hugepages, numa};
use super::problem::{Findings, ProblemKind};
use super::section::Section;
use super::value::{boolean, host, number, one_of};

const GIB: u64 = 1 << 30;

/// What carries KV from prefill to decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Connector {
    /// The store in pegaflow: shared memory of one machine.
    #[default]
    Pegaflow,
    /// vLLM's NixlConnector: decode reads from prefill, also over a network.
    Nixl,
}

/// `[kv]`.
#[derive(Debug, Clone, PartialEq)]
pub struct KvSettings {
    pub connector: Connector,
    /// Where decode nodes ask what prefill nodes hold, with [`Connector::Nixl`].
    pub side_channel_host: IpAddr,
    /// Of the shared store.
    pub capacity: Capacity,
    pub hugepages: HugepageRequest,
    pub numa: NumaRequest,
    pub handoff_deadline: Duration,
    /// Decode nodes save the tokens they generate, for the next turn of a conversation.
    pub save_decoded: bool,
    /// A checksum is kept of everything stored, and compared at every load.
    pub verify: bool,
    /// Skips the refusal of models that are known to answer wrongly with loaded KV.
    pub allow_unproven_models: bool,
    /// `None`: what the device and the processor allow.
    pub canary_logprob_tolerance: Option<f64>,
}

pub(super) fn kv(top: &mut Section<'_, '_, '_, '_>) -> KvSettings {
    let mut section = top.sub("kv", &keys::KV);
    KvSettings {
        connector: section.get("connector", connector).unwrap_or_default(),
        side_channel_host: section
            .get("side_channel_host", host)
            .unwrap_or(Ipv4Addr::LOCALHOST.into()),
        capacity: section
            .get("capacity", capacity)
            .unwrap_or(Capacity::Bytes(8 * GIB)),
        hugepages: section
            .get("hugepages", hugepages)
            .unwrap_or(HugepageRequest::Auto),
        numa: section.get("numa", numa).unwrap_or(NumaRequest::Auto),
        handoff_deadline: section.seconds("handoff_deadline", 60),
        save_decoded: section.get("save_decoded", boolean).unwrap_or(false),
        verify: section.get("verify", boolean).unwrap_or(false),
        allow_unproven_models: section
            .get("allow_unproven_models", boolean)
            .unwrap_or(false),
        canary_logprob_tolerance: section.get("canary_logprob_tolerance", number(0.0..=10.0)),
    }
}

fn connector(value: &DeValue<'_>) -> Result<Connector, ProblemKind> {
    let choices = [("pegaflow", Connector::Pegaflow), ("nixl", Connector::Nixl)];
    one_of(value, &choices)
}

/// Keys of the store, where there is none, and of NIXL where it is not used.
pub(super) fn check(settings: &KvSettings, findings: &mut Findings<'_>) {
    let (without_meaning, instead): (&[&str], _) = match settings.connector {
        Connector::Pegaflow => (
            &["side_channel_host"],
            "leave it out, or write `connector = \"nixl\"`",
        ),
        Connector::Nixl => (
            &[
                "capacity",
                "hugepages",
                "numa",
                "handoff_deadline",
                "save_decoded",
                "verify",
            ],
            "leave it out: with NIXL there is no store, prefill nodes keep the KV in their own cache",
        ),
    };
    for key in without_meaning {
        let key = format!("kv.{key}");
        if findings.source.has(&key) && !findings.is_bad("kv.connector") {
            let conflict = ProblemKind::Conflict {
                with: match settings.connector {
                    Connector::Pegaflow => "`connector = \"pegaflow\"`".to_owned(),
                    Connector::Nixl => "`connector = \"nixl\"`".to_owned(),
                },
                instead: instead.to_owned(),
            };
            findings.add_at_key(&key, conflict);
        }
    }
}
