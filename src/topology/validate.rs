//! Combinations that cannot work. Pure.
//!
//! What has been reported already is not used for a second complaint.

use std::collections::BTreeMap;

use super::flags::{self, Flag, Verdict};
use super::problem::{Findings, ProblemKind};
use super::{Capacity, Connector, CpuRequest, Device, GpuRequest, NodeSettings, Topology, kv};
use crate::fleet::Role;

mod models;
mod others;
mod router;

pub use router::is_origin;

/// The name of pegaflow's own log, where it has one: it lies beside its nodes'.
pub const OWN_LOG: &str = "pegaflow";

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

pub(super) fn validate(topology: &Topology, findings: &mut Findings<'_>) {
    top(topology, findings);
    kv::check(&topology.kv, findings);
    router::router(topology, findings);
    for (index, node) in topology.nodes.iter().enumerate() {
        let at = At(index);
        names(topology, &at, node, findings);
        if !node.is_own() {
            others::other(topology, &at, node, findings);
            continue;
        }
        others::own(&at, findings);
        device(topology.device, &at, node, findings);
        port(topology, &at, node, findings);
        args(&at, node, findings);
        env(&at, node, findings);
    }
    others::some_own(topology, findings);
    models::names(topology, findings);
    roles(topology, findings);
    sharing(topology, findings);
}

/// A node's place in the file.
struct At(usize);

impl At {
    fn key(&self, key: &str) -> String {
        format!("node[{}].{key}", self.0)
    }
}

fn bad(found: impl Into<String>, instead: impl Into<String>) -> ProblemKind {
    ProblemKind::BadValue {
        found: found.into(),
        instead: instead.into(),
    }
}

fn is_name(name: &str, most: usize) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=most).contains(&name.len()) && name.chars().all(allowed)
}

pub(super) fn instance_name(name: &str, findings: &mut Findings<'_>) {
    if !findings.is_bad("name") && !is_name(name, 40) {
        let found = format!("the name {name:?}");
        let instead = "`name = \"...\"` with 1 to 40 of a-z, 0-9 and -";
        findings.add("name", bad(found, instead));
    }
}

fn top(topology: &Topology, findings: &mut Findings<'_>) {
    instance_name(&topology.name, findings);
    let multiple = match topology.device {
        Device::Cuda => 16,
        Device::Cpu => 32,
    };
    if !findings.is_bad("block_size")
        && !findings.is_bad("device")
        && !topology.block_size.is_multiple_of(multiple)
    {
        let found = format!("the number {}", topology.block_size);
        findings.add(
            "block_size",
            bad(found, format!("a multiple of {multiple}")),
        );
    }
    if let Some(length) = topology.max_model_len
        && length < topology.block_size
    {
        let found = format!("{length}, less than one block of {}", topology.block_size);
        findings.add("max_model_len", bad(found, "a larger number"));
    }
    if let Capacity::Bytes(bytes) = topology.kv.capacity
        && bytes < 16 * MIB
    {
        let found = format!("{bytes} bytes");
        findings.add("kv.capacity", bad(found, "at least \"16MiB\""));
    }
    let supervisor = &topology.supervisor;
    if supervisor.backoff_first > supervisor.backoff_max {
        let conflict = ProblemKind::Conflict {
            with: "a smaller `backoff_max`".to_owned(),
            instead: "write a `backoff_max` that is at least as long".to_owned(),
        };
        findings.add("supervisor.backoff_first", conflict);
    }
    if supervisor.log_bytes < MIB {
        let found = format!("{} bytes", supervisor.log_bytes);
        findings.add("supervisor.log_bytes", bad(found, "at least \"1MiB\""));
    }
}

fn names(topology: &Topology, at: &At, node: &NodeSettings, findings: &mut Findings<'_>) {
    let key = at.key("name");
    if findings.is_bad(&key) || findings.is_bad(&at.key("role")) {
        return;
    }
    if !is_name(&node.name, 40) {
        let found = format!("the name {:?}", node.name);
        findings.add(&key, bad(found, "1 to 40 of a-z, 0-9 and -"));
        return;
    }
    if let Some(name) = node.ids().find(|id| id.as_str() == OWN_LOG) {
        let found = format!("the name {:?}", name.as_str());
        findings.add(&key, bad(found, "another; pegaflow's own log has this one"));
        return;
    }
    for (index, other) in topology.nodes.iter().enumerate().take(at.0) {
        if findings.is_bad(&At(index).key("name")) {
            continue;
        }
        let taken: Vec<_> = other.ids().collect();
        if let Some(name) = node.ids().find(|id| taken.contains(id)) {
            let duplicate = ProblemKind::DuplicateName {
                name: name.to_string(),
                other: format!("node[{index}]"),
            };
            findings.add(&key, duplicate);
            return;
        }
    }
}

