//! `pegaflow up --detach`: a launcher at the terminal, and pegaflow in a session of its own.
//!
//! ```text
//! launcher ── starts ──▶ pegaflow __detached    no terminal; /dev/null, and the rotated pegaflow.log
//!     ◀── what a person should see: progress, warnings ── link ──┤   until it is ready or has failed
//!     ◀── ready: the banner ─────────────────────────────────────┤   the launcher ends with 0
//!     ◀── failed: why ───────────────────────────────────────────┘   it ends with pegaflow's exit code
//!     ── SIGINT, for each signal that the launcher gets ──▶
//! ```
//!
//! The link is one end of a socket pair, handed over as standard input. A launcher that is killed is
//! just one that does not listen any more: the start goes on.

use std::collections::{BTreeSet, VecDeque};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::anyhow;
use clap::{Args, ValueEnum as _};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, close, dup2_stdin, setsid};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::client::{converse, note};
use super::{Exit, Target};
use crate::observe::{Console, Shown, Style, Word};
use crate::shutdown::{Shutdown, SignalListener};

/// The hidden subcommand that the launcher starts.
pub const COMMAND: &str = "__detached";
/// Lines of nodes that are shown when the start fails.
const LAST_LINES: usize = 20;

#[derive(Debug, Args)]
pub struct UpArgs {
    #[command(flatten)]
    pub target: Target,
    /// Run in the background: return when the fleet is ready, or has failed to start
    #[arg(short, long)]
    pub detach: bool,
    /// With --detach: give up waiting after this; the start goes on
    #[arg(long, value_name = "TIME", requires = "detach", value_parser = humantime::parse_duration)]
    wait: Option<Duration>,
    /// With --detach: return when nothing stands against the start
    #[arg(long, requires = "detach", conflicts_with = "wait")]
    no_wait: bool,
}

/// The launcher.
pub fn launch(args: &UpArgs) -> ExitCode {
    let console = match Console::start(Style::of_stderr(args.target.log_format)) {
        Ok(console) => console,
        Err(error) => {
            let exit = Exit::failed("the console's thread could not be started", error);
            exit.report();
            return exit.code();
        }
    };
    let code = converse(launched(args, &console)).unwrap_or_else(|exit| {
        console.print(&format!("error: {exit}"));
        exit.code()
    });
    console.flush();
    code
}

async fn launched(args: &UpArgs, console: &Console) -> Result<ExitCode, Exit> {
    let shutdown = Shutdown::default();
    let _signals = SignalListener::install(shutdown.clone())
        .map_err(|error| Exit::failed("cannot listen for signals", error))?;
    let (link, child) = spawn(&args.target)
        .map_err(|error| Exit::failed("cannot start pegaflow in the background", error))?;
    let mut start = Start {
        console: console.clone(),
        child,
        interrupts: 0,
        underway: None,
        open: BTreeSet::new(),
        node_lines: VecDeque::new(),
        error: None,
    };
    let mut words = BufReader::new(link).lines();
    let mut listening = true;
    let patience = tokio::time::sleep(args.wait.unwrap_or(Duration::MAX));
    tokio::pin!(patience);
    loop {
        tokio::select! {
            line = words.next_line(), if listening => match line {
                Ok(Some(line)) => {
                    if let Some(code) = start.hear(&line, args) {
                        return Ok(code);
                    }
                }
                _ => listening = false,
            },
            status = start.child.wait(), if !listening => {
                let status = status.map_err(|error| Exit::failed("cannot wait for pegaflow", error))?;
                return Ok(start.failed(status));
            }
            () = shutdown.graceful().cancelled(), if start.interrupts == 0 => start.interrupt(),
            () = shutdown.forced().cancelled(), if start.interrupts == 1 => start.interrupt(),
            () = &mut patience, if args.wait.is_some() && start.interrupts == 0 => {
                return Err(start.late(args.wait.unwrap_or_default()));
            }
        }
    }
}

/// The same command line, without what is for the launcher.
fn spawn(target: &Target) -> io::Result<(tokio::net::UnixStream, Child)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let program = std::env::current_exe()?;
    let mut command = Command::new(program);
    command.arg(COMMAND);
    if let Some(format) = target.log_format.to_possible_value() {
        command.args(["--log-format", format.get_name()]);
    }
    for set in &target.topology.set {
        command.args(["--set", set]);
    }
    // Standard error is there for what goes wrong before the log is open.
    command
        .arg("--")
        .arg(&target.topology.topology)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null());
    let child = command.spawn()?;
    Ok((tokio::net::UnixStream::from_std(ours)?, child))
}

/// What the launcher knows of the start.
struct Start {
    console: Console,
    child: Child,
    /// Signals passed on.
    interrupts: u32,
    underway: Option<(String, PathBuf)>,
    /// Jobs that the console shows.
    open: BTreeSet<u64>,
    /// The last ones; they are not shown while all goes well.
    node_lines: VecDeque<Shown>,
    error: Option<String>,
}

