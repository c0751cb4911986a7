//! The prefill stage of a split request.
//!
//! ```text
//!  register ticket ─▶ send P leg ─▶ waiting ──┬─ board: Ready ──────────────▶ decode loads KV
//!                        ▲                    ├─ P's 2xx, if that says it ──▶ decode loads KV
//!                        │                    ├─ board: Failed(other) ──────▶ decode, fallback
//!                        │                    ├─ P's 2xx, never opened ─────▶ decode, fallback
//!                        │                    │  or never announced
//!                        │                    ├─ handoff_timeout ───────────▶ decode, fallback
//!                        │                    ├─ P's 4xx ───────────────────▶ the client's error
//!                        └── another P, once ─┴─ P failed or left / ProducerDied
//!                                                 └─ no other P ────────────▶ decode computes
//! ```
//!
//! P's HTTP reply is not awaited, unless there is nothing else that says that the KV is complete
//! ([`KvReady`], or NIXL); then what it says of the KV goes to decode, see [`Claim`]. After Ready it is read in the background, so that its connection
//! can be used again; if the store held the whole prompt already, or the hand-off is of no more use,
//! dropping the request stops P's work.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};

use super::balance::{self, Breaking, Pick, Purpose};
use super::claim::Claim;
use super::legs::{self, CompleteReply, Leg, LegError, Reply};
use super::metrics::RouterMetrics;
use super::split;
use super::{Call, Context};
use crate::fleet::{NodeView, Role};
use crate::handoff::{HandoffFailure, HandoffId, HandoffOutcome, HandoffState, HandoffTicket};
use crate::topology::{Connector, KvReady};

/// Prefill nodes that one request may be sent to.
const MAX_ATTEMPTS: usize = 2;

/// What the decode stage starts with.
#[derive(Default)]
pub(super) struct Prefilled {
    /// Kept until decode answered. `None`: there is nothing in the store to look for.
    pub(super) ticket: Option<HandoffTicket>,
    /// Where the KV is.
    pub(super) pool: Option<Arc<str>>,
    /// What P's connector has to say to decode's.
    pub(super) claim: Option<Claim>,
    pub(super) background: Option<Background>,
}

pub(super) enum Stage {
    Decode(Prefilled),
    /// P refused the request itself.
    Rejected(CompleteReply),
}

pub(super) async fn prefill(cx: &Context, call: &Call<'_>) -> Stage {
    let stage = attempts(cx, call).await;
    call.timeline.settled();
    stage
}

async fn attempts(cx: &Context, call: &Call<'_>) -> Stage {
    let deadline = Instant::now() + cx.plan.handoff_timeout;
    let mut tried = Vec::new();
    let mut reason = "no_prefill_node";
    while tried.len() < MAX_ATTEMPTS {
        let mut passed_by = false;
        let Some(pick) = pick(cx, call, &tried, &mut passed_by) else {
            if passed_by && tried.is_empty() {
                reason = "breaker_open";
            }
            break;
        };
        if !tried.is_empty() {
            if !cx.retries.take() {
                cx.metrics.retry_denied("prefill");
                break;
            }
            cx.metrics.retry("prefill", reason);
        }
        let mut attempt = Attempt::start(cx, call, pick, tried.len());
        let event = attempt.wait(cx, deadline).await;
        match event {
            Event::Settled(HandoffOutcome::Ready { already_stored, .. }) => {
                attempt.pick.answered();
                cx.metrics.handoff_ready(attempt.sent.elapsed());
                return Stage::Decode(attempt.into_prefilled(cx, already_stored));
            }
            Event::Replied(None) if cx.plan.connector == Connector::Nixl => {
                // Its connector has nothing to hand over, or there is none.
                attempt.pick.answered();
                cx.metrics.fallback("no_params");
                return Stage::Decode(Prefilled::default());
            }
            Event::Replied(params) => {
                attempt.pick.answered();
                cx.metrics.handoff_ready(attempt.sent.elapsed());
                return Stage::Decode(Prefilled {
                    claim: params.map(|params| Claim::new(cx, &attempt.pick, params)),
                    ..attempt.into_ticket()
                });
            }
            Event::Rejected(reply) => {
                attempt.pick.answered();
                return Stage::Rejected(reply);
            }
            Event::Settled(HandoffOutcome::Failed(HandoffFailure::ProducerDied)) => {
                reason = HandoffFailure::ProducerDied.label();
            }
            Event::Failed(ref error) => {
                tracing::warn!(node = %attempt.pick_id(), id = %call.caller.id, %error, "prefill failed");
                attempt.pick.failed(error);
                if error.is_unreached() {
                    cx.traffic.suspect(attempt.pick_id());
                }
                reason = error.label();
            }
            Event::Settled(HandoffOutcome::Failed(failure)) => {
                cx.metrics.fallback(failure.label());
                return Stage::Decode(attempt.into_ticket());
            }
            Event::NotOpened => {
                attempt.pick.answered();
                cx.metrics.fallback("not_opened");
                return Stage::Decode(attempt.into_ticket());
            }
            Event::Late => {
                let error = LegError::FirstByteTimeout(cx.plan.handoff_timeout);
                attempt.pick.failed(&error);
                cx.metrics.fallback("handoff_timeout");
                return Stage::Decode(attempt.into_ticket());
            }
        }
        tried.push(attempt.into_tried());
    }
    cx.metrics.fallback(reason);
    Stage::Decode(Prefilled::default())
}

