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

/// How it went, and what the kernel had to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    pub exit: Exit,
    /// The kernel's OOM killer was at work just then.
    pub out_of_memory: bool,
}

impl End {
    pub fn describe(self) -> String {
        let exit = self.exit.describe();
        match self.exit {
            _ if self.out_of_memory => format!(
                "{exit}: out of memory (the kernel's OOM killer has just ended a process; allow \
                 more memory, or lower `kv_cache` or `[kv] capacity`)"
            ),
            Exit::Signal(number) if number == Signal::SIGKILL as i32 => {
                format!("{exit}, not by pegaflow (`dmesg` may say more)")
            }
            // Pages of a file that has no room: shared memory is such a file.
            Exit::Signal(number) if number == Signal::SIGBUS as i32 => {
                format!("{exit}: most often /dev/shm is full (`df /dev/shm`)")
            }
            _ => exit,
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
pub fn write(end: End, tail: &[String]) -> Obituary {
    let exit = end.exit;
    let mut traceback = Traceback::default();
    let errors: Vec<&str> = tail
        .iter()
        .filter(|line| traceback.ends_with(line) || is_error(line))
        .map(|line| line.trim())
        .collect();
    let telling = errors.iter().rev().find(|line| !line.contains(VAGUE));
    let text = match telling.or(errors.last()) {
        Some(line) => format!("{}: {line}", end.describe()),
        None => end.describe(),
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

/// Finds the last line of each traceback, whatever the exception is called.
#[derive(Debug, Default)]
struct Traceback {
    inside: bool,
}

impl Traceback {
    fn ends_with(&mut self, line: &str) -> bool {
        let line = without_prefix(line);
        if line.starts_with("Traceback (most recent call last)") {
            self.inside = true;
            return false;
        }
        // Frames are indented.
        let ends = self.inside && !line.is_empty() && !line.starts_with([' ', '\t']);
        self.inside &= !ends;
        ends
    }
}

/// Without vLLM's `(EngineCore_DP0 pid=7) ERROR 11-26 10:00:00 [core.py:700] `.
fn without_prefix(line: &str) -> &str {
    let mut rest = line;
    if let Some((_, after)) = rest.strip_prefix('(').and_then(|it| it.split_once(") ")) {
        rest = after;
    }
    let is_log = ["ERROR ", "WARNING ", "INFO "]
        .iter()
        .any(|level| rest.starts_with(level));
    match rest.split_once("] ") {
        Some((_, after)) if is_log => after,
        _ => rest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_of(exit: Exit, lines: &[&str]) -> Obituary {
        let tail: Vec<String> = lines.iter().map(ToString::to_string).collect();
        let end = End {
            exit,
            out_of_memory: false,
        };
        write(end, &tail)
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
        let no_room = write_of(Exit::Signal(7), &[]);
        assert!(no_room.text.contains("/dev/shm"));
        let silent = write_of(Exit::Code(2), &[]);
        assert_eq!(silent.mendable, Mendable::Perhaps);
    }

    #[test]
    fn the_last_line_of_a_traceback_is_quoted_whatever_it_is_called() {
        let lines = [
            "(EngineCore_DP0 pid=7) ERROR 11-26 10:00:00 [core.py:700] Traceback (most recent call last):",
            "(EngineCore_DP0 pid=7) ERROR 11-26 10:00:00 [core.py:700]   File \"a.py\", line 1, in f",
            "(EngineCore_DP0 pid=7) ERROR 11-26 10:00:00 [core.py:700]     assert x",
            "(EngineCore_DP0 pid=7) ERROR 11-26 10:00:00 [core.py:700] AssertionError",
            "(EngineCore_DP0 pid=7) and more",
        ];
        let obituary = write_of(Exit::Code(1), &lines);
        assert!(obituary.text.ends_with("AssertionError"), "{obituary:?}");
    }

    #[test]
    fn the_oom_killer_and_a_strangers_kill_are_told_apart() {
        let end = |out_of_memory| End {
            exit: Exit::Signal(9),
            out_of_memory,
        };
        assert!(end(true).describe().contains("out of memory"));
        let killed = end(false).describe();
        assert!(killed.contains("SIGKILL") && !killed.contains("memory"));
    }
}
