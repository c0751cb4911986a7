//! How a life ends: deaths, refusals, a person's stop, and the escalation until nothing is left.

use std::time::Instant;

use crate::fleet::{KvTrust, Role};

use super::super::backoff::Verdict;
use super::{
    Action, End, Force, KILL_PATIENCE, Machine, Mendable, Obituary, State, Then, fresh_trust,
};

impl Machine {
    pub(super) fn refused(&mut self, why: String, now: Instant) -> Vec<Action> {
        if !self.is_warm() || self.role == Role::Unified {
            return vec![];
        }
        self.trust = KvTrust::Refused(why.clone());
        self.reason = Some(why);
        self.end(Then::End(End::Failed), now);
        self.force_to(Force::Stop, now)
    }

    /// A death that we bring about.
    pub(super) fn kill(&mut self, why: String, now: Instant) -> Vec<Action> {
        self.die(why, now);
        self.force_to(Force::Kill, now)
    }

    pub(super) fn die(&mut self, why: String, now: Instant) {
        let ready = match self.state {
            State::Ready { since }
            | State::Unreachable { since }
            | State::Draining { since, .. } => Some(since),
            _ => None,
        };
        self.trouble = None;
        self.reason = Some(why);
        let then = match self.deaths.record(now, ready) {
            Verdict::CrashLoop => Then::End(End::CrashLoop),
            Verdict::Restart(delay) => Then::Restart {
                at: now + delay,
                delay,
            },
        };
        self.end(then, now);
    }

    pub(super) fn end(&mut self, then: Then, now: Instant) {
        if !matches!(self.trust, KvTrust::Refused(_)) {
            self.trust = fresh_trust(self.role);
        }
        // After an exit the guard kills the rest by itself.
        self.state = State::Ending {
            then,
            by: now + KILL_PATIENCE,
        };
    }

    pub(super) fn force_to(&mut self, force: Force, now: Instant) -> Vec<Action> {
        let State::Ending { then, .. } = self.state else {
            return vec![];
        };
        if force <= self.force {
            return vec![];
        }
        self.force = force;
        let (action, patience) = match force {
            Force::None => return vec![],
            Force::Stop => {
                let grace = self.plan.stop_grace;
                (Action::Stop(grace), grace + KILL_PATIENCE)
            }
            Force::Kill => (Action::Kill, KILL_PATIENCE),
            Force::KillGuard => (Action::KillGuard, KILL_PATIENCE),
        };
        self.state = State::Ending {
            then,
            by: now + patience,
        };
        vec![action]
    }

    pub(super) fn escalate(&mut self, then: Then, now: Instant) -> Vec<Action> {
        match (self.force, then) {
            (Force::None | Force::Stop, _) => self.force_to(Force::Kill, now),
            (Force::Kill, _) => self.force_to(Force::KillGuard, now),
            (Force::KillGuard, Then::End(End::Stopped)) => {
                self.reason = Some("some of its processes could not be killed".to_owned());
                self.state = State::Over(End::Stopped);
                vec![]
            }
            // Memory that a dead node still holds is not ours to hand out again: wait on.
            (Force::KillGuard, then) => {
                self.reason = Some("waits for processes that cannot be killed".to_owned());
                self.state = State::Ending {
                    then,
                    by: now + KILL_PATIENCE,
                };
                vec![]
            }
        }
    }

    pub(super) fn reaped(&mut self, obituary: Option<Obituary>, now: Instant) {
        let State::Ending { then, .. } = self.state else {
            return;
        };
        // The log of a node that has served tells of its clients' errors too.
        let never =
            !self.once_healthy && matches!(&obituary, Some(it) if it.mendable == Mendable::Never);
        if let (Some(obituary), Then::Restart { .. } | Then::End(End::CrashLoop)) = (obituary, then)
            && self.force == Force::None
        {
            self.reason = Some(obituary.text);
        }
        self.state = match then {
            Then::Restart { .. } if never && self.force == Force::None => State::Over(End::Failed),
            Then::Restart { at, delay } => {
                self.delay = Some(delay);
                State::Waiting { until: at.max(now) }
            }
            Then::Again => {
                self.delay = None;
                State::Waiting { until: now }
            }
            Then::End(end) => State::Over(end),
        };
    }

    pub(super) fn stop(&mut self, now: Instant) -> Vec<Action> {
        match self.state {
            State::Waiting { .. } | State::Gate { .. } | State::Over(_) => {
                self.state = State::Over(End::Stopped);
                vec![]
            }
            State::Ending { by, .. } => {
                let then = Then::End(End::Stopped);
                self.state = State::Ending { then, by };
                vec![]
            }
            _ => {
                self.end(Then::End(End::Stopped), now);
                self.force_to(Force::Stop, now)
            }
        }
    }

    pub(super) fn force_stop(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = self.stop(now);
        actions.extend(self.force_to(Force::Kill, now));
        actions.retain(|action| !matches!(action, Action::Stop(_)));
        actions
    }
}
