//! What a GPU does with memory like the store's: registers a slice of it, and copies to and from it; and which
//! other GPUs it reaches by itself.
//!
//! Only a short-lived child calls this (`pegaflow __probe-gpu`): a driver may hang or kill its process,
//! and pegaflow itself never opens a GPU context. The driver's library is loaded at run time.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// Of the arena: enough that starting a copy does not count.
const SLICE: usize = 256 << 20;
const ROUNDS: usize = 5;

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GpuProbe {
    /// The CUDA that the driver itself is of, like `12.8`.
    pub cuda: String,
    /// Of the other GPUs that this process can see, in their order: can this one read their memory?
    pub peers: Vec<bool>,
    /// Bytes of shared memory that were registered.
    pub registered: u64,
    pub register_ms: f64,
    /// Bytes per second from the registered memory to the GPU, and back; the best of some rounds.
    pub to_gpu: f64,
    pub from_gpu: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum GpuProbeError {
    #[error("there is no libcuda")]
    NoLibrary,
    #[error("cannot make shared memory: {0}")]
    Memory(#[source] io::Error),
    #[error("cannot run on the cores beside this GPU, {cores:?}: {error}")]
    Cores { cores: Vec<usize>, error: Errno },
    #[error("{call} failed: {error}")]
    Cuda {
        call: &'static str,
        error: DriverError,
    },
}

fn cuda<T>(call: &'static str, result: Result<T, DriverError>) -> Result<T, GpuProbeError> {
    result.map_err(|error| GpuProbeError::Cuda { call, error })
}

/// Measures the first GPU that this process can see, with memory that `cores` touched first (any cores where there
/// are none): the kernel takes it from their NUMA node, as it does for a store that is placed there. It does not give
/// back what it took: the process is to end now.
pub fn probe_gpu(cores: &[usize]) -> Result<GpuProbe, GpuProbeError> {
    run_on(cores).map_err(|error| GpuProbeError::Cores {
        cores: cores.to_vec(),
        error,
    })?;
    #[expect(unsafe_code, reason = "the driver's library is loaded")]
    // SAFETY: it loads NVIDIA's own library by name, whose initialisers need nothing of us. Without this
    // look, the first call below would panic where the library is missing.
    let present = unsafe { sys::is_culib_present() };
    if !present {
        return Err(GpuProbeError::NoLibrary);
    }
    cuda("cuInit", result::init())?;
    let version = cuda("cuDriverGetVersion", driver_version())?;
    let device = cuda("cuDeviceGet", result::device::get(0))?;
    let peers = cuda("cuDeviceCanAccessPeer", peers_of(device))?;
    #[expect(unsafe_code, reason = "a context is made current")]
    // SAFETY: the device comes from `get`, and the context from `retain`.
    let entered =
        unsafe { result::primary_ctx::retain(device).map(|ctx| result::ctx::set_current(ctx)) };
    cuda(
        "cuDevicePrimaryCtxRetain",
        entered.and_then(|entered| entered),
    )?;
    let arena = slice().map_err(GpuProbeError::Memory)?;
    let started = Instant::now();
    cuda("cuMemHostRegister", register(&arena))?;
    let register_ms = started.elapsed().as_secs_f64() * 1000.0;
    #[expect(unsafe_code, reason = "memory of the GPU is taken")]
    // SAFETY: a context is current. The memory is never read from here as if it held something.
    let there = cuda("cuMemAlloc", unsafe { result::malloc_sync(SLICE) })?;
    let to_gpu = fastest(|| cuda("cuMemcpyHtoD", copy_to(there, &arena)))?;
    let from_gpu = fastest(|| cuda("cuMemcpyDtoH", copy_from(there, &arena)))?;
    Ok(GpuProbe {
        cuda: format!("{}.{}", version / 1000, version % 1000 / 10),
        peers,
        registered: SLICE as u64,
        register_ms,
        to_gpu,
        from_gpu,
    })
}

fn run_on(cores: &[usize]) -> Result<(), Errno> {
    if cores.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    cores.iter().try_for_each(|&core| set.set(core))?;
    sched_setaffinity(Pid::from_raw(0), &set)
}

/// 12080 is CUDA 12.8.
fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    #[expect(unsafe_code, reason = "the driver writes through a pointer")]
    // SAFETY: it points to an integer of this frame, which the call fills in and forgets.
    let told = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    told.result().map(|()| version)
}

fn peers_of(device: sys::CUdevice) -> Result<Vec<bool>, DriverError> {
    let others = 1..result::device::get_count()?;
    others
        .map(|ordinal| {
            let other = result::device::get(ordinal)?;
            let mut can = 0;
            #[expect(unsafe_code, reason = "the driver writes through a pointer")]
            // SAFETY: it points to an integer of this frame; both devices come from `get`.
            let told = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, device, other) };
            told.result().map(|()| can != 0)
        })
        .collect()
}

/// As the engine makes its arena: a memfd, mapped shared, every page there.
fn slice() -> io::Result<MmapRaw> {
    let file = File::from(memfd_create(c"pegaflow-probe", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(SLICE as u64)?;
    MmapOptions::new().len(SLICE).populate().map_raw(&file)
}

fn register(arena: &MmapRaw) -> Result<(), DriverError> {
    let start = arena.as_mut_ptr().cast::<c_void>();
    #[expect(unsafe_code, reason = "the driver pins the pages of a mapping")]
    // SAFETY: the range is exactly one live mapping, which nothing unmaps while this process lives
    // (the driver lets go of it at exit).
    let registered =
        unsafe { sys::cuMemHostRegister_v2(start, arena.len(), sys::CU_MEMHOSTREGISTER_PORTABLE) };
    registered.result()
}

fn copy_to(there: sys::CUdeviceptr, arena: &MmapRaw) -> Result<(), DriverError> {
    let here = arena.as_mut_ptr().cast::<c_void>();
    #[expect(unsafe_code, reason = "the driver copies between raw addresses")]
    // SAFETY: both ranges are SLICE bytes long, and the call returns after the copy. Nobody else has
    // the mapping.
    let copied = unsafe { sys::cuMemcpyHtoD_v2(there, here, SLICE) };
    copied.result()
}

fn copy_from(there: sys::CUdeviceptr, arena: &MmapRaw) -> Result<(), DriverError> {
    let here = arena.as_mut_ptr().cast::<c_void>();
    #[expect(unsafe_code, reason = "the driver copies between raw addresses")]
    // SAFETY: as in `copy_to`; the mapping is writable, and no reference to its bytes exists.
    let copied = unsafe { sys::cuMemcpyDtoH_v2(here, there, SLICE) };
    copied.result()
}

/// Bytes per second.
#[expect(clippy::cast_precision_loss, reason = "a power of two")]
fn fastest(mut copy: impl FnMut() -> Result<(), GpuProbeError>) -> Result<f64, GpuProbeError> {
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let started = Instant::now();
        copy()?;
        best = best.min(started.elapsed());
    }
    Ok(SLICE as f64 / best.as_secs_f64().max(1e-9))
}
