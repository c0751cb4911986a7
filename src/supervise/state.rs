//! What happens to a node next: a pure machine, fed with events and a clock.
//!
//! ```text
//!            port taken for too long ──────────────┐
//! Waiting ─▶ Gate ── open: Spawn ─▶ Starting ─▶ WarmingUp ─▶ Verifying ─▶ Ready ◀─▶ Unreachable
//!    ▲                                 │            │      (kv nodes) │     │             │
//!    │                                 └────────────┴── death ────────┴─────┴─────────────┘
//!    │                                                    ▼
//!    └────────────── reaped, restart ◀───────────────── Ending ── reaped, no restart ──▶ Over
//! ```
//!
//! `command.rs` draws what a person adds: `Draining`, a ready node that gets nothing new, and restarts.
//!
//! A death is decided on when it is seen (exit, 503, a hang as `liveness.rs` judges it, a deadline,
//! refused by the KV canary):
//! the node leaves `Ready` in that step. Its tree is another matter: until `Reaped`, nothing is
//! spawned; nor while the gate (`gate.rs`) is shut, which it is for a bounded time. `Ending` escalates by itself: stop, kill, and at last killing the guard.
//! A person's stop wins over everything and ends in `Over(Stopped)`.

use std::time::{Duration, Instant};

use crate::fleet::{KvTrust, Phase, Role};
use crate::plan::SupervisorPlan;

use super::backoff::Deaths;
use super::liveness::Liveness;

mod command;
mod ending;
mod event;
mod gate;
mod signs;
use command::Until;
pub use command::{Command, Refusal};
pub use event::{Action, Event, Mendable, Obituary, Probe, Warmth};

/// How often a starting node is asked whether it is healthy, if `health_interval` is longer.
const START_PROBE: Duration = Duration::from_millis(100);
const GATE_RETRY: Duration = Duration::from_millis(200);
/// A look that is not answered by then is lost.
const GATE_LOOK: Duration = Duration::from_secs(20);
/// The first request compiles kernels. A node that has less than this for its start has no more for its
/// warm-up either: a server that stands still there is found as early.
const WARM_UP_LIMIT: Duration = Duration::from_secs(300);
const WARM_UP_RETRY: Duration = Duration::from_secs(1);
/// A ready node whose answers are late this often in a row is unreachable. Fewer are no reason to send
/// it nothing: vLLM answers nobody while it renders its /metrics, and it may be the only node.
const LATE_PROBES: u32 = 3;
/// Progress may extend the start up to this many times `start_timeout`.
const START_EXTENSIONS: u32 = 4;
/// Memory that grows by this is progress: weights are read, kernels compiled.
const MEMORY_STEP: u64 = 16 << 20;
/// From one step of escalation to the next.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting {
        until: Instant,
    },
    /// `at`: when to look, once more.
    Gate {
        since: Instant,
        at: Instant,
    },
    Starting {
        since: Instant,
        by: Instant,
    },
    WarmingUp {
        by: Instant,
        next: Next,
    },
    Verifying,
    Ready {
        since: Instant,
    },
    Unreachable {
        since: Instant,
    },
    /// `since`: when it became ready.
    Draining {
        since: Instant,
        reachable: bool,
        until: Until,
    },
    Ending {
        then: Then,
        by: Instant,
    },
    Over(End),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    At(Instant),
    InFlight,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Restart {
        at: Instant,
        delay: Duration,
    },
    /// As asked, at once.
    Again,
    End(End),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    CrashLoop,
    Failed,
    Stopped,
}

/// How far the teardown has escalated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Force {
    None,
    Stop,
    Kill,
    KillGuard,
}

/// One node's life. See the module.
#[derive(Debug)]
pub struct Machine {
    plan: SupervisorPlan,
    role: Role,
    state: State,
    deaths: Deaths,
    delay: Option<Duration>,
    probe: Next,
    /// The most memory that the tree was seen to have.
    memory: u64,
    /// Probes in a row that were not answered in time.
    late: u32,
    liveness: Liveness,
    force: Force,
    restarts: u32,
    /// A person has drained it.
    held: bool,
    spawned: bool,
    /// Some incarnation has answered /health, so the command line is right.
    once_healthy: bool,
    trust: KvTrust,
    reason: Option<String>,
    /// Why the gate is shut, or the warm-up goes on.
    trouble: Option<String>,
}

impl Machine {
    pub fn new(plan: SupervisorPlan, role: Role, now: Instant) -> Self {
        let seed = rand::random();
        Self {
            deaths: Deaths::new(&plan, seed),
            liveness: Liveness::new(&plan, now),
            plan,
            role,
            state: State::Waiting { until: now },
            delay: None,
            probe: Next::At(now),
            memory: 0,
            late: 0,
            force: Force::None,
            restarts: 0,
            held: false,
            spawned: false,
            once_healthy: false,
            trust: fresh_trust(role),
            reason: None,
            trouble: None,
        }
    }

    pub fn phase(&self) -> Phase {
        match self.state {
            State::Waiting { .. } | State::Gate { .. } => match self.delay {
                Some(delay) => Phase::Backoff { delay },
                None => Phase::Pending,
            },
            State::Starting { .. } => Phase::Starting,
            State::WarmingUp { .. } => Phase::WarmingUp,
            State::Verifying => Phase::Verifying,
            State::Ready { .. } => Phase::Ready,
            State::Unreachable { .. } => Phase::Unreachable,
            State::Draining { .. } => Phase::Draining,
            State::Ending { then, .. } => match then {
                Then::Restart { delay, .. } => Phase::Backoff { delay },
                Then::Again | Then::End(End::Stopped) => Phase::Stopping,
                Then::End(end) => end.phase(),
            },
            State::Over(end) => end.phase(),
        }
    }

