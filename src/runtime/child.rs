//! A helper program (uv, pip, python) run to its end: its lines are passed on as they come, its last
//! ones are kept for the error message, and nothing of its tree outlives the call, however the call
//! ends: exit, deadline, cancellation, the future dropped, or `kill -9` of pegaflow.
//!
//! ```text
//! pegaflow ──tether (socket)──▶ guard ──▶ program ──▶ whatever it starts, daemons included
//!    ▲                            │ "kill", or the tether's end: the tree is killed and reaped
//!    └──── its report, its exit ──┘ only when nothing is left
//! ```
//!
//! It is the same guard as a node's. A process group that we kill ourselves would be less: nobody
//! kills it when we are killed, and a child that calls `setsid` is not in it.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Job;

const TAIL_LINES: usize = 20;
const LINE_BYTES: usize = 4096;
/// For the guard to kill and reap its tree, and for what is left in the pipes afterwards.
const SETTLE: Duration = Duration::from_secs(5);

/// How to start the process that every helper runs under.
#[derive(Debug, Clone)]
pub struct Guarding {
    /// Executed as `<program> __guard ...`; normally pegaflow itself.
    pub program: PathBuf,
    /// Removed by the guard if pegaflow was killed and nobody else has its lock.
    pub run_dir: Option<PathBuf>,
}

impl Guarding {
    /// The guard that runs `inner` with its arguments, environment and directory.
    fn wrap(&self, inner: &Command) -> Command {
        let inner = inner.as_std();
        let mut outer = Command::new(&self.program);
        outer.args(["__guard", "--node", "helper"]);
        if let Some(run_dir) = &self.run_dir {
            outer.arg("--run-dir").arg(run_dir);
        }
        outer
            .arg("--")
            .arg(inner.get_program())
            .args(inner.get_args());
        for name in crate::notify::VARIABLES {
            outer.env_remove(name);
        }
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => outer.env(name, value),
                None => outer.env_remove(name),
            };
        }
        if let Some(dir) = inner.get_current_dir() {
            outer.current_dir(dir);
        }
        outer
    }
}

/// Our end of a guard's control socket. Closing it kills the tree too, but more slowly.
struct Tether(UnixStream);

impl Tether {
    fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((Self(ours), theirs.into()))
    }

    fn kill(&self) {
        // Fails only when the guard has ended, which it does after its tree.
        let _ = (&self.0).write_all(b"kill\n");
    }

    /// How the program ended; call after the guard's end.
    fn outcome(&self) -> Result<ExitStatus, ChildError> {
        let mut said = Vec::new();
        // Ends with the guard's end of the socket; what came before an error is kept.
        let _ = (&self.0).read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said);
        said.lines().find_map(parse).unwrap_or_else(|| {
            let lost = io::Error::other("its guard process ended without a report");
            Err(ChildError::Wait(lost))
        })
    }
}

impl Drop for Tether {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A line of the guard, if it says how the program ended; the clock at its end is the supervisor's.
fn parse(line: &str) -> Option<Result<ExitStatus, ChildError>> {
    let words: Vec<&str> = line.split(' ').collect();
    match words.as_slice() {
        ["exited", _, "code", code, ..] => {
            let code: i32 = code.parse().ok()?;
            Some(Ok(ExitStatus::from_raw(code << 8)))
        }
        ["exited", _, "signal", signal, ..] => Some(Ok(ExitStatus::from_raw(signal.parse().ok()?))),
        ["failed", why @ ..] => Some(Err(ChildError::Spawn(io::Error::other(why.join(" "))))),
        _ => None,
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    #[error("it could not be started: {0}")]
    Spawn(#[source] io::Error),
    #[error("waiting for it failed: {0}")]
    Wait(#[source] io::Error),
    #[error("it had not finished after {} s; its last lines:\n{tail}", .limit.as_secs())]
    Deadline { limit: Duration, tail: String },
    #[error("it was stopped")]
    Cancelled,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    /// The last lines of both streams.
    pub tail: String,
    pub last_stdout: Option<String>,
}

#[derive(Default)]
struct Tail {
    lines: VecDeque<String>,
    last_stdout: Option<String>,
}

impl Tail {
    fn push(&mut self, stream: Stream, line: String) {
        if stream == Stream::Stdout {
            self.last_stdout = Some(line.clone());
        }
        if self.lines.len() == TAIL_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    fn text(&self) -> String {
        let lines: Vec<_> = self.lines.iter().map(String::as_str).collect();
        lines.join("\n")
    }
}

/// Runs `command` under a guard. `on_line` sees every line, also those that a progress bar ends with
/// a carriage return.
pub async fn run(
    command: Command,
    limit: Duration,
    job: Job<'_>,
    on_line: &mut (dyn FnMut(Stream, &str) + Send),
) -> Result<Finished, ChildError> {
    let (tether, theirs) = Tether::new().map_err(ChildError::Spawn)?;
    let mut command = job.guard.wrap(&command);
    command
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut guard = command.spawn().map_err(ChildError::Spawn)?;
    // It holds the guard's end of the tether.
    drop(command);

    let (sender, mut lines) = mpsc::channel(64);
    let mut readers = JoinSet::new();
    if let Some(stdout) = guard.stdout.take() {
        readers.spawn(read_lines(stdout, Stream::Stdout, sender.clone()));
    }
    if let Some(stderr) = guard.stderr.take() {
        readers.spawn(read_lines(stderr, Stream::Stderr, sender.clone()));
    }
    drop(sender);

    let mut tail = Tail::default();
    let deadline = tokio::time::sleep(limit);
    tokio::pin!(deadline);
    let mut open = true;
    let ended = loop {
        tokio::select! {
            biased;
            () = job.cancel.cancelled() => break Err(ChildError::Cancelled),
            () = &mut deadline => break Err(ChildError::Deadline { limit, tail: tail.text() }),
            line = lines.recv(), if open => match line {
                Some((stream, line)) => {
                    on_line(stream, &line);
                    tail.push(stream, line);
                }
                None => open = false,
            },
            ended = guard.wait() => break ended.map_err(ChildError::Wait),
        }
    };
    if ended.is_err() {
        tether.kill();
        let _ = tokio::time::timeout(SETTLE, guard.wait()).await;
    }
    let drain = async {
        while let Some((stream, line)) = lines.recv().await {
            on_line(stream, &line);
            tail.push(stream, line);
        }
    };
    let _ = tokio::time::timeout(SETTLE, drain).await;
    ended?;
    Ok(Finished {
        status: tether.outcome()?,
        tail: tail.text(),
        last_stdout: tail.last_stdout,
    })
}

async fn read_lines(
    mut source: impl AsyncRead + Unpin,
    stream: Stream,
    lines: mpsc::Sender<(Stream, String)>,
) {
    let mut line = Vec::new();
    let mut buffer = [0u8; 4096];
    loop {
        let read = match source.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(read) => read,
        };
        for &byte in buffer.iter().take(read) {
            if byte != b'\n' && byte != b'\r' {
                if line.len() < LINE_BYTES {
                    line.push(byte);
                }
            } else if !send(&mut line, stream, &lines).await {
                return;
            }
        }
    }
    send(&mut line, stream, &lines).await;
}

/// False when nobody listens any more.
async fn send(line: &mut Vec<u8>, stream: Stream, lines: &mpsc::Sender<(Stream, String)>) -> bool {
    let text = String::from_utf8_lossy(line).trim_end().to_owned();
    line.clear();
    text.is_empty() || lines.send((stream, text)).await.is_ok()
}
