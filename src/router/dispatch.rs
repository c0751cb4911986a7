//! The leg whose answer the client gets: decode after a hand-off, or one node for everything.
//!
//! ```text
//!  choose ─▶ send ─▶ first piece there? ── yes ─▶ commit (no way back from here)
//!    ▲  │                 │ no: refused, reset, 5xx, timeout, node left
//!    │  └─ none ready: wait for the fleet, up to queue_timeout
//!    │     none but one that answered with an error: see whether it is dying, up to DYING
//!    └──── next node ─────┘ at most MAX_ATTEMPTS
//! ```

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use super::balance::{Breaking, Pick, Purpose, pick};
use super::claim::Claim;
use super::error::RouterError;
use super::handoff::Prefilled;
use super::legs::{self, Leg, LegError, Reply};
use super::split::{self, WholeReason};
use super::timeline::AnswerLeg;
use super::{Call, Context};
use crate::fleet::{FleetSnapshot, NodeId, NodeView, Phase, Role};
use crate::handoff::{HandoffId, HandoffTicket};

/// Nodes that one request may be sent to before it is given up.
const MAX_ATTEMPTS: usize = 5;

/// How long a node may miss its health probes before its unanswered requests go elsewhere. A busy
/// API server stalls for seconds; moving its requests would make the next one stall.
const SILENCE: Duration = Duration::from_secs(10);

/// How long after an error of a node its death may show. A vLLM API server whose engine has died answers
/// 500 to all it has, and only then fails its next health probe and exits.
const DYING: Duration = Duration::from_secs(2);

/// What the leg is to do.
pub(super) enum Task<'a> {
    /// Answer a prompt that went through the prefill stage.
    Decode(&'a Prefilled),
    /// Answer alone.
    Whole(WholeReason),
}

impl Task<'_> {
    fn handoff(&self) -> Option<&HandoffId> {
        match self {
            Self::Decode(prefilled) => prefilled.ticket.as_ref().map(HandoffTicket::id),
            Self::Whole(_) => None,
        }
    }

    /// This node finds what was prefilled.
    fn suits(&self, role: Role, pool: &str) -> bool {
        match self {
            Self::Decode(prefilled) => {
                role == Role::Decode && prefilled.pool.as_deref().is_none_or(|known| known == pool)
            }
            Self::Whole(_) => false,
        }
    }

    /// Roles in order of preference.
    fn roles(&self) -> [Role; 3] {
        match self {
            Self::Decode(_) => [Role::Decode, Role::Unified, Role::Prefill],
            // One token is prefill work.
            Self::Whole(WholeReason::OneToken) => [Role::Unified, Role::Prefill, Role::Decode],
            Self::Whole(_) => [Role::Unified, Role::Decode, Role::Prefill],
        }
    }

    fn purpose(&self) -> Purpose {
        match self {
            Self::Decode(_) => Purpose::Decode,
            Self::Whole(_) => Purpose::Whole,
        }
    }

    fn leg(&self) -> AnswerLeg {
        match self {
            Self::Decode(_) => AnswerLeg::Decode,
            Self::Whole(_) => AnswerLeg::Whole,
        }
    }
}

/// A node that was asked before, and failed.
pub(super) struct Failed {
    pub(super) node: NodeId,
    pub(super) incarnation: u64,
    pub(super) error: LegError,
    /// Its answer had begun.
    pub(super) begun: bool,
}

/// An answer that can be committed, and the node that gives it.
pub(super) struct Delivery {
    pub(super) reply: Reply,
    pub(super) pick: Pick,
}

