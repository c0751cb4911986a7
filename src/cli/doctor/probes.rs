//! What only a child can find out: whether vLLM has what the shim builds on, and how fast a GPU
//! reaches the store's memory. Each has a deadline, and its tree is killed with it.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;
use serde::Deserialize;
use tokio::process::Command;

use super::finding::Finding;
use super::finding::Status::{Failed, NotChecked, Warning};
use crate::host::{Gpu, GpuProbe, GpuProbeError, HostSnapshot, probe_gpu};
use crate::runtime::child::{self, ChildError, Finished};
use crate::runtime::{Job, Runtime};

/// Importing vLLM takes half a minute on a slow disk.
const CHECK_LIMIT: Duration = Duration::from_secs(180);
/// Bytes per second; PCIe 3.0 with 16 lanes moves about 12 GB.
const SLOW: f64 = 6e9;
/// How the child says that there is no libcuda.
const NO_LIBRARY: u8 = 3;

/// `pegaflow __probe-gpu INDEX`.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// Which one, for `ps`; the environment shows it first.
    pub index: u32,
    /// Where to run: the cores beside it.
    #[arg(long, value_delimiter = ',')]
    pub cores: Vec<usize>,
}

/// The body of the hidden subcommand: one line of JSON.
pub fn probe_main(args: &ProbeArgs) -> ExitCode {
    match probe_gpu(&args.cores) {
        Ok(probe) => match serde_json::to_string(&probe) {
            Ok(line) => {
                println!("{line}");
                ExitCode::SUCCESS
            }
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => {
            eprintln!("GPU {}: {error}", args.index);
            match error {
                GpuProbeError::NoLibrary => ExitCode::from(NO_LIBRARY),
                GpuProbeError::Memory(_)
                | GpuProbeError::Cores { .. }
                | GpuProbeError::Cuda { .. } => ExitCode::FAILURE,
            }
        }
    }
}

pub async fn gpu(gpu: &Gpu, host: &HostSnapshot, limit: Duration, job: Job<'_>) -> Finding {
    let others: Vec<&Gpu> = host
        .gpus
        .iter()
        .filter(|other| other.index != gpu.index && !other.mig)
        .collect();
    let seen = std::iter::once(gpu).chain(others.iter().copied());
    let uuids: Vec<&str> = seen.map(|gpu| gpu.uuid.as_str()).collect();
    let node = host
        .memory
        .numa
        .iter()
        .find(|node| Some(node.id) == gpu.numa_node && !node.cpus.is_empty());
    let mut command = Command::new(&job.guard.program);
    command
        .args(["__probe-gpu", &gpu.index.to_string()])
        .env("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        .env("CUDA_VISIBLE_DEVICES", uuids.join(","));
    if let Some(node) = node {
        // Only those that this process may use; with none of them it runs anywhere.
        let cores = node.cpus.iter().filter(|core| host.cpus.contains(core));
        let cores: Vec<String> = cores.map(ToString::to_string).collect();
        if !cores.is_empty() {
            command.args(["--cores", &cores.join(",")]);
        }
    }
    let finished = child::run(command, limit, job, &mut |_, _| {}).await;
    judge_gpu(gpu, &others, finished)
}

fn judge_gpu(gpu: &Gpu, others: &[&Gpu], finished: Result<Finished, ChildError>) -> Finding {
    let check = format!("copy {}", gpu.index);
    let remedy =
        "see what nvidia-smi and the kernel's log (dmesg) say of this GPU; where registering \
                  memory failed, raise the limit of lockable memory (ulimit -l)"
            .to_owned();
    let finished = match finished {
        Ok(finished) => finished,
        Err(error) => {
            let what = format!("the probe of this GPU was given up: {error}");
            return Finding::new(check, Failed(remedy), what);
        }
    };
    if finished.status.code() == Some(NO_LIBRARY.into()) {
        let remedy = "install libcuda.so.1 of the same driver (a container needs --gpus all and \
                      NVIDIA_DRIVER_CAPABILITIES=compute,utility)";
        let what = "the driver's libcuda is missing, so nothing can compute";
        return Finding::new(check, Failed(remedy.to_owned()), what);
    }
    let line = finished.last_stdout.as_deref().unwrap_or_default();
    let probe = match serde_json::from_str::<GpuProbe>(line) {
        Ok(probe) if finished.status.success() => probe,
        _ => {
            let what = format!(
                "the probe ended with {}: {}",
                finished.status, finished.tail
            );
            return Finding::new(check, Failed(remedy), what);
        }
    };
    let near = gpu
        .numa_node
        .map_or_else(String::new, |node| format!(" of NUMA node {node}"));
    let what = format!(
        "{:.1} GB/s to the GPU, {:.1} GB/s from it; {} of shared memory{near} registered in {:.0} ms; CUDA {}{}",
        probe.to_gpu / 1e9,
        probe.from_gpu / 1e9,
        ByteSize(probe.registered),
        probe.register_ms,
        probe.cuda,
        reaches(others, &probe.peers)
    );
    if probe.to_gpu.min(probe.from_gpu) < SLOW {
        let remedy = "the link is slow: compare `nvidia-smi -q -d PCIE` (generation and width, now \
                      and at most), and the slot that the GPU is in";
        return Finding::new(check, Warning(remedy.to_owned()), what);
    }
    Finding::ok(check, what)
}

/// Which other GPUs this one reads by itself: what tensor parallel is fast over.
fn reaches(others: &[&Gpu], peers: &[bool]) -> String {
    if others.is_empty() {
        return String::new();
    }
    let reached: Vec<String> = others
        .iter()
        .zip(peers)
        .filter(|(_, can)| **can)
        .map(|(other, _)| other.index.to_string())
        .collect();
    match reached.is_empty() {
        true => "; reaches no other GPU by itself".to_owned(),
        false => format!("; reaches GPU {} by itself", reached.join(", ")),
    }
}

/// What the shim's own check says.
#[derive(Debug, Deserialize)]
struct Hooks {
    vllm: Option<String>,
    /// The versions that the shim was tried with.
    #[serde(default)]
    tested: String,
    problems: Vec<String>,
}

pub async fn vllm(runtime: &Runtime, shim: &Path, job: Job<'_>) -> Finding {
    let Some(interpreter) = &runtime.interpreter else {
        let remedy = "give [runtime] python = \"...\" the environment that vLLM is in";
        let what = format!("{}: no Python is known behind it", runtime.description);
        return Finding::new("vllm", NotChecked(remedy.to_owned()), what);
    };
    let mut command = Command::new(interpreter);
    command
        .args(["-m", "pegaflow_vllm.check"])
        // Not in the working directory: a checkout of vLLM there would be found.
        .current_dir("/")
        .env("PYTHONPATH", shim)
        .env("VLLM_NO_USAGE_STATS", "1");
    let finished = child::run(command, CHECK_LIMIT, job, &mut |_, _| {}).await;
    judge_vllm(runtime, finished)
}

fn judge_vllm(runtime: &Runtime, finished: Result<Finished, ChildError>) -> Finding {
    let where_ = &runtime.description;
    let broken = |what: String| {
        let remedy = "install vLLM there (`pip install vllm`), or point [runtime] at another \
                      environment";
        Finding::new("vllm", Failed(remedy.to_owned()), what)
    };
    let finished = match finished {
        Ok(finished) => finished,
        Err(error) => return broken(format!("{where_}: the check was given up: {error}")),
    };
    let line = finished.last_stdout.as_deref().unwrap_or_default();
    let Ok(hooks) = serde_json::from_str::<Hooks>(line) else {
        let (status, tail) = (finished.status, finished.tail);
        return broken(format!("{where_}: the check ended with {status}: {tail}"));
    };
    let Some(version) = hooks.vllm else {
        return broken(format!("{where_}: no vLLM is installed"));
    };
    if hooks.problems.is_empty() {
        return Finding::ok(
            "vllm",
            format!("{version} has the hooks of the shim; {where_}"),
        );
    }
    let remedy = format!(
        "use one of the versions that are tested ({}), or unified nodes, which need no hooks",
        hooks.tested
    );
    let what = format!(
        "{version} lacks hooks of the shim: {}",
        hooks.problems.join("; ")
    );
    Finding::new("vllm", Failed(remedy), what)
}
