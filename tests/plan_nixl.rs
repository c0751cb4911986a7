//! What nodes are started with where NIXL carries the KV.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::path::Path;

use pegaflow::fleet::NodeKey;
use pegaflow::host::{Gpu, HostSnapshot};
use pegaflow::plan::{NodePlan, Plan, PlanInputs};
use pegaflow::topology::{Launcher, ModelFacts, Topology};
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;

fn plan(device: &str, kv: &str) -> Plan {
    let text = format!(
        "device = \"{device}\"\nmodel = \"owner/name\"\n[kv]\nconnector = \"nixl\"\n{kv}\
         [[node]]\nrole = \"prefill\"\n[[node]]\nrole = \"decode\"\n[[node]]\nrole = \"unified\"\n"
    );
    let topology = Topology::parse(&text, Path::new("t.toml")).unwrap();
    let gpu = |index| Gpu {
        index,
        uuid: format!("GPU-{index}"),
        memory_total: Some(80 * GIB),
        memory_free: Some(80 * GIB),
        ..Gpu::default()
    };
    let host = HostSnapshot {
        cpus: vec![0, 1, 2],
        memory_total: 64 * GIB,
        memory_available: 60 * GIB,
        gpus: (0..3).map(gpu).collect(),
        ..HostSnapshot::default()
    };
    let inputs = PlanInputs {
        launcher: Launcher::Vllm("bin/vllm".into()),
        model: ModelFacts {
            load_from: "owner/name".to_owned(),
            identity: "weights-1".to_owned(),
            config: Some(json!({"model_type": "qwen3"})),
            weights: None,
        },
        other_models: Vec::new(),
        ports: vec![11_000, 11_032, 11_064],
        engine_socket: "run/engine.sock".into(),
        shim_dir: "run/shim".into(),
        kv_token: "s3cret-token".to_owned(),
        node_key: NodeKey::random(),
        run_id: "run-1".to_owned(),
        inherited_pythonpath: None,
        cpu_config: None,
    };
    Plan::make(&topology, &host, &inputs).unwrap_or_else(|error| panic!("{error}"))
}

fn connector(node: &NodePlan) -> Option<Value> {
    let at = node
        .argv
        .iter()
        .position(|word| word == "--kv-transfer-config")?;
    Some(serde_json::from_str(&node.argv[at + 1]).unwrap())
}

#[test]
fn prefill_produces_decode_consumes_and_each_has_a_side_channel_of_its_own() {
    for (device, buffer) in [("cpu", "cpu"), ("cuda", "cuda")] {
        let plan = plan(device, "side_channel_host = \"10.0.0.7\"\n");
        // No store, and none of its secrets in anybody's environment.
        assert!(!plan.kv.enabled);
        let [p, d, unified] = &plan.nodes[..] else {
            panic!("{plan:?}");
        };
        for (node, role, port) in [(p, "kv_producer", "11031"), (d, "kv_consumer", "11063")] {
            let expected = json!({
                "kv_connector": "NixlConnector",
                "kv_role": role,
                "kv_buffer_device": buffer,
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": { "kv_lease_duration": 30 },
            });
            assert_eq!(connector(node), Some(expected));
            assert_eq!(node.env["VLLM_NIXL_SIDE_CHANNEL_HOST"], "10.0.0.7");
            assert_eq!(node.env["VLLM_NIXL_SIDE_CHANNEL_PORT"], port);
            let of_store = |name: &String| name.starts_with("PEGAFLOW_KV");
            assert!(!node.env.keys().any(of_store), "{:?}", node.env.keys());
        }
        assert_eq!(connector(unified), None);
        assert!(!unified.env.contains_key("VLLM_NIXL_SIDE_CHANNEL_HOST"));
    }
}

#[test]
fn a_side_channel_that_others_cannot_reach_is_told() {
    let far = "[[node]]\nname = \"far\"\nrole = \"decode\"\nurl = \"http://10.0.0.8:8000\"\n";
    assert_eq!(plan("cpu", "").warnings, Vec::<String>::new());
    let warned = plan("cpu", far).warnings;
    assert!(
        matches!(&warned[..], [one] if one.contains("side_channel_host")),
        "{warned:?}"
    );
    let reachable = format!("side_channel_host = \"10.0.0.7\"\n{far}");
    assert_eq!(plan("cpu", &reachable).warnings, Vec::<String>::new());
}

#[test]
fn its_answers_may_be_rounded_otherwise_unless_told_otherwise() {
    assert!(plan("cpu", "").kv.canary_logprob_tolerance > 0.0);
    let strict = plan("cpu", "canary_logprob_tolerance = 0.0\n");
    assert!(strict.kv.canary_logprob_tolerance.abs() < f64::EPSILON);
}
