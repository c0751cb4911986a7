//! Which nodes may answer a request: those that serve what its `model` names. Pure.
//!
//! ```text
//! model ─▶ alias? ─▶ its target ─▶ some node serves it ──▶ those nodes      (the name on both legs: the target's)
//!                                  none does ────────────▶ 404, with the names that there are
//! none  ─▶ the nodes all serve one model ────────────────▶ any node         (as vLLM by itself)
//!          they serve several ───────────────────────────▶ 400, likewise
//! ```
//!
//! A node that has not said what it serves may serve anything. This is known before anything is computed.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::value::RawValue;

use super::error::RouterError;
use crate::fleet::FleetSnapshot;

/// Names that clients may write for a model, and the model's own.
pub(super) type Aliases = BTreeMap<String, String>;

/// What a request's `model` came to.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// As its nodes call it; `None`: every node will do.
    pub(super) model: Option<String>,
    /// The JSON of it, where the client wrote an alias.
    pub(super) renamed: Option<Box<RawValue>>,
}

/// `raw`: the JSON value of `model`, where the request has one.
pub(super) fn resolve(
    fleet: &FleetSnapshot,
    aliases: &Aliases,
    raw: Option<&str>,
) -> Result<Wanted, RouterError> {
    // What is no string is the node's to refuse.
    let name: Option<String> = raw.and_then(|raw| serde_json::from_str(raw).ok());
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return match serve_one_model(fleet) {
            true => Ok(Wanted::default()),
            false => Err(RouterError::ModelMissing {
                known: known(fleet, aliases).into_keys().collect(),
            }),
        };
    };
    let target = aliases.get(&name);
    let model = target.unwrap_or(&name);
    if !fleet.nodes().any(|node| node.serves(Some(model))) {
        let known: BTreeSet<_> = known(fleet, aliases).into_keys().collect();
        return Err(RouterError::NoModel { id: name, known });
    }
    let renamed = target.and_then(|target| serde_json::value::to_raw_value(target).ok());
    Ok(Wanted {
        model: Some(model.clone()),
        renamed,
    })
}

/// What clients may write in `model`, and the model that each of it means.
pub(super) fn known(fleet: &FleetSnapshot, aliases: &Aliases) -> BTreeMap<String, String> {
    let served = fleet.nodes().flat_map(|node| node.models.iter());
    let mut known: BTreeMap<_, _> = served.map(|model| (model.clone(), model.clone())).collect();
    for (alias, model) in aliases {
        if known.get(model) == Some(model) {
            known.entry(alias.clone()).or_insert_with(|| model.clone());
        }
    }
    known
}

/// A node's first name is its model's own; adapters and other names follow.
fn serve_one_model(fleet: &FleetSnapshot) -> bool {
    let own: BTreeSet<_> = fleet
        .nodes()
        .filter_map(|node| node.models.first())
        .collect();
    own.len() <= 1
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::fleet::{FleetPublisher, NodeView, Role};

    fn fleet(nodes: &[&[&str]]) -> Arc<FleetSnapshot> {
        let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        let views = nodes.iter().enumerate().map(|(index, models)| {
            let id = index.to_string();
            NodeView::pending(id.as_str().into(), Role::Unified, addr)
                .serving(models.iter().copied())
        });
        FleetPublisher::new(views).snapshot()
    }

    fn aliases() -> Aliases {
        [("gpt", "qwen"), ("lost", "nowhere")]
            .map(|(alias, model)| (alias.to_owned(), model.to_owned()))
            .into()
    }

    fn ask(
        fleet: &FleetSnapshot,
        raw: Option<&str>,
    ) -> Result<(Option<String>, bool), RouterError> {
        let wanted = resolve(fleet, &aliases(), raw)?;
        Ok((wanted.model, wanted.renamed.is_some()))
    }

    #[test]
    fn a_name_is_looked_up_and_an_alias_is_replaced() {
        let two = fleet(&[&["qwen", "lora"], &["llama"]]);
        let model = |name: &str, renamed| (Some(name.to_owned()), renamed);
        assert_eq!(ask(&two, Some("\"llama\"")).unwrap(), model("llama", false));
        assert_eq!(ask(&two, Some("\"lora\"")).unwrap(), model("lora", false));
        assert_eq!(ask(&two, Some("\"gpt\"")).unwrap(), model("qwen", true));
        assert_eq!(
            ask(&two, Some("\"\\u0067pt\"")).unwrap(),
            model("qwen", true)
        );
        let raw = resolve(&two, &aliases(), Some("\"gpt\"")).unwrap().renamed;
        assert_eq!(raw.unwrap().get(), "\"qwen\"");
    }

    #[test]
    fn what_nobody_serves_is_refused_with_what_there_is() {
        let two = fleet(&[&["qwen", "lora"], &["llama"]]);
        for name in ["\"mistral\"", "\"lost\"", "\"Qwen\""] {
            let Err(RouterError::NoModel { known, .. }) = ask(&two, Some(name)) else {
                panic!("{name} is known");
            };
            let known: Vec<_> = known.iter().map(String::as_str).collect();
            assert_eq!(known, ["gpt", "llama", "lora", "qwen"]);
        }
    }

    #[test]
    fn without_a_name_the_only_model_is_meant() {
        let (one, two) = (
            fleet(&[&["qwen", "lora"], &["qwen"]]),
            fleet(&[&["qwen"], &["llama"]]),
        );
        for raw in [None, Some("\"\""), Some("5")] {
            assert_eq!(ask(&one, raw).unwrap(), (None, false));
            let refused = ask(&two, raw);
            assert!(
                matches!(refused, Err(RouterError::ModelMissing { known }) if known.len() == 3)
            );
        }
    }

    #[test]
    fn a_node_that_has_not_said_may_serve_anything() {
        let unknown = fleet(&[&["qwen"], &[]]);
        assert!(ask(&unknown, Some("\"mistral\"")).is_ok());
        assert!(ask(&unknown, None).is_ok());
    }
}
