//! What must be true before a node is spawned, and the spawn.

use std::time::Instant;

use super::{Action, Force, Machine, Next, PortState, State, fresh_trust};

impl Machine {
    pub(super) fn port(&mut self, port: PortState, now: Instant) -> Vec<Action> {
        let State::Port { by, .. } = self.state else {
            return vec![];
        };
        if port == PortState::Free {
            if self.spawned {
                self.restarts = self.restarts.saturating_add(1);
            }
            self.spawned = true;
            self.trust = fresh_trust(self.role);
            self.force = Force::None;
            self.probe = Next::At(now + self.plan.health_interval);
            self.state = State::Starting {
                since: now,
                by: now + self.plan.start_timeout,
            };
            return vec![Action::Spawn];
        }
        if now >= by {
            let why = "another process holds the node's port; stop it or choose another port";
            self.die(why.to_owned(), now);
            self.reaped(None, now);
        }
        vec![]
    }
}