impl Start {
    /// The launcher's exit code, once it has nothing more to wait for.
    fn hear(&mut self, line: &str, args: &UpArgs) -> Option<ExitCode> {
        // Of another version, when the program was replaced in this moment: its end tells the rest.
        match serde_json::from_str(line).ok()? {
            Word::Shown(shown) => self.show(shown),
            Word::Underway { name, log } => {
                let pid = self.pid();
                let underway = (name, log);
                if args.no_wait && self.interrupts == 0 {
                    self.close();
                    note(&format!("{} starts in the background", underway.0));
                    note(&hints(&underway, pid));
                    return Some(ExitCode::SUCCESS);
                }
                self.underway = Some(underway);
            }
            Word::Ready { banner } if self.interrupts == 0 => {
                self.close();
                self.announce(&banner);
                return Some(ExitCode::SUCCESS);
            }
            // It ends, as asked.
            Word::Ready { .. } => {}
            Word::Failed { error } => self.error = Some(error),
        }
        None
    }

    fn show(&mut self, shown: Shown) {
        match shown {
            Shown::NodeLine { .. } => {
                if self.node_lines.len() == LAST_LINES {
                    self.node_lines.pop_front();
                }
                self.node_lines.push_back(shown);
                return;
            }
            Shown::Started { job, .. } => {
                self.open.insert(job);
            }
            Shown::Finished { job, .. } => {
                self.open.remove(&job);
            }
            Shown::Formatted(_) | Shown::Text(_) | Shown::Status { .. } | Shown::Note { .. } => {}
        }
        self.console.relay(shown);
    }

    /// Takes what was in progress off the screen.
    fn close(&mut self) {
        for job in std::mem::take(&mut self.open) {
            let text = String::new();
            self.console.relay(Shown::Finished { job, text });
        }
        self.console.flush();
    }

    /// On stdout, as `up` does it.
    fn announce(&self, banner: &str) {
        let mut text = format!("\n{banner}");
        if let Some(underway) = &self.underway {
            text += &format!("\n{}\n", hints(underway, self.pid()));
        }
        let mut stdout = io::stdout().lock();
        // A closed stdout is no reason to fail.
        let _ = stdout.write_all(text.as_bytes());
        let _ = stdout.flush();
    }

    fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    fn interrupt(&mut self) {
        self.interrupts += 1;
        if let Some(Ok(pid)) = self.child.id().map(i32::try_from) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGINT);
        }
    }

    /// Shows what a person at a foreground `up` would have seen at its end.
    fn failed(&mut self, status: ExitStatus) -> ExitCode {
        self.close();
        let asked = self.interrupts > 0;
        if !status.success() && !asked && !self.node_lines.is_empty() {
            self.console.print("the last lines of the nodes:");
            for line in self.node_lines.drain(..) {
                self.console.relay(line);
            }
        }
        match &self.error {
            Some(error) => self.console.print(error),
            // A signal that came before it could listen.
            None if asked => self.console.print(&format!("error: {}", Exit::Interrupted)),
            None => self
                .console
                .print(&format!("error: pegaflow ended ({status}) without a word")),
        }
        if let (Some((_, log)), false) = (&self.underway, asked) {
            let log = log.display();
            self.console.print(&format!("pegaflow's own log: {log}"));
        }
        match (status.code(), status.signal()) {
            (Some(code), _) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
            (None, _) if asked => Exit::Interrupted.code(),
            // As a shell counts.
            (None, Some(signal)) => ExitCode::from(u8::try_from(128 + signal).unwrap_or(1)),
            (None, None) => ExitCode::FAILURE,
        }
    }

    fn late(&mut self, wait: Duration) -> Exit {
        self.close();
        let waited = humantime::format_duration(wait);
        let hints = match &self.underway {
            Some(underway) => hints(underway, self.pid()),
            None => format!("  pid {}", self.pid()),
        };
        Exit::Failed(anyhow!(
            "not ready after {waited}; the start goes on in the background\n{hints}"
        ))
    }
}

fn hints((name, log): &(String, PathBuf), pid: u32) -> String {
    format!(
        "  in the background: pid {pid}, log {}\n  \
         look: pegaflow status {name}, pegaflow logs -f --name {name}   end: pegaflow down {name}",
        log.display()
    )
}

/// The beginning of the process that stays: leaves terminal, session and open files of whoever launched it,
/// and returns the link. Must run before anything is opened and any thread starts.
pub fn leave() -> io::Result<UnixStream> {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        // The listing's own is closed already.
        let _ = close(fd);
    }
    // Fails only for the leader of a process group, which nobody starts as this.
    let _ = setsid();
    let link = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    dup2_stdin(File::open("/dev/null")?)?;
    Ok(link)
}
