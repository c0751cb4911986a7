//! What the matrix consists of, and what each cell is to come to.

use std::fmt;

use nix::sys::signal::Signal;

/// Which process gets the signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Leader,
    Engine,
    Worker,
    Guard,
    Supervisor,
}

/// What the fleet is doing then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The node's processes run, and `/health` is silent.
    Starting,
    /// The node computes its first request.
    WarmUp,
    Idle,
    /// The prefill node computes two prompts.
    Prefill,
    /// The prefill node's worker copies chunks into the store.
    Save,
    /// The decode node's worker copies chunks out of the store.
    Load,
    /// A stream has begun; another answer is on its way that is not streamed.
    Decode,
    /// The same, and the decode node was told to drain.
    Draining,
    /// The node was killed, and is starting again.
    Restarting,
}

pub const TARGETS: [Target; 5] = [
    Target::Leader,
    Target::Engine,
    Target::Worker,
    Target::Guard,
    Target::Supervisor,
];

pub const SIGNALS: [Signal; 4] = [
    Signal::SIGKILL,
    Signal::SIGTERM,
    Signal::SIGSTOP,
    Signal::SIGSEGV,
];

pub const MOMENTS: [Moment; 9] = [
    Moment::Starting,
    Moment::WarmUp,
    Moment::Idle,
    Moment::Prefill,
    Moment::Save,
    Moment::Load,
    Moment::Decode,
    Moment::Draining,
    Moment::Restarting,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    pub target: Target,
    pub signal: Signal,
    pub moment: Moment,
}

/// What the signal means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// The node dies, at once or when its hang is found, and is started again.
    Death,
    /// A guard blocks TERM, and a node does not need its guard as long as it lives.
    Nothing,
    /// pegaflow lets requests finish, stops everything, and ends.
    End,
    /// pegaflow is dead; the guards end everything.
    Gone,
    /// pegaflow stands still until it gets CONT.
    Pause,
}

impl Cell {
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for target in TARGETS {
            for signal in SIGNALS {
                all.extend(MOMENTS.map(|moment| Self {
                    target,
                    signal,
                    moment,
                }));
            }
        }
        all
    }

    pub fn effect(self) -> Effect {
        match (self.target, self.signal) {
            (Target::Supervisor, Signal::SIGTERM) => Effect::End,
            (Target::Supervisor, Signal::SIGSTOP) => Effect::Pause,
            (Target::Supervisor, _) => Effect::Gone,
            (Target::Guard, Signal::SIGTERM | Signal::SIGSTOP) => Effect::Nothing,
            _ => Effect::Death,
        }
    }

    /// To whose processes it happens; the supervisor has both nodes.
    pub fn node(self) -> &'static str {
        match self.moment {
            Moment::WarmUp | Moment::Prefill | Moment::Save | Moment::Restarting => "prefill",
            _ => "decode",
        }
    }

    pub fn other(self) -> &'static str {
        match self.node() {
            "prefill" => "decode",
            _ => "prefill",
        }
    }

    /// pegaflow has not called itself ready yet.
    pub fn is_first_start(self) -> bool {
        matches!(self.moment, Moment::Starting | Moment::WarmUp)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::WarmUp => "warm-up",
            Self::Idle => "idle",
            Self::Prefill => "prefill",
            Self::Save => "KV save",
            Self::Load => "KV load",
            Self::Decode => "decode",
            Self::Draining => "draining",
            Self::Restarting => "restarting",
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Leader => "leader",
            Self::Engine => "EngineCore",
            Self::Worker => "worker",
            Self::Guard => "guard",
            Self::Supervisor => "supervisor",
        })
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let signal = self.signal.as_str();
        write!(f, "{} {signal} {}", self.target, self.moment)
    }
}
