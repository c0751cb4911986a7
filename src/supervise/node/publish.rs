//! What the fleet is told about a node.

use std::time::Instant;

use crate::fleet::{KvTrust, Phase};

use super::NodeActor;

/// What readers of the fleet are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Published {
    phase: Phase,
    trust: KvTrust,
    incarnation: u64,
    reaped: u64,
    pid: Option<u32>,
    restarts: u32,
    reason: Option<String>,
}

impl NodeActor {
    /// Tells the fleet what has changed.
    pub(super) fn publish(&mut self) {
        let next = Published {
            phase: self.machine.phase(),
            trust: self.machine.trust().clone(),
            incarnation: self.incarnation,
            reaped: self.reaped,
            pid: self.pid,
            restarts: self.machine.restarts(),
            reason: self.machine.reason().map(str::to_owned),
        };
        if self.published.as_ref() == Some(&next) {
            return;
        }
        let before = self.published.as_ref().map(|it| it.phase.label());
        if before != Some(next.phase.label()) {
            let reason = next.reason.as_deref().unwrap_or("");
            self.timing.entered(&next.phase, Instant::now());
            tracing::info!(node = %self.plan.id, phase = next.phase.label(), reason);
        }
        self.published = Some(next.clone());
        // Before the fleet is told: who has not heard of it yet cannot send anything here either.
        match next.phase {
            Phase::Draining => self.shared.traffic.close(&self.plan.id),
            Phase::Ready => self.shared.traffic.open(&self.plan.id),
            _ => {}
        }
        self.shared.fleet.update(&self.plan.id, |node| {
            node.phase = next.phase;
            node.trust = next.trust;
            node.incarnation = next.incarnation;
            node.reaped = next.reaped;
            node.pid = next.pid;
            node.restarts = next.restarts;
            node.reason = next.reason;
        });
    }
}
