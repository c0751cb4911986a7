//! Why a topology cannot run on this machine.

use std::path::PathBuf;

use bytesize::ByteSize;

use crate::fleet::NodeId;
use crate::topology::{GpuSelector, Problem, Topology, write_problems};

/// Everything that stands against a plan.
#[derive(Debug, thiserror::Error)]
#[error("{}", write_problems(file, problems))]
pub struct PlanErrors {
    pub file: PathBuf,
    pub problems: Vec<Problem<PlanProblem>>,
}

/// One reason, as a fragment that follows the key.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanProblem {
    #[error(
        "no GPU here ({reason}); to run on the CPU instead: pegaflow up {}", cpu_config.display()
    )]
    NoGpu { reason: String, cpu_config: PathBuf },
    #[error(
        "too few usable GPUs: {wanted} wanted, {usable} left\n    wanted: {wants}\n    here: {gpus}"
    )]
    TooFewGpus {
        wanted: usize,
        usable: usize,
        /// Who wants how many.
        wants: String,
        /// What is the matter with each.
        gpus: String,
    },
    #[error("{node} asks for {selector}, but here are: {gpus}")]
    UnknownGpu {
        node: NodeId,
        selector: GpuSelector,
        gpus: String,
    },
    #[error(
        "{node} asks for GPU {index}, which is split into MIG instances: not supported; switch MIG \
         off (nvidia-smi -i {index} -mig 0) or choose another GPU"
    )]
    MigGpu { node: NodeId, index: u32 },
    #[error(
        "{node} asks for GPU {index}, which does not answer; look for Xid in the kernel's log \
         (dmesg), and reset it (nvidia-smi -r -i {index}) or reboot, or choose another GPU"
    )]
    LostGpu { node: NodeId, index: u32 },
    #[error(
        "{node} asks for GPU {index} with {} of memory, but {} of {} are free{}; stop what uses it, \
         choose another GPU or write a smaller `gpu_memory_fraction`",
        ByteSize(*needed), ByteSize(*free), ByteSize(*total), held_by(holders)
    )]
    BusyGpu {
        node: NodeId,
        index: u32,
        needed: u64,
        free: u64,
        total: u64,
        /// Empty: the driver names nobody.
        holders: String,
    },
    #[error(
        "{node} asks for {fraction} of GPU {index}, which it shares with {others}; write fractions \
         (`gpu_memory_fraction`) that add up to 1.0 at most: {left:.2} is left"
    )]
    FullGpu {
        node: NodeId,
        index: u32,
        fraction: f64,
        /// With their fractions.
        others: String,
        left: f64,
    },
    #[error(
        "{node} asks for GPU {index}, which {other} has already; choose another GPU, or write \
         `share_gpus = true` for both, with fractions (`gpu_memory_fraction`) that add up to 1.0 at \
         most"
    )]
    DoubleBooked {
        node: NodeId,
        index: u32,
        other: NodeId,
    },
    #[error(
        "the model does not fit: {node} needs {} on GPU {gpu} ({} of weights), and may take {} of its \
         {}; use more GPUs (`tensor_parallel`), larger ones, a larger `gpu_memory_fraction` or a \
         smaller `kv_cache`",
        ByteSize(*needed), ByteSize(*weights), ByteSize(*budget), ByteSize(*total)
    )]
    ModelTooLarge {
        node: NodeId,
        gpu: u32,
        weights: u64,
        needed: u64,
        budget: u64,
        total: u64,
    },
    #[error(
        "a request of {longest} tokens does not fit: {node} has {} for KV, which is {tokens} tokens; \
         write `max_model_len = {tokens}` or less at the top, or use more memory (`kv_cache`, \
         `gpu_memory_fraction`, `tensor_parallel`)",
        ByteSize(*kv)
    )]
    TooFewTokens {
        node: NodeId,
        longest: u64,
        tokens: u64,
        kv: u64,
    },
    #[error(
        "{node} asks for core {core}, but this process may use {}",
        list(cores)
    )]
    UnknownCore {
        node: NodeId,
        core: usize,
        cores: Vec<usize>,
    },
    #[error(
        "core {core} is given to {other} already; list other cores for {node}, or write \"auto\" for \
         both"
    )]
    CoreDoubleBooked {
        node: NodeId,
        core: usize,
        other: NodeId,
    },
    #[error(
        "a model with multi-head latent attention ({model_type}) answers wrongly on the CPU when \
         its KV is loaded: vLLM's CPU kernels for it ignore context they did not compute; use \
         `role = \"unified\"` nodes, or GPUs (`allow_unproven_models = true` in [kv] skips this \
         check)"
    )]
    MlaOnCpu { model_type: String },
    #[error(
        "the store of {} does not fit: of {}'s {} of memory, {} are free; {}",
        ByteSize(*capacity),
        if *limited { "this control group" } else { "this machine" },
        ByteSize(*total), ByteSize(*available), smaller(*instead)
    )]
    StoreTooLarge {
        capacity: u64,
        available: u64,
        total: u64,
        /// Not the machine, but the control group has no more.
        limited: bool,
        /// What would fit.
        instead: Option<u64>,
    },
    #[error(
        "the store needs {needed} free huge pages of 2 MiB, {free} are there; run `{command}`, or \
         write \"auto\""
    )]
    TooFewHugePages {
        needed: u64,
        free: u64,
        command: String,
    },
    #[error(
        "there is no NUMA node {node} with memory for this process, only {}",
        list(nodes)
    )]
    UnknownNumaNode { node: u32, nodes: Vec<u32> },
    #[error(
        "the store of {} does not fit on NUMA node {node}, which has {} free; write a smaller \
         `capacity`, or more nodes",
        ByteSize(*capacity), ByteSize(*available)
    )]
    NumaNodeTooSmall {
        node: u32,
        capacity: u64,
        available: u64,
    },
    #[error("{wanted} port ranges are needed, {given} were found; write fewer nodes")]
    TooFewPorts { wanted: usize, given: usize },
}

