use serde_json::json;

use super::*;
use crate::host::Gpu;
use crate::plan::tests::{node, replicas_of};
use crate::topology::NodeSettings;

const GIB: u64 = 1 << 30;

/// Llama 3.1 8B.
fn llama() -> Value {
    json!({
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128_256,
        "torch_dtype": "bfloat16", "max_position_embeddings": 131_072,
        "tie_word_embeddings": false, "sliding_window": null,
    })
}

fn facts(config: Value, weights: Option<u64>) -> ModelFacts {
    ModelFacts {
        load_from: "m".to_owned(),
        identity: "m".to_owned(),
        config: Some(config),
        weights,
    }
}

fn topology(top: &str) -> Topology {
    let text = format!("model = \"o/n\"\n{top}\n[[node]]\nrole = \"unified\"\n");
    Topology::parse(&text, std::path::Path::new("t.toml")).unwrap()
}

/// One node on one GPU of this size.
fn on(
    gpu: u64,
    top: &str,
    node: &NodeSettings,
    model: &ModelFacts,
) -> (Option<MemoryEstimate>, Vec<PlanProblem>, bool) {
    let mut found = Found::default();
    let host = HostSnapshot {
        gpus: vec![Gpu {
            memory_total: Some(gpu),
            ..Gpu::default()
        }],
        ..HostSnapshot::default()
    };
    let placement = Placement {
        gpus: vec![0],
        ..Placement::default()
    };
    let nodes = std::slice::from_ref(node);
    let on = (&replicas_of(nodes)[..], &[placement][..]);
    let estimate = estimate(&topology(top), |_| model, on, &host, &mut found);
    (estimate[0], found.problems(), found.has_warnings())
}

fn cuda(name: &str) -> NodeSettings {
    NodeSettings {
        kv_cache: None,
        ..node(name)
    }
}

#[test]
fn a_known_model_is_estimated_as_its_authors_count_it() {
    let shape = Shape::of(&topology(""), &facts(llama(), None), &cuda("a")).unwrap();
    // 8.03 billion parameters of two bytes; 128 KiB of KV for each token.
    let weights = shape.of_rank(1).weights;
    assert!(
        (16_000_000_000..16_130_000_000).contains(&weights),
        "{weights}"
    );
    assert_eq!(shape.of_rank(1).kv_per_token, 128 << 10);
    assert_eq!(shape.of_rank(4).kv_per_token, 32 << 10);
    // More ranks than heads: each keeps one.
    assert_eq!(shape.of_rank(16).kv_per_token, 16 << 10);
    assert_eq!(shape.of_rank(4).weights, weights / 4);
}

#[test]
fn latent_attention_and_experts_are_counted_their_way() {
    // DeepSeek V2 Lite: 15.7 billion parameters; one latent vector of 576 for each token and layer.
    let config = json!({
        "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_routed_experts": 64, "n_shared_experts": 2, "vocab_size": 102_400,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    });
    let shape = Shape::of(&topology(""), &facts(config, None), &cuda("a")).unwrap();
    let billions = shape.weights as f64 / 2e9;
    assert!((15.0..17.5).contains(&billions), "{billions}");
    assert_eq!(shape.of_rank(8).kv_per_token, 27 * 576 * 2);
    assert!(!shape.certain);
}

#[test]
fn flags_and_files_change_the_estimate() {
    let shape = |top: &str, args: &[&str], model: &ModelFacts| {
        let mut node = cuda("a");
        node.args = args.iter().map(|arg| (*arg).to_owned()).collect();
        Shape::of(&topology(top), model, &node).unwrap()
    };
    let model = facts(llama(), Some(5 * GIB));
    assert_eq!(shape("", &[], &model).weights, 5 * GIB);
    assert!(shape("", &[], &model).certain);
    let fp8 = shape("", &["--kv-cache-dtype", "fp8_e4m3"], &model);
    assert_eq!(fp8.of_rank(1).kv_per_token, 64 << 10);
    assert!(!shape("", &["--quantization=fp8"], &model).certain);
    assert_eq!(shape("dtype = \"float32\"", &[], &model).kv_bytes, 4);
    let mut wide = llama();
    wide["torch_dtype"] = json!("float32");
    assert_eq!(shape("", &[], &facts(wide, Some(8 * GIB))).weights, 4 * GIB);
    for (name, value) in [
        ("sliding_window", json!(4096)),
        ("layer_types", json!(["full_attention", "linear_attention"])),
    ] {
        let mut config = llama();
        config[name] = value;
        assert!(!shape("", &[], &facts(config, Some(GIB))).certain, "{name}");
    }
    let vlm = json!({"text_config": llama(), "vision_config": {}});
    assert_eq!(
        shape("", &[], &facts(vlm, None)).of_rank(1).kv_per_token,
        128 << 10
    );
}

#[test]
fn a_model_that_does_not_fit_is_refused_if_that_is_certain() {
    let model = facts(llama(), Some(15 * GIB));
    let short = "max_model_len = 4096";
    let (estimate, problems, warned) = on(24 * GIB, short, &cuda("a"), &model);
    assert_eq!((problems, warned), (vec![], false));
    // 0.9 of 24 GiB, less the weights and what lies beside them.
    let kv = estimate.unwrap().kv.unwrap();
    assert!(kv > 6 * GIB && kv < 7 * GIB, "{kv}");

    let (_, problems, _) = on(16 * GIB, short, &cuda("a"), &model);
    assert!(matches!(
        problems[..],
        [PlanProblem::ModelTooLarge { gpu: 0, .. }]
    ));
    // The model's own 131,072 tokens take 16 GiB.
    let (_, problems, _) = on(24 * GIB, "", &cuda("a"), &model);
    assert!(matches!(
        problems[..],
        [PlanProblem::TooFewTokens { longest: 131_072, tokens, .. }] if tokens < 56_000
    ));
    let mut split = cuda("a");
    split.tensor_parallel = 4;
    assert_eq!(on(24 * GIB, "", &split, &model).1, []);

    let mut fixed = cuda("a");
    fixed.kv_cache = Some(10 * GIB);
    let (_, problems, _) = on(24 * GIB, short, &fixed, &model);
    assert!(matches!(problems[..], [PlanProblem::ModelTooLarge { .. }]));

    let mut unsure = cuda("a");
    unsure.args = vec!["--quantization".to_owned(), "fp8".to_owned()];
    let (_, problems, warned) = on(16 * GIB, short, &unsure, &model);
    assert_eq!((problems, warned), (vec![], true));
}

#[test]
fn nonsense_in_a_configuration_is_no_panic() {
    let huge = (1u64 << 24) - 1;
    let mut config = llama();
    for name in [
        "hidden_size",
        "num_hidden_layers",
        "head_dim",
        "intermediate_size",
    ] {
        config[name] = json!(huge);
    }
    config["num_experts"] = json!(huge);
    let shape = Shape::of(&topology(""), &facts(config, None), &cuda("a")).unwrap();
    assert_eq!(shape.of_rank(1).weights, u64::MAX);
    for config in [
        json!({}),
        json!([]),
        json!({"hidden_size": -1}),
        json!({"hidden_size": "x"}),
    ] {
        assert_eq!(
            Shape::of(&topology(""), &facts(config, None), &cuda("a")),
            None
        );
    }
}
