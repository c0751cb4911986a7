//! GPUs through NVML.

use std::collections::BTreeMap;
use std::env;
use std::path::Path;

use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

use super::{Gpu, NvmlStatus, numa};

/// `NVML_DEVICE_MIG_ENABLE`.
const MIG_ENABLED: u32 = 1;

/// Names NVML's library where the loader does not find it by itself.
const LIBRARY_VARIABLE: &str = "PEGAFLOW_NVML_LIBRARY";

/// A process that holds memory of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuHolder {
    /// As the driver sees it, which may be outside of our pid namespace.
    pub pid: u32,
    /// Bytes; `None` where the driver does not say.
    pub memory: Option<u64>,
}

/// Who holds memory of which GPU, by UUID. What the driver does not tell is left out.
pub fn gpu_holders() -> BTreeMap<String, Vec<GpuHolder>> {
    holders().unwrap_or_default()
}

fn holders() -> Result<BTreeMap<String, Vec<GpuHolder>>, NvmlError> {
    let nvml = nvml()?;
    let mut found = BTreeMap::new();
    for index in 0..nvml.device_count()? {
        let listed = nvml.device_by_index(index).and_then(|device| {
            let processes = device.running_compute_processes()?;
            Ok((device.uuid()?, processes))
        });
        // A GPU that does not answer hides nothing of the others.
        let Ok((uuid, processes)) = listed else {
            continue;
        };
        let holder = |process: nvml_wrapper::struct_wrappers::device::ProcessInfo| GpuHolder {
            pid: process.pid,
            memory: match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => Some(bytes),
                UsedGpuMemory::Unavailable => None,
            },
        };
        found.insert(uuid, processes.into_iter().map(holder).collect());
    }
    Ok(found)
}

fn nvml() -> Result<Nvml, NvmlError> {
    match env::var_os(LIBRARY_VARIABLE) {
        Some(path) if !path.is_empty() => Nvml::builder().lib_path(&path).init(),
        _ => Nvml::init(),
    }
}

/// The GPUs that this process may use, by index, and whether it could look for them.
///
/// A property that the driver does not tell is unknown, not a failure.
pub fn take_gpus() -> (Vec<Gpu>, NvmlStatus) {
    let visible = env::var("CUDA_VISIBLE_DEVICES").ok();
    match look() {
        Ok(mut gpus) => {
            gpus.retain(|gpu| is_visible(visible.as_deref(), gpu));
            (gpus, NvmlStatus::Available)
        }
        Err(error @ NvmlError::LibloadingError(_)) => {
            (Vec::new(), NvmlStatus::Missing(error.to_string()))
        }
        Err(error) => (Vec::new(), NvmlStatus::Failed(error.to_string())),
    }
}

fn look() -> Result<Vec<Gpu>, NvmlError> {
    let nvml = nvml()?;
    let mut found = Vec::new();
    for index in 0..nvml.device_count()? {
        // A GPU that fell off the bus must not hide the others, nor shift their indices.
        match nvml.device_by_index(index).and_then(|device| read(&device)) {
            Ok(gpu) => found.push(gpu),
            Err(error) => tracing::warn!("GPU {index} does not answer: {error}"),
        }
    }
    let lost = nvml.device_count()? as usize != found.len();
    Ok(in_bus_order(found, lost))
}

/// A GPU and its address on the PCI bus, where that is known.
type Located = (Gpu, Option<(u32, u32, u32)>);

fn read(device: &Device<'_>) -> Result<Located, NvmlError> {
    let memory = device.memory_info().ok();
    let pci = device.pci_info().ok();
    let gpu = Gpu {
        index: device.index()?,
        uuid: device.uuid()?,
        name: device.name().unwrap_or_else(|_| "unknown GPU".to_owned()),
        memory_total: memory.as_ref().map(|memory| memory.total),
        memory_free: memory.as_ref().map(|memory| memory.free),
        mig: device
            .mig_mode()
            .is_ok_and(|mode| mode.current == MIG_ENABLED),
        numa_node: pci
            .as_ref()
            .and_then(|pci| numa::of_pci(Path::new("/"), &pci.bus_id)),
    };
    Ok((gpu, pci.map(|pci| (pci.domain, pci.bus, pci.device))))
}

/// Renumbers in PCI bus order. NVML documents that order for its own indices, so they are kept
/// where an address is unknown or a GPU is lost.
fn in_bus_order(mut found: Vec<Located>, lost: bool) -> Vec<Gpu> {
    if !lost && found.iter().all(|(_, address)| address.is_some()) {
        found.sort_by_key(|(_, address)| *address);
        for (index, (gpu, _)) in (0..).zip(&mut found) {
            gpu.index = index;
        }
    }
    found.sort_by_key(|(gpu, _)| gpu.index);
    found.into_iter().map(|(gpu, _)| gpu).collect()
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

    fn gpu(index: u32, uuid: &str) -> Gpu {
        Gpu {
            index,
            uuid: uuid.to_owned(),
            name: String::new(),
            memory_total: None,
            memory_free: None,
            mig: false,
            numa_node: None,
        }
    }

    #[test]
    fn gpus_are_numbered_by_bus_address() {
        let found = vec![
            (gpu(0, "late"), Some((0, 9, 0))),
            (gpu(1, "early"), Some((0, 1, 0))),
        ];
        let uuids = |gpus: Vec<Gpu>| {
            gpus.into_iter()
                .map(|gpu| (gpu.index, gpu.uuid))
                .collect::<Vec<_>>()
        };
        let own_order = [(0, "late".to_owned()), (1, "early".to_owned())];
        assert_eq!(
            uuids(in_bus_order(found.clone(), false)),
            [(0, "early".to_owned()), (1, "late".to_owned())]
        );
        assert_eq!(uuids(in_bus_order(found.clone(), true)), own_order);
        let mut unknown = found;
        unknown[1].1 = None;
        assert_eq!(uuids(in_bus_order(unknown, false)), own_order);
    }

    #[test]
    fn what_the_user_hid_stays_hidden() {
        let gpu = gpu(1, "GPU-abc");
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
