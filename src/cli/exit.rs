//! How a command ends: a message for the person, a number for the script.

use std::error::Error;
use std::fmt;
use std::io::Write as _;
use std::process::ExitCode;

/// Shown below `pegaflow --help`.
pub const HELP: &str = "\
Exit codes:
  0    done, or stopped as asked
  1    failed while running
  2    wrong use of the command line
  3    the topology cannot run: the file or a combination in it is wrong
  4    this machine cannot run it: no GPU, no vLLM, no model, no space
  5    the same topology is already running
  6    it is not running, or it does not answer
  130  stopped by a signal before it was ready";

/// Why a command did not succeed.
#[derive(Debug)]
pub enum Exit {
    /// 1: failed while running.
    Failed(anyhow::Error),
    /// 2: wrong use of the command line, beyond what clap sees.
    Usage(anyhow::Error),
    /// 3: the topology is wrong.
    Topology(anyhow::Error),
    /// 4: the machine lacks something.
    Machine(anyhow::Error),
    /// 5: already running.
    Running(anyhow::Error),
    /// 6: there is nobody to talk to.
    NotRunning(anyhow::Error),
    /// 0, without a word: whoever read our output has left.
    ReaderGone,
    /// 130: interrupted before it was ready.
    Interrupted,
}

impl Exit {
    pub fn failed(what: &'static str, source: impl Error + Send + Sync + 'static) -> Self {
        Self::Failed(anyhow::Error::new(source).context(what))
    }

    /// On stderr.
    pub fn report(&self) {
        if !matches!(self, Self::ReaderGone) {
            let _ = writeln!(std::io::stderr(), "error: {self}");
        }
    }

    pub fn code(&self) -> ExitCode {
        ExitCode::from(self.number())
    }

    pub fn number(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::Topology(_) => 3,
            Self::Machine(_) => 4,
            Self::Running(_) => 5,
            Self::NotRunning(_) => 6,
            Self::ReaderGone => 0,
            Self::Interrupted => 130,
        }
    }

    /// What it is about, for a closer look.
    pub fn error(&self) -> Option<&anyhow::Error> {
        match self {
            Self::Failed(error)
            | Self::Topology(error)
            | Self::Machine(error)
            | Self::Usage(error)
            | Self::Running(error)
            | Self::NotRunning(error) => Some(error),
            Self::ReaderGone | Self::Interrupted => None,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(error)
            | Self::Usage(error)
            | Self::Topology(error)
            | Self::Machine(error)
            | Self::Running(error)
            | Self::NotRunning(error) => write!(f, "{error:#}"),
            Self::ReaderGone => f.write_str("stdout is closed"),
            Self::Interrupted => f.write_str("interrupted before the fleet was ready"),
        }
    }
}
