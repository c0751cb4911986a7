//! What a model takes of each rank's memory: its weights, and the KV of one token. Pure.
//!
//! An estimate from config.json and the size of the weight files. A node is refused only where the
//! estimate is certain to be no more than what vLLM will take; else it is warned about, or shown.

use serde::Serialize;
use serde_json::Value;

use super::problem::{Found, PlanProblem};
use super::{Placement, Replica};
use crate::host::HostSnapshot;
use crate::topology::{Device, ModelFacts, NodeSettings, Topology};

/// What CUDA's context, activations and graphs take at least.
const BESIDE: u64 = 512 << 20;
/// Flags that change how much memory the weights take, or that there are any.
const CHANGES_WEIGHTS: &[&str] = &[
    "--quantization",
    "-q",
    "--load-format",
    "--hf-overrides",
    "--cpu-offload-gb",
];

/// Bytes of each rank's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    pub weights: u64,
    /// KV of one token; an upper limit where layers keep less than every token.
    pub kv_per_token: u64,
    /// What is left for KV, where that is known.
    pub kv: Option<u64>,
    /// How many tokens that is.
    pub kv_tokens: Option<u64>,
}

/// For each replica what it takes, where the model's configuration is known; refuses those that cannot fit.
pub(super) fn estimate<'m>(
    topology: &Topology,
    facts: impl Fn(&NodeSettings) -> &'m ModelFacts,
    (replicas, placements): (&[Replica<'_>], &[Placement]),
    host: &HostSnapshot,
    found: &mut Found,
) -> Vec<Option<MemoryEstimate>> {
    let estimate = |(replica, placement): (&Replica<'_>, &Placement)| {
        let model = facts(replica.settings);
        let shape = Shape::of(topology, model, replica.settings)?;
        let mut estimate = shape.of_rank(replica.settings.tensor_parallel.into());
        let budget = match topology.device {
            Device::Cuda => smallest(placement, host).map(|gpu| {
                let fraction = replica.settings.gpu_memory_fraction;
                Budget {
                    gpu: gpu.0,
                    total: gpu.1,
                    bytes: share(gpu.1, fraction),
                }
            }),
            Device::Cpu => None,
        };
        let left = budget.as_ref().map(|budget| {
            budget
                .bytes
                .saturating_sub(estimate.weights.saturating_add(BESIDE))
        });
        estimate.kv = replica.settings.kv_cache.or(left);
        estimate.kv_tokens = estimate
            .kv
            .and_then(|kv| kv.checked_div(estimate.kv_per_token));
        if let Some(budget) = budget {
            shape.fits(replica, &estimate, &budget, found);
        }
        Some(estimate)
    };
    replicas.iter().zip(placements).map(estimate).collect()
}

/// What a rank may take of its GPU.
struct Budget {
    gpu: u32,
    total: u64,
    bytes: u64,
}

/// The GPU of a node with the least memory: its index and size.
fn smallest(placement: &Placement, host: &HostSnapshot) -> Option<(u32, u64)> {
    let mine = host
        .gpus
        .iter()
        .filter(|gpu| placement.gpus.contains(&gpu.index));
    mine.map(|gpu| gpu.memory_total.map(|total| (gpu.index, total)))
        .collect::<Option<Vec<_>>>()?
        .into_iter()
        .min_by_key(|(_, total)| *total)
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a fraction of a memory size; a few bytes do not matter"
)]
fn share(total: u64, fraction: f64) -> u64 {
    (total as f64 * fraction) as u64
}

/// The sizes of a model under a node's flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    weights: u64,
    layers: u64,
    /// KV values of one token and layer for each head, and how many heads share ranks.
    per_head: u64,
    heads: u64,
    kv_bytes: u64,
    /// Tokens of the longest request.
    longest: Option<u64>,
    /// Nothing is known that would make vLLM take less.
    certain: bool,
}

impl Shape {
    fn of(topology: &Topology, model: &ModelFacts, node: &NodeSettings) -> Option<Self> {
        let config = Config(model.config.as_ref()?);
        let hidden = config.number("hidden_size")?;
        let layers = config.number("num_hidden_layers")?;
        let query_heads = config.number("num_attention_heads")?.max(1);
        let own_type = config.text("dtype").or(config.text("torch_dtype"));
        let bytes = bytes_of(&topology.dtype);
        let latent = config.number("kv_lora_rank");
        let (per_head, heads) = match latent {
            // One latent vector, which every rank keeps.
            Some(rank) => (rank + config.number("qk_rope_head_dim").unwrap_or(0), 1),
            None => {
                let size = config.number("head_dim").unwrap_or(hidden / query_heads);
                let heads = config.number("num_key_value_heads").unwrap_or(query_heads);
                (2 * size, heads.max(1))
            }
        };
        let fp8 = |kind: String| kind.starts_with("fp8");
        let kv_bytes = match node.flag("--kv-cache-dtype") {
            Some(kind) if fp8(kind.clone()) => 1,
            _ => bytes,
        };
        let changed = CHANGES_WEIGHTS.iter().any(|flag| node.flag(flag).is_some());
        let from_files = model.weights.filter(|bytes| *bytes > 0);
        let as_loaded = from_files.map(|files| match own_type {
            Some("float32") if bytes == 2 && !config.has("quantization_config") => files / 2,
            _ => files,
        });
        Some(Self {
            weights: as_loaded
                .unwrap_or_else(|| config.parameters(layers, hidden).saturating_mul(bytes)),
            layers,
            per_head,
            heads,
            kv_bytes,
            longest: topology
                .max_model_len
                .map(u64::from)
                .or(config.number("max_position_embeddings")),
            certain: from_files.is_some() && latent.is_none() && !changed && !config.is_sparse(),
        })
    }

