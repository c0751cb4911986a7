//! NUMA nodes: which memory is near which cores and GPUs.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::memory::{HugePages, number, pool};
use super::memory_field;
use crate::topology::PciAddress;

/// The most that a list like `0-3,8` may name.
const MOST: usize = 8192;

/// A part of the machine's memory, and the cores beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaNode {
    pub id: u32,
    pub cpus: Vec<usize>,
    /// Bytes that can be had here without swapping: free ones and the page cache.
    pub available: u64,
    pub hugepages: HugePages,
}

const NODES: &str = "sys/devices/system/node";

/// The nodes whose memory this process may use, ascending.
pub(super) fn nodes(root: &Path) -> Vec<NumaNode> {
    let read = |file: &str| fs::read_to_string(root.join(file)).ok();
    let Some(with_memory) = read(&format!("{NODES}/has_memory")) else {
        return Vec::new();
    };
    let allowed = read("proc/self/status").and_then(|status| {
        let mut lines = status.lines();
        lines.find_map(|line| Some(list(line.strip_prefix("Mems_allowed_list:")?)))
    });
    list(&with_memory)
        .into_iter()
        .filter(|id| allowed.as_ref().is_none_or(|allowed| allowed.contains(id)))
        .filter_map(|id| u32::try_from(id).ok())
        .filter_map(|id| {
            Some(NumaNode {
                id,
                cpus: list(&read(&format!("{NODES}/node{id}/cpulist"))?),
                available: available(root, id)?,
                hugepages: pool(&root.join(format!("{NODES}/node{id}"))),
            })
        })
        .collect()
}

/// Bytes that can be had on a node without swapping.
pub(super) fn available(root: &Path, id: u32) -> Option<u64> {
    let text = fs::read_to_string(root.join(format!("{NODES}/node{id}/meminfo"))).ok()?;
    // "Node 0 MemFree:  12 kB"
    let text: Vec<&str> = text
        .lines()
        .filter_map(|line| line.splitn(3, ' ').nth(2))
        .collect();
    let text = text.join("\n");
    let field = |name| memory_field(&text, name).unwrap_or(0);
    let cache = field("Active(file)") + field("Inactive(file)") + field("SReclaimable");
    Some(memory_field(&text, "MemFree").ok()?.saturating_add(cache))
}

/// The node beside a PCI device.
pub(super) fn of_pci(root: &Path, address: PciAddress) -> Option<u32> {
    // A machine that does not know says -1.
    let file = root.join(format!("sys/bus/pci/devices/{address}/numa_node"));
    number(&file).and_then(|id| u32::try_from(id).ok())
}

/// A kernel list, like `0-3,8`; what is malformed is left out.
fn list(text: &str) -> Vec<usize> {
    let mut all: Vec<usize> = text
        .trim()
        .split(',')
        .filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
        })
        .flatten()
        .take(MOST)
        .collect();
    all.sort_unstable();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::testing::Machine;

    #[test]
    fn nodes_with_memory_that_we_may_use_are_found() {
        let machine = Machine::default();
        assert_eq!(nodes(machine.root()), []);
        machine.file(&format!("{NODES}/has_memory"), "0-2\n");
        machine.file("proc/self/status", "Mems_allowed_list:\t0,2\n");
        for (id, cpus) in [(0, "0-1,4"), (1, "2-3"), (2, "")] {
            machine.file(&format!("{NODES}/node{id}/cpulist"), &format!("{cpus}\n"));
            let meminfo = format!(
                "Node {id} MemTotal:       99 kB\nNode {id} MemFree:        {} kB\n\
                 Node {id} Active(file):   2 kB\nNode {id} Inactive(file): 3 kB\n",
                10 * (id + 1)
            );
            machine.file(&format!("{NODES}/node{id}/meminfo"), &meminfo);
            let pool = format!("{NODES}/node{id}/hugepages/hugepages-2048kB");
            machine.file(&format!("{pool}/nr_hugepages"), "7\n");
            machine.file(&format!("{pool}/free_hugepages"), &format!("{id}\n"));
        }
        let node = |id, cpus: &[usize], kib: u64| NumaNode {
            id,
            cpus: cpus.to_vec(),
            available: kib * 1024,
            hugepages: HugePages {
                total: 7,
                free: id.into(),
            },
        };
        assert_eq!(
            nodes(machine.root()),
            [node(0, &[0, 1, 4], 15), node(2, &[], 35)]
        );
    }

    #[test]
    fn the_node_of_a_gpu_is_found_by_its_address() {
        let machine = Machine::default();
        machine.file("sys/bus/pci/devices/0000:3b:00.0/numa_node", "1\n");
        machine.file("sys/bus/pci/devices/0001:01:00.0/numa_node", "-1\n");
        let of = |address: &str| of_pci(machine.root(), address.parse().unwrap());
        assert_eq!(of("00000000:3B:00.0"), Some(1));
        assert_eq!(of("00000001:01:00.0"), None);
        assert_eq!(of("00000000:3C:00.0"), None);
    }

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(list("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert_eq!(list("\n"), [] as [usize; 0]);
        assert_eq!(list("5-4,x,7"), [7]);
        assert_eq!(list("0-18446744073709551615").len(), MOST);
    }
}
