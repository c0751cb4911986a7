//! A node's output: from its pipe to a file, the console, and a short memory.
//!
//! One blocking thread per incarnation, so that a slow disk stops nobody but itself. It reads
//! until the incarnation is over, not until end of file: a grandchild may hold the pipe for ever.

use std::collections::VecDeque;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::task::JoinHandle;

use crate::fleet::NodeId;
use crate::observe::LogFile;
use crate::topology::Secrets;

const MAX_LINE: usize = 64 * 1024;
const TAIL_LINES: usize = 50;
const TAIL_LINE: usize = 2048;
/// After the end, for what is still in the pipe.
const DRAIN: Duration = Duration::from_millis(200);

/// Where a person reads along. Must not block.
pub trait LogSink: Send + Sync {
    fn line(&self, node: &NodeId, line: &str);
}

/// Where one node's output goes.
#[derive(Clone)]
pub struct LogTarget {
    pub node: NodeId,
    pub path: PathBuf,
    pub max_bytes: u64,
    pub max_files: u32,
    pub console: Arc<dyn LogSink>,
    /// What a line must not show, wherever it goes.
    pub secrets: Secrets,
}

/// The output of one incarnation.
pub struct LogPump {
    shared: Arc<Shared>,
    end: PipeWriter,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    bytes: AtomicU64,
    tail: Mutex<VecDeque<String>>,
}

impl LogPump {
    /// Returns the writing end for the child.
    pub fn start(target: LogTarget) -> io::Result<(Self, PipeWriter)> {
        let (output, writer) = io::pipe()?;
        let (ended, end) = io::pipe()?;
        let shared = Arc::new(Shared::default());
        let mut pump = Pump {
            file: LogFile::new(target.path.clone(), target.max_bytes, target.max_files),
            target,
            output,
            ended,
            shared: shared.clone(),
            line: Vec::new(),
        };
        let thread = tokio::task::spawn_blocking(move || pump.run());
        Ok((
            Self {
                shared,
                end,
                thread,
            },
            writer,
        ))
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Takes what is left in the pipe and returns the last lines.
    pub async fn finish(self) -> Vec<String> {
        drop(self.end);
        // A pump that the disk holds up is left behind; it ends with its write.
        let _ = tokio::time::timeout(DRAIN * 5, self.thread).await;
        let tail = self
            .shared
            .tail
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        tail.iter().cloned().collect()
    }
}

struct Pump {
    target: LogTarget,
    file: LogFile,
    output: PipeReader,
    ended: PipeReader,
    shared: Arc<Shared>,
    line: Vec<u8>,
}

impl Pump {
    fn run(&mut self) {
        let mut stop_at: Option<Instant> = None;
        while let Ok((readable, ended)) = self.wait(stop_at) {
            if ended && stop_at.is_none() {
                stop_at = Some(Instant::now() + DRAIN);
            }
            let over = stop_at.is_some_and(|at| Instant::now() >= at);
            if (readable && !self.read()) || (stop_at.is_some() && !readable) || over {
                break;
            }
        }
        if !self.line.is_empty() {
            self.emit();
        }
    }

    /// Whether there is output, and whether the incarnation is over.
    fn wait(&self, stop_at: Option<Instant>) -> nix::Result<(bool, bool)> {
        let mut fds = vec![PollFd::new(self.output.as_fd(), PollFlags::POLLIN)];
        let timeout = match stop_at {
            Some(_) => PollTimeout::ZERO,
            None => {
                fds.push(PollFd::new(self.ended.as_fd(), PollFlags::POLLIN));
                PollTimeout::NONE
            }
        };
        match poll(&mut fds, timeout) {
            Err(nix::errno::Errno::EINTR) => return Ok((false, stop_at.is_some())),
            other => other?,
        };
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
        let readable = ready.next().unwrap_or(false);
        Ok((readable, ready.next().unwrap_or(stop_at.is_some())))
    }

    /// False at end of file.
    fn read(&mut self) -> bool {
        let mut buffer = [0u8; 16 * 1024];
        let count = match self.output.read(&mut buffer) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(error) => return error.kind() == io::ErrorKind::Interrupted,
        };
        let grown = u64::try_from(count).unwrap_or(0);
        self.shared.bytes.fetch_add(grown, Ordering::Relaxed);
        for byte in buffer.iter().take(count) {
            if *byte == b'\n' {
                self.emit();
            } else {
                self.line.push(*byte);
                if self.line.len() >= MAX_LINE {
                    self.emit();
                }
            }
        }
        true
    }

    fn emit(&mut self) {
        let bytes = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(&bytes);
        // A progress bar redraws itself with carriage returns; its last state is the line.
        let line = text.trim_end_matches('\r').rsplit('\r').next();
        let line = self.target.secrets.redact(line.unwrap_or_default());
        let line = line.as_ref();
        self.file.write_line(line);
        self.target.console.line(&self.target.node, line);
        let short: String = line.chars().take(TAIL_LINE).collect();
        let mut tail = self
            .shared
            .tail
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(short);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[derive(Default)]
    struct Memory(Mutex<Vec<String>>);

    impl LogSink for Memory {
        fn line(&self, node: &NodeId, line: &str) {
            self.0.lock().unwrap().push(format!("{node} {line}"));
        }
    }

    fn target(dir: &tempfile::TempDir, max_bytes: u64) -> (LogTarget, Arc<Memory>) {
        let console = Arc::new(Memory::default());
        let target = LogTarget {
            node: "p".into(),
            path: dir.path().join("p.log"),
            max_bytes,
            max_files: 3,
            console: console.clone(),
            secrets: Secrets::default(),
        };
        (target, console)
    }

    #[tokio::test]
    async fn the_end_comes_although_somebody_holds_the_pipe() {
        let dir = tempfile::tempdir().unwrap();
        let (target, console) = target(&dir, 1 << 20);
        let (pump, mut writer) = LogPump::start(target).unwrap();
        writer.write_all(b"one\ntwo \xff\r\nhalf").unwrap();
        let tail = pump.finish().await;
        assert_eq!(tail, ["one", "two \u{fffd}", "half"]);
        assert_eq!(console.0.lock().unwrap().len(), 3);
        let file = std::fs::read_to_string(dir.path().join("p.log")).unwrap();
        assert_eq!(file, "one\ntwo \u{fffd}\nhalf\n");
        drop(writer);
    }

    #[tokio::test]
    async fn long_lines_are_cut_and_the_memory_is_short() {
        let dir = tempfile::tempdir().unwrap();
        let (target, console) = target(&dir, 1 << 30);
        let (pump, mut writer) = LogPump::start(target).unwrap();
        let writing = std::thread::spawn(move || {
            writer.write_all(&vec![b'x'; MAX_LINE * 2]).unwrap();
            for line in 0..60 {
                writeln!(writer, "line {line}").unwrap();
            }
        });
        tokio::task::spawn_blocking(move || writing.join().unwrap())
            .await
            .unwrap();
        let tail = pump.finish().await;
        assert_eq!(tail.len(), TAIL_LINES);
        assert_eq!(tail.last().unwrap(), "line 59");
        // "x...", "x...", and the empty rest that "line 0" completes.
        assert_eq!(console.0.lock().unwrap().len(), 62);
    }
}
