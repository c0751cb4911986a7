//! What a killed run of the same topology has left: processes that nobody ends any more, and memory of the
//! GPUs.
//!
//! After `kill -9` of pegaflow its guards take some seconds to end the nodes, and the driver frees a
//! dead process's memory a moment later still. An `up` in that time would find its GPUs busy:
//!
//! ```text
//!  look ─▶ fits? ─ yes ─▶ go on
//!   ▲        └─ no ─▶ would it without the leftovers? ─ no, or PATIENCE is over ─▶ refuse
//!   │                   └─ yes ─▶ say once what is waited for ─┐
//!   └──────────────────────────────────────────────────────────┘
//! ```

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::unistd::Pid;
use tokio::time::Instant;

use super::{Context, Exit};
use crate::host::{GpuHolder, HostSnapshot};
use crate::instance::Instance;
use crate::supervise;

/// A guard's grace and kill, and the driver's cleaning up after a large process.
const PATIENCE: Duration = Duration::from_secs(8);
/// From SIGKILL to the end of a process with much memory.
const ORPHANS: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// `PF_EXITING` of the kernel's `task_struct`.
const EXITING: u32 = 4;

/// Ends the engines and workers of an earlier run under this name whose guard was killed with it.
pub async fn end_orphans(cx: &Context, instance: &Instance) -> Result<(), Exit> {
    let dir = instance.dir().to_owned();
    let ended = blocking(cx, move || supervise::end_orphans(&dir, ORPHANS)).await?;
    if ended.gone > 0 {
        let count = ended.gone;
        tracing::warn!("ended {count} processes of an earlier run, whose guard was killed with it");
    }
    if !ended.stuck.is_empty() {
        let pids: Vec<String> = ended.stuck.iter().map(i32::to_string).collect();
        let pids = pids.join(", ");
        tracing::warn!("processes of an earlier run do not die of SIGKILL: pids {pids}");
    }
    Ok(())
}

/// The machine, once `fits` accepts it. Waits only for what leftovers will free.
pub async fn host_that_fits(
    cx: &Context,
    instance: &Instance,
    fits: impl Fn(&HostSnapshot) -> Result<(), Exit>,
) -> Result<HostSnapshot, Exit> {
    let started = Instant::now();
    let mut told = false;
    loop {
        let host = blocking(cx, HostSnapshot::take)
            .await?
            .map_err(|error| Exit::Machine(error.into()))?;
        let Err(refusal) = fits(&host) else {
            return Ok(host);
        };
        if host.gpus.is_empty() || started.elapsed() >= PATIENCE {
            return Err(refusal);
        }
        let run = EarlierRun {
            shim: instance.shim_dir().into_os_string().into_encoded_bytes(),
            was_killed: instance.follows_a_killed_one(),
        };
        let seen = host.clone();
        let held = blocking(cx, move || run.holds(&seen)).await?;
        if held.is_empty() || fits(&without(&host, &held)).is_err() {
            return Err(refusal);
        }
        if !told {
            told = true;
            let held: Vec<String> = held.iter().map(Held::describe).collect();
            tracing::info!(
                "waiting up to {} s for GPU memory that an earlier run still holds: {}",
                PATIENCE.as_secs(),
                held.join(", ")
            );
        }
        tokio::select! {
            () = cx.shutdown.graceful().cancelled() => return Err(Exit::Interrupted),
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
    }
}

/// NVML may hang with its driver; its thread is left behind then.
async fn blocking<T: Send + 'static>(
    cx: &Context,
    look: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Exit> {
    tokio::select! {
        () = cx.shutdown.graceful().cancelled() => Err(Exit::Interrupted),
        seen = tokio::task::spawn_blocking(look) => {
            seen.map_err(|error| Exit::failed("looking at the machine panicked", error))
        }
    }
}

/// Memory of one GPU that will be free soon.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    index: u32,
    /// Empty: the driver names nobody.
    pids: Vec<u32>,
    /// Bytes; `None`: unknown, perhaps all that is not free.
    memory: Option<u64>,
}

impl Held {
    fn describe(&self) -> String {
        let pids: Vec<String> = self.pids.iter().map(u32::to_string).collect();
        match pids.as_slice() {
            [] => format!("GPU {} (pids unknown)", self.index),
            pids => format!("GPU {} (pids {})", self.index, pids.join(", ")),
        }
    }
}

/// What tells the processes of an earlier run: we hold its name, so every one of them is to end.
struct EarlierRun {
    /// In the environment of each of its nodes.
    shim: Vec<u8>,
    was_killed: bool,
}

impl EarlierRun {
    fn holds(&self, host: &HostSnapshot) -> Vec<Held> {
        let held = host.gpus.iter().filter_map(|gpu| {
            let (pids, memory) = self.of(&gpu.holders)?;
            let index = gpu.index;
            Some(Held {
                index,
                pids,
                memory,
            })
        });
        held.collect()
    }

