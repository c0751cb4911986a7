//! Plans of the shipped topologies and of small ones, on scripted machines.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::fs;
use std::path::{Path, PathBuf};

use pegaflow::fleet::{NodeKey, Role};
use pegaflow::host::{Gpu, HostSnapshot, MemoryFacts, NvmlStatus};
use pegaflow::plan::{NodePlan, Plan, PlanErrors, PlanInputs, PlanProblem};
use pegaflow::topology::{Connector, Device, Launcher, ModelFacts, Topology, cpu_sibling};
use serde_json::json;

const GIB: u64 = 1 << 30;

fn host(gpus: u32) -> HostSnapshot {
    HostSnapshot {
        cpus: vec![0, 1],
        memory_total: 64 * GIB,
        memory_available: 60 * GIB,
        memory: MemoryFacts::default(),
        gpus: (0..gpus)
            .map(|index| Gpu {
                index,
                uuid: format!("GPU-{index}"),
                name: "H200".to_owned(),
                memory_total: Some(100 * GIB),
                memory_free: Some(99 * GIB),
                ..Gpu::default()
            })
            .collect(),
        ..HostSnapshot::default()
    }
}

fn inputs() -> PlanInputs {
    PlanInputs {
        launcher: Launcher::Vllm("bin/vllm".into()),
        model: ModelFacts {
            load_from: "owner/name".to_owned(),
            identity: "weights-1".to_owned(),
            config: Some(json!({"model_type": "qwen3"})),
            weights: None,
        },
        other_models: Vec::new(),
        ports: vec![11_000, 11_032, 11_064, 11_096],
        engine_socket: "run/engine.sock".into(),
        shim_dir: "run/shim".into(),
        kv_token: "s3cret-token".to_owned(),
        node_key: NodeKey::random(),
        run_id: "run-1".to_owned(),
        inherited_pythonpath: None,
        cpu_config: None,
    }
}

fn parse(text: &str) -> Topology {
    Topology::parse(text, Path::new("t.toml")).unwrap_or_else(|error| panic!("{error}"))
}

/// One prefill and one decode node; `rest` belongs to the decode node.
fn pd(device: &str, rest: &str) -> Topology {
    parse(&format!(
        "device = \"{device}\"\nmodel = \"owner/name\"\n[[node]]\nrole = \"prefill\"\n\
         [[node]]\nrole = \"decode\"\n{rest}"
    ))
}

fn problems(errors: &PlanErrors) -> Vec<&PlanProblem> {
    errors
        .problems
        .iter()
        .map(|problem| &problem.kind)
        .collect()
}

/// The value after a flag.
fn flag<'p>(node: &'p NodePlan, name: &str) -> Option<&'p str> {
    let at = node.argv.iter().position(|arg| arg == name)?;
    node.argv.get(at + 1).map(String::as_str)
}

fn configs() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "toml")
        })
        .collect();
    files.sort();
    files
}

