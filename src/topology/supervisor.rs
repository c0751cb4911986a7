//! `[supervisor]`: the life of the nodes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeValue;

use super::keys;
use super::problem::ProblemKind;
use super::section::Section;
use super::value::{duration_or_zero, integer, one_of, size};

const MIB: u64 = 1 << 20;

/// `cgroup`: whether each node gets a control group of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupRequest {
    /// Where pegaflow may make some.
    Auto,
    Off,
    Require,
}

/// `[supervisor]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SupervisorSettings {
    /// From spawn to ready; extended while the log grows.
    pub start_timeout: Duration,
    pub health_interval: Duration,
    /// Requests running, or one token asked for, and no sign of life for this long: the node is
    /// restarted.
    pub hang_timeout: Duration,
    /// How long a node may be idle before it is asked for one token; `None`: it is not asked.
    pub idle_canary: Option<Duration>,
    /// Between TERM and KILL.
    pub stop_grace: Duration,
    /// The second restart's delay; doubles up to `backoff_max`.
    pub backoff_first: Duration,
    pub backoff_max: Duration,
    /// Deaths within `crash_window` after which the node stays down.
    pub crash_limit: u32,
    pub crash_window: Duration,
    /// Bytes of one log file before it is rotated.
    pub log_bytes: u64,
    /// Rotated files that are kept.
    pub log_files: u32,
    pub cgroup: CgroupRequest,
    /// A file with the key that nodes ask for; `None`: one that is new for each run.
    pub node_key_file: Option<PathBuf>,
}

pub(super) fn supervisor(top: &mut Section<'_, '_, '_, '_>, base: &Path) -> SupervisorSettings {
    let mut section = top.sub("supervisor", &keys::SUPERVISOR);
    SupervisorSettings {
        start_timeout: section.seconds("start_timeout", 900),
        health_interval: section.seconds("health_interval", 1),
        hang_timeout: section.seconds("hang_timeout", 120),
        idle_canary: Some(
            section
                .get("idle_canary", duration_or_zero)
                .unwrap_or(Duration::from_secs(30)),
        )
        .filter(|interval| !interval.is_zero()),
        stop_grace: section.seconds("stop_grace", 15),
        backoff_first: section.seconds("backoff_first", 5),
        backoff_max: section.seconds("backoff_max", 120),
        crash_limit: section.get("crash_limit", integer(1..=1000)).unwrap_or(5),
        crash_window: section.seconds("crash_window", 30 * 60),
        log_bytes: section.get("log_bytes", size).unwrap_or(32 * MIB),
        log_files: section.get("log_files", integer(1..=100)).unwrap_or(5),
        cgroup: section.get("cgroup", cgroup).unwrap_or(CgroupRequest::Auto),
        node_key_file: section.file("node_key_file", base),
    }
}

fn cgroup(value: &DeValue<'_>) -> Result<CgroupRequest, ProblemKind> {
    use CgroupRequest::{Auto, Off, Require};
    one_of(value, &[("auto", Auto), ("off", Off), ("require", Require)])
}
