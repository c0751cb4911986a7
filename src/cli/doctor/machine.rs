//! Judgements on what the machine is. Pure.

use bytesize::ByteSize;

use super::finding::Finding;
use super::finding::Status::{Failed, NotChecked, Warning};
use crate::host::{Gpu, HUGE_PAGE, HostSnapshot, NvmlStatus, Space};
use crate::topology::{Device, Topology};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Without a topology: its default `[kv] capacity`.
const USUAL_CAPACITY: u64 = 8 * GIB;
/// What Docker gives by default; vLLM's ranks need more.
const DOCKER_SHM: u64 = 64 * MIB;

/// For whom it is looked at.
#[derive(Clone, Copy)]
pub struct Wanted {
    /// `None`: no topology was given.
    pub device: Option<Device>,
    /// Of the store.
    pub capacity: u64,
}

impl Wanted {
    pub fn of(topology: Option<&Topology>, host: &HostSnapshot) -> Self {
        Self {
            device: topology.map(|topology| topology.device),
            capacity: topology.map_or(USUAL_CAPACITY, |topology| {
                topology.kv.capacity.bytes(host.memory_total)
            }),
        }
    }
}

pub fn driver(host: &HostSnapshot, wanted: Wanted) -> Finding {
    let (what, remedy) = match &host.nvml {
        NvmlStatus::Available if host.gpus.is_empty() && host.lost_gpus.is_empty() => (
            "the NVIDIA driver shows no GPU".to_owned(),
            "see what `nvidia-smi -L` and CUDA_VISIBLE_DEVICES say; start a container with --gpus all",
        ),
        NvmlStatus::Available => {
            let count = host.gpus.len() + host.lost_gpus.len();
            let versions = host.driver.as_ref().map_or_else(
                || "an NVIDIA driver of unknown version".to_owned(),
                ToString::to_string,
            );
            return Finding::ok("driver", format!("{versions}; GPUs: {count}"));
        }
        NvmlStatus::Missing(why) => (
            format!("no NVIDIA driver: {why}"),
            "install the driver, start a container with --gpus all, or name libnvidia-ml.so.1 in \
             PEGAFLOW_NVML_LIBRARY; without GPUs use a topology with device = \"cpu\"",
        ),
        NvmlStatus::Failed(why) => (
            format!("the NVIDIA driver does not work: {why}"),
            "see what nvidia-smi and the kernel's log (dmesg) say; after an update of the driver, \
             reboot",
        ),
    };
    let remedy = remedy.to_owned();
    let status = match wanted.device {
        Some(Device::Cuda) => Failed(remedy),
        Some(Device::Cpu) => NotChecked("nothing: this topology uses no GPU".to_owned()),
        None => NotChecked(remedy),
    };
    Finding::new("driver", status, what)
}

pub fn gpus(host: &HostSnapshot) -> Vec<Finding> {
    let lost = host.lost_gpus.iter().map(|index| {
        let remedy = format!(
            "look for Xid in the kernel's log (dmesg); nvidia-smi -r -i {index} resets it, a reboot too"
        );
        Finding::new(format!("gpu {index}"), Failed(remedy), "does not answer")
    });
    host.gpus.iter().map(gpu).chain(lost).collect()
}

fn gpu(gpu: &Gpu) -> Finding {
    let check = format!("gpu {}", gpu.index);
    let index = gpu.index;
    if gpu.mig {
        let remedy = format!("nvidia-smi -i {index} -mig 0 joins them; pegaflow gives whole GPUs");
        let what = format!("{} is split into MIG instances", gpu.name);
        return Finding::new(check, Warning(remedy), what);
    }
    let (Some(total), Some(free)) = (gpu.memory_total, gpu.memory_free) else {
        return Finding::ok(check, format!("{}; its memory is not told", gpu.name));
    };
    let what = format!(
        "{}, {} of {} free",
        gpu.name,
        ByteSize(free),
        ByteSize(total)
    );
    // What a node takes unless it says otherwise.
    if free >= total / 10 * 9 {
        return Finding::ok(check, what);
    }
    let who = crate::plan::holders(gpu);
    let held = if who.is_empty() {
        "held by nobody that the driver names".to_owned()
    } else {
        format!("held by {who}")
    };
    let remedy = "stop what uses it, or write a smaller gpu_memory_fraction";
    Finding::new(check, Warning(remedy.to_owned()), format!("{what}, {held}"))
}

pub fn hugepages(host: &HostSnapshot, wanted: Wanted) -> Finding {
    let pool = host.memory.hugepages;
    let needed = wanted.capacity.div_ceil(HUGE_PAGE);
    let what = format!("{} of {} huge pages of 2 MiB free", pool.free, pool.total);
    if pool.free >= needed {
        return Finding::ok("hugepages", what);
    }
    let total = (pool.total - pool.free.min(pool.total)) + needed;
    let remedy = format!(
        "optional: for a store of {}, `sudo sysctl -w vm.nr_hugepages={total}`, best right after boot",
        ByteSize(wanted.capacity)
    );
    Finding::new("hugepages", Warning(remedy), what)
}

pub fn memlock(host: &HostSnapshot, wanted: Wanted) -> Finding {
    let memlock = host.memory.memlock;
    match memlock.hard {
        Some(hard) if !memlock.exempt && hard < wanted.capacity => {
            let what = format!(
                "a process may lock {}, and the store of {} is registered with the GPUs",
                ByteSize(hard),
                ByteSize(wanted.capacity)
            );
            let remedy = "LimitMEMLOCK=infinity in a systemd unit, --ulimit memlock=-1 for a \
                          container, `* - memlock unlimited` in /etc/security/limits.conf for logins";
            let status = match wanted.device {
                Some(Device::Cpu) => return Finding::ok("memlock", "not needed on CPUs"),
                Some(Device::Cuda) | None => Warning(remedy.to_owned()),
            };
            Finding::new("memlock", status, what)
        }
        _ => Finding::ok("memlock", "enough memory may be locked"),
    }
}

pub fn shm(space: std::io::Result<Space>) -> Finding {
    let remedy = "for a container: --shm-size=8g or --ipc=host; else \
                  `sudo mount -o remount,size=50% /dev/shm`"
        .to_owned();
    match space {
        Err(error) => Finding::new(
            "/dev/shm",
            Failed(remedy),
            format!("cannot be used: {error}"),
        ),
        Ok(Space { total, free }) => {
            let what = format!("{} of {} free", ByteSize(free), ByteSize(total));
            let status = match free {
                _ if total <= DOCKER_SHM => Failed(remedy),
                free if free < GIB => Warning(remedy),
                _ => return Finding::ok("/dev/shm", what),
            };
            Finding::new("/dev/shm", status, what)
        }
    }
}

/// A place that grows, with the room that it needs to work at all and to work well.
pub struct Room {
    pub check: &'static str,
    pub path: std::path::PathBuf,
    pub least: u64,
    pub good: u64,
    pub remedy: &'static str,
}

impl Room {
    pub fn judge(&self, space: std::io::Result<Space>) -> Finding {
        let path = self.path.display();
        let remedy = self.remedy.to_owned();
        match space {
            Err(error) => Finding::new(self.check, Failed(remedy), format!("{path}: {error}")),
            Ok(Space { free, .. }) => {
                let what = format!("{path}: {} free", ByteSize(free));
                match free {
                    free if free < self.least => Finding::new(self.check, Failed(remedy), what),
                    free if free < self.good => Finding::new(self.check, Warning(remedy), what),
                    _ => Finding::ok(self.check, what),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
