//! The supervisor's end of one guard: one incarnation of a node.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::unistd::Pid;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::cgroup::Group;
use super::guard::clock;
use super::logs::{LogPump, LogTarget};
use super::obituary::Exit;
use super::sweep::{self, KnownGuard};
use crate::topology::{ADMIN_KEY, API_KEYS};

/// A guard says little; more than this is not a guard.
const MAX_STATUS: usize = 64 * 1024;
/// Files in /dev/shm that are remembered of one tree; vLLM has some dozens.
const MAX_SHM: usize = 4096;
const SEND_LIMIT: Duration = Duration::from_secs(1);
/// From `empty` to the guard's own exit.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// What to run.
pub struct SpawnSpec<'a> {
    pub guard_program: &'a Path,
    pub run_dir: &'a Path,
    pub argv: &'a [String],
    pub env: BTreeMap<String, String>,
    /// The only cores that the tree may run on; empty: all.
    pub cpus: &'a [usize],
    /// The NUMA nodes whose memory the tree takes first; empty: the kernel's choice.
    pub numa: &'a [u32],
    /// The control group to run it in.
    pub group: Option<Group>,
    pub log: LogTarget,
}

/// What the guard reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    Spawned(u32),
    SpawnFailed(String),
    /// The leader, that long ago.
    Exited {
        exit: Exit,
        ago: Duration,
    },
    /// A file in /dev/shm that the tree has made, and its inode.
    Shm(PathBuf, u64),
    /// Every process of the tree is reaped.
    Empty,
    /// The guard is gone without having said so.
    Lost,
}

/// A living guard. Dropping it makes the guard stop its tree by itself.
pub struct Incarnation {
    guard: Child,
    known: KnownGuard,
    socket: UnixStream,
    input: Vec<u8>,
    log: LogPump,
    shm: BTreeMap<PathBuf, u64>,
    group: Option<Group>,
}

impl Incarnation {
    pub fn spawn(spec: SpawnSpec<'_>) -> io::Result<Self> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let socket = UnixStream::from_std(ours)?;
        let node = spec.log.node.to_string();
        let (log, output) = LogPump::start(spec.log)?;
        let mut command = Command::new(spec.guard_program);
        command
            .args(["__guard", "--node", &node, "--private-shm", "--run-dir"])
            .arg(spec.run_dir);
        if !spec.cpus.is_empty() {
            let cores: Vec<_> = spec.cpus.iter().map(usize::to_string).collect();
            command.args(["--cpus", &cores.join(",")]);
        }
        if !spec.numa.is_empty() {
            let nodes: Vec<_> = spec.numa.iter().map(u32::to_string).collect();
            command.args(["--numa", &nodes.join(",")]);
        }
        if let Some(group) = &spec.group {
            command.arg("--cgroup").arg(group.dir());
        }
        command.arg("--").args(spec.argv);
        for name in crate::notify::VARIABLES {
            command.env_remove(name);
        }
        // Who may use the endpoint is nothing that a node has to know.
        for name in [API_KEYS, ADMIN_KEY, "PEGAFLOW_ROUTER_ENDPOINT"] {
            command.env_remove(name);
        }
        command
            .envs(spec.env)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(output.try_clone()?))
            .stderr(Stdio::from(output));
        let (guard, known) = sweep::spawn_guard(&mut command)?;
        Ok(Self {
            guard,
            known,
            socket,
            input: Vec::new(),
            log,
            shm: BTreeMap::new(),
            group: spec.group,
        })
    }

    /// The next report. Cancel-safe. Nothing follows `Empty` and `Lost`.
    pub async fn next(&mut self) -> Status {
        loop {
            while let Some(line) = take_line(&mut self.input) {
                match parse(&line) {
                    Some(Status::Shm(path, inode)) if self.shm.len() < MAX_SHM => {
                        self.shm.insert(path, inode);
                    }
                    Some(Status::Shm(..)) => {}
                    Some(status) => return status,
                    None => tracing::warn!("a guard said {line:?}"),
                }
            }
            if self.socket.readable().await.is_err() || self.input.len() > MAX_STATUS {
                return Status::Lost;
            }
            match self.socket.try_read_buf(&mut self.input) {
                Ok(0) => return Status::Lost,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Status::Lost,
            }
        }
    }

    /// TERM for the leader now, KILL for everybody after `grace`.
    pub async fn stop(&self, grace: Duration) {
        self.send(&format!("stop {}\n", grace.as_millis())).await;
    }

    pub async fn kill(&self) {
        self.send("kill\n").await;
    }

    /// The last resort against a guard that does not react; its leader dies with it.
    pub fn kill_guard(&mut self) {
        let _ = self.guard.start_kill();
    }

    /// What a killed guard can no longer empty and remove.
    pub fn take_group(&mut self) -> Option<Group> {
        self.group.take()
    }

    /// What a killed guard can no longer remove.
    pub fn take_shm(&mut self) -> BTreeMap<PathBuf, u64> {
        std::mem::take(&mut self.shm)
    }

    /// The guard's pid, which the tree hangs below.
    pub fn root(&self) -> Option<Pid> {
        let pid = self.guard.id()?;
        i32::try_from(pid).ok().map(Pid::from_raw)
    }

    pub fn log_bytes(&self) -> u64 {
        self.log.bytes()
    }

    /// Call after `Empty` or `Lost`: reaps the guard and returns the log's last lines.
    pub async fn finish(mut self) -> Vec<String> {
        if tokio::time::timeout(EXIT_LIMIT, self.guard.wait())
            .await
            .is_err()
        {
            let _ = self.guard.start_kill();
            let _ = tokio::time::timeout(EXIT_LIMIT, self.guard.wait()).await;
        }
        drop(self.known);
        self.log.finish().await
    }

    async fn send(&self, command: &str) {
        let sending = async {
            loop {
                self.socket.writable().await?;
                match self.socket.try_write(command.as_bytes()) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
            }
        };
        // A guard that is gone is reported by `next`; one that is stuck, by the machine's clock.
        let _ = tokio::time::timeout(SEND_LIMIT, sending).await;
    }
}