#[test]
fn every_shipped_topology_plans() {
    let files = configs();
    let names: Vec<_> = files.iter().map(|file| file.file_stem().unwrap()).collect();
    for expected in ["1p1d", "1p1d-cpu", "unified2-cpu"] {
        assert!(names.iter().any(|name| *name == expected), "{names:?}");
    }
    for file in files {
        let topology = Topology::load(&file).unwrap_or_else(|error| panic!("{error}"));
        let plan =
            Plan::make(&topology, &host(2), &inputs()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(plan.nodes.len(), 2);
        assert_eq!(plan.nodes.len(), Plan::ports_needed(&topology));
        assert_eq!(plan.warnings, [] as [String; 0], "{}", file.display());
        let shares = plan.nodes.iter().any(|node| node.role != Role::Unified);
        let store = topology.kv.connector == Connector::Pegaflow;
        assert_eq!(plan.kv.enabled, shares && store);
    }
}

#[test]
fn without_a_gpu_the_cpu_topology_is_named() {
    let file = configs().remove(0).with_file_name("1p1d.toml");
    let sibling = cpu_sibling(&file).unwrap();
    assert_eq!(sibling, file.with_file_name("1p1d-cpu.toml"));
    let topology = Topology::load(&file).unwrap();
    for (given, expected) in [
        (Some(sibling.clone()), sibling),
        (None, PathBuf::from("configs/1p1d-cpu.toml")),
    ] {
        let mut inputs = inputs();
        inputs.cpu_config = given;
        let mut host = host(0);
        host.nvml = NvmlStatus::Missing("no such library".to_owned());
        let errors = Plan::make(&topology, &host, &inputs).unwrap_err();
        assert!(
            matches!(problems(&errors)[..], [PlanProblem::NoGpu { cpu_config, .. }] if *cpu_config == expected),
            "{errors}"
        );
        assert!(errors.to_string().contains(&expected.display().to_string()));
    }
    assert_eq!(cpu_sibling(&file.with_file_name("nothing.toml")), None);
}

#[test]
fn problems_of_the_machine_name_the_place_in_the_file() {
    let text = "model = \"a/b\"\n[kv]\ncapacity = \"1TiB\"\n[[node]]\nrole = \"prefill\"\n\
                gpus = [0]\n[[node]]\nrole = \"decode\"\ngpus = [7]\n";
    let mut inputs = inputs();
    inputs.ports.truncate(1);
    let errors = Plan::make(&parse(text), &host(1), &inputs).unwrap_err();
    let places: Vec<_> = errors
        .problems
        .iter()
        .map(|p| (p.place.line, p.place.column, p.key.as_str()))
        .collect();
    assert_eq!(
        places,
        [
            (3, 12, "kv.capacity"),
            (4, 1, "node"),
            (9, 8, "node[1].gpus")
        ]
    );
    assert!(matches!(
        problems(&errors)[..],
        [
            PlanProblem::StoreTooLarge { .. },
            PlanProblem::TooFewPorts {
                wanted: 2,
                given: 1
            },
            PlanProblem::UnknownGpu { .. }
        ]
    ));
}

#[test]
fn a_node_sees_its_own_gpus_and_only_those() {
    let topology = pd(
        "cuda",
        "gpus = [1]\nkv_cache = \"2GiB\"\nargs = [\"--max-num-seqs\", \"8\"]\n",
    );
    let plan = Plan::make(&topology, &host(2), &inputs()).unwrap();
    let [p, d] = &plan.nodes[..] else {
        panic!("two nodes")
    };
    assert_eq!((&p.gpus[..], &d.gpus[..]), (&[0][..], &[1][..]));
    assert_eq!((p.addr.port(), d.addr.port()), (11_000, 11_032));
    for (node, gpu, vllm_port) in [(p, "0", "11001"), (d, "1", "11033")] {
        assert_eq!(node.env["CUDA_VISIBLE_DEVICES"], gpu);
        assert_eq!(node.env["CUDA_DEVICE_ORDER"], "PCI_BUS_ID");
        assert_eq!(node.env["PYTHONHASHSEED"], "0");
        assert_eq!(node.env["PYTHONPATH"], "run/shim");
        assert_eq!(node.env["VLLM_PORT"], vllm_port);
        assert_eq!(node.env["PEGAFLOW_KV_SOCKET"], "run/engine.sock");
        assert_eq!(node.env["PEGAFLOW_KV_TOKEN"], "s3cret-token");
        assert_eq!(node.env["PEGAFLOW_WEIGHTS_ID"], "weights-1");
        assert_eq!(node.env["PEGAFLOW_NODE"], node.id.as_str());
        assert!(
            !node.env.contains_key("HF_HUB_OFFLINE"),
            "the model is not local"
        );
        assert_eq!(node.argv[..3], ["bin/vllm", "serve", "owner/name"]);
        assert_eq!(flag(node, "--host"), Some("127.0.0.1"));
        assert_eq!(flag(node, "--port").unwrap(), node.addr.port().to_string());
        assert_eq!(flag(node, "--served-model-name"), Some("name"));
        assert_eq!(flag(node, "--block-size"), Some("16"));
        assert_eq!(flag(node, "--dtype"), Some("auto"));
        assert_eq!(flag(node, "--tensor-parallel-size"), Some("1"));
        assert_eq!(flag(node, "--gpu-memory-utilization"), Some("0.9"));
        assert_eq!(
            flag(node, "--prefix-caching-hash-algo"),
            Some("sha256_cbor")
        );
        assert_eq!(flag(node, "--max-model-len"), None);
        let config: serde_json::Value =
            serde_json::from_str(flag(node, "--kv-transfer-config").unwrap()).unwrap();
        assert_eq!(
            config,
            json!({
                "kv_connector": "PegaConnector",
                "kv_connector_module_path": "pegaflow_vllm.connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "spec_name": "PegaSpec",
                    "spec_module_path": "pegaflow_vllm.spec",
                },
            })
        );
    }
    assert_eq!(flag(p, "--kv-cache-memory-bytes"), None);
    assert_eq!(flag(d, "--kv-cache-memory-bytes"), Some("2147483648"));
    assert_eq!(d.argv[d.argv.len() - 2..], ["--max-num-seqs", "8"]);
}

