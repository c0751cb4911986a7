//! What is left when pegaflow and a guard were killed in the same moment, as by a `kill -9` of both: the
//! leader dies with its guard, but its engine and workers have nobody who would end them. They are told by
//! their environment, which names the run directory, and ended by a guard of another node if one was spared,
//! else by the next `up` of that name.
//!
//! Why the kernel does not do it at once:
//!
//! - *A PID namespace for each node*, whose first process is the guard, would end with it. But it takes
//!   `CAP_SYS_ADMIN`, which containers rarely have, so that this here would be needed as well; the pids
//!   in vLLM's log and in the compiler caches that nodes share would be those of the namespace, the same in
//!   every node and known to no `ps`, `nvidia-smi` or `py-spy` outside.
//! - *A control group for each node* ends its processes with one write, but somebody alive has to write it.
//! - *The death signal of a parent* (as the leader has it) follows the thread that forked. The engine and
//!   workers are forked by vLLM, from whichever of its threads.
//!
//! What is left is rare, since a guard has another name than pegaflow: `pkill -9 pegaflow` spares it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use super::guard::{processes, shm};
use crate::instance;

const ROUND: Duration = Duration::from_millis(20);

/// What has become of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ended {
    pub gone: usize,
    /// Killed, and still there at the end of the limit: the kernel does not let go of them.
    pub stuck: Vec<i32>,
}

/// Kills what an earlier run in this directory has left, and waits until it is gone. The caller holds the
/// directory's lock, so nobody runs in it now, but for guards that are still at work: what is below one is
/// left to it.
///
/// Blocks; for `limit` at most.
pub fn end_orphans(run_dir: &Path, limit: Duration) -> Ended {
    let started = Instant::now();
    let mut seen: BTreeSet<Pid> = BTreeSet::new();
    let mut files = BTreeMap::new();
    loop {
        let orphans = orphans(run_dir);
        seen.extend(&orphans);
        if orphans.is_empty() || started.elapsed() >= limit {
            let gone = seen.len() - orphans.len();
            shm::remove(files);
            let stuck = orphans.into_iter().map(Pid::as_raw).collect();
            return Ended { gone, stuck };
        }
        for pid in orphans {
            files.extend(shm::mapped_by(pid));
            let _ = kill(pid, Signal::SIGKILL);
        }
        thread::sleep(ROUND);
    }
}

fn orphans(run_dir: &Path) -> Vec<Pid> {
    let all = processes::all();
    let guards = all.iter().map(|process| process.pid);
    let guards: Vec<Pid> = guards.filter(|pid| is_guard(*pid, run_dir)).collect();
    let mut others: BTreeSet<Pid> = processes::below(&all, guards).into_iter().collect();
    others.insert(getpid());
    // Every process of a node has it on its PYTHONPATH, and no other name's run directory ends so.
    let shim = instance::shim_dir(run_dir);
    let shim = shim.as_os_str().as_encoded_bytes();
    all.iter()
        .filter(|process| !process.zombie && !others.contains(&process.pid))
        .map(|process| process.pid)
        .filter(|pid| mentions(*pid, shim) && !is_guard(*pid, run_dir))
        .collect()
}

fn is_guard(pid: Pid, run_dir: &Path) -> bool {
    let arguments = read(pid, "cmdline");
    let mut arguments = arguments.split(|byte| *byte == 0);
    arguments.nth(1) == Some(b"__guard")
        && arguments.any(|argument| argument == run_dir.as_os_str().as_encoded_bytes())
}

fn read(pid: Pid, file: &str) -> Vec<u8> {
    fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default()
}

/// Whether a text occurs in a process's environment, which for others' processes cannot be read.
pub fn mentions(pid: Pid, text: &[u8]) -> bool {
    let environment = read(pid, "environ");
    !text.is_empty() && environment.windows(text.len()).any(|window| window == text)
}