pub(super) async fn deliver(
    cx: &Context,
    call: &Call<'_>,
    task: Task<'_>,
    before: Option<Failed>,
) -> Result<Delivery, RouterError> {
    let mut choice = Choice {
        model: call.model,
        ..Choice::default()
    };
    if let Some(failed) = before {
        choice.failed(cx, failed);
    }
    let mut patience = None;
    loop {
        let mut pick = choice.next(cx, call, &task, &mut patience).await?;
        if let Some((_, error)) = &choice.last {
            if !cx.retries.take() {
                cx.metrics.retry_denied(task.leg().label());
                return Err(choice.give_up(cx));
            }
            cx.metrics.retry(task.leg().label(), error.label());
        }
        let (body, claimed) = body_for(cx, &pick, call, &task);
        let leg = Leg {
            caller: call.caller,
            target: call.target,
            suffix: suffix(choice.attempts),
            body,
        };
        call.timeline.answer_sent(task.leg(), pick.node());
        let sent = Instant::now();
        let error = tokio::select! {
            biased;
            reply = cx.client.fetch(&pick, leg) => match reply {
                Ok(reply) => {
                    pick.answered();
                    call.timeline.first_piece();
                    cx.metrics.leg_first_byte(task.leg(), sent.elapsed());
                    if matches!(task, Task::Decode(_)) && pick.role != Role::Decode {
                        cx.metrics.fallback("no_decode_node");
                    }
                    return Ok(Delivery { reply, pick });
                }
                Err(error) => error,
            },
            phase = legs::lost(cx.fleet.clone(), &pick, SILENCE) => LegError::NodeLost { phase },
        };
        tracing::warn!(node = %pick.node(), id = %call.caller.id, %error, "a leg failed before its first byte");
        pick.failed(&error);
        if let (Some((claim, params)), LegError::Connect(_) | LegError::Tls(_)) = (claimed, &error)
        {
            claim.give_back(params);
        }
        let failed = Failed {
            node: pick.node().clone(),
            incarnation: pick.incarnation,
            error,
            begun: false,
        };
        choice.failed(cx, failed);
    }
}

fn suffix(attempts: usize) -> &'static str {
    match attempts {
        0 => "-d",
        1 => "-d2",
        2 => "-d3",
        3 => "-d4",
        _ => "-d5",
    }
}

/// Only decode nodes look for the hand-off, and only those whose loading was proven may. With what was taken for it.
fn body_for<'a>(
    cx: &Context,
    pick: &Pick,
    call: &Call<'_>,
    task: &Task<'a>,
) -> (Bytes, Option<(&'a Claim, String)>) {
    let whole = || split::whole_body(call.fields, call.original, call.asks_ids);
    let (Task::Decode(prefilled), Some(handoff)) = (task, task.handoff()) else {
        return (whole(), None);
    };
    if !task.suits(pick.role, &pick.pool) || !pick.can_hand_off {
        return (whole(), None);
    }
    let claimed = match &prefilled.claim {
        None => None,
        Some(claim) => match claim.take() {
            Some(params) => Some((claim, params)),
            None => {
                cx.metrics.fallback("claim_used");
                return (whole(), None);
            }
        },
    };
    let params = claimed.as_ref().map(|(_, params)| params.as_str());
    let how = (cx.plan.connector, call.asks_ids);
    let body = split::decode_body(call.fields, handoff, params, how);
    (body, claimed)
}

/// Where the request has been.
#[derive(Default)]
struct Choice<'a> {
    /// What its nodes serve.
    model: Option<&'a str>,
    tried: Vec<(NodeId, u64)>,
    attempts: usize,
    last: Option<(NodeId, LegError)>,
    /// Nodes that died or left after they failed, and were not tried since.
    left: Vec<NodeId>,
    /// Until when the last error may turn out to have been a dying node's.
    dying: Option<Instant>,
    /// A connection that broke, on a node that is still called ready, may have been an idle one
    /// that the node was closing: one more try there.
    forgiven: bool,
    /// The node in `tried` broke off an answer that had begun. If it still lives when its death should
    /// have shown, and there is no other one, it is asked again.
    begun: bool,
}

