//! Commands for nodes: which are meant, what would come of it, and passing it on.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::{Path, Query, State as Shared};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::{Deserialize, Serialize};

use crate::fleet::{FleetSnapshot, NodeId, NodeView, Role};
use crate::supervise::{Command, Refusal};

use super::{Api, refuse};

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    pub nodes: Vec<AcceptedNode>,
    /// What it means for clients, where that is not nothing.
    pub notes: Vec<String>,
}

/// A node as it was when it got the command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptedNode {
    pub name: String,
    pub incarnation: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct OrderQuery {
    force: bool,
    /// How long a restart may wait for running requests, like `30s`.
    limit: Option<String>,
}

#[derive(Debug, thiserror::Error)]
enum OrderError {
    #[error("there is no node and no role `{target}` here; there are: {known}")]
    Unknown { target: String, known: String },
    #[error("`{value}` is no time; write it like 30s or 2m")]
    Limit { value: String },
    #[error("{consequence} Add --force to do it all the same.")]
    Force { consequence: String },
    #[error("pegaflow is stopping, and its nodes with it")]
    Stopping,
    #[error("{node} was started by others; restart it where that is done (it can be drained here)")]
    External { node: NodeId },
    #[error("{node}: {source}")]
    Node { node: NodeId, source: Refusal },
}

impl OrderError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Unknown { .. } => StatusCode::NOT_FOUND,
            Self::Limit { .. } => StatusCode::BAD_REQUEST,
            Self::Force { .. } | Self::Stopping | Self::External { .. } => StatusCode::CONFLICT,
            Self::Node { source, .. } => match source {
                Refusal::Stopping | Refusal::Others => StatusCode::CONFLICT,
                Refusal::NoAnswer(_) => StatusCode::GATEWAY_TIMEOUT,
            },
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Restart,
    Drain,
    Undrain,
}

type Target = Path<String>;
type Asked = Query<OrderQuery>;

pub(super) async fn restart(Shared(api): Shared<Api>, target: Target, query: Asked) -> Response {
    reply(&api, Verb::Restart, &target, &query).await
}

pub(super) async fn drain(Shared(api): Shared<Api>, target: Target, query: Asked) -> Response {
    reply(&api, Verb::Drain, &target, &query).await
}

pub(super) async fn undrain(Shared(api): Shared<Api>, target: Target, query: Asked) -> Response {
    reply(&api, Verb::Undrain, &target, &query).await
}

async fn reply(api: &Api, verb: Verb, target: &str, query: &OrderQuery) -> Response {
    match order(api, verb, target, query).await {
        Ok(accepted) => (StatusCode::ACCEPTED, Json(accepted)).into_response(),
        Err(error) => refuse(error.status(), &error.to_string()),
    }
}

async fn order(
    api: &Api,
    verb: Verb,
    target: &str,
    query: &OrderQuery,
) -> Result<Accepted, OrderError> {
    let deps = &api.deps;
    if deps.shutdown.graceful().is_cancelled() {
        return Err(OrderError::Stopping);
    }
    let limit = match &query.limit {
        None => deps.about.drain_timeout,
        Some(text) => humantime::parse_duration(text).map_err(|_| OrderError::Limit {
            value: text.clone(),
        })?,
    };
    let fleet = deps.fleet.now();
    let nodes = resolve(&fleet, target, verb)?;
    let loss = match verb {
        Verb::Undrain => None,
        Verb::Drain | Verb::Restart => loss(&fleet, &nodes),
    };
    // A restart is over by itself, and a pair of nodes has no other way to be restarted: it is only told.
    if let (Some(loss), Verb::Drain, false) = (&loss, verb, query.force) {
        let consequence = loss.clone();
        return Err(OrderError::Force { consequence });
    }
    let mut notes: Vec<String> = loss.into_iter().collect();
    if verb == Verb::Restart && nodes.len() > 1 && !notes.is_empty() {
        notes.push("--rolling restarts them one after the other.".to_owned());
    }
    let command = match verb {
        Verb::Restart => Command::Restart { limit },
        Verb::Drain => Command::Drain,
        Verb::Undrain => Command::Undrain,
    };
    let mut accepted = Vec::new();
    for node in &nodes {
        tracing::info!(node = %node.id, "told to {}", verb.word());
        let given = deps.orders.give(&node.id, command).await;
        given.map_err(|source| OrderError::Node {
            node: node.id.clone(),
            source,
        })?;
        accepted.push(AcceptedNode {
            name: node.id.to_string(),
            incarnation: node.incarnation,
        });
    }
    Ok(Accepted {
        nodes: accepted,
        notes,
    })
}

impl Verb {
    fn word(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Drain => "drain",
            Self::Undrain => "undrain",
        }
    }
}