#[test]
fn a_unified_node_on_cpu_has_no_connector() {
    let topology = parse(
        "name = \"u\"\ndevice = \"cpu\"\nmodel = \"builtin:tiny\"\nmax_model_len = 64\n[[node]]\nrole = \"unified\"\n\
         cpus = [1]\nport = 9000\nkv_cache = \"3GiB\"\n\
         env = { HF_HUB_OFFLINE = \"0\", EXTRA = \"x\", PYTHONPATH = \"mine\" }\n",
    );
    let mut inputs = inputs();
    inputs.launcher = Launcher::Python("venv/bin/python".into());
    inputs.inherited_pythonpath = Some("theirs".to_owned());
    let plan = Plan::make(&topology, &host(0), &inputs).unwrap();
    let node = &plan.nodes[0];
    assert_eq!((plan.device, plan.kv.enabled), (Device::Cpu, false));
    assert_eq!((node.addr.port(), &node.cpus[..]), (9000, &[1][..]));
    assert_eq!(
        node.argv[..5],
        [
            "venv/bin/python",
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            "owner/name"
        ]
    );
    assert_eq!(flag(node, "--max-model-len"), Some("64"));
    assert_eq!(flag(node, "--block-size"), Some("32"));
    assert_eq!(node.env["VLLM_CPU_KVCACHE_SPACE"], "3");
    assert_eq!(node.env["VLLM_CPU_OMP_THREADS_BIND"], "1");
    assert_eq!(node.env["PYTHONPATH"], "run/shim:mine");
    assert_eq!(
        (
            node.env["HF_HUB_OFFLINE"].as_str(),
            node.env["EXTRA"].as_str()
        ),
        ("0", "x")
    );
    for absent in [
        "--kv-transfer-config",
        "--prefix-caching-hash-algo",
        "--gpu-memory-utilization",
    ] {
        assert_eq!(flag(node, absent), None, "{absent}");
    }
    for absent in [
        "PEGAFLOW_KV_TOKEN",
        "PEGAFLOW_KV_SOCKET",
        "CUDA_VISIBLE_DEVICES",
    ] {
        assert!(!node.env.contains_key(absent), "{absent}");
    }
}

#[test]
fn latent_attention_is_refused_where_it_answers_wrongly() {
    let mla = |topology: &Topology, host: &HostSnapshot| {
        let mut inputs = inputs();
        inputs.model.config = Some(json!({"model_type": "deepseek_v3", "kv_lora_rank": 512}));
        Plan::make(topology, host, &inputs)
    };
    let errors = mla(&pd("cpu", ""), &host(0)).unwrap_err();
    assert!(matches!(
        problems(&errors)[..],
        [PlanProblem::MlaOnCpu { model_type }] if model_type == "deepseek_v3"
    ));
    assert_eq!(
        (
            errors.problems[0].place.line,
            errors.problems[0].place.column
        ),
        (2, 9)
    );
    assert!(mla(&pd("cpu", "[kv]\nallow_unproven_models = true\n"), &host(0)).is_ok());
    assert!(mla(&pd("cuda", ""), &host(2)).is_ok());
    let unified = parse("device = \"cpu\"\nmodel = \"a/b\"\n[[node]]\nrole = \"unified\"\n");
    assert!(mla(&unified, &host(0)).is_ok());
}