    fn of_rank(&self, ranks: u64) -> MemoryEstimate {
        let heads = self.heads.div_ceil(ranks.max(1));
        MemoryEstimate {
            weights: self.weights / ranks.max(1),
            kv_per_token: (self.layers * self.per_head)
                .saturating_mul(heads)
                .saturating_mul(self.kv_bytes),
            kv: None,
            kv_tokens: None,
        }
    }

    /// The weights, and the longest request that the node is to take, must fit.
    fn fits(
        &self,
        replica: &Replica<'_>,
        estimate: &MemoryEstimate,
        budget: &Budget,
        found: &mut Found,
    ) {
        let settings = replica.settings;
        // A fixed cache is not held to the fraction.
        let budget_bytes = match settings.kv_cache {
            Some(_) => budget.total,
            None => budget.bytes,
        };
        let needed = estimate
            .weights
            .saturating_add(BESIDE)
            .saturating_add(settings.kv_cache.unwrap_or(0));
        let longest = self.longest.filter(|_| estimate.kv_per_token > 0);
        let problem = if needed > budget_bytes {
            PlanProblem::ModelTooLarge {
                node: replica.id.clone(),
                gpu: budget.gpu,
                weights: estimate.weights,
                needed,
                budget: budget_bytes,
                total: budget.total,
            }
        } else if let (Some(longest), Some(tokens)) = (longest, estimate.kv_tokens)
            && tokens < longest
        {
            PlanProblem::TooFewTokens {
                node: replica.id.clone(),
                longest,
                tokens,
                kv: estimate.kv.unwrap_or(0),
            }
        } else {
            return;
        };
        if self.certain {
            found.problem(&replica.key, problem);
        } else {
            found.warning(format!("by estimate, {problem}"));
        }
    }
}

/// A model's configuration; that of its text part where it has several.
struct Config<'c>(&'c Value);

impl Config<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        let parts = [
            Some(self.0),
            self.0.get("text_config"),
            self.0.get("llm_config"),
        ];
        let mut parts = parts.into_iter().flatten();
        parts.find_map(|part| part.get(name).filter(|value| !value.is_null()))
    }

    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Larger numbers are a fault of the file, and their products would overflow.
    fn number(&self, name: &str) -> Option<u64> {
        self.get(name)?.as_u64().filter(|number| *number < 1 << 24)
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.get(name)?.as_str()
    }

    /// Some layers may keep less than all tokens.
    fn is_sparse(&self) -> bool {
        let windowed = self.has("sliding_window")
            && self.get("use_sliding_window").and_then(Value::as_bool) != Some(false);
        let mixed = self.get("layer_types").and_then(Value::as_array);
        let other = |kind: &Value| kind.as_str() != Some("full_attention");
        let recurrent = [
            "ssm_cfg",
            "mamba_d_state",
            "linear_attn_config",
            "attn_layer_period",
        ];
        windowed
            || mixed.is_some_and(|kinds| kinds.iter().any(other))
            || recurrent.iter().any(|name| self.has(name))
    }

    /// Of a transformer with a gated feed-forward part, as nearly all are.
    fn parameters(&self, layers: u64, hidden: u64) -> u64 {
        let or = |name, default| u128::from(self.number(name).unwrap_or(default));
        let wide = u128::from(hidden);
        let heads = self.number("num_attention_heads").unwrap_or(1).max(1);
        let size = or("head_dim", hidden / heads);
        let attention =
            wide * size * (2 * u128::from(heads) + 2 * or("num_key_value_heads", heads));
        let inner = self.number("intermediate_size").unwrap_or(4 * hidden);
        let experts = ["num_local_experts", "num_experts", "n_routed_experts"];
        let experts = experts.iter().find_map(|name| self.number(name));
        let forward = match experts.map(u128::from) {
            None | Some(0) => 3 * wide * u128::from(inner),
            Some(experts) => {
                let all = experts + or("n_shared_experts", 0);
                3 * wide * or("moe_intermediate_size", inner) * all + wide * experts
            }
        };
        let tied = self.get("tie_word_embeddings").and_then(Value::as_bool) == Some(true);
        let vocabulary = or("vocab_size", 0) * wide * if tied { 1 } else { 2 };
        let all = u128::from(layers) * (attention + forward) + vocabulary;
        u64::try_from(all).unwrap_or(u64::MAX)
    }
}

/// Of one value, as `--dtype` has vLLM load the model.
fn bytes_of(dtype: &str) -> u64 {
    match dtype {
        "float32" | "float" => 4,
        // With "auto", vLLM loads float32 as float16.
        _ => 2,
    }
}

#[cfg(test)]
mod tests;
