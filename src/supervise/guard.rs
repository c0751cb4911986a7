//! The guard: one tiny single-threaded process per node, between pegaflow and vLLM. Helpers that
//! `runtime::child` starts (uv, downloads) run under one as well.
//!
//! It exists because only a parent that outlives everybody can promise that nothing is left. It
//! is the subreaper of the node's tree, so whatever the tree does (setsid, double fork, a killed
//! API server), its processes stay descendants of the guard until the guard has reaped them.
//!
//! ```text
//!           leader exits ─────────────────────────────┐
//! Running ──────────────▶ Stopping ── grace over ──▶ Killing ── no child left ──▶ empty, exit
//!     stop N / EOF (TERM the leader once)                ▲
//!     kill ──────────────────────────────────────────────┘
//! ```
//!
//! Standard input is one end of a socket pair. Lines in: `stop <grace ms>`, `kill`; end of file
//! means that pegaflow is dead, which stops the node and removes the run directory.
//! Lines out: `spawned <pid>`, `failed <why>`, `exited <pid> code|signal <n> <clock>`, `shm <inode> <path>` (a file of
//! the tree's in /dev/shm, for whoever outlives the guard), `empty`. Standard output and error are the
//! node's log.

mod cleanup;
mod place;
pub(super) mod processes;
pub(super) mod shm;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, getpid, getppid, setsid, write};

use super::cgroup::Group;
use shm::Shm;

/// From pegaflow's death to KILL: the whole tree must be gone within five seconds.
const ORPHAN_GRACE: Duration = Duration::from_secs(2);
const SHM_SCAN: Duration = Duration::from_secs(1);
/// A file that has just appeared is mapped by then. Also the shortest time between two scans for such.
const SHM_SETTLE: Duration = Duration::from_millis(20);
const KILL_ROUND: Duration = Duration::from_millis(10);
const MAX_COMMAND: usize = 4096;