/// P's reply and its words to the engine travel apart: for a prompt below one chunk, P asks the
/// engine nothing that it waits for, and its reply may be first.
const OPEN_GRACE: Duration = Duration::from_millis(100);

/// A node that others started may save what it computed after it has answered, and say so then.
const ANNOUNCE_GRACE: Duration = Duration::from_secs(5);

/// How long P may miss its health probes before the prompt goes elsewhere: longer than the stalls of
/// a busy API server, shorter than a client's patience.
const SILENCE: Duration = Duration::from_secs(3);

type Tried = (crate::fleet::NodeId, u64);

/// `passed_by`: there is a node, but it keeps failing. Decode computes the prompt then: to wait for a node that
/// fails would be worse.
fn pick(cx: &Context, call: &Call<'_>, tried: &[Tried], passed_by: &mut bool) -> Option<Pick> {
    let fleet = cx.fleet.now();
    let fresh = |node: &&NodeView| {
        node.can_hand_off()
            && node.serves(call.model)
            && fleet.has_decode_for(node, call.model)
            && !tried
                .iter()
                .any(|(id, incarnation)| *id == node.id && *incarnation == node.incarnation)
    };
    let nodes = fleet.ready(Role::Prefill).filter(fresh);
    *passed_by = nodes.clone().next().is_some();
    let errand = (Purpose::Prefill, Breaking::Heeded);
    balance::pick(cx, call.demand, errand, nodes)
}

enum Event {
    Settled(HandoffOutcome),
    /// P answered 2xx, and that is the sign; with its `kv_transfer_params`.
    Replied(Option<String>),
    Rejected(CompleteReply),
    /// P answered 2xx without ever having seen the hand-off.
    NotOpened,
    Failed(LegError),
    Late,
}

type Sent = Pin<Box<dyn Future<Output = Result<Reply, LegError>> + Send>>;

struct Attempt {
    ticket: HandoffTicket,
    pick: Pick,
    /// `None` once P answered.
    leg: Option<Sent>,
    sent: Instant,
}

impl Attempt {
    fn start(cx: &Context, call: &Call<'_>, pick: Pick, number: usize) -> Self {
        let ticket = cx.board.register(HandoffId::random());
        let leg = Leg {
            caller: call.caller,
            target: call.target,
            suffix: if number == 0 { "-p" } else { "-p2" },
            body: split::prefill_body(call.fields, ticket.id(), cx.plan.connector),
        };
        let leg: Sent = Box::pin(timed(cx.metrics.clone(), cx.client.fetch(&pick, leg)));
        call.timeline.prefill_sent(pick.node());
        Self {
            ticket,
            pick,
            leg: Some(leg),
            sent: Instant::now(),
        }
    }