    pub fn trust(&self) -> &KvTrust {
        &self.trust
    }

    pub fn reason(&self) -> Option<&str> {
        self.trouble.as_deref().or(self.reason.as_deref())
    }

    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// Nothing will ever happen again.
    pub fn is_stopped(&self) -> bool {
        self.state == State::Over(End::Stopped)
    }

    /// When to send the next [`Event::Tick`].
    pub fn deadline(&self) -> Option<Instant> {
        let own = match self.state {
            State::Waiting { until } => Some(until),
            State::Gate { at, .. } => Some(at),
            State::Starting { by, .. } | State::Ending { by, .. } => Some(by),
            State::WarmingUp { by, next } => Some(match next {
                Next::At(at) => by.min(at),
                Next::InFlight => by,
            }),
            State::Verifying | State::Ready { .. } | State::Unreachable { .. } => {
                self.liveness.deadline()
            }
            State::Draining { until, .. } => match until {
                Until::Undrained => self.liveness.deadline(),
                Until::Idle { by } => Some(self.liveness.deadline().map_or(by, |at| at.min(by))),
            },
            State::Over(_) => None,
        };
        match self.probe {
            Next::At(at) if self.is_alive() => Some(own.map_or(at, |own| own.min(at))),
            _ => own,
        }
    }

    pub fn step(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match event {
            Event::Stop => self.stop(now),
            Event::Force => self.force_stop(now),
            Event::Command(command) => self.command(command, now),
            Event::Idle => self.idle(now),
            Event::Tick => self.tick(now),
            Event::Gate(obstacle) => self.looked(obstacle, now),
            Event::SpawnFailed(why) => self.spawn_failed(why, now),
            Event::LogGrew => self.progressed(now),
            Event::Memory(bytes) => self.weighed(bytes, now),
            Event::Probe(probe) => self.probed(probe, now),
            Event::Pulse(pulse) => self.pulsed(pulse, now),
            Event::Canary(canary) => self.canaried(canary, now),
            Event::Warm(warmth) => self.warmed(warmth, now),
            Event::Proven => self.trusted(KvTrust::Proven, now),
            Event::Vouched => self.trusted(KvTrust::Assumed, now),
            Event::Unpaired => {
                if self.state == State::Verifying {
                    self.serve(now);
                }
                vec![]
            }
            Event::Refused(why) => self.refused(why, now),
            Event::Exited(why) => {
                if self.is_alive() {
                    self.die(why, now);
                }
                vec![]
            }
            Event::Reaped(obituary) => {
                self.reaped(obituary, now);
                vec![]
            }
        }
    }

    /// A leader was asked for and is not known to be gone.
    fn is_alive(&self) -> bool {
        matches!(self.state, State::Starting { .. } | State::WarmingUp { .. }) || self.is_warm()
    }

    fn warm_up_limit(&self) -> Duration {
        WARM_UP_LIMIT.min(self.plan.start_timeout)
    }

    /// It has answered a request.
    fn is_warm(&self) -> bool {
        matches!(
            self.state,
            State::Verifying
                | State::Ready { .. }
                | State::Unreachable { .. }
                | State::Draining { .. }
        )
    }

    fn tick(&mut self, now: Instant) -> Vec<Action> {
        match self.state {
            State::Waiting { until } if now >= until => {
                return self.look(now, now);
            }
            State::Gate { since, at } if now >= at => return self.look(since, now),
            State::Starting { by, since } if now >= by => {
                let waited = humantime::format_duration(whole_seconds(now - since));
                return self.kill(format!("not ready after {waited}"), now);
            }
            State::WarmingUp { by, .. } if now >= by => {
                let limit = humantime::format_duration(self.warm_up_limit());
                let slow = || format!("the warm-up request did not end within {limit}");
                let why = self.trouble.take().unwrap_or_else(slow);
                return self.kill(why, now);
            }
            State::Draining {
                until: Until::Idle { by },
                ..
            } if now >= by => return self.again(now),
            State::Ending { then, by } if now >= by => return self.escalate(then, now),
            _ => {}
        }
        let mut actions = vec![];
        if self.is_warm() {
            match self.liveness.check(now) {
                Ok(asks) => actions.extend(asks.into_iter().map(Action::from)),
                Err(why) => return self.kill(why, now),
            }
        }
        if let State::WarmingUp {
            by,
            next: Next::At(at),
        } = self.state
            && now >= at
        {
            self.state = State::WarmingUp {
                by,
                next: Next::InFlight,
            };
            actions.push(Action::WarmUp);
        }
        if let Next::At(at) = self.probe
            && now >= at
            && self.is_alive()
        {
            self.probe = Next::InFlight;
            actions.push(Action::Probe);
        }
        actions
    }
}

impl End {
    fn phase(self) -> Phase {
        match self {
            Self::CrashLoop => Phase::CrashLoop,
            Self::Failed => Phase::Failed,
            Self::Stopped => Phase::Stopped,
        }
    }
}

fn fresh_trust(role: Role) -> KvTrust {
    match role {
        Role::Unified => KvTrust::None,
        Role::Prefill | Role::Decode => KvTrust::Unproven,
    }
}

fn whole_seconds(duration: Duration) -> Duration {
    Duration::from_secs(duration.as_secs())
}

#[cfg(test)]
mod tests;
