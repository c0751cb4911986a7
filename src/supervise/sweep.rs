//! What is left when a guard was killed: its tree, now reparented to pegaflow.
//!
//! pegaflow is a subreaper, so the orphans of a dead guard become its own children. They are told
//! from what pegaflow itself started by two marks: a guard is registered here, and anything else
//! that pegaflow starts beside its nodes stays in pegaflow's session, while a guard's tree has left it
//! for good. (The guards of installs and downloads have ended before the first node starts.)

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getpid, getsid};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use super::guard::processes;

const ROUND: Duration = Duration::from_millis(20);
const UNCLAIMED: Duration = Duration::from_secs(1);

/// The guards of this process. One table per process, as there is one list of children.
static GUARDS: Mutex<BTreeSet<Pid>> = Mutex::new(BTreeSet::new());

fn guards() -> MutexGuard<'static, BTreeSet<Pid>> {
    GUARDS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While it lives, no sweep touches the guard or its tree.
#[derive(Debug)]
pub struct KnownGuard(Pid);

impl Drop for KnownGuard {
    fn drop(&mut self) {
        guards().remove(&self.0);
    }
}

/// Starts a guard and registers it in one step: no sweep may see it in between.
pub fn spawn_guard(command: &mut Command) -> io::Result<(Child, KnownGuard)> {
    let mut guards = guards();
    let child = command.spawn()?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let pid = Pid::from_raw(pid.unwrap_or_default());
    guards.insert(pid);
    Ok((child, KnownGuard(pid)))
}

/// Kills and reaps strays until none is left. False if some are left at the end of `limit`.
pub async fn sweep(limit: Duration) -> bool {
    let rounds = async {
        while round() {
            tokio::time::sleep(ROUND).await;
        }
    };
    tokio::time::timeout(limit, rounds).await.is_ok()
}

/// Reaps what pegaflow inherits as the first process of a container: orphans of `docker exec`, and
/// whatever else loses its parent there. Does not end by itself.
///
/// A child of pegaflow's own is waited for at once by whoever started it, so a zombie that is still
/// there after [`UNCLAIMED`] is nobody's.
pub async fn reap_adopted() {
    let Ok(mut ended) = signal(SignalKind::child()) else {
        tracing::warn!("cannot listen for SIGCHLD; zombies of others will stay");
        return;
    };
    loop {
        let seen = zombies();
        if !seen.is_empty() {
            tokio::time::sleep(UNCLAIMED).await;
            for pid in zombies().intersection(&seen) {
                let _ = waitpid(*pid, Some(WaitPidFlag::WNOHANG));
            }
        }
        ended.recv().await;
    }
}

/// Dead children that are no guards.
fn zombies() -> BTreeSet<Pid> {
    let guards = guards();
    processes::all()
        .iter()
        .filter(|process| process.parent == getpid() && process.zombie)
        .map(|process| process.pid)
        .filter(|pid| !guards.contains(pid))
        .collect()
}

/// True if there was a stray.
fn round() -> bool {
    let guards = guards();
    let own_session = getsid(None).unwrap_or(Pid::from_raw(0));
    let processes = processes::all();
    let strays: Vec<_> = processes
        .iter()
        .filter(|process| process.parent == getpid() && process.session != own_session)
        .filter(|process| !guards.contains(&process.pid))
        .map(|process| process.pid)
        .collect();
    let mut found = false;
    for pid in processes::below(&processes, strays.iter().copied()) {
        found |= kill(pid, Signal::SIGKILL).is_ok();
    }
    for pid in strays {
        let _ = kill(pid, Signal::SIGKILL);
        found |= !matches!(waitpid(pid, Some(WaitPidFlag::WNOHANG)), Err(Errno::ECHILD));
    }
    found
}
