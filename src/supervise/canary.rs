//! Who is examined with whom, and when. The examination itself is in `check.rs`.
//!
//! ```text
//! fleet changes ─▶ next_step (pure) ─▶ Examine(p, d) ─▶ check ─┬─ equal ──────▶ Proven, both
//!                       │                                      └─ failed ──▶ history (pure): again
//!                       │                                         later, unpaired, or Refused
//!                       ├────────────▶ Unpaired(node): serves whole requests until a partner comes
//!                       └────────────▶ Vouched(node): its partners are others' nodes; who named them says they fit
//! ```
//!
//! One examination at a time; it takes seconds, and the nodes share the machine.

mod check;
mod compare;
mod history;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::fleet::{FleetSnapshot, FleetWatch, KvTrust, NodeId, NodeView, Phase, Role};
use crate::handoff::HandoffBoard;
use crate::traffic::Traffic;

use super::CanaryPlan;
use super::node::{Finding, Verdict};
use super::probe::NodeClient;

pub use history::Pace;

use check::Severity;
use history::{History, Outcome, Standing};

const APPLY_LIMIT: Duration = Duration::from_secs(5);

/// Examines pairs until it is dropped.
pub struct Canary {
    pub plan: CanaryPlan,
    pub client: NodeClient,
    pub board: HandoffBoard,
    pub traffic: Traffic,
    pub watch: FleetWatch,
    pub verdicts: BTreeMap<NodeId, mpsc::Sender<Verdict>>,
    pub pace: Pace,
    /// Nodes that passed, in whatever life.
    pub passed: BTreeSet<NodeId>,
    /// The store was found turned off; it does not come back.
    pub store_off: bool,
}

/// One life of one node.
type Life = (NodeId, u64);

#[derive(Debug)]
enum Step {
    Examine(Box<(NodeView, NodeView)>),
    Unpaired(Life),
    /// Its partners were started by others.
    Vouched(Life),
    /// Until the fleet changes, or this long.
    Wait(Option<Duration>),
}

impl Canary {
    pub async fn run(mut self) {
        let mut histories: BTreeMap<(Life, Life), History> = BTreeMap::new();
        loop {
            let snapshot = self.watch.latest();
            let now = Instant::now();
            // Entries of earlier incarnations will never be asked for again.
            histories.retain(|(p, d), _| is_current(&snapshot, p) && is_current(&snapshot, d));
            let blocked = |p: &NodeView, d: &NodeView| {
                let history = histories.get(&(life(p), life(d)))?;
                history.not_before?.checked_duration_since(now)
            };
            match next_step(&snapshot, self.plan.partner_grace, blocked) {
                Step::Examine(pair) => {
                    let (prefill, decode) = *pair;
                    let key = (life(&prefill), life(&decode));
                    let history = histories.entry(key).or_default();
                    self.examine(&prefill, &decode, history).await;
                }
                Step::Unpaired(life) => self.tell(&life, Finding::Unpaired).await,
                Step::Vouched(life) => self.tell(&life, Finding::Vouched).await,
                Step::Wait(limit) => {
                    let changed = self.watch.changed();
                    match limit {
                        Some(limit) => {
                            let _ = tokio::time::timeout(limit, changed).await;
                        }
                        None if changed.await.is_err() => return,
                        None => {}
                    }
                }
            }
        }
    }

    async fn examine(&mut self, prefill: &NodeView, decode: &NodeView, history: &mut History) {
        let (p, d) = (&prefill.id, &decode.id);
        let check = check::Check {
            plan: &self.plan,
            client: &self.client,
            board: &self.board,
            traffic: &self.traffic,
            model: decode.models.first().map(String::as_str),
            prefill: (p, prefill.addr),
            decode: (d, decode.addr),
        };
        let began = Instant::now();
        let lives = [life(prefill), life(decode)];
        let mut watch = self.watch.clone();
        let died = async {
            let dead = |fleet: &FleetSnapshot| !lives.iter().all(|life| is_up(fleet, life));
            let _ = watch.wait_for(dead).await;
        };
        let result = tokio::select! {
            result = check.run() => result,
            () = died => return,
        };
        let Err(error) = result else {
            tracing::info!("canary: {d} loads from {p} what it would compute itself");
            for life in &lives {
                self.passed.insert(life.0.clone());
                self.tell(life, Finding::Proven).await;
            }
            return;
        };
        let why = check::explain(&error);
        tracing::warn!("canary {p} -> {d}: {why}");
        let severity = error.severity();
        self.store_off |= severity == Severity::StoreOff;
        let known =
            |node: &NodeView| node.trust == KvTrust::Proven || self.passed.contains(&node.id);
        let standing = Standing {
            ever_proven: known(prefill) || known(decode),
            store_off: self.store_off,
            grace: self.plan.partner_grace,
        };
        let times = (began, Instant::now());
        let finding = match history.failed(severity, standing, self.pace, times) {
            Outcome::Again(_) => return,
            Outcome::Unpaired(_) => Finding::Unpaired,
            Outcome::Refuse => {
                Finding::Refused(format!("the canary {p} -> {d} was refused: {why}"))
            }
        };
        for node in [prefill, decode] {
            // Whoever passed with another partner is not to blame.
            if node.trust != KvTrust::Proven {
                self.tell(&life(node), finding.clone()).await;
            }
        }
    }