    async fn wait(&mut self, cx: &Context, deadline: Instant) -> Event {
        let mut lost = std::pin::pin!(legs::lost(cx.fleet.clone(), &self.pick, SILENCE));
        let mut late = std::pin::pin!(sleep_until(deadline));
        let mut unopened = None;
        loop {
            tokio::select! {
                // A hand-off that is ready counts, whatever else happened meanwhile.
                biased;
                outcome = self.ticket.settled() => return Event::Settled(outcome),
                reply = answer(&mut self.leg) => {
                    self.leg = None;
                    match reply {
                        Err(error) => return Event::Failed(error),
                        Ok(Reply::Complete(reply)) if !reply.status.is_success() => {
                            return Event::Rejected(reply);
                        }
                        Ok(reply) if self.reply_is_the_sign(cx) => {
                            return Event::Replied(kv_transfer_params(&reply));
                        }
                        Ok(_) => unopened = Some(Instant::now() + self.grace(cx)),
                    }
                }
                () = until(unopened) => {
                    if self.ticket.state() == HandoffState::Expected {
                        return Event::NotOpened;
                    }
                    unopened = None;
                }
                phase = &mut lost => return Event::Failed(LegError::NodeLost { phase }),
                () = &mut late => return Event::Late,
            }
        }
    }

    /// From its reply to the word that comes on another way.
    fn grace(&self, cx: &Context) -> Duration {
        match cx.plan.kv_ready {
            KvReady::Callback if self.pick.is_external => ANNOUNCE_GRACE,
            _ => OPEN_GRACE,
        }
    }

    fn reply_is_the_sign(&self, cx: &Context) -> bool {
        match cx.plan.connector {
            Connector::Nixl => true,
            Connector::Pegaflow => {
                self.pick.is_external
                    && cx.plan.kv_ready == KvReady::Reply
                    && self.ticket.state() == HandoffState::Expected
            }
        }
    }

    fn pick_id(&self) -> &crate::fleet::NodeId {
        self.pick.node()
    }

    fn into_prefilled(self, cx: &Context, cancel: bool) -> Prefilled {
        let leg = self.leg.filter(|_| !cancel);
        Prefilled {
            pool: Some(self.pick.pool.clone()),
            background: leg.map(|leg| Background::spawn(cx, leg, self.pick)),
            ticket: Some(self.ticket),
            claim: None,
        }
    }

    fn into_ticket(self) -> Prefilled {
        Prefilled {
            ticket: Some(self.ticket),
            pool: Some(self.pick.pool.clone()),
            background: None,
            claim: None,
        }
    }

    fn into_tried(self) -> Tried {
        (self.pick.node().clone(), self.pick.incarnation)
    }
}

/// Counts how long P's reply took, wherever it is waited for.
async fn timed(
    metrics: RouterMetrics,
    leg: impl Future<Output = Result<Reply, LegError>>,
) -> Result<Reply, LegError> {
    let sent = Instant::now();
    let reply = leg.await;
    if reply.is_ok() {
        metrics.prefill_leg(sent.elapsed());
    }
    reply
}

fn kv_transfer_params(reply: &Reply) -> Option<String> {
    match reply {
        Reply::Complete(reply) => split::kv_transfer_params(reply.body()),
        Reply::Streamed(_) => None,
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

async fn answer(leg: &mut Option<Sent>) -> Result<Reply, LegError> {
    match leg {
        Some(leg) => leg.await,
        None => std::future::pending().await,
    }
}

/// P's reply, read to its end aside. Aborted when dropped, unless detached; bounded by
/// `first_byte_timeout`, which the leg carries itself, and by the router's end.
#[derive(Debug)]
pub(super) struct Background {
    task: Option<AbortHandle>,
}

impl Background {
    fn spawn(cx: &Context, leg: Sent, pick: Pick) -> Self {
        let stop = cx.stop.clone();
        let task = cx.background.spawn(async move {
            let outcome = stop.run_until_cancelled(leg).await;
            if let Some(Err(error)) = outcome {
                tracing::debug!(node = %pick.node(), %error, "prefill's reply was lost after its hand-off");
            }
        });
        Self {
            task: Some(task.abort_handle()),
        }
    }

    /// The request is over in good order: let the reply come.
    pub(super) fn detach(mut self) {
        self.task = None;
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}