fn device(device: Device, at: &At, node: &NodeSettings, findings: &mut Findings<'_>) {
    if findings.is_bad("device") {
        return;
    }
    let wrong = match device {
        Device::Cpu => [
            ("gpus", "leave it out, or write `cpus`"),
            ("gpu_memory_fraction", "leave it out, or write `kv_cache`"),
            ("gpu_memory_free", "leave it out"),
            ("share_gpus", "leave it out, or write `cpus`"),
        ]
        .as_slice(),
        Device::Cuda => &[],
    };
    for (key, instead) in wrong {
        let key = at.key(key);
        if findings.source.has(&key) && !findings.is_bad(&key) {
            let only = "cuda";
            findings.add_at_key(&key, ProblemKind::WrongDevice { only, instead });
        }
    }
    if device == Device::Cpu && node.cpus == CpuRequest::All {
        let found = "the string \"all\" for nodes that compute on the CPU";
        let instead = "\"auto\" or a list of cores: their ranks must not share them";
        findings.add(&at.key("cpus"), bad(found, instead));
    }
    let replicas = |with: &str| ProblemKind::Conflict {
        with: format!("`count = {}`", node.count),
        instead: format!("write `{with} = \"auto\"`, or one [[node]] for each list"),
    };
    if device == Device::Cuda && node.count > 1 && matches!(node.gpus, GpuRequest::Listed(_)) {
        findings.add(&at.key("gpus"), replicas("gpus"));
    }
    if device == Device::Cpu
        && let CpuRequest::Listed(cores) = &node.cpus
    {
        if node.count > 1 {
            findings.add(&at.key("cpus"), replicas("cpus"));
        }
        if !u32::try_from(cores.len()).is_ok_and(|n| n.is_multiple_of(node.tensor_parallel)) {
            let conflict = ProblemKind::Conflict {
                with: format!("`tensor_parallel = {}`", node.tensor_parallel),
                instead: format!(
                    "each rank takes as many cores; {} do not divide",
                    cores.len()
                ),
            };
            findings.add(&at.key("cpus"), conflict);
        }
    }
    if let (Device::Cpu, Some(bytes)) = (device, node.kv_cache)
        && !bytes.is_multiple_of(GIB)
    {
        let found = format!("{bytes} bytes");
        let instead = "whole GiB, like \"1GiB\": vLLM on CPU takes no other";
        findings.add(&at.key("kv_cache"), bad(found, instead));
    }
}

fn port(topology: &Topology, at: &At, node: &NodeSettings, findings: &mut Findings<'_>) {
    let Some(port) = node.port else {
        return;
    };
    let key = at.key("port");
    if node.count > 1 {
        let conflict = ProblemKind::Conflict {
            with: format!("`count = {}`", node.count),
            instead: "leave it out: replicas need a port each".to_owned(),
        };
        findings.add(&key, conflict);
    }
    let earlier = topology.nodes.iter().enumerate().take(at.0);
    let same = earlier
        .filter(|(_, other)| other.port == Some(port))
        .map(|(index, _)| format!("node[{index}]"))
        .next();
    let settings = &topology.router;
    let router = [
        ("listen", Some(settings.listen)),
        ("metrics_listen", settings.metrics_listen),
    ]
    .into_iter()
    .find(|(_, listen)| listen.is_some_and(|listen| listen.port() == port))
    .map(|(key, _)| format!("[router] {key}"));
    if let Some(other) = same.or(router) {
        findings.add(&key, ProblemKind::PortCollision { port, other });
    }
}

fn args(at: &At, node: &NodeSettings, findings: &mut Findings<'_>) {
    if findings.is_bad(&at.key("args")) {
        return;
    }
    for flag in flags::flags(&node.args) {
        let Some((name, verdict)) = flags::verdict(&flag) else {
            continue;
        };
        let kind = match verdict {
            Verdict::Owned { instead } => ProblemKind::OwnedFlag {
                flag: name,
                instead,
            },
            Verdict::UnifiedOnly { .. } if !node.shares_kv() => continue,
            Verdict::Unsupported { reason }
            | Verdict::OneOnly { reason }
            | Verdict::UnifiedOnly { reason } => {
                ProblemKind::UnsupportedFlag { flag: name, reason }
            }
        };
        findings.add(&at.key(&format!("args[{}]", flag.index)), kind);
    }
}

fn env(at: &At, node: &NodeSettings, findings: &mut Findings<'_>) {
    for (name, value) in &node.env {
        let key = at.key(&format!("env.{name}"));
        if let Some(instead) = flags::owned_env(name) {
            findings.add_at_key(&key, ProblemKind::OwnedEnv { instead });
        } else if name.is_empty() || name.contains(['=', '\0']) {
            let instead = "a name without = and NUL";
            findings.add_at_key(&key, bad(format!("the name {name:?}"), instead));
        } else if value.contains('\0') {
            findings.add(&key, bad("a NUL character", "a value without it"));
        }
    }
}

