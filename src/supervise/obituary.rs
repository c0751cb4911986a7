//! Why a node died, in one line, out of its exit and its last words. Pure.

use nix::sys::signal::Signal;

use super::state::{Mendable, Obituary};

/// How the leader went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
    /// The guard vanished, and with it whoever could have told.
    GuardLost,
}

impl Exit {
    pub fn describe(self) -> String {
        match self {
            Self::Code(code) => format!("exited with code {code}"),
            Self::Signal(number) => match Signal::try_from(number) {
                Ok(signal) => format!("killed by {signal}"),
                Err(_) => format!("killed by signal {number}"),
            },
            Self::GuardLost => "its guard process was killed".to_owned(),
        }
    }
}

/// Nothing that time heals, if it is said before the node was ever healthy (`ending.rs` looks).
const NEVER: [&str; 7] = [
    "unrecognized arguments",
    "error: argument ",
    "no such file",
    "is not a valid model identifier",
    "repository not found",
    "no module named",
    "invalid device ordinal",
];
/// argparse's exit code, and that of a shell script's own usage error.
const USAGE: i32 = 2;
/// Says only that something else was wrong.
const VAGUE: &str = "Engine core initialization failed";

/// `tail`: the last lines of the log, oldest first.
pub fn write(exit: Exit, tail: &[String]) -> Obituary {
    let errors: Vec<&str> = tail
        .iter()
        .map(|line| line.trim())
        .filter(|line| is_error(line))
        .collect();
    let telling = errors.iter().rev().find(|line| !line.contains(VAGUE));
    let text = match telling.or(errors.last()) {
        Some(line) => format!("{}: {line}", exit.describe()),
        None => exit.describe(),
    };
    let hopeless = errors.iter().any(|line| {
        let line = line.to_lowercase();
        NEVER.iter().any(|pattern| line.contains(pattern))
    });
    let usage = exit == Exit::Code(USAGE) && !errors.is_empty();
    let by_itself = matches!(exit, Exit::Code(_));
    let mendable = if by_itself && (hopeless || usage) {
        Mendable::Never
    } else {
        Mendable::Perhaps
    };
    Obituary { text, mendable }
}

/// `SomethingError: text`, `prog: error: text`, `sh: x: No such file or directory`.
fn is_error(line: &str) -> bool {
    let lower = line.to_lowercase();
    lower.contains("error: ") || lower.contains("exception: ") || lower.contains("no such file")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_of(exit: Exit, lines: &[&str]) -> Obituary {
        let tail: Vec<String> = lines.iter().map(ToString::to_string).collect();
        write(exit, &tail)
    }

    #[test]
    fn a_wrong_flag_is_hopeless_and_quoted() {
        let obituary = write_of(
            Exit::Code(2),
            &[
                "usage: api_server.py [-h]",
                "api_server.py: error: unrecognized arguments: --frob",
            ],
        );
        assert_eq!(obituary.mendable, Mendable::Never);
        assert!(obituary.text.contains("--frob"));
    }

    #[test]
    fn the_root_cause_wins_over_its_consequence() {
        let obituary = write_of(
            Exit::Code(1),
            &[
                "(EngineCore pid=7) ValueError: head size 7 is not supported",
                "Traceback (most recent call last):",
                "RuntimeError: Engine core initialization failed. See root cause above.",
            ],
        );
        assert!(obituary.text.contains("head size 7"));
        assert_eq!(obituary.mendable, Mendable::Perhaps);
    }

    #[test]
    fn a_missing_model_is_hopeless_but_not_when_the_node_was_killed() {
        let lines = ["OSError: x is not a local folder and is not a valid model identifier"];
        assert_eq!(write_of(Exit::Code(1), &lines).mendable, Mendable::Never);
        assert_eq!(
            write_of(Exit::Signal(9), &lines).mendable,
            Mendable::Perhaps
        );
    }

    #[test]
    fn a_silent_death_names_the_signal() {
        let obituary = write_of(Exit::Signal(11), &["hello"]);
        assert!(obituary.text.contains("SIGSEGV"));
        assert_eq!(obituary.mendable, Mendable::Perhaps);
        let silent = write_of(Exit::Code(2), &[]);
        assert_eq!(silent.mendable, Mendable::Perhaps);
    }
}
