//! Several models in one topology: who serves which, and by which name.

use std::collections::BTreeMap;

use super::{At, Findings, NodeSettings, ProblemKind, Topology};

/// The key that says what the node serves, or the one that could.
fn key(at: &At, findings: &Findings<'_>) -> String {
    let keys = ["model", "served_model_name"].map(|key| at.key(key));
    let written = keys.iter().find(|key| findings.source.has(key));
    written.unwrap_or(&at.key("name")).clone()
}

/// A pool's KV is one model's.
pub(super) fn one_in_each_pool(
    topology: &Topology,
    pool: &[(usize, &NodeSettings)],
    findings: &mut Findings<'_>,
) {
    let Some(((first_index, first), others)) = pool.split_first() else {
        return;
    };
    for (index, node) in others {
        let (this, theirs) = (topology.served_by(node), topology.served_by(first));
        if this == theirs && topology.model_of(node) == topology.model_of(first) {
            continue;
        }
        let conflict = ProblemKind::Conflict {
            with: format!("node[{first_index}], which serves {theirs:?} in the same `pool`"),
            instead: "write a `pool` of its own for each model".to_owned(),
        };
        findings.add(&key(&At(*index), findings), conflict);
    }
}

/// A name is one model's.
pub(super) fn names(topology: &Topology, findings: &mut Findings<'_>) {
    let mut known = BTreeMap::new();
    let own = topology.nodes.iter().enumerate();
    for (index, node) in own.filter(|(_, node)| node.is_own()) {
        let (name, model) = (topology.served_by(node), topology.model_of(node));
        let (first, other) = *known.entry(name).or_insert((index, model));
        if other != model {
            let conflict = ProblemKind::Conflict {
                with: format!("node[{first}], which serves another model as {name:?}"),
                instead: "write another `served_model_name`".to_owned(),
            };
            findings.add(&key(&At(index), findings), conflict);
        }
    }
}