fn take_line(input: &mut Vec<u8>) -> Option<String> {
    let end = input.iter().position(|byte| *byte == b'\n')?;
    let line: Vec<u8> = input.drain(..=end).collect();
    Some(String::from_utf8_lossy(&line).trim_end().to_owned())
}

fn parse(line: &str) -> Option<Status> {
    if line == "empty" {
        return Some(Status::Empty);
    }
    let (word, rest) = line.split_once(' ')?;
    match word {
        "spawned" => Some(Status::Spawned(rest.parse().ok()?)),
        "shm" => {
            let (inode, path) = rest.split_once(' ')?;
            Some(Status::Shm(path.into(), inode.parse().ok()?))
        }
        "failed" => Some(Status::SpawnFailed(rest.to_owned())),
        "exited" => {
            let mut words = rest.split(' ').skip(1);
            let (kind, number) = (words.next()?, words.next()?.parse().ok()?);
            let at = Duration::from_nanos(words.next()?.parse().ok()?);
            let exit = match kind {
                "code" => Exit::Code(number),
                "signal" => Exit::Signal(number),
                _ => return None,
            };
            let ago = clock().saturating_sub(at);
            Some(Status::Exited { exit, ago })
        }
        _ => None,
    }
}

/// Where a node's log is.
pub fn log_path(dir: &Path, node: &crate::fleet::NodeId) -> PathBuf {
    dir.join(format!("{node}.log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_parsed_and_nonsense_is_not() {
        assert_eq!(parse("spawned 12"), Some(Status::Spawned(12)));
        let exited = |line| match parse(line) {
            Some(Status::Exited { exit, ago }) => (exit, ago > Duration::ZERO),
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!(exited("exited 12 code 3 5"), (Exit::Code(3), true));
        assert_eq!(exited("exited 12 signal 9 5"), (Exit::Signal(9), true));
        assert_eq!(parse("empty"), Some(Status::Empty));
        assert_eq!(
            parse("shm 7 /dev/shm/a b"),
            Some(Status::Shm("/dev/shm/a b".into(), 7))
        );
        assert_eq!(
            parse("failed No such file"),
            Some(Status::SpawnFailed("No such file".into()))
        );
        for line in [
            "",
            "exited",
            "exited 1 code",
            "exited 1 code 3",
            "exited 1 shot 2 3",
            "spawned x",
            "shm x /dev/shm/a",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn lines_may_come_in_pieces() {
        let mut input = b"spawned 1\nexi".to_vec();
        assert_eq!(take_line(&mut input).as_deref(), Some("spawned 1"));
        assert_eq!(take_line(&mut input), None);
        input.extend(b"ted 1 code 0\n");
        assert_eq!(take_line(&mut input).as_deref(), Some("exited 1 code 0"));
    }
}
