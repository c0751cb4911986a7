//! Nodes with a `url`: others started them, and know everything else.

use super::{At, Findings, NodeSettings, ProblemKind, Topology};

/// What pegaflow decides for the nodes that it starts.
const OWN_ONLY: [&str; 14] = [
    "model",
    "served_model_name",
    "count",
    "gpus",
    "cpus",
    "tensor_parallel",
    "args",
    "env",
    "host",
    "port",
    "gpu_memory_fraction",
    "gpu_memory_free",
    "share_gpus",
    "kv_cache",
];

pub(super) fn other(
    topology: &Topology,
    at: &At,
    node: &NodeSettings,
    findings: &mut Findings<'_>,
) {
    for key in OWN_ONLY.map(|key| at.key(key)) {
        if findings.source.has(&key) {
            let conflict = ProblemKind::Conflict {
                with: "`url`".to_owned(),
                instead: "leave it out: others started that node".to_owned(),
            };
            findings.add_at_key(&key, conflict);
        }
    }
    let key = at.key("ca_file");
    if node.url.as_ref().is_some_and(|url| !url.is_https()) && findings.source.has(&key) {
        let conflict = ProblemKind::Conflict {
            with: "a `url` of plain HTTP".to_owned(),
            instead: "write https:// there, or leave it out".to_owned(),
        };
        findings.add_at_key(&key, conflict);
    }
    let earlier = topology.nodes.iter().enumerate().take(at.0);
    let mut same = earlier.filter(|(_, other)| other.url == node.url);
    if let Some((index, _)) = same.next() {
        let conflict = ProblemKind::Conflict {
            with: format!("that of node[{index}]"),
            instead: "write each node once; it has one role".to_owned(),
        };
        findings.add(&at.key("url"), conflict);
    }
}

/// What only a node of others has.
pub(super) fn own(at: &At, findings: &mut Findings<'_>) {
    // A bad URL is told already, and the node may be no own one.
    if findings.is_bad(&at.key("url")) {
        return;
    }
    for (key, instead) in [
        (
            "key_file",
            "write `node_key_file` in [supervisor] for the key of pegaflow's own nodes",
        ),
        (
            "ca_file",
            "leave it out: pegaflow's own nodes speak plain HTTP",
        ),
    ] {
        let key = at.key(key);
        if findings.source.has(&key) {
            let conflict = ProblemKind::Conflict {
                with: "a node without `url`".to_owned(),
                instead: instead.to_owned(),
            };
            findings.add_at_key(&key, conflict);
        }
    }
}

/// A pool is a store that its nodes share: others' nodes do not reach ours.
pub(super) fn apart(pool: &[(usize, &NodeSettings)], findings: &mut Findings<'_>) {
    let other = pool.iter().find(|(_, node)| !node.is_own());
    let own = pool.iter().find(|(_, node)| node.is_own());
    if let (Some((index, _)), Some((own, _))) = (other, own) {
        let conflict = ProblemKind::Conflict {
            with: format!("the `pool` of node[{own}], which pegaflow starts"),
            instead: "write a `pool` of their own for the nodes of others".to_owned(),
        };
        findings.add(&At(*index).key("url"), conflict);
    }
}

/// Somebody has to be started.
pub(super) fn some_own(topology: &Topology, findings: &mut Findings<'_>) {
    if !topology.nodes.is_empty() && !topology.nodes.iter().any(NodeSettings::is_own) {
        let instead =
            "a [[node]] without `url`; for nodes of others alone there is `pegaflow router`";
        let instead = instead.to_owned();
        findings.add("node", ProblemKind::Missing { instead });
    }
}
