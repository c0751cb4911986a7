//! GPUs through NVML: what there is, how close it is, and who holds its memory.

use std::env;
use std::fmt;
use std::fs;
use std::path::Path;

use nvml_wrapper::enum_wrappers::device::{P2pCapabilitiesIndex, P2pStatus, TopologyLevel};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml, cuda_driver_version_major, cuda_driver_version_minor};
use serde::{Deserialize, Serialize};

use super::{Gpu, NvmlStatus, numa};
use crate::topology::PciAddress;

/// `NVML_DEVICE_MIG_ENABLE`.
const MIG_ENABLED: u32 = 1;
/// `NVML_AFFINITY_SCOPE_NODE`.
const SCOPE_NODE: u32 = 0;
/// Words of a set of NUMA nodes, as many as the kernel's most nodes.
const NODE_WORDS: usize = 16;

/// Names NVML's library where the loader does not find it by itself.
const LIBRARY_VARIABLE: &str = "PEGAFLOW_NVML_LIBRARY";

/// A process that holds memory of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuHolder {
    /// As the driver sees it, which may be outside of our pid namespace.
    pub pid: u32,
    /// Where /proc shows it.
    pub name: Option<String>,
    /// Bytes; `None` where the driver does not say.
    pub memory: Option<u64>,
}

/// How close two GPUs are, the closest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Link {
    NvLink,
    /// Two chips of one board.
    Board,
    /// Through one PCIe switch.
    Switch,
    /// Through several, without the processor.
    Switches,
    HostBridge,
    /// Through the processor, within one NUMA node.
    Node,
    /// Between NUMA nodes.
    System,
}

/// The way between two GPUs, by index; `a` is less than `b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuPath {
    pub a: u32,
    pub b: u32,
    pub link: Link,
}

/// What NVML shows.
#[derive(Debug, Clone, Default)]
pub struct GpuFindings {
    /// By index; those that `CUDA_VISIBLE_DEVICES` hides are left out.
    pub gpus: Vec<Gpu>,
    /// Between all pairs that the driver tells something of.
    pub paths: Vec<GpuPath>,
    /// GPUs that do not answer, by NVML's index.
    pub lost: Vec<u32>,
    pub nvml: NvmlStatus,
    pub driver: Option<DriverVersions>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverVersions {
    pub driver: String,
    /// The newest CUDA that it can run, like `12.8`.
    pub cuda: Option<String>,
}

impl fmt::Display for DriverVersions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "driver {}", self.driver)?;
        match &self.cuda {
            Some(cuda) => write!(f, " for CUDA up to {cuda}"),
            None => Ok(()),
        }
    }
}

fn driver(nvml: &Nvml) -> Option<DriverVersions> {
    let cuda = nvml.sys_cuda_driver_version().ok();
    Some(DriverVersions {
        driver: nvml.sys_driver_version().ok()?,
        cuda: cuda.map(|version| {
            let (major, minor) = (
                cuda_driver_version_major(version),
                cuda_driver_version_minor(version),
            );
            format!("{major}.{minor}")
        }),
    })
}

pub(super) fn nvml() -> Result<Nvml, NvmlError> {
    match env::var_os(LIBRARY_VARIABLE) {
        Some(path) if !path.is_empty() => Nvml::builder().lib_path(&path).init(),
        _ => Nvml::init(),
    }
}

/// The GPUs that this process may use, and whether it could look for them.
///
/// A property that the driver does not tell is unknown, not a failure.
pub fn take_gpus() -> GpuFindings {
    let visible = env::var("CUDA_VISIBLE_DEVICES").ok();
    let failed = |nvml| GpuFindings {
        nvml,
        ..GpuFindings::default()
    };
    match nvml().and_then(|nvml| look(&nvml)) {
        Ok(mut found) => {
            found.gpus.retain(|gpu| is_visible(visible.as_deref(), gpu));
            found
        }
        Err(error @ NvmlError::LibloadingError(_)) => {
            failed(NvmlStatus::Missing(error.to_string()))
        }
        Err(error) => failed(NvmlStatus::Failed(error.to_string())),
    }
}

fn look(nvml: &Nvml) -> Result<GpuFindings, NvmlError> {
    let (found, lost) = devices(nvml)?;
    for (index, error) in &lost {
        tracing::warn!("GPU {index} does not answer: {error}");
    }
    Ok(GpuFindings {
        paths: paths(nvml, &found),
        gpus: found.into_iter().map(|(gpu, _)| gpu).collect(),
        lost: lost.into_iter().map(|(index, _)| index).collect(),
        nvml: NvmlStatus::Available,
        driver: driver(nvml),
    })
}

/// GPUs by index.
type Found<D> = Vec<(Gpu, D)>;
/// NVML's index of a GPU that does not answer.
type Lost = (u32, NvmlError);

/// All GPUs with their handles, and those that do not answer.
pub(super) fn devices(nvml: &Nvml) -> Result<(Found<Device<'_>>, Vec<Lost>), NvmlError> {
    let mut found = Vec::new();
    let mut lost = Vec::new();
    for index in 0..nvml.device_count()? {
        // A GPU that fell off the bus must not hide the others, nor shift their indices.
        let seen = nvml
            .device_by_index(index)
            .and_then(|device| Ok((read(&device)?, device)));
        match seen {
            Ok(seen) => found.push(seen),
            Err(error) => lost.push((index, error)),
        }
    }
    let any_lost = !lost.is_empty();
    Ok((in_bus_order(found, any_lost), lost))
}

