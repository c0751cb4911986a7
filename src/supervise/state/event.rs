//! What goes into the machine, and what comes out.

use std::time::Duration;

use super::Command;

use super::super::gate::Obstacle;
use super::super::liveness::{Ask, Canary, Pulse};

/// What the actor tells the machine.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The moment of `Machine::deadline` has come.
    Tick,
    /// What is in the way of a spawn.
    Gate(Option<Obstacle>),
    /// The guard could not be started, or could not execute the leader.
    SpawnFailed(String),
    LogGrew,
    /// What the tree has, in bytes.
    Memory(u64),
    Probe(Probe),
    /// `None`: no figures, or not in time.
    Pulse(Option<Pulse>),
    /// What became of the request for one token.
    Canary(Canary),
    Warm(Warmth),
    Proven,
    /// Its partners are others' nodes, with which no KV canary runs.
    Vouched,
    /// There is nobody to run the KV canary with.
    Unpaired,
    Refused(String),
    /// The leader is gone, or the guard.
    Exited(String),
    /// Every process of the incarnation is gone.
    Reaped(Option<Obituary>),
    Stop,
    Force,
    /// Ignored unless `Machine::accepts`.
    Command(Command),
    /// The node has no request left, and gets none.
    Idle,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    Healthy,
    /// Nobody there, or the wrong answer.
    Miss,
    /// No answer in time: perhaps only busy.
    Late,
    /// Healthy, but another process than the node's listens there.
    Stranger,
    /// HTTP 503: the API server lives, the engine behind it does not.
    EngineDead,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warmth {
    Warm,
    Failed(String),
}

/// What the log said at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obituary {
    pub text: String,
    pub mendable: Mendable,
}

/// Whether a restart can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mendable {
    Perhaps,
    Never,
}

/// What the machine asks of the actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    CheckGate,
    Spawn,
    Probe,
    /// Read the node's figures.
    Pulse,
    /// Ask it for one token.
    Canary,
    WarmUp,
    /// TERM the leader, and KILL everything after this.
    Stop(Duration),
    Kill,
    /// The guard does not do its work.
    KillGuard,
}

impl From<Ask> for Action {
    fn from(ask: Ask) -> Self {
        match ask {
            Ask::Pulse => Self::Pulse,
            Ask::Canary => Self::Canary,
        }
    }
}
