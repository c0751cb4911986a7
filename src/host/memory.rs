//! Memory as a store needs it: how much there is, in which pages, and how much may be locked.
//!
//! ```text
//! /proc/meminfo, /proc/self/cgroup ─ /sys/fs/cgroup/**/memory.{max,high,current,stat}  how much
//! /sys/kernel/mm/hugepages, transparent_hugepage/shmem_enabled                         which pages
//! /sys/devices/system/node                                                ([`super::numa`]) where
//! ```
//!
//! Everything is read below a root directory, so that tests can bring a machine of their own. What
//! cannot be read is absent: only `/proc/meminfo` must be there.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::numa::{self, NumaNode};
use super::{HostError, memory_field};

/// The size of the huge pages that are looked for: 2 MiB, on every 64-bit x86 and ARM with 4 KiB pages.
pub const HUGE_PAGE: u64 = 2 << 20;
/// `CAP_IPC_LOCK`.
const IPC_LOCK: u32 = 14;

/// What the machine's memory is like.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFacts {
    /// This process is in a control group with a limit below the machine's memory.
    pub limited: bool,
    pub hugepages: HugePages,
    pub shmem_thp: ShmemThp,
    /// Those that have memory, ascending; one on most machines, none where the kernel knows none.
    pub numa: Vec<NumaNode>,
    pub memlock: Memlock,
}

/// The pool of 2 MiB pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugePages {
    pub total: u64,
    /// Neither used nor promised to anybody.
    pub free: u64,
}

/// What the kernel does about transparent huge pages in shared memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShmemThp {
    #[default]
    Never,
    /// Where they are asked for.
    Advise,
    /// Without being asked.
    Always,
}

/// How much memory this process and its children may lock (and so, register with a GPU).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memlock {
    /// Bytes; `None`: unlimited.
    pub soft: Option<u64>,
    /// Up to which a process may raise its own limit.
    pub hard: Option<u64>,
    /// The process has `CAP_IPC_LOCK`: limits do not apply to it.
    pub exempt: bool,
}

/// How much memory there is for this process, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Amount {
    pub(super) total: u64,
    /// Without swapping.
    pub(super) available: u64,
    pub(super) limited: bool,
}

impl MemoryFacts {
    pub(super) fn read(root: &Path, limited: bool) -> Self {
        Self {
            limited,
            hugepages: hugepages(root),
            shmem_thp: shmem_thp(root),
            numa: numa::nodes(root),
            memlock: memlock(root),
        }
    }
}

/// The machine's memory, or the control group's where that is less.
pub(super) fn amount(root: &Path) -> Result<Amount, HostError> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).map_err(HostError::Memory)?;
    let total = memory_field(&meminfo, "MemTotal")?;
    let available = memory_field(&meminfo, "MemAvailable")?;
    let groups = groups(root);
    let limits = groups.iter().filter_map(|group| group_memory(group));
    let limited = limits.clone().any(|limit| limit.total < total);
    Ok(limits.fold(
        Amount {
            total,
            available,
            limited,
        },
        |least, limit| Amount {
            total: least.total.min(limit.total),
            available: least.available.min(limit.available),
            limited,
        },
    ))
}

/// Bytes that can be had right now without swapping, on one NUMA node or on all.
pub fn memory_available(node: Option<u32>) -> Option<u64> {
    let root = Path::new("/");
    let all = amount(root).ok()?.available;
    Some(match node {
        Some(node) => all.min(numa::available(root, node)?),
        None => all,
    })
}

/// Raises the soft limit of lockable memory to the hard one; children inherit it. The limit before
/// and after.
pub fn raise_memlock() -> nix::Result<(Memlock, Memlock)> {
    let before = memlock(Path::new("/"));
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
    if soft != hard {
        setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard)?;
    }
    Ok((before, memlock(Path::new("/"))))
}