/// A node of this name, else all nodes of this role. Those that others started are not ours to restart.
fn resolve<'f>(
    fleet: &'f FleetSnapshot,
    target: &str,
    verb: Verb,
) -> Result<Vec<&'f NodeView>, OrderError> {
    let ours = |node: &&NodeView| !node.external || verb != Verb::Restart;
    if let Some(node) = fleet.node(&target.into()) {
        return match ours(&node) {
            true => Ok(vec![node]),
            false => Err(OrderError::External {
                node: node.id.clone(),
            }),
        };
    }
    let ours = fleet.nodes().filter(ours);
    let nodes: Vec<_> = ours
        .filter(|node| node.role.to_string() == target)
        .collect();
    if nodes.is_empty() {
        let known = fleet
            .nodes()
            .map(|node| format!("{} ({})", node.id, node.role));
        return Err(OrderError::Unknown {
            target: target.to_owned(),
            known: known.collect::<Vec<_>>().join(", "),
        });
    }
    Ok(nodes)
}

/// What clients lose while these nodes serve nothing, if they are the last ready ones of a role.
fn loss(fleet: &FleetSnapshot, nodes: &[&NodeView]) -> Option<String> {
    let gone: BTreeSet<&NodeId> = nodes.iter().map(|node| &node.id).collect();
    let left = |role: Role| fleet.ready(role).any(|node| !gone.contains(&node.id));
    let roles = [Role::Prefill, Role::Decode, Role::Unified];
    let lost: Vec<Role> = roles
        .into_iter()
        .filter(|role| {
            nodes
                .iter()
                .any(|node| node.role == *role && node.is_ready())
        })
        .filter(|role| !left(*role))
        .collect();
    let first = lost.first()?;
    let means = if !roles.into_iter().any(left) {
        "requests wait for [router] queue_timeout, and are then refused"
    } else if *first == Role::Prefill {
        "prompts are computed by the nodes that generate, without hand-offs"
    } else {
        "requests are served whole by the nodes that are left"
    };
    Some(format!(
        "No other {first} node is ready: meanwhile {means}."
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{FleetPublisher, Phase};

    fn fleet(nodes: &[(&str, Role, Phase)]) -> FleetPublisher {
        let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        FleetPublisher::new(nodes.iter().map(|(name, role, phase)| {
            let mut view = NodeView::pending((*name).into(), *role, addr);
            view.phase = phase.clone();
            view
        }))
    }

    fn names(fleet: &FleetSnapshot, target: &str) -> Vec<String> {
        let nodes = resolve(fleet, target, Verb::Restart).unwrap();
        nodes.iter().map(|node| node.id.to_string()).collect()
    }

    #[test]
    fn a_name_wins_over_a_role_and_anything_else_is_refused_with_what_there_is() {
        let ready = Phase::Ready;
        let fleet = fleet(&[
            ("decode", Role::Decode, ready.clone()),
            ("d2", Role::Decode, ready.clone()),
            ("p", Role::Prefill, ready),
        ]);
        let fleet = fleet.snapshot();
        assert_eq!(names(&fleet, "decode"), ["decode"]);
        assert_eq!(names(&fleet, "prefill"), ["p"]);
        let refused = resolve(&fleet, "x", Verb::Drain);
        assert!(
            matches!(refused, Err(OrderError::Unknown { known, .. }) if known == "d2 (decode), decode (decode), p (prefill)")
        );
    }

    #[test]
    fn nodes_of_others_are_not_ours_to_restart() {
        let fleet = fleet(&[
            ("d1", Role::Decode, Phase::Ready),
            ("d2", Role::Decode, Phase::Ready),
        ]);
        fleet.update(&"d2".into(), |node| node.external = true);
        let fleet = fleet.snapshot();
        assert_eq!(names(&fleet, "decode"), ["d1"]);
        assert!(matches!(
            resolve(&fleet, "d2", Verb::Restart),
            Err(OrderError::External { .. })
        ));
        for verb in [Verb::Drain, Verb::Undrain] {
            assert_eq!(resolve(&fleet, "d2", verb).unwrap().len(), 1);
            assert_eq!(resolve(&fleet, "decode", verb).unwrap().len(), 2);
        }
    }

    #[test]
    fn only_the_last_ready_node_of_a_role_is_a_loss() {
        let ready = Phase::Ready;
        let nodes = |second: Phase| {
            fleet(&[
                ("d1", Role::Decode, Phase::Ready),
                ("d2", Role::Decode, second),
                ("p", Role::Prefill, Phase::Ready),
            ])
        };
        let lost = |fleet: &FleetPublisher, target: &str| {
            let fleet = fleet.snapshot();
            loss(&fleet, &resolve(&fleet, target, Verb::Drain).unwrap())
        };
        let both = nodes(ready);
        assert_eq!(lost(&both, "d1"), None);
        assert!(lost(&both, "decode").unwrap().contains("served whole"));
        assert!(lost(&both, "p").unwrap().contains("without hand-offs"));
        let one = nodes(Phase::CrashLoop);
        assert!(lost(&one, "d1").is_some());
        assert_eq!(lost(&one, "d2"), None, "it serves nothing now");
        let alone = fleet(&[("u", Role::Unified, Phase::Ready)]);
        assert!(lost(&alone, "u").unwrap().contains("refused"));
    }
}
