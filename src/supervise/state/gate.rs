//! What must be true before a node is spawned, and the spawn.

use std::time::Instant;

use super::super::gate::Obstacle;
use super::{Action, Force, GATE_LOOK, GATE_RETRY, Machine, Next, START_PROBE, State, fresh_trust};

impl Machine {
    pub(super) fn look(&mut self, since: Instant, now: Instant) -> Vec<Action> {
        let at = now + GATE_LOOK;
        self.state = State::Gate { since, at };
        vec![Action::CheckGate]
    }

    pub(super) fn looked(&mut self, obstacle: Option<Obstacle>, now: Instant) -> Vec<Action> {
        let State::Gate { since, .. } = self.state else {
            return vec![];
        };
        let Some(obstacle) = obstacle else {
            return self.spawn(now);
        };
        if now < since + obstacle.patience() {
            self.trouble = Some(format!("waits before its start: {obstacle}"));
            let at = now + GATE_RETRY;
            self.state = State::Gate { since, at };
            return vec![];
        }
        if obstacle.is_fatal() {
            self.die(obstacle.to_string(), now);
            self.reaped(None, now);
            return vec![];
        }
        // Whoever has it may never let go; the node may do with what is left.
        self.spawn(now)
    }

    fn spawn(&mut self, now: Instant) -> Vec<Action> {
        if self.spawned {
            self.restarts = self.restarts.saturating_add(1);
        }
        self.spawned = true;
        self.trouble = None;
        self.trust = fresh_trust(self.role);
        self.force = Force::None;
        self.memory = 0;
        self.probe = Next::At(now + START_PROBE.min(self.plan.health_interval));
        self.state = State::Starting {
            since: now,
            by: now + self.plan.start_timeout,
        };
        vec![Action::Spawn]
    }
}