impl PlanProblem {
    /// The topology is sound; this machine has too little for it.
    fn lacks_machine(&self) -> bool {
        !matches!(
            self,
            Self::DoubleBooked { .. }
                | Self::FullGpu { .. }
                | Self::CoreDoubleBooked { .. }
                | Self::MlaOnCpu { .. }
        )
    }
}

impl PlanErrors {
    /// Another machine could run this topology: nothing in the file itself is wrong.
    pub fn lacks_machine(&self) -> bool {
        self.problems
            .iter()
            .all(|problem| problem.kind.lacks_machine())
    }
}

/// What the plan's parts find.
#[derive(Debug, Default)]
pub(super) struct Found {
    problems: Vec<(String, PlanProblem)>,
    warnings: Vec<String>,
}

impl Found {
    pub(super) fn problem(&mut self, key: impl Into<String>, problem: PlanProblem) {
        self.problems.push((key.into(), problem));
    }

    pub(super) fn warning(&mut self, text: String) {
        self.warnings.push(text);
    }

    #[cfg(test)]
    pub(super) fn problems(&self) -> Vec<PlanProblem> {
        self.problems.iter().map(|(_, kind)| kind.clone()).collect()
    }

    #[cfg(test)]
    pub(super) fn has_warnings(&self) -> bool {
        !self.warnings.is_empty()
    }

    /// The warnings, if there is no problem.
    pub(super) fn into_warnings(self, topology: &Topology) -> Result<Vec<String>, PlanErrors> {
        if self.problems.is_empty() {
            return Ok(self.warnings);
        }
        let mut problems: Vec<_> = self
            .problems
            .into_iter()
            .map(|(key, kind)| Problem {
                place: topology.place(&key),
                key,
                kind,
            })
            .collect();
        problems.sort_by(|a, b| a.place.cmp(&b.place));
        Err(PlanErrors {
            file: topology.source.file().to_owned(),
            problems,
        })
    }
}

pub(super) fn list<T: std::fmt::Display>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(T::to_string).collect();
    items.join(", ")
}

/// What to write for a store that fits.
fn smaller(instead: Option<u64>) -> String {
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    match instead {
        None => "end something that uses memory".to_owned(),
        Some(bytes) if bytes < 4 * GIB => format!("write \"{}MiB\" or less", bytes / MIB),
        Some(bytes) => format!("write \"{}GiB\" or less", bytes / GIB),
    }
}

fn held_by(holders: &str) -> String {
    if holders.is_empty() {
        return String::new();
    }
    format!(", held by {holders}")
}
