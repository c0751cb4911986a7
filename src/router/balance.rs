//! Which node: [`Traffic`](crate::traffic::Traffic) chooses by load; what a request asks of a node is said here.
//!
//! | for | it counts as | what a warm node saves |
//! |---|---|---|
//! | prefill | its prompt | the beginning that it need not compute |
//! | whole | prompt and expected answer | the same |
//! | decode after a hand-off | the same: what it holds, not what it computes | the beginning that it need not copy: [`COPIED`] times cheaper |

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::Context;
use super::affinity::Place;
use super::breaker::{Duty, Trial};
use super::demand::Demand;
use super::legs::LegError;
use crate::fleet::{NodeId, NodeView, Role};
use crate::traffic::{Ask, Passage};

/// How much less it takes to load a token's KV from host memory than to compute it: the order of magnitude.
const COPIED: u64 = 8;

/// What the node is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Prefill,
    /// After a hand-off.
    Decode,
    Whole,
}

impl Purpose {
    fn duty(self) -> Duty {
        match self {
            Self::Prefill => Duty::Prefill,
            Self::Decode | Self::Whole => Duty::Answer,
        }
    }

    fn place(self) -> Place {
        match self {
            Self::Prefill => Place::Prefill,
            Self::Decode | Self::Whole => Place::Answer,
        }
    }
}

/// A chosen node; counted as in flight until this is dropped.
#[derive(Debug)]
pub(super) struct Pick {
    pub(super) role: Role,
    pub(super) pool: Arc<str>,
    pub(super) addr: SocketAddr,
    pub(super) incarnation: u64,
    /// Its KV was proven, or is vouched for: it may take part in a hand-off.
    pub(super) can_hand_off: bool,
    /// Others started it.
    pub(super) is_external: bool,
    passage: Passage,
    trial: Trial,
}

impl Pick {
    /// The node did as it should.
    pub(super) fn answered(&mut self) {
        self.trial.answered(Instant::now());
    }

    pub(super) fn failed(&mut self, error: &LegError) {
        self.trial.failed(error, Instant::now());
    }

    pub(super) fn node(&self) -> &NodeId {
        self.passage.node()
    }
}

/// Whether a node is passed by that keeps failing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Breaking {
    Heeded,
    /// Where there is no other node: better than to refuse the request.
    Ignored,
}

pub(super) fn pick<'a>(
    cx: &Context,
    demand: &Demand<'_>,
    (purpose, breaking): (Purpose, Breaking),
    candidates: impl Iterator<Item = &'a NodeView> + Clone,
) -> Option<Pick> {
    let duty = purpose.duty();
    if breaking == Breaking::Ignored {
        let (node, passage) = choose(cx, demand, purpose, candidates)?;
        let trial = cx.breakers.insist(node, duty);
        return Some(picked(node, passage, trial));
    }
    loop {
        let now = Instant::now();
        let through = candidates
            .clone()
            .filter(|node| cx.breakers.lets_through(node, duty, now));
        let (node, passage) = choose(cx, demand, purpose, through)?;
        if let Some(trial) = cx.breakers.send(node, duty, now) {
            return Some(picked(node, passage, trial));
        }
        // Another request has become the one that decides about this node; it is filtered out now.
    }
}

fn choose<'a>(
    cx: &Context,
    demand: &Demand<'_>,
    purpose: Purpose,
    candidates: impl Iterator<Item = &'a NodeView>,
) -> Option<(&'a NodeView, Passage)> {
    let candidates: Vec<_> = candidates.collect();
    // Where there is nothing to choose, nothing need be known of the prompt.
    let several = candidates.len() > 1;
    let warm = several.then(|| cx.affinity.find(purpose.place(), demand.prefix()));
    let ask = Ask {
        tokens: match purpose {
            Purpose::Prefill => demand.prompt,
            Purpose::Decode | Purpose::Whole => demand.prompt + demand.output,
        },
        session: demand.session,
        warm: warm.flatten().map(|mut warm| {
            if purpose == Purpose::Decode {
                warm.tokens /= COPIED;
            }
            warm
        }),
    };
    let (node, passage) = cx.traffic.choose(candidates.into_iter(), &ask)?;
    if several {
        let place = purpose.place();
        cx.affinity
            .learn(place, demand.prefix(), &node.id, node.incarnation);
    }
    Some((node, passage))
}

fn picked(node: &NodeView, passage: Passage, trial: Trial) -> Pick {
    Pick {
        role: node.role,
        pool: node.pool.clone(),
        addr: node.addr,
        incarnation: node.incarnation,
        can_hand_off: node.can_hand_off(),
        is_external: node.external,
        passage,
        trial,
    }
}