fn read(device: &Device<'_>) -> Result<Gpu, NvmlError> {
    let memory = device.memory_info().ok();
    let pci = device.pci_info().ok();
    let address = pci.as_ref().and_then(|pci| {
        Some(PciAddress {
            domain: pci.domain,
            bus: pci.bus.try_into().ok()?,
            device: pci.device.try_into().ok()?,
        })
    });
    Ok(Gpu {
        index: device.index()?,
        uuid: device.uuid()?,
        pci: address,
        name: device.name().unwrap_or_else(|_| "unknown GPU".to_owned()),
        memory_total: memory.as_ref().map(|memory| memory.total),
        memory_free: memory.as_ref().map(|memory| memory.free),
        mig: device
            .mig_mode()
            .is_ok_and(|mode| mode.current == MIG_ENABLED),
        numa_node: address
            .and_then(|address| numa::of_pci(Path::new("/"), address))
            .or_else(|| numa_node(device)),
        holders: holders(device),
    })
}

/// What the driver says, where /sys does not: a container may hide it.
fn numa_node(device: &Device<'_>) -> Option<u32> {
    let words = device.memory_affinity(NODE_WORDS, SCOPE_NODE).ok()?;
    let mut nodes = (0u32..)
        .zip(words)
        .filter(|(_, word)| *word != 0)
        .map(|(at, word)| (at * u64::BITS + word.trailing_zeros(), word.count_ones()));
    match (nodes.next(), nodes.next()) {
        (Some((node, 1)), None) => Some(node),
        _ => None,
    }
}

fn holders(device: &Device<'_>) -> Vec<GpuHolder> {
    let processes = device.running_compute_processes().unwrap_or_default();
    let holder = |process: nvml_wrapper::struct_wrappers::device::ProcessInfo| GpuHolder {
        pid: process.pid,
        name: fs::read_to_string(format!("/proc/{}/comm", process.pid))
            .ok()
            .map(|name| name.trim_end().to_owned()),
        memory: match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
    };
    processes.into_iter().map(holder).collect()
}

/// Renumbers in PCI bus order. NVML documents that order for its own indices, so they are kept
/// where an address is unknown or a GPU is lost.
fn in_bus_order<D>(mut found: Found<D>, lost: bool) -> Found<D> {
    if !lost && found.iter().all(|(gpu, _)| gpu.pci.is_some()) {
        found.sort_by_key(|(gpu, _)| gpu.pci);
        for (index, (gpu, _)) in (0..).zip(&mut found) {
            gpu.index = index;
        }
    }
    found.sort_by_key(|(gpu, _)| gpu.index);
    found
}

fn paths(nvml: &Nvml, found: &[(Gpu, Device<'_>)]) -> Vec<GpuPath> {
    let mut paths = Vec::new();
    for (at, (gpu, device)) in found.iter().enumerate() {
        for (other_gpu, other) in found.iter().skip(at + 1) {
            paths.extend(link(nvml, device, other).map(|link| GpuPath {
                a: gpu.index,
                b: other_gpu.index,
                link,
            }));
        }
    }
    paths
}

fn link(nvml: &Nvml, one: &Device<'_>, other: &Device<'_>) -> Option<Link> {
    let linked = one.p2p_status(other, P2pCapabilitiesIndex::NvLink);
    if matches!(linked, Ok(P2pStatus::Ok)) {
        return Some(Link::NvLink);
    }
    Some(match nvml.topology_common_ancestor(one, other).ok()? {
        TopologyLevel::Internal => Link::Board,
        TopologyLevel::Single => Link::Switch,
        TopologyLevel::Multiple => Link::Switches,
        TopologyLevel::HostBridge => Link::HostBridge,
        TopologyLevel::Node => Link::Node,
        TopologyLevel::System => Link::System,
    })
}

/// What `CUDA_VISIBLE_DEVICES` of our own environment allows: indices or beginnings of UUIDs; the
/// first entry that is neither ends the list, as in CUDA.
fn is_visible(visible: Option<&str>, gpu: &Gpu) -> bool {
    let Some(visible) = visible else {
        return true;
    };
    visible
        .split(',')
        .map(str::trim)
        .take_while(|entry| entry.parse::<u32>().is_ok() || entry.starts_with("GPU-"))
        .any(|entry| entry.parse() == Ok(gpu.index) || gpu.uuid.starts_with(entry))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(index: u32, uuid: &str, bus: Option<u8>) -> (Gpu, ()) {
        let gpu = Gpu {
            index,
            uuid: uuid.to_owned(),
            pci: bus.map(|bus| PciAddress {
                domain: 0,
                bus,
                device: 0,
            }),
            ..Gpu::default()
        };
        (gpu, ())
    }

    #[test]
    fn gpus_are_numbered_by_bus_address() {
        let found = vec![gpu(0, "late", Some(9)), gpu(1, "early", Some(1))];
        let uuids = |gpus: Vec<(Gpu, ())>| {
            gpus.into_iter()
                .map(|(gpu, ())| (gpu.index, gpu.uuid))
                .collect::<Vec<_>>()
        };
        let own_order = [(0, "late".to_owned()), (1, "early".to_owned())];
        assert_eq!(
            uuids(in_bus_order(found.clone(), false)),
            [(0, "early".to_owned()), (1, "late".to_owned())]
        );
        assert_eq!(uuids(in_bus_order(found.clone(), true)), own_order);
        let mut unknown = found;
        unknown[1].0.pci = None;
        assert_eq!(uuids(in_bus_order(unknown, false)), own_order);
    }

    #[test]
    fn what_the_user_hid_stays_hidden() {
        let (gpu, ()) = gpu(1, "GPU-abc", None);
        for (visible, expected) in [
            (None, true),
            (Some("0,1"), true),
            (Some("GPU-ab"), true),
            (Some("0"), false),
            (Some(""), false),
            (Some("-1,1"), false),
            (Some("NoDevFiles"), false),
        ] {
            assert_eq!(is_visible(visible, &gpu), expected, "{visible:?}");
        }
    }
}