#[test]
fn what_is_not_fatal_is_warned_of() {
    let topology = pd("cpu", "count = 2\n");
    let mut host = host(0);
    host.memory_available = 9 * GIB;
    let mut inputs = inputs();
    inputs.model.config = None;
    let plan = Plan::make(&topology, &host, &inputs).unwrap();
    // Cores shared, little memory, a model that cannot be looked into.
    assert_eq!(plan.warnings.len(), 3, "{:?}", plan.warnings);
    assert_eq!(plan.nodes[2].id.as_str(), "decode-1");
}

#[test]
fn nodes_are_told_to_save_generated_tokens_only_when_the_topology_says_so() {
    let told = |kv: &str| {
        let plan = Plan::make(&pd("cuda", kv), &host(2), &inputs()).unwrap();
        let value = |node: &NodePlan| node.env.get("PEGAFLOW_KV_SAVE_DECODED").cloned();
        plan.nodes.iter().map(value).collect::<Vec<_>>()
    };
    assert_eq!(told(""), [None, None]);
    assert_eq!(told("[kv]\nsave_decoded = false\n"), [None, None]);
    let yes = Some("1".to_owned());
    assert_eq!(told("[kv]\nsave_decoded = true\n"), [yes.clone(), yes]);
}

#[test]
fn checksums_are_kept_only_when_the_topology_says_so() {
    let verify = |kv: &str| {
        let plan = Plan::make(&pd("cuda", kv), &host(2), &inputs()).unwrap();
        plan.kv.arena.verify
    };
    assert!(!verify(""));
    assert!(!verify("[kv]\nverify = false\n"));
    assert!(verify("[kv]\nverify = true\n"));
}

#[test]
fn nothing_that_is_printed_holds_the_token() {
    let plan = Plan::make(&pd("cuda", ""), &host(2), &inputs()).unwrap();
    assert_eq!(plan.nodes[0].env["PEGAFLOW_KV_TOKEN"], "s3cret-token");
    let table = plan.table();
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(
        lines[1],
        ["prefill", "prefill", "gpu", "0", "127.0.0.1:11000"]
    );
    assert_eq!(
        lines[2],
        ["decode", "decode", "gpu", "1", "127.0.0.1:11032"]
    );
    for printed in [table, format!("{plan:?}")] {
        assert!(!printed.contains("s3cret"), "{printed}");
    }
}

#[test]
fn a_node_with_a_host_listens_there_and_others_need_a_key_that_is_chosen() {
    let topology = |host: &str, supervisor: &str| {
        parse(&format!(
            "device = \"cpu\"\nmodel = \"owner/name\"\n{supervisor}[[node]]\nname = \"a\"\nrole = \"unified\"\n\
             host = \"{host}\"\nport = 9000\n[[node]]\nname = \"b\"\nrole = \"unified\"\n"
        ))
    };
    let machine = host(0);
    let chosen = "[supervisor]\nnode_key_file = \"node.key\"\n";
    for (host, supervisor, warned) in [
        ("10.0.0.8", "", true),
        ("10.0.0.8", chosen, false),
        ("fd00::8", "", true),
        ("127.0.0.2", "", false),
    ] {
        let topology = topology(host, supervisor);
        let plan = Plan::make(&topology, &machine, &inputs()).unwrap();
        let [a, b] = &plan.nodes[..] else { panic!() };
        assert_eq!(flag(a, "--host"), Some(host));
        assert_eq!(flag(a, "--port"), Some("9000"));
        assert_eq!((a.addr.ip(), a.addr.port()), (host.parse().unwrap(), 9000));
        assert_eq!(flag(b, "--host"), Some("127.0.0.1"));
        assert_eq!(b.addr.to_string(), "127.0.0.1:11032");
        let warning = plan
            .warnings
            .iter()
            .find(|text| text.contains("node_key_file"));
        assert_eq!(warning.is_some(), warned, "{:?}", plan.warnings);
        assert!(warning.is_none_or(|text| text.contains(host)));
    }
    let key = topology("10.0.0.8", chosen).supervisor.node_key_file;
    assert_eq!(key.as_deref(), Some(Path::new("node.key")));
}