impl Choice<'_> {
    /// The next node. `patience` is set when there is none at first, and is not extended.
    async fn next(
        &mut self,
        cx: &Context,
        call: &Call<'_>,
        task: &Task<'_>,
        patience: &mut Option<Instant>,
    ) -> Result<Pick, RouterError> {
        let mut fleet = cx.fleet.clone();
        loop {
            let snapshot = fleet.latest();
            self.forget_the_gone(&snapshot);
            if self.attempts < MAX_ATTEMPTS
                && let Some(pick) = self.pick(cx, call, task, &snapshot)
            {
                self.left.retain(|left| left != pick.node());
                return Ok(pick);
            }
            let patient = *patience.get_or_insert_with(|| Instant::now() + cx.plan.queue_timeout);
            let Some(until) = self.worth_waiting(&snapshot, patient) else {
                return Err(self.give_up(cx));
            };
            match timeout_at(until, fleet.changed()).await {
                Ok(Ok(())) => {}
                Err(_) if self.begun && self.lives(&snapshot) => {
                    self.begun = false;
                    self.tried.clear();
                }
                Ok(Err(_)) | Err(_) => return Err(self.give_up(cx)),
            }
        }
    }

    fn pick(
        &self,
        cx: &Context,
        call: &Call<'_>,
        task: &Task<'_>,
        fleet: &FleetSnapshot,
    ) -> Option<Pick> {
        let heeded = self.pick_by(cx, call, task, (fleet, Breaking::Heeded));
        heeded.or_else(|| self.pick_by(cx, call, task, (fleet, Breaking::Ignored)))
    }

    fn pick_by(
        &self,
        cx: &Context,
        call: &Call<'_>,
        task: &Task<'_>,
        (fleet, breaking): (&FleetSnapshot, Breaking),
    ) -> Option<Pick> {
        let fresh = |node: &&NodeView| node.serves(self.model) && !self.has_tried(node);
        if task.handoff().is_some() {
            let proven = |node: &&NodeView| {
                fresh(node) && node.can_hand_off() && task.suits(node.role, &node.pool)
            };
            let nodes = fleet.ready(Role::Decode).filter(proven);
            let errand = (Purpose::Decode, breaking);
            if let Some(pick) = pick(cx, call.demand, errand, nodes) {
                return Some(pick);
            }
        }
        task.roles().into_iter().find_map(|role| {
            let errand = (task.purpose(), breaking);
            pick(cx, call.demand, errand, fleet.ready(role).filter(fresh))
        })
    }

    fn has_tried(&self, node: &NodeView) -> bool {
        self.tried
            .iter()
            .any(|(id, incarnation)| *id == node.id && *incarnation == node.incarnation)
    }

    /// A node that was tried is still called ready.
    fn lives(&self, fleet: &FleetSnapshot) -> bool {
        let tried = |node: &NodeView| node.is_ready() && self.has_tried(node);
        fleet.nodes().any(tried)
    }

    /// A node that left and comes back gets another chance.
    fn forget_the_gone(&mut self, fleet: &FleetSnapshot) {
        let gone = self.tried.extract_if(.., |(id, incarnation)| {
            !fleet
                .node(id)
                .is_some_and(|node| node.is_ready() && node.incarnation == *incarnation)
        });
        self.left.extend(gone.map(|(id, _)| id));
    }

    /// Until when, if at all. A node that answers badly is no better in a minute; one that died will be
    /// back, and `patient` is the time for that.
    fn worth_waiting(&self, fleet: &FleetSnapshot, patient: Instant) -> Option<Instant> {
        if self.attempts >= MAX_ATTEMPTS {
            return None;
        }
        if self.begun && self.lives(fleet) {
            return Some(self.dying.map_or(patient, |until| until.min(patient)));
        }
        let died = |(_, error): &(NodeId, LegError)| error.is_death();
        let returns = |node: &NodeView| !node.phase.is_terminal() && node.phase != Phase::Draining;
        let left = |id: &NodeId| fleet.node(id).is_some_and(returns);
        if self.last.as_ref().is_none_or(died)
            || self.left.iter().any(left)
            || !fleet
                .nodes()
                .any(|node| node.is_ready() && node.serves(self.model))
        {
            return Some(patient);
        }
        self.dying.map(|until| until.min(patient))
    }

    fn failed(&mut self, cx: &Context, failed: Failed) {
        let Failed {
            node,
            incarnation,
            error,
            begun,
        } = failed;
        self.attempts += 1;
        if error.is_unreached() {
            cx.traffic.suspect(&node);
        }
        let forgivable = matches!(error, LegError::Transport(_)) && !self.forgiven && !begun;
        if forgivable {
            self.forgiven = true;
        } else {
            self.tried.push((node.clone(), incarnation));
        }
        self.begun = begun;
        let may_be_dying = begun || error.may_be_dying();
        self.dying = may_be_dying.then(|| Instant::now() + DYING);
        self.last = Some((node, error));
    }

    fn give_up(&mut self, cx: &Context) -> RouterError {
        match self.last.take() {
            Some((node, source)) => RouterError::Nodes { node, source },
            None => cx.admission.no_node(&cx.fleet),
        }
    }
}
