//! What a person asks of a node: drain, undrain, restart.
//!
//! ```text
//!                drain                               undrain
//! Ready ────────────────────────▶ Draining, held ────────────────▶ Ready or Unreachable
//! Unreachable                         │ restart
//!    └──────────── restart ────────▶ Draining, to restart ── idle, or the time is over ─▶ Ending
//! Starting, WarmingUp, Verifying ── restart ─▶ Ending            (nobody waits for an answer)
//! Waiting, Over(CrashLoop | Failed) ── restart ─▶ Waiting, at once; deaths are forgotten
//! ```
//!
//! A drain is a wish that outlives the process: a drained node that dies or is restarted comes back
//! drained. A shutdown is stronger than any of this.

use std::time::{Duration, Instant};

use super::{Action, End, Machine, State, Then, fresh_trust};

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Send it nothing new, until [`Command::Undrain`]; it stays up.
    Drain,
    Undrain,
    /// Drain for this long at most, then stop it and start it again.
    Restart {
        limit: Duration,
    },
}

/// Why a node does not do as it is told.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    #[error("it is stopping with pegaflow; start it again with `pegaflow up`")]
    Stopping,
    #[error("others started it; restart it where that is done")]
    Others,
    #[error("its supervisor has not answered within {0:?}; see pegaflow's log")]
    NoAnswer(Duration),
}

/// What ends a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    Undrained,
    /// Nothing runs any more, or the moment has come: then it is restarted.
    Idle {
        by: Instant,
    },
}

impl Machine {
    /// Whether [`super::Event::Command`] may come.
    pub fn accepts(&self) -> Result<(), Refusal> {
        match self.state {
            State::Over(End::Stopped)
            | State::Ending {
                then: Then::End(End::Stopped),
                ..
            } => Err(Refusal::Stopping),
            _ => Ok(()),
        }
    }

    /// [`super::Event::Idle`] is waited for.
    pub fn awaits_idle(&self) -> bool {
        matches!(
            self.state,
            State::Draining {
                until: Until::Idle { .. },
                ..
            }
        )
    }

    pub(super) fn command(&mut self, command: Command, now: Instant) -> Vec<Action> {
        if self.accepts().is_err() {
            return vec![];
        }
        match command {
            Command::Drain => {
                self.held = true;
                if let State::Ready { since } | State::Unreachable { since } = self.state {
                    self.drain(since, Until::Undrained);
                }
                vec![]
            }
            Command::Undrain => {
                self.undrain();
                vec![]
            }
            Command::Restart { limit } => self.restart(limit, now),
        }
    }

    /// Ready, or drained as it was told.
    pub(super) fn serve(&mut self, now: Instant) {
        self.state = State::Ready { since: now };
        if self.held {
            self.drain(now, Until::Undrained);
        }
    }

    /// No request is left at the node.
    pub(super) fn idle(&mut self, now: Instant) -> Vec<Action> {
        match self.state {
            State::Draining {
                until: Until::Idle { .. },
                ..
            } => self.again(now),
            _ => vec![],
        }
    }

    fn drain(&mut self, since: Instant, until: Until) {
        let reachable = match self.state {
            State::Draining { reachable, .. } => reachable,
            State::Unreachable { .. } => false,
            _ => true,
        };
        self.state = State::Draining {
            since,
            reachable,
            until,
        };
    }

    fn undrain(&mut self) {
        self.held = false;
        if let State::Draining {
            since,
            reachable,
            until: Until::Undrained,
        } = self.state
        {
            self.state = match reachable {
                true => State::Ready { since },
                false => State::Unreachable { since },
            };
        }
    }

    fn restart(&mut self, limit: Duration, now: Instant) -> Vec<Action> {
        self.deaths.forget();
        match self.state {
            State::Ready { since }
            | State::Unreachable { since }
            | State::Draining { since, .. } => {
                self.drain(since, Until::Idle { by: now + limit });
            }
            State::Starting { .. } | State::WarmingUp { .. } | State::Verifying => {
                return self.again(now);
            }
            State::Gate { .. } => self.delay = None,
            State::Waiting { .. } | State::Over(_) => {
                self.delay = None;
                self.trust = fresh_trust(self.role);
                self.state = State::Waiting { until: now };
            }
            State::Ending { by, .. } => {
                let then = Then::Again;
                self.state = State::Ending { then, by };
            }
        }
        vec![]
    }

    /// Stops the leader; once nothing of it is left, the next one is started.
    pub(super) fn again(&mut self, now: Instant) -> Vec<Action> {
        self.trouble = None;
        self.reason = Some("restarted as asked".to_owned());
        self.end(Then::Again, now);
        self.force_to(super::Force::Stop, now)
    }
}

#[cfg(test)]
mod tests;