    /// Returns when the node's actor has acted on it, or does not matter any more.
    async fn tell(&mut self, life: &Life, finding: Finding) {
        let (id, incarnation) = life;
        let verdict = Verdict {
            incarnation: *incarnation,
            finding: finding.clone(),
        };
        let Some(sender) = self.verdicts.get(id) else {
            return;
        };
        let sent = tokio::time::timeout(APPLY_LIMIT, sender.send(verdict)).await;
        if !matches!(sent, Ok(Ok(()))) {
            return;
        }
        let applied = self.watch.wait_for(|fleet| {
            is_up(fleet, life)
                .then(|| fleet.node(id))
                .flatten()
                .is_none_or(|node| match finding {
                    Finding::Proven => node.trust == KvTrust::Proven,
                    Finding::Vouched => node.trust == KvTrust::Assumed,
                    Finding::Unpaired => node.phase != Phase::Verifying,
                    Finding::Refused(_) => matches!(node.trust, KvTrust::Refused(_)),
                })
        });
        let _ = tokio::time::timeout(APPLY_LIMIT, applied).await;
    }
}

fn life(node: &NodeView) -> Life {
    (node.id.clone(), node.incarnation)
}

fn is_current(fleet: &FleetSnapshot, (id, incarnation): &Life) -> bool {
    fleet
        .node(id)
        .is_some_and(|node| node.incarnation == *incarnation)
}

fn is_up(fleet: &FleetSnapshot, life: &Life) -> bool {
    is_current(fleet, life)
        && fleet.node(&life.0).is_some_and(|node| {
            matches!(
                node.phase,
                Phase::Verifying | Phase::Ready | Phase::Unreachable
            )
        })
}

fn is_eligible(node: &NodeView) -> bool {
    matches!(node.phase, Phase::Verifying | Phase::Ready)
        && matches!(node.trust, KvTrust::Unproven | KvTrust::Proven)
}

fn partner_role(role: Role) -> Option<Role> {
    match role {
        Role::Prefill => Some(Role::Decode),
        Role::Decode => Some(Role::Prefill),
        Role::Unified => None,
    }
}

/// `blocked`: how long the pair must not be examined yet.
fn next_step(
    fleet: &FleetSnapshot,
    grace: Duration,
    blocked: impl Fn(&NodeView, &NodeView) -> Option<Duration>,
) -> Step {
    let mut wait: Option<Duration> = None;
    let mut wait_for = |time: Duration| wait = Some(wait.map_or(time, |wait| wait.min(time)));
    let unproven = fleet
        .nodes()
        .filter(|node| is_eligible(node) && node.trust == KvTrust::Unproven);
    for node in unproven {
        let Some(role) = partner_role(node.role) else {
            continue;
        };
        let is_partner = move |other: &&NodeView| other.role == role && other.pool == node.pool;
        let partners = || fleet.nodes().filter(is_partner);
        if partners().next().is_some() && partners().all(|other| other.external) {
            return Step::Vouched(life(node));
        }
        let mut candidates: Vec<_> = partners().filter(|other| is_eligible(other)).collect();
        // A proven partner makes the verdict unambiguous.
        candidates.sort_by_key(|other| other.trust != KvTrust::Proven);
        for partner in &candidates {
            let (p, d) = match node.role {
                Role::Decode => (*partner, node),
                _ => (node, *partner),
            };
            match blocked(p, d).filter(|left| !left.is_zero()) {
                None => return Step::Examine(Box::new((p.clone(), d.clone()))),
                Some(left) => wait_for(left),
            }
        }
        if !candidates.is_empty() || node.phase != Phase::Verifying {
            continue;
        }
        let waited = SystemTime::now()
            .duration_since(node.since)
            .unwrap_or_default();
        if partners().all(|other| other.phase.is_terminal()) || waited >= grace {
            return Step::Unpaired(life(node));
        }
        wait_for(grace.saturating_sub(waited));
    }
    Step::Wait(wait)
}

#[cfg(test)]
mod tests;
