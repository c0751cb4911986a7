//! What this machine has: one look at it, for a plan that is made without looking again.
//!
//! Nothing here needs a GPU or its driver: NVML is loaded at run time, and a machine without it
//! simply has no GPUs, with the reason in [`NvmlStatus`].

use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

mod cuda;
mod disk;
mod files;
mod gpu_watch;
mod gpus;
mod memory;
mod numa;
mod ports;
#[cfg(test)]
mod testing;

pub use cuda::{GpuProbe, GpuProbeError, probe_gpu};
pub use disk::{Space, space};
pub use files::raise_open_files;
pub use gpu_watch::{GpuFigures, GpuWatch, GpuWatcher};
pub use gpus::{DriverVersions, GpuFindings, GpuHolder, GpuPath, Link, take_gpus};
pub use memory::{
    HUGE_PAGE, HugePages, Memlock, MemoryFacts, ShmemThp, memory_available, raise_memlock,
};
pub use numa::NumaNode;
pub use ports::{PORTS_PER_NODE, PortRanges, claim_ports, is_own};

use crate::topology::PciAddress;

/// The machine at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSnapshot {
    /// Cores that this process may use, ascending.
    pub cpus: Vec<usize>,
    /// They multiply matrices of bfloat16 in tiles (Intel's AMX).
    #[serde(default)]
    pub amx: bool,
    /// Bytes: the machine's, or the control group's where that is less.
    pub memory_total: u64,
    /// Bytes of it that can be had without swapping.
    pub memory_available: u64,
    pub memory: MemoryFacts,
    /// By index; those that `CUDA_VISIBLE_DEVICES` hides are left out.
    pub gpus: Vec<Gpu>,
    /// How close they are, each pair once; pairs that the driver tells nothing of are left out.
    pub gpu_paths: Vec<GpuPath>,
    /// GPUs that NVML counts, but that do not answer, by NVML's index.
    pub lost_gpus: Vec<u32>,
    pub nvml: NvmlStatus,
    /// Where NVML tells them.
    pub driver: Option<DriverVersions>,
}

/// One GPU as NVML sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// In PCI bus order, as CUDA counts under `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    pub index: u32,
    pub uuid: String,
    pub pci: Option<PciAddress>,
    pub name: String,
    /// Bytes; `None` where the driver does not say.
    pub memory_total: Option<u64>,
    pub memory_free: Option<u64>,
    /// The GPU is split into MIG instances.
    pub mig: bool,
    /// The NUMA node that it is attached to, where that is known.
    pub numa_node: Option<u32>,
    /// Processes that hold memory of it; those that the driver does not tell are missing.
    pub holders: Vec<GpuHolder>,
}

/// Whether GPUs could be looked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NvmlStatus {
    #[default]
    Available,
    /// The library is not installed.
    Missing(String),
    /// The library is there, but does not work.
    Failed(String),
}

/// Why the machine could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("cannot read which cores this process may use: {0}")]
    Affinity(#[source] Errno),
    #[error("cannot read /proc/meminfo: {0}")]
    Memory(#[source] io::Error),
    #[error("/proc/meminfo has no {0}")]
    MemoryField(&'static str),
    #[error(
        "found {found} of {wanted} free port ranges on 127.0.0.1; write `port` in the [[node]]s"
    )]
    Ports { wanted: usize, found: usize },
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    #[error(
        "the GPU driver has not answered for {} s: look for Xid and nvidia in the kernel's log \
         (dmesg), see whether nvidia-smi answers, and reboot if it does not",
        limit.as_secs()
    )]
    Silent { limit: Duration },
}

impl HostSnapshot {
    /// Looks at the machine. Blocks while the GPU driver answers: seconds, when it is asleep.
    pub fn take() -> Result<Self, HostError> {
        let root = Path::new("/");
        let amount = memory::amount(root)?;
        let found = take_gpus();
        Ok(Self {
            cpus: cores()?,
            amx: has_amx(root),
            memory_total: amount.total,
            memory_available: amount.available,
            memory: MemoryFacts::read(root, amount.limited),
            gpus: found.gpus,
            gpu_paths: found.paths,
            lost_gpus: found.lost,
            nvml: found.nvml,
            driver: found.driver,
        })
    }
}

/// [`HostSnapshot::take`] on a thread that is left behind if the GPU driver hangs.
pub fn look_within(limit: Duration) -> Result<HostSnapshot, HostError> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let look = move || {
        // Nobody listens any more after the limit.
        let _ = sender.send(HostSnapshot::take());
    };
    let thread = thread::Builder::new().name("host".to_owned()).spawn(look);
    thread.map_err(HostError::Thread)?;
    receiver
        .recv_timeout(limit)
        .unwrap_or(Err(HostError::Silent { limit }))
}

fn cores() -> Result<Vec<usize>, HostError> {
    let set = sched_getaffinity(Pid::from_raw(0)).map_err(HostError::Affinity)?;
    Ok((0..CpuSet::count())
        .filter(|core| set.is_set(*core).unwrap_or(false))
        .collect())
}

/// A file that cannot be read says nothing.
fn has_amx(root: &Path) -> bool {
    let text = std::fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("flags"))
        .is_some_and(|flags| {
            flags
                .split_ascii_whitespace()
                .any(|flag| flag == "amx_bf16")
        })
}

/// A field of /proc/meminfo in bytes.
fn memory_field(meminfo: &str, field: &'static str) -> Result<u64, HostError> {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .ok_or(HostError::MemoryField(field))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_cores_and_memory() {
        let host = HostSnapshot::take().unwrap();
        assert!(!host.cpus.is_empty());
        assert!(host.cpus.is_sorted());
        assert!(host.memory_available > 0 && host.memory_available <= host.memory_total);
    }

    #[test]
    fn amx_is_a_flag_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("proc")).unwrap();
        for (text, amx) in [
            ("flags\t\t: fpu avx512f amx_bf16 amx_tile\n", true),
            (
                "model name: amx_bf16\nflags\t: fpu amx_bf16x amx_tile\n",
                false,
            ),
            ("", false),
        ] {
            std::fs::write(root.path().join("proc/cpuinfo"), text).unwrap();
            assert_eq!(has_amx(root.path()), amx, "{text}");
        }
        assert!(!has_amx(&root.path().join("nowhere")));
    }

    #[test]
    fn meminfo_is_read_by_its_exact_field() {
        let text = "MemTotalX:  1 kB\nMemTotal:     16 kB\nMemFree: 3 kB\n";
        assert_eq!(memory_field(text, "MemTotal").unwrap(), 16 * 1024);
        assert!(matches!(
            memory_field(text, "MemAvailable"),
            Err(HostError::MemoryField("MemAvailable"))
        ));
    }
}
