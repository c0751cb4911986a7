//! The signs that a running node gives: log, health, figures, answers, and what the KV canary found.

use std::time::Instant;

use crate::fleet::{KvTrust, Role};

use super::super::liveness::{Canary, Cause, Liveness, Pulse};
use super::{
    Action, End, LATE_PROBES, MEMORY_STEP, Machine, Next, Probe, START_EXTENSIONS, START_PROBE,
    State, Then, WARM_UP_RETRY, Warmth,
};

impl Machine {
    pub(super) fn spawn_failed(&mut self, why: String, now: Instant) -> Vec<Action> {
        if self.is_alive() {
            self.reason = Some(why);
            self.end(Then::End(End::Failed), now);
        }
        vec![]
    }

    pub(super) fn weighed(&mut self, bytes: u64, now: Instant) -> Vec<Action> {
        if bytes < self.memory.saturating_add(MEMORY_STEP) {
            return vec![];
        }
        self.memory = bytes;
        self.progressed(now)
    }

    pub(super) fn progressed(&mut self, now: Instant) -> Vec<Action> {
        if let State::Starting { since, by } = self.state {
            let limit = since + self.plan.start_timeout.saturating_mul(START_EXTENSIONS);
            let wanted = now + self.plan.start_timeout / 4;
            self.state = State::Starting {
                since,
                by: by.max(wanted.min(limit)),
            };
        }
        vec![]
    }

    pub(super) fn probed(&mut self, probe: Probe, now: Instant) -> Vec<Action> {
        if !self.is_alive() {
            return vec![];
        }
        let interval = match self.state {
            State::Starting { .. } => START_PROBE.min(self.plan.health_interval),
            _ => self.plan.health_interval,
        };
        self.probe = Next::At(now + interval);
        self.late = match probe {
            Probe::Late => self.late.saturating_add(1),
            _ => 0,
        };
        match (probe, self.state) {
            (Probe::Healthy, state) => {
                self.once_healthy = true;
                match state {
                    State::Starting { .. } => {
                        self.state = State::WarmingUp {
                            by: now + self.warm_up_limit(),
                            next: Next::InFlight,
                        };
                        return vec![Action::WarmUp];
                    }
                    State::Unreachable { since } => self.state = State::Ready { since },
                    State::Draining { since, until, .. } => {
                        let reachable = true;
                        self.state = State::Draining {
                            since,
                            reachable,
                            until,
                        };
                    }
                    _ => {}
                }
            }
            (Probe::Stranger, State::Starting { .. }) => {
                let why = "another process answers on its port (`ss -ltnp` names it)";
                self.trouble = Some(why.to_owned());
            }
            // A server that is still loading may say 503; its deadline and its exit are watched.
            (_, State::Starting { .. }) => {}
            (Probe::EngineDead, _) => {
                return self.kill("/health says 503: its engine is dead".to_owned(), now);
            }
            (Probe::Late, State::Ready { .. } | State::Draining { .. })
                if self.late < LATE_PROBES => {}
            (Probe::Miss | Probe::Stranger | Probe::Late, State::Ready { since }) => {
                self.state = State::Unreachable { since };
            }
            (Probe::Miss | Probe::Stranger | Probe::Late, State::Draining { since, until, .. }) => {
                let reachable = false;
                self.state = State::Draining {
                    since,
                    reachable,
                    until,
                };
            }
            (Probe::Miss | Probe::Stranger | Probe::Late, _) => {}
        }
        vec![]
    }

    pub(super) fn pulsed(&mut self, pulse: Option<Pulse>, now: Instant) -> Vec<Action> {
        let verdict = self.liveness.pulse(pulse, now);
        self.judged(verdict, now)
    }

    pub(super) fn canaried(&mut self, canary: Canary, now: Instant) -> Vec<Action> {
        let verdict = self.liveness.canary(canary, now);
        self.judged(verdict, now)
    }

    fn judged(&mut self, verdict: Result<(), Cause>, now: Instant) -> Vec<Action> {
        match verdict {
            Err(why) if self.is_warm() => self.kill(why, now),
            _ => vec![],
        }
    }

    pub(super) fn warmed(&mut self, warmth: Warmth, now: Instant) -> Vec<Action> {
        let State::WarmingUp { by, .. } = self.state else {
            return vec![];
        };
        match warmth {
            Warmth::Failed(why) => {
                self.trouble = Some(format!("the warm-up request failed: {why}"));
                self.state = State::WarmingUp {
                    by,
                    next: Next::At(now + WARM_UP_RETRY),
                };
            }
            Warmth::Warm => {
                self.trouble = None;
                self.liveness = Liveness::new(&self.plan, now);
                match self.role {
                    Role::Unified => self.serve(now),
                    Role::Prefill | Role::Decode => self.state = State::Verifying,
                }
            }
        }
        vec![]
    }

    pub(super) fn trusted(&mut self, trust: KvTrust, now: Instant) -> Vec<Action> {
        if self.trust == KvTrust::None {
            // It has no connector: there is nothing to prove.
            return vec![];
        }
        match self.state {
            _ if self.role == Role::Unified => {}
            State::Verifying => {
                self.serve(now);
                self.trust = trust;
            }
            State::Ready { .. } | State::Unreachable { .. } | State::Draining { .. } => {
                self.trust = trust;
            }
            _ => {}
        }
        vec![]
    }
}
