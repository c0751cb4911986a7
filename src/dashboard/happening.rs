//! What became of nodes: every change of phase, with its reason.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde::Serialize;

use crate::fleet::{FleetSnapshot, NodeId};
use crate::live::unix_ms;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Happening {
    /// Milliseconds since 1970.
    pub(super) at: u64,
    pub(super) node: NodeId,
    pub(super) from: &'static str,
    pub(super) to: &'static str,
    pub(super) incarnation: u64,
    pub(super) restarts: u32,
    pub(super) reason: Option<String>,
}

/// Compares one picture of the fleet with the one before it.
#[derive(Debug, Default)]
pub(super) struct Changes(BTreeMap<NodeId, Seen>);

#[derive(Debug, PartialEq, Eq)]
struct Seen {
    phase: &'static str,
    incarnation: u64,
    reason: Option<String>,
}

/// Phases that always want a reason; in the others an old one only says what is long over.
const UNWELL: [&str; 5] = ["backoff", "crash_loop", "failed", "unreachable", "down"];

impl Changes {
    /// Of two changes between pictures only the outcome is seen.
    pub(super) fn look(&mut self, fleet: &FleetSnapshot) -> Vec<Happening> {
        let mut found = Vec::new();
        for node in fleet.nodes() {
            let to = node.phase.label();
            let now = Seen {
                phase: to,
                incarnation: node.incarnation,
                reason: node.reason.clone(),
            };
            let Some(before) = self.0.insert(node.id.clone(), now) else {
                continue;
            };
            if (before.phase, before.incarnation) == (to, node.incarnation) {
                continue;
            }
            let is_news = before.reason != node.reason && !node.is_ready();
            let reason = node.reason.clone();
            let reason = reason.filter(|_| is_news || UNWELL.contains(&to));
            found.push(Happening {
                at: unix_ms(SystemTime::now()),
                node: node.id.clone(),
                from: before.phase,
                to,
                incarnation: node.incarnation,
                restarts: node.restarts,
                reason,
            });
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{FleetPublisher, NodeView, Phase, Role};

    #[test]
    fn each_change_of_phase_happens_once() {
        let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        let fleet = FleetPublisher::new([NodeView::pending("d".into(), Role::Decode, addr)]);
        let mut changes = Changes::default();
        assert_eq!(changes.look(&fleet.snapshot()), []);
        fleet.update(&"d".into(), |node| node.phase = Phase::Ready);
        let found = changes.look(&fleet.snapshot());
        assert_eq!((found[0].from, found[0].to), ("pending", "ready"));
        assert_eq!(changes.look(&fleet.snapshot()), []);
        fleet.update(&"d".into(), |node| {
            node.phase = Phase::CrashLoop;
            node.reason = Some("killed by SIGSEGV".to_owned());
        });
        let found = changes.look(&fleet.snapshot());
        assert_eq!(found[0].reason.as_deref(), Some("killed by SIGSEGV"));
        // It was started again so fast that nobody saw it away.
        fleet.update(&"d".into(), |node| node.incarnation += 1);
        assert_eq!(changes.look(&fleet.snapshot()).len(), 1);
        // What it died of is told no more than once.
        for phase in [Phase::Starting, Phase::Ready, Phase::Draining] {
            fleet.update(&"d".into(), |node| node.phase = phase);
            assert_eq!(changes.look(&fleet.snapshot())[0].reason, None);
        }
    }
}