/// `pegaflow __guard --node NAME [--run-dir DIR] [--private-shm] [--cgroup DIR] [--cpus 0,1] [--numa 0] -- argv...`
#[derive(Debug, clap::Args)]
pub struct GuardArgs {
    /// Whose guard it is, to be seen in `ps`.
    #[arg(long)]
    pub node: String,
    /// Removed when pegaflow has died and nobody else owns its `lock`.
    #[arg(long)]
    pub run_dir: Option<PathBuf>,
    /// Give the tree a /dev/shm of its own where the kernel allows it.
    #[arg(long)]
    pub private_shm: bool,
    /// The control group for the tree; made, emptied and removed by the guard.
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// The only cores that the tree may run on.
    #[arg(long, value_delimiter = ',')]
    pub cpus: Vec<usize>,
    /// The NUMA nodes whose memory the tree takes first.
    #[arg(long, value_delimiter = ',')]
    pub numa: Vec<u32>,
    /// The leader.
    #[arg(last = true, required = true)]
    pub argv: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
enum GuardError {
    #[error("cannot take over standard input")]
    Control(#[source] io::Error),
    #[error("cannot prepare signals")]
    Signals(#[source] Errno),
    #[error("cannot become a subreaper")]
    Subreaper(#[source] Errno),
    #[error("cannot wait for events")]
    Poll(#[source] Errno),
}

/// The body of the hidden subcommand `__guard`. Must run before the process starts a thread.
pub fn guard_main(args: GuardArgs) -> ExitCode {
    let node = args.node.clone();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            eprintln!(
                "pegaflow guard of {node}: {error}: {}",
                source.unwrap_or_default()
            );
            ExitCode::FAILURE
        }
    }
}

fn run(args: GuardArgs) -> Result<(), GuardError> {
    // `pkill pegaflow` is to spare who cleans up after pegaflow. Fails for no valid name.
    let _ = prctl::set_name(c"pega-guard");
    // Fails only for a process group leader, which then has a group of its own already.
    let _ = setsid();
    prctl::set_child_subreaper(true).map_err(GuardError::Subreaper)?;
    let signals = block_signals().map_err(GuardError::Signals)?;
    let control = take_control().map_err(GuardError::Control)?;
    let shm = Shm::prepare(args.private_shm);
    place::prefer_memory(&args.numa);
    let group = args.cgroup.map(Group::at);
    let leader = place::confine(&args.cpus).and_then(|()| {
        let door = group.as_ref().and_then(enter);
        spawn_leader(&args.argv, door)
    });
    let mut guard = match leader {
        Ok(leader) => Guard::new(control, leader, shm, group),
        Err(error) => {
            group.iter().for_each(Group::remove);
            report(&control, &format!("failed {error}\nempty"));
            return Ok(());
        }
    };
    guard.watch(&signals)?;
    guard.shm.remove_owned();
    guard.group.iter().for_each(Group::remove);
    report(&guard.control, "empty");
    if let (true, Some(run_dir)) = (guard.orphaned, &args.run_dir) {
        cleanup::remove_run_dir(run_dir);
    }
    Ok(())
}

/// SIGCHLD becomes readable; what a terminal sends stays pending for ever.
fn block_signals() -> Result<SignalFd, Errno> {
    let mut blocked = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
    ] {
        blocked.add(signal);
    }
    blocked.thread_block()?;
    let mut child = SigSet::empty();
    child.add(Signal::SIGCHLD);
    SignalFd::with_flags(&child, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

fn take_control() -> io::Result<UnixStream> {
    let control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    control.set_nonblocking(true)?;
    Ok(control)
}

/// Without one the tree is ended process by process.
fn enter(group: &Group) -> Option<File> {
    let dir = group.dir().display();
    let made = group.make();
    made.inspect_err(|error| eprintln!("pegaflow guard: no control group {dir}: {error}"))
        .ok()
}

fn spawn_leader(argv: &[OsString], door: Option<File>) -> io::Result<Pid> {
    let Some((program, arguments)) = argv.split_first() else {
        return Err(io::Error::new(ErrorKind::InvalidInput, "no program given"));
    };
    let guard = getpid();
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    let in_leader = move || {
        // std keeps the parent's mask, and the guard's would make the leader deaf to TERM.
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        if let Some(door) = &door {
            write(door, b"0")?;
        }
        if getppid() != guard {
            return Err(ErrorKind::BrokenPipe.into());
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls (sigprocmask, prctl, write,
    // getppid); it allocates nothing and takes no lock.
    #[expect(unsafe_code, reason = "the death signal must be set in the child")]
    let child = unsafe { command.pre_exec(in_leader) }.spawn();
    // The guard waits with waitpid(-1) for everybody, so the handle is not needed.
    Ok(Pid::from_raw(i32::try_from(child?.id()).unwrap_or(-1)))
}

#[derive(Debug, Clone, Copy)]
enum Mode {
    Running,
    Stopping { deadline: Instant },
    Killing,
}

struct Guard {
    control: UnixStream,
    input: Vec<u8>,
    leader: Pid,
    leader_alive: bool,
    termed: bool,
    mode: Mode,
    /// pegaflow is dead.
    orphaned: bool,
    shm: Shm,
    /// The next look is due after [`SHM_SETTLE`]: a file has appeared.
    settling: bool,
    group: Option<Group>,
}

impl Guard {
    fn new(control: UnixStream, leader: Pid, shm: Shm, group: Option<Group>) -> Self {
        report(&control, &format!("spawned {leader}"));
        Self {
            control,
            input: Vec::new(),
            leader,
            leader_alive: true,
            termed: false,
            mode: Mode::Running,
            orphaned: false,
            shm,
            settling: false,
            group,
        }
    }

    /// Returns when no descendant is left.
    fn watch(&mut self, signals: &SignalFd) -> Result<(), GuardError> {
        loop {
            self.wait(signals)?;
            while let Ok(Some(_)) = signals.read_signal() {}
            self.settling = self.shm.take_appeared();
            if !self.orphaned {
                self.read_control();
            }
            if self.reap() {
                return Ok(());
            }
            if matches!(self.mode, Mode::Stopping { deadline } if Instant::now() >= deadline) {
                self.mode = Mode::Killing;
            }
            let tree = match self.mode {
                Mode::Killing => processes::descendants(getpid()),
                _ if self.shm.wants_notes() => processes::descendants(getpid()),
                _ => continue,
            };
            self.note(&tree);
            if matches!(self.mode, Mode::Killing) {
                self.group.iter().for_each(Group::kill);
                for pid in tree {
                    // Gone already: the next round will not see it.
                    let _ = kill(pid, Signal::SIGKILL);
                }
            }
        }
    }

    fn note(&mut self, tree: &[Pid]) {
        for (path, inode) in self.shm.note(tree) {
            let path = path.display();
            report(&self.control, &format!("shm {inode} {path}"));
        }
    }

    fn wait(&self, signals: &SignalFd) -> Result<(), GuardError> {
        let scan = if self.settling { SHM_SETTLE } else { SHM_SCAN };
        let mut limit = self.shm.wants_notes().then_some(scan);
        let wanted = match self.mode {
            Mode::Running => None,
            Mode::Stopping { deadline } => Some(deadline.saturating_duration_since(Instant::now())),
            Mode::Killing => Some(KILL_ROUND),
        };
        if let Some(wanted) = wanted {
            limit = Some(limit.map_or(wanted, |limit| limit.min(wanted)));
        }
        let timeout = limit.map_or(PollTimeout::NONE, |limit| {
            // One more millisecond: the poll must not end just before the deadline.
            let millis = limit.as_millis().saturating_add(1);
            PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = vec![readable(signals.as_fd())];
        if !self.orphaned {
            fds.push(readable(self.control.as_fd()));
        }
        if let (Some(appeared), false) = (self.shm.appeared(), self.settling) {
            fds.push(readable(appeared));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(GuardError::Poll(error)),
        }
    }

    fn read_control(&mut self) {
        let mut buffer = [0u8; 512];
        loop {
            match self.control.read(&mut buffer) {
                Ok(0) => return self.orphan(),
                Ok(count) => {
                    self.input.extend(buffer.iter().take(count));
                    self.obey_lines();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => return self.orphan(),
            }
        }
    }

    fn obey_lines(&mut self) {
        while let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.input.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let mut words = line.split_whitespace();
            match (words.next(), words.next().map(str::parse)) {
                (Some("stop"), Some(Ok(millis))) => self.stop(Duration::from_millis(millis)),
                (Some("kill"), None) => self.mode = Mode::Killing,
                _ => eprintln!("pegaflow guard: unknown command {:?}", line.trim_end()),
            }
        }
        if self.input.len() > MAX_COMMAND {
            self.input.clear();
        }
    }

    fn orphan(&mut self) {
        self.orphaned = true;
        self.stop(ORPHAN_GRACE);
    }

    /// TERM goes to the leader only: vLLM's workers would exit at once and break its own stop.
    fn stop(&mut self, grace: Duration) {
        if self.leader_alive && !self.termed {
            self.termed = true;
            if self.shm.wants_notes() {
                self.note(&processes::descendants(getpid()));
            }
            let _ = kill(self.leader, Signal::SIGTERM);
        }
        let wanted = Instant::now() + grace;
        self.mode = match self.mode {
            Mode::Running => Mode::Stopping { deadline: wanted },
            Mode::Stopping { deadline } => Mode::Stopping {
                deadline: deadline.min(wanted),
            },
            Mode::Killing => Mode::Killing,
        };
    }

    /// True when the tree is empty.
    fn reap(&mut self) -> bool {
        loop {
            let status = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => return false,
                Ok(status) => status,
                Err(Errno::EINTR) => continue,
                Err(_) => return true,
            };
            if status.pid() == Some(self.leader) {
                self.leader_exited(status);
            }
        }
    }

    fn leader_exited(&mut self, status: WaitStatus) {
        let how = match status {
            WaitStatus::Exited(_, code) => format!("code {code}"),
            WaitStatus::Signaled(_, signal, _) => format!("signal {}", signal as i32),
            _ => return,
        };
        let at = clock().as_nanos();
        report(&self.control, &format!("exited {} {how} {at}", self.leader));
        self.leader_alive = false;
        self.mode = Mode::Killing;
    }
}

/// A clock that all processes of the machine share; zero where there is none.
pub(super) fn clock() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// Nobody may be listening any more; the socket's buffer holds all that a guard ever says.
fn report(mut control: &UnixStream, line: &str) {
    let _ = control.write_all(format!("{line}\n").as_bytes());
}