/// The version 2 control groups around this process, innermost first.
fn groups(root: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let Some(path) = text.lines().find_map(|line| line.strip_prefix("0::")) else {
        return Vec::new();
    };
    // The second is where a machine that still uses version 1 keeps version 2.
    let mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"].map(|mount| root.join(mount));
    let Some(mount) = mounts
        .into_iter()
        .find(|mount| mount.join("cgroup.controllers").exists())
    else {
        return Vec::new();
    };
    // In a container the path may be the host's, of which only the mount itself is to be seen.
    let inner = mount.join(path.trim_start_matches('/'));
    let levels = inner.ancestors().take_while(|at| at.starts_with(&mount));
    levels.map(Path::to_owned).collect()
}

fn group_memory(group: &Path) -> Option<Amount> {
    let limits = ["memory.max", "memory.high"];
    let total = limits
        .iter()
        .filter_map(|file| number(&group.join(file)))
        .min()?;
    let used = number(&group.join("memory.current")).unwrap_or(0);
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let reclaimable: u64 = ["active_file", "inactive_file", "slab_reclaimable"]
        .iter()
        .filter_map(|field| {
            let mut lines = stat.lines();
            lines.find_map(|line| line.strip_prefix(field)?.trim().parse::<u64>().ok())
        })
        .sum();
    Some(Amount {
        total,
        available: total.saturating_sub(used.saturating_sub(reclaimable)),
        limited: true,
    })
}

fn hugepages(root: &Path) -> HugePages {
    let mut pool = pool(&root.join("sys/kernel/mm"));
    for group in groups(root) {
        if let Some(limit) = number(&group.join("hugetlb.2MB.max")) {
            let used = number(&group.join("hugetlb.2MB.current")).unwrap_or(0);
            pool.free = pool.free.min(limit.saturating_sub(used) / HUGE_PAGE);
        }
    }
    pool
}

/// The 2 MiB pool whose `hugepages` directory lies in `directory`.
pub(super) fn pool(directory: &Path) -> HugePages {
    let read = |file: &str| {
        let path = directory.join("hugepages/hugepages-2048kB").join(file);
        number(&path).unwrap_or(0)
    };
    // Reserved pages are counted as free until they are touched. A NUMA node has no such count.
    HugePages {
        total: read("nr_hugepages"),
        free: read("free_hugepages").saturating_sub(read("resv_hugepages")),
    }
}

