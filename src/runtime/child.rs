//! A helper program (uv, pip, python) run to its end: its lines are passed on as they come, its last
//! ones are kept for the error message, and nothing of its process group outlives the call, however
//! the call ends: exit, deadline, cancellation, or the future dropped.

use std::collections::VecDeque;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const TAIL_LINES: usize = 20;
const LINE_BYTES: usize = 4096;
/// For reaping after a kill, and for what is left in the pipes after the exit.
const SETTLE: Duration = Duration::from_secs(5);

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
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    /// The last lines of both streams.
    pub(crate) tail: String,
    pub(crate) last_stdout: Option<String>,
}

/// Kills the whole process group when dropped.
struct KillGroup(Option<Pid>);

impl KillGroup {
    fn kill(&mut self) {
        if let Some(group) = self.0.take() {
            // ESRCH: everybody is gone already.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

impl Drop for KillGroup {
    fn drop(&mut self) {
        self.kill();
    }
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

/// Runs `command` in a process group of its own. `on_line` sees every line, also those that a
/// progress bar ends with a carriage return.
pub(crate) async fn run(
    mut command: Command,
    limit: Duration,
    cancel: &CancellationToken,
    on_line: &mut (dyn FnMut(Stream, &str) + Send),
) -> Result<Finished, ChildError> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    die_with_parent(&mut command);
    let mut child = command.spawn().map_err(ChildError::Spawn)?;
    let group = child
        .id()
        .and_then(|pid| i32::try_from(pid).ok())
        .map(Pid::from_raw);
    let mut group = KillGroup(group);

    let (sender, mut lines) = mpsc::channel(64);
    let mut readers = JoinSet::new();
    if let Some(stdout) = child.stdout.take() {
        readers.spawn(read_lines(stdout, Stream::Stdout, sender.clone()));
    }
    if let Some(stderr) = child.stderr.take() {
        readers.spawn(read_lines(stderr, Stream::Stderr, sender.clone()));
    }
    drop(sender);

    let mut tail = Tail::default();
    let deadline = tokio::time::sleep(limit);
    tokio::pin!(deadline);
    let mut open = true;
    let status = loop {
        tokio::select! {
            biased;
            () = cancel.cancelled() => break Err(ChildError::Cancelled),
            () = &mut deadline => break Err(ChildError::Deadline { limit, tail: tail.text() }),
            line = lines.recv(), if open => match line {
                Some((stream, line)) => {
                    on_line(stream, &line);
                    tail.push(stream, line);
                }
                None => open = false,
            },
            status = child.wait() => break status.map_err(ChildError::Wait),
        }
    };
    // Also after a normal exit: a grandchild may have stayed, and may hold the pipes.
    group.kill();
    if status.is_err() {
        let _ = tokio::time::timeout(SETTLE, child.wait()).await;
    }
    let drain = async {
        while let Some((stream, line)) = lines.recv().await {
            on_line(stream, &line);
            tail.push(stream, line);
        }
    };
    let _ = tokio::time::timeout(SETTLE, drain).await;
    Ok(Finished {
        status: status?,
        tail: tail.text(),
        last_stdout: tail.last_stdout,
    })
}

/// The child is killed when pegaflow dies without a chance to do it (`kill -9`).
#[expect(
    unsafe_code,
    reason = "pre_exec is the only way to set the parent-death signal"
)]
fn die_with_parent(command: &mut Command) {
    // SAFETY: the closure makes one system call, which is async-signal-safe, and allocates nothing.
    unsafe {
        command
            .pre_exec(|| nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from));
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    const LIMIT: Duration = Duration::from_secs(30);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    fn alive(pid: i32) -> bool {
        // A zombie whose parent has not reaped it counts as gone.
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.contains(") Z "))
    }

    async fn gone(pid: i32) {
        let wait = async {
            while alive(pid) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait)
            .await
            .expect("the grandchild lives on");
    }

    #[tokio::test]
    async fn lines_status_and_tail() {
        let mut seen = Vec::new();
        let script = "i=0; while [ $i -lt 30 ]; do echo line $i; i=$((i+1)); done; \
                      printf 'a\\rb\\n' >&2; exit 7";
        let token = CancellationToken::new();
        let finished = run(shell(script), LIMIT, &token, &mut |stream, line| {
            seen.push((stream, line.to_owned()));
        })
        .await
        .unwrap();
        assert_eq!(finished.status.code(), Some(7));
        assert_eq!(finished.last_stdout.as_deref(), Some("line 29"));
        assert_eq!(finished.tail.lines().count(), TAIL_LINES);
        assert_eq!(seen.len(), 32);
        assert!(seen.contains(&(Stream::Stderr, "a".into())));
    }

    #[tokio::test]
    async fn a_grandchild_that_holds_the_pipe_does_not_hold_us() {
        let token = CancellationToken::new();
        let finished = run(
            shell("sleep 600 & echo $!; exit 0"),
            LIMIT,
            &token,
            &mut |_, _| {},
        )
        .await
        .unwrap();
        assert!(finished.status.success());
        gone(finished.last_stdout.unwrap().parse().unwrap()).await;
    }

    #[tokio::test]
    async fn cancelling_kills_the_tree() {
        let token = CancellationToken::new();
        let pid = Arc::new(Mutex::new(0));
        let result = run(
            shell("trap '' TERM INT; sleep 600 & echo $!; wait"),
            LIMIT,
            &token,
            &mut |_, line| {
                *pid.lock().unwrap() = line.parse().unwrap();
                token.cancel();
            },
        )
        .await;
        assert!(matches!(result, Err(ChildError::Cancelled)));
        let pid = *pid.lock().unwrap();
        gone(pid).await;
    }

    #[tokio::test]
    async fn the_deadline_keeps_the_last_lines() {
        let token = CancellationToken::new();
        let result = run(
            shell("echo still here; sleep 600"),
            Duration::from_secs(1),
            &token,
            &mut |_, _| {},
        )
        .await;
        assert!(matches!(result, Err(ChildError::Deadline { tail, .. }) if tail == "still here"));
    }
}