/// The pools, in the file's order, and the nodes of each.
fn pools(topology: &Topology) -> Vec<Vec<(usize, &NodeSettings)>> {
    let mut pools: Vec<Vec<(usize, &NodeSettings)>> = Vec::new();
    let sharing = topology.nodes.iter().enumerate();
    for (index, node) in sharing.filter(|(_, node)| node.role != Role::Unified) {
        let same =
            |pool: &&mut Vec<(usize, &NodeSettings)>| pool.iter().any(|(_, n)| n.pool == node.pool);
        match pools.iter_mut().find(same) {
            Some(pool) => pool.push((index, node)),
            None => pools.push(vec![(index, node)]),
        }
    }
    pools
}

fn roles(topology: &Topology, findings: &mut Findings<'_>) {
    for (index, node) in topology.nodes.iter().enumerate() {
        let key = At(index).key("pool");
        if findings.is_bad(&key) || !findings.source.has(&key) {
            continue;
        }
        if !is_name(&node.pool, 40) {
            let found = format!("the name {:?}", node.pool);
            findings.add(&key, bad(found, "1 to 40 of a-z, 0-9 and -"));
        } else if node.role == Role::Unified {
            let conflict = ProblemKind::Conflict {
                with: "`role = \"unified\"`".to_owned(),
                instead: "leave it out: a unified node shares no KV".to_owned(),
            };
            findings.add(&key, conflict);
        }
    }
    let unknown = |index| {
        let at = At(index);
        findings.is_bad(&at.key("role")) || findings.is_bad(&at.key("pool"))
    };
    if (0..topology.nodes.len()).any(unknown) {
        return;
    }
    for pool in pools(topology) {
        let first = |role| pool.iter().find(|(_, node)| node.role == role);
        match (first(Role::Prefill), first(Role::Decode)) {
            (Some((index, _)), None) => {
                findings.add(&At(*index).key("role"), ProblemKind::PrefillWithoutDecode);
            }
            (None, Some((index, _))) => {
                findings.add(&At(*index).key("role"), ProblemKind::DecodeWithoutPrefill);
            }
            _ => {}
        }
    }
}

fn sharing(topology: &Topology, findings: &mut Findings<'_>) {
    for mut pool in pools(topology) {
        // A store is shared by nodes of one machine; NIXL reaches others.
        if topology.kv.connector == Connector::Pegaflow {
            others::apart(&pool, findings);
        }
        pool.retain(|(_, node)| node.is_own());
        models::one_in_each_pool(topology, &pool, findings);
        agreeing(topology, &pool, findings);
    }
}

/// Nodes that exchange KV are compared with the first of them.
fn agreeing(topology: &Topology, pool: &[(usize, &NodeSettings)], findings: &mut Findings<'_>) {
    let Some(((first_index, first), others)) = pool.split_first() else {
        return;
    };
    let other = format!("node[{first_index}]");
    let first_flags = kv_flags(first);
    for &(index, node) in others {
        let at = At(index);
        let tensor_parallel = if findings.source.has(&at.key("tensor_parallel")) {
            at.key("tensor_parallel")
        } else {
            at.key("gpus")
        };
        // NIXL translates between unlike ones.
        let known = topology.kv.connector == Connector::Pegaflow
            && !findings.is_bad(&tensor_parallel)
            && !findings.is_bad(&format!("{other}.tensor_parallel"))
            && !findings.is_bad(&format!("{other}.gpus"));
        if known && node.tensor_parallel != first.tensor_parallel {
            let unequal = ProblemKind::UnequalTensorParallel {
                this: node.tensor_parallel,
                other: other.clone(),
                theirs: first.tensor_parallel,
            };
            findings.add(&tensor_parallel, unequal);
        }
        let flags = kv_flags(node);
        for name in flags::SHAPES_KV {
            let here = flags.get(name);
            if here.map(|flag| &flag.value) != first_flags.get(name).map(|flag| &flag.value) {
                let key = here.map_or_else(|| "args".to_owned(), |f| format!("args[{}]", f.index));
                let unequal = ProblemKind::UnequalFlag {
                    flag: name,
                    other: other.clone(),
                };
                findings.add(&at.key(&key), unequal);
            }
        }
    }
}

fn kv_flags(node: &NodeSettings) -> BTreeMap<&'static str, Flag> {
    flags::flags(&node.args)
        .into_iter()
        .filter_map(|flag| {
            let name = flags::SHAPES_KV.iter().find(|name| **name == flag.name)?;
            Some((*name, flag))
        })
        .collect()
}
