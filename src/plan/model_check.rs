//! Models that are known to answer wrongly when their KV is loaded. Pure; the canary guards against
//! those that nobody knows of yet.

use serde_json::Value;

use super::problem::{Found, PlanProblem};
use crate::topology::{Device, ModelFacts, NodeSettings, Topology};

/// Architectures whose configuration has latent attention even where it is not written out.
const MLA_TYPES: &[&str] = &[
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_mtp",
    "glm_moe_dsa",
    "kimi_k2",
    "kimi_linear",
    "longcat_flash",
    "minicpm3",
    "pangu_ultra_moe",
];

pub(super) fn check<'m>(
    topology: &Topology,
    facts: impl Fn(&NodeSettings) -> &'m ModelFacts,
    found: &mut Found,
) {
    if topology.device != Device::Cpu || topology.kv.allow_unproven_models {
        return;
    }
    let mut seen = Vec::new();
    let nodes = topology.nodes.iter().enumerate();
    for (index, node) in nodes.filter(|(_, node)| node.shares_kv()) {
        let model = topology.model_of(node);
        if !seen.contains(&model) {
            seen.push(model);
            let key = match *model == topology.model {
                true => "model".to_owned(),
                false => format!("node[{index}].model"),
            };
            check_one(&key, facts(node), found);
        }
    }
}

fn check_one(key: &str, model: &ModelFacts, found: &mut Found) {
    match &model.config {
        Some(config) => {
            if let Some(model_type) = mla(config) {
                found.problem(key, PlanProblem::MlaOnCpu { model_type });
            }
        }
        None => found.warning(format!(
            "{} has no readable config.json: only the canary can tell whether its KV can be loaded",
            model.load_from
        )),
    }
}

/// The model's type, if it has multi-head latent attention.
fn mla(config: &Value) -> Option<String> {
    let parts = [
        Some(config),
        config.get("text_config"),
        config.get("llm_config"),
    ];
    parts.into_iter().flatten().find_map(|part| {
        let model_type = part.get("model_type").and_then(Value::as_str);
        let is_mla = match part.get("kv_lora_rank") {
            Some(rank) => !rank.is_null(),
            None => model_type.is_some_and(|name| MLA_TYPES.contains(&name)),
        };
        is_mla.then(|| model_type.unwrap_or("unknown type").to_owned())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn latent_attention_is_seen_in_every_shape() {
        for (config, expected) in [
            (
                json!({"model_type": "deepseek_v3", "kv_lora_rank": 512}),
                true,
            ),
            (json!({"model_type": "deepseek_v2"}), true),
            (
                json!({"model_type": "somebody_else", "kv_lora_rank": 64}),
                true,
            ),
            (
                json!({"model_type": "vlm", "text_config": {"kv_lora_rank": 64}}),
                true,
            ),
            (json!({"kv_lora_rank": 64}), true),
            (
                json!({"model_type": "deepseek_v2", "kv_lora_rank": null}),
                false,
            ),
            (json!({"model_type": "qwen3"}), false),
            (json!({}), false),
        ] {
            assert_eq!(mla(&config).is_some(), expected, "{config}");
        }
    }
}