fn shmem_thp(root: &Path) -> ShmemThp {
    let file = root.join("sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let text = fs::read_to_string(file).unwrap_or_default();
    match text.split(['[', ']']).nth(1) {
        Some("advise") => ShmemThp::Advise,
        Some("always" | "within_size" | "force") => ShmemThp::Always,
        _ => ShmemThp::Never,
    }
}

fn memlock(root: &Path) -> Memlock {
    let limit = |bytes| (bytes != RLIM_INFINITY).then_some(bytes);
    let (soft, hard) =
        getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or((RLIM_INFINITY, RLIM_INFINITY));
    let status = fs::read_to_string(root.join("proc/self/status")).unwrap_or_default();
    let capabilities = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    Memlock {
        soft: limit(soft),
        hard: limit(hard),
        exempt: capabilities.is_some_and(|set| set >> IPC_LOCK & 1 == 1),
    }
}

/// The number that a file holds; `None` also for `max`.
pub(super) fn number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::testing::Machine;

    const MIB: u64 = 1 << 20;

    fn machine() -> Machine {
        let machine = Machine::default();
        machine.file(
            "proc/meminfo",
            "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n",
        );
        machine
    }

    #[test]
    fn the_lowest_limit_of_all_groups_around_us_counts() {
        let machine = machine();
        machine.file("proc/self/cgroup", "1:name=systemd:/x\n0::/a/b\n");
        machine.file("sys/fs/cgroup/cgroup.controllers", "memory\n");
        let before = amount(machine.root()).unwrap();
        assert_eq!((before.total, before.available), (1024 * MIB, 512 * MIB));
        assert!(!before.limited);

        machine.file("sys/fs/cgroup/a/b/memory.max", "max\n");
        machine.file("sys/fs/cgroup/a/b/memory.high", "314572800\n"); // 300 MiB
        machine.file("sys/fs/cgroup/a/b/memory.current", "104857600\n"); // 100 MiB
        machine.file(
            "sys/fs/cgroup/a/b/memory.stat",
            "anon 5\ninactive_file 20971520\nactive_file 10485760\n", // 20 and 10 MiB
        );
        machine.file("sys/fs/cgroup/a/memory.max", "419430400\n"); // 400 MiB
        machine.file("sys/fs/cgroup/a/memory.current", "367001600\n"); // 350 MiB
        let found = amount(machine.root()).unwrap();
        assert_eq!((found.total, found.available), (300 * MIB, 50 * MIB));
        assert!(found.limited);

        machine.file("sys/fs/cgroup/a/memory.max", "max\n");
        assert_eq!(amount(machine.root()).unwrap().available, 230 * MIB);
    }

    #[test]
    fn a_limit_above_the_machine_is_none() {
        let machine = machine();
        machine.file("proc/self/cgroup", "0::/\n");
        machine.file("sys/fs/cgroup/cgroup.controllers", "memory\n");
        machine.file("sys/fs/cgroup/memory.max", "99999999999999\n");
        let found = amount(machine.root()).unwrap();
        assert_eq!((found.total, found.limited), (1024 * MIB, false));
    }

    #[test]
    fn a_container_that_sees_only_its_own_group_finds_its_limit() {
        let machine = machine();
        machine.file("proc/self/cgroup", "0::/docker/abc\n");
        machine.file("sys/fs/cgroup/cgroup.controllers", "memory\n");
        machine.file("sys/fs/cgroup/memory.max", "209715200\n"); // 200 MiB
        assert_eq!(amount(machine.root()).unwrap().total, 200 * MIB);
    }

    #[test]
    fn promised_huge_pages_are_not_free() {
        let machine = machine();
        assert_eq!(hugepages(machine.root()), HugePages::default());
        let pool = "sys/kernel/mm/hugepages/hugepages-2048kB";
        machine.file(&format!("{pool}/nr_hugepages"), "100\n");
        machine.file(&format!("{pool}/free_hugepages"), "60\n");
        machine.file(&format!("{pool}/resv_hugepages"), "25\n");
        let expected = HugePages {
            total: 100,
            free: 35,
        };
        assert_eq!(hugepages(machine.root()), expected);

        machine.file("proc/self/cgroup", "0::/a\n");
        machine.file("sys/fs/cgroup/cgroup.controllers", "hugetlb\n");
        machine.file("sys/fs/cgroup/a/hugetlb.2MB.max", "20971520\n");
        machine.file("sys/fs/cgroup/a/hugetlb.2MB.current", "4194304\n");
        assert_eq!(hugepages(machine.root()).free, 8);
    }

    #[test]
    fn transparent_huge_pages_are_what_the_brackets_say() {
        for (text, expected) in [
            (
                "always within_size advise [never] deny force",
                ShmemThp::Never,
            ),
            (
                "always within_size [advise] never deny force",
                ShmemThp::Advise,
            ),
            (
                "always [within_size] advise never deny force",
                ShmemThp::Always,
            ),
            ("", ShmemThp::Never),
        ] {
            let machine = machine();
            let file = "sys/kernel/mm/transparent_hugepage/shmem_enabled";
            machine.file(file, text);
            assert_eq!(shmem_thp(machine.root()), expected, "{text}");
        }
    }

    #[test]
    fn who_may_lock_anything_is_exempt_from_the_limit() {
        let machine = machine();
        for (set, exempt) in [("0000000000004000", true), ("00000000ffffbfff", false)] {
            machine.file("proc/self/status", &format!("Name: x\nCapEff:\t{set}\n"));
            assert_eq!(memlock(machine.root()).exempt, exempt, "{set}");
        }
    }

    #[test]
    fn the_soft_limit_is_raised_to_the_hard_one() {
        let (before, after) = raise_memlock().unwrap();
        assert_eq!((after.soft, after.hard), (before.hard, before.hard));
    }

    #[test]
    fn some_memory_is_available_here() {
        let all = memory_available(None).unwrap();
        assert!(all > 0);
        for node in numa::nodes(Path::new("/")) {
            assert!(memory_available(Some(node.id)).unwrap() > 0);
        }
        assert_eq!(memory_available(Some(1023)), None);
    }
}