    /// The leftovers among a GPU's holders, if there are any or may be.
    fn of(&self, holders: &[GpuHolder]) -> Option<(Vec<u32>, Option<u64>)> {
        if holders.is_empty() {
            // The driver forgets a process before it frees its memory.
            return self.was_killed.then_some((Vec::new(), None));
        }
        let ours = holders.iter().filter(|holder| self.includes(holder.pid));
        let ours: Vec<&GpuHolder> = ours.collect();
        let memory = ours.iter().map(|holder| holder.memory).sum();
        let pids: Vec<u32> = ours.iter().map(|holder| holder.pid).collect();
        (!pids.is_empty()).then_some((pids, memory))
    }

    fn includes(&self, pid: u32) -> bool {
        let process = Path::new("/proc").join(pid.to_string());
        let Ok(stat) = fs::read(process.join("stat")) else {
            return true;
        };
        let id = Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX));
        is_ending(&String::from_utf8_lossy(&stat)) || supervise::mentions(id, &self.shim)
    }
}

/// A zombie, or a process that the kernel is taking down (`/proc/<pid>/stat`).
fn is_ending(stat: &str) -> bool {
    let Some((_, fields)) = stat.rsplit_once(") ") else {
        return false;
    };
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let state = fields.first().copied();
    let flags = fields.get(6).and_then(|flags| flags.parse::<u32>().ok());
    matches!(state, Some("Z" | "X")) || flags.is_some_and(|flags| flags & EXITING != 0)
}

/// The machine as it will be.
fn without(host: &HostSnapshot, held: &[Held]) -> HostSnapshot {
    let mut host = host.clone();
    for gpu in &mut host.gpus {
        let Some(held) = held.iter().find(|held| held.index == gpu.index) else {
            continue;
        };
        if let (Some(total), Some(free)) = (gpu.memory_total, gpu.memory_free) {
            let more = held.memory.unwrap_or(total);
            gpu.memory_free = Some(free.saturating_add(more).min(total));
        }
    }
    host
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Gpu;

    fn run(shim: &str, was_killed: bool) -> EarlierRun {
        EarlierRun {
            shim: shim.into(),
            was_killed,
        }
    }

    fn holder(pid: u32, memory: Option<u64>) -> GpuHolder {
        GpuHolder {
            pid,
            name: None,
            memory,
        }
    }

    #[test]
    fn an_ending_process_is_told_from_a_living_one() {
        assert!(is_ending("7 (a) b) Z 1 7 7 0 -1 4194560"));
        assert!(is_ending("7 (x) R 1 7 7 0 -1 4194564 0"));
        assert!(is_ending("7 (x) D 1 7 7 0 -1 4 0"));
        assert!(!is_ending("7 (x) S 1 7 7 0 -1 4194304 0"));
        assert!(!is_ending("7 (Z) S 1 7 7 0 -1 4194304 0"));
        assert!(!is_ending("garbage"));
    }

    #[test]
    fn the_dead_and_our_own_count_and_strangers_do_not() {
        let stranger = holder(std::process::id(), Some(5));
        // Above the largest pid that Linux gives.
        let dead = holder(4_194_305, Some(7));
        let nobody = run("/no/such/run/shim", true);
        assert_eq!(nobody.of(std::slice::from_ref(&stranger)), None);
        assert_eq!(
            nobody.of(&[stranger.clone(), dead.clone()]),
            Some((vec![dead.pid], Some(7)))
        );
        let unknown = holder(dead.pid, None);
        assert_eq!(nobody.of(&[dead.clone(), unknown]).unwrap().1, None);
        // Every process of this test has its own PATH, or at least some variable.
        let environment = fs::read("/proc/self/environ").unwrap();
        let own = EarlierRun {
            shim: environment.iter().copied().take(8).collect(),
            was_killed: false,
        };
        assert_eq!(
            own.of(std::slice::from_ref(&stranger)),
            Some((vec![stranger.pid], Some(5)))
        );
    }

    #[test]
    fn memory_that_nobody_holds_is_waited_for_only_after_a_kill() {
        assert_eq!(run("x", true).of(&[]), Some((Vec::new(), None)));
        assert_eq!(run("x", false).of(&[]), None);
    }

    #[test]
    fn what_leftovers_hold_counts_as_free_and_no_more() {
        let gpu = |index| Gpu {
            index,
            memory_total: Some(100),
            memory_free: Some(10),
            ..Gpu::default()
        };
        let host = HostSnapshot {
            gpus: vec![gpu(0), gpu(1), gpu(2)],
            ..HostSnapshot::default()
        };
        let held = |index, memory| Held {
            index,
            pids: Vec::new(),
            memory,
        };
        let later = without(&host, &[held(0, Some(30)), held(1, None)]);
        let free: Vec<_> = later.gpus.iter().map(|gpu| gpu.memory_free).collect();
        assert_eq!(free, [Some(40), Some(100), Some(10)]);
    }
}
