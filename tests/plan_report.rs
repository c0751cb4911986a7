//! What `pegaflow plan` prints, against golden files, and as the command of the binary.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pegaflow::fleet::NodeKey;
use pegaflow::host::{Gpu, GpuPath, HostSnapshot, HugePages, Link, MemoryFacts, NumaNode};
use pegaflow::plan::{Plan, PlanInputs, Report};
use pegaflow::topology::{Launcher, ModelFacts, Surroundings, Topology};
use serde_json::{Value, json};

mod fake_nvml;

const GIB: u64 = 1 << 30;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn host() -> HostSnapshot {
    let gpu = |index: u32| Gpu {
        index,
        uuid: format!("GPU-{index}"),
        pci: format!("{:02x}:00.0", index + 1).parse().ok(),
        name: "NVIDIA H100 80GB HBM3".to_owned(),
        memory_total: Some(80 * GIB),
        memory_free: Some(79 * GIB),
        numa_node: Some(index / 2),
        ..Gpu::default()
    };
    let numa = |id: u32, cpus: &[usize]| NumaNode {
        id,
        cpus: cpus.to_vec(),
        available: 100 * GIB,
        hugepages: HugePages::default(),
    };
    HostSnapshot {
        cpus: (0..8).collect(),
        memory_total: 256 * GIB,
        memory_available: 200 * GIB,
        memory: MemoryFacts {
            numa: vec![numa(0, &[0, 1, 2, 3]), numa(1, &[4, 5, 6, 7])],
            ..MemoryFacts::default()
        },
        gpus: (0..4).map(gpu).collect(),
        gpu_paths: vec![
            GpuPath {
                a: 0,
                b: 1,
                link: Link::Node,
            },
            GpuPath {
                a: 2,
                b: 3,
                link: Link::NvLink,
            },
        ],
        ..HostSnapshot::default()
    }
}

const TOPOLOGY: &str = r#"
model = "owner/name"
max_model_len = 8192
[kv]
capacity = "16GiB"
[[node]]
role = "prefill"
args = ["--max-num-seqs", "8", "--speculative-config", "${SPEC}"]
[[node]]
role = "decode"
args = ["--speculative-config", "${SPEC}"]
env = { MY_API_KEY = "in-the-file", NCCL_DEBUG = "WARN", FROM = "x ${VAR}" }
"#;

fn report() -> Report {
    let around = Surroundings {
        set: &[],
        env: &|name| Some(format!("value of {name}").into()),
    };
    let topology = Topology::parse_with(TOPOLOGY, Path::new("t.toml"), &around).unwrap();
    let config = json!({
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128_256,
    });
    let inputs = PlanInputs {
        launcher: Launcher::Vllm("/opt/vllm/bin/vllm".into()),
        model: ModelFacts {
            load_from: "/models/owner name".to_owned(),
            identity: "weights-1".to_owned(),
            config: Some(config),
            weights: Some(15 * GIB),
        },
        other_models: Vec::new(),
        ports: vec![11_000, 11_032],
        engine_socket: "/run/user/1000/pegaflow/t/engine.sock".into(),
        shim_dir: "/run/user/1000/pegaflow/t/shim".into(),
        kv_token: "s3cret-token".to_owned(),
        node_key: NodeKey::random(),
        run_id: "0123456789abcdef".to_owned(),
        inherited_pythonpath: None,
        cpu_config: None,
    };
    let plan = Plan::make(&topology, &host(), &inputs).unwrap_or_else(|error| panic!("{error}"));
    let mut report = Report::new(&plan, &host(), &topology.secrets);
    report.warn("something worth knowing");
    report
}

/// Compares with a file; `GOLDEN=write` writes it instead.
fn golden(name: &str, text: &str) {
    let file = root().join("tests/golden").join(name);
    if std::env::var_os("GOLDEN").is_some_and(|value| value == "write") {
        fs::write(&file, text).unwrap();
    }
    let expected = fs::read_to_string(&file).unwrap_or_default();
    assert_eq!(
        text, expected,
        "{name} differs; if that is right: GOLDEN=write cargo test --test plan_report"
    );
}

#[test]
fn the_report_is_as_it_was() {
    let report = report();
    golden("plan.txt", &report.text());
    golden("plan.json", &serde_json::to_string_pretty(&report).unwrap());
}

#[test]
fn no_secret_is_in_it() {
    let report = report();
    let json = serde_json::to_string(&report).unwrap();
    for text in [report.text(), json] {
        for secret in [
            "s3cret-token",
            "in-the-file",
            "value of SPEC",
            "value of VAR",
        ] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
        assert!(text.contains("PEGAFLOW_KV_TOKEN") && text.contains("WARN"));
    }
}

/// A machine with two scripted GPUs, a program named vllm and a model.
struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    fn new(gpus: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["bin", "run", "state", "cache", "home", "model"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let vllm = dir.path().join("bin/vllm");
        fs::write(&vllm, "#!/bin/sh\ntouch \"$0.ran\"\n").unwrap();
        fs::set_permissions(&vllm, fs::Permissions::from_mode(0o755)).unwrap();
        let config = json!({
            "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        });
        fs::write(dir.path().join("model/config.json"), config.to_string()).unwrap();
        let weights = fs::File::create(dir.path().join("model/model.safetensors")).unwrap();
        // Sparse.
        weights.set_len(15 * GIB).unwrap();
        fake_nvml::build(dir.path());
        fs::write(dir.path().join("gpus.txt"), gpus).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn plan(&self, topology: &str, args: &[&str]) -> Output {
        fs::write(self.path("t.toml"), topology).unwrap();
        let path = std::env::var("PATH").unwrap_or_default();
        Command::new(env!("CARGO_BIN_EXE_pegaflow"))
            .args(["plan", "t.toml"])
            .args(args)
            .current_dir(self.dir.path())
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("HOME", self.path("home"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env("PEGAFLOW_CACHE_DIR", self.path("cache"))
            .env("PEGAFLOW_NVML_LIBRARY", self.path("libnvidia-ml.so.1"))
            .env("FAKE_NVML_FILE", self.path("gpus.txt"))
            .env_remove("CUDA_VISIBLE_DEVICES")
            .output()
            .unwrap()
    }

    fn assert_untouched(&self) {
        for name in ["run", "state", "cache", "home"] {
            let left = fs::read_dir(self.path(name)).unwrap().count();
            assert_eq!(left, 0, "something was left in {name}");
        }
        assert!(!self.path("bin/vllm.ran").exists(), "vllm was started");
    }
}

const PAIR: &str = "model = \"./model\"\n[kv]\ncapacity = \"32MiB\"\nhugepages = \"off\"\n\
                    [[node]]\nrole = \"prefill\"\n[[node]]\nrole = \"decode\"\ngpus = [1]\n";

fn two_gpus(gib: u64) -> String {
    let total = gib * GIB;
    format!("0 GPU-a {total} {total} 0 1\n1 GPU-b {total} {total} 0 2\n")
}

fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[test]
fn the_command_starts_nothing_and_says_what_would_run() {
    let machine = Machine::new(&two_gpus(80));
    let output = machine.plan(PAIR, &["--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let plan = json_of(&output);
    let gpus: Vec<_> = plan["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["gpus"][0]["uuid"].as_str().unwrap())
        .collect();
    assert_eq!(gpus, ["GPU-a", "GPU-b"]);
    let decode = &plan["nodes"][1];
    assert_eq!(decode["memory"]["weights"], 15 * GIB);
    assert_eq!(decode["memory"]["kv_per_token"], 128 << 10);
    assert_eq!(decode["env"]["CUDA_VISIBLE_DEVICES"], "1");
    let program = decode["argv"][0].as_str().unwrap();
    assert_eq!(Path::new(program), machine.path("bin/vllm"));
    machine.assert_untouched();

    let output = machine.plan(PAIR, &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("15.0 GiB") && text.contains("nothing was started"),
        "{text}"
    );
    machine.assert_untouched();
}

#[test]
fn what_is_not_here_yet_is_a_warning() {
    let machine = Machine::new(&two_gpus(80));
    let absent = PAIR.replace("./model", "owner/name")
        + "[runtime]\nkind = \"managed\"\nrequirements = [\"vllm\"]\n";
    let output = machine.plan(&absent, &["--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let plan = json_of(&output);
    assert_eq!(plan["nodes"][0]["memory"], Value::Null);
    let warnings = plan["warnings"].to_string();
    assert!(
        warnings.contains("runtime is not installed") && warnings.contains("model is not here"),
        "{warnings}"
    );
    machine.assert_untouched();
}

#[test]
fn a_refusal_is_json_too_and_ends_as_up_would() {
    let machine = Machine::new(&two_gpus(16));
    let output = machine.plan(PAIR, &["--json"]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let error = &json_of(&output)["error"];
    assert_eq!(error["exit_code"], 4);
    let problems = error["problems"].as_array().unwrap();
    assert_eq!(problems.len(), 2);
    assert_eq!(
        (&problems[0]["key"], &problems[0]["line"]),
        (&json!("node[0]"), &json!(5))
    );
    let message = problems[0]["message"].as_str().unwrap();
    assert!(message.contains("the model does not fit"), "{message}");

    let output = machine.plan("model = 1\n", &["--json"]);
    assert_eq!(output.status.code(), Some(3));
    let error = &json_of(&output)["error"];
    let problems = error["problems"].as_array().unwrap();
    assert!(
        problems.iter().any(|problem| problem["key"] == "model"),
        "{error}"
    );

    let output = machine.plan(PAIR, &["--json", "--set", "node.decode.gpus=[5]"]);
    assert_eq!(output.status.code(), Some(4));
    let problem = &json_of(&output)["error"]["problems"][0];
    assert_eq!(problem["argument"], "node.decode.gpus=[5]");

    let none = Machine::new("");
    let output = none.plan(PAIR, &[]);
    assert_eq!(output.status.code(), Some(4));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("no GPU here")
    );
    none.assert_untouched();
}

#[test]
fn a_host_and_a_key_that_cannot_be_used_are_refused_before_anything_starts() {
    let machine = Machine::new(&two_gpus(80));
    let topology = |host: &str| {
        let node = format!("role = \"decode\"\nhost = \"{host}\"");
        let chosen = "[supervisor]\nnode_key_file = \"node.key\"\n[kv]";
        PAIR.replacen("role = \"decode\"", &node, 1)
            .replacen("[kv]", chosen, 1)
    };
    let told = |output: Output| {
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let key = machine.path("node.key");
    let missing = told(machine.plan(&topology("127.0.0.2"), &[]));
    assert!(
        missing.contains("node.key") && missing.contains("No such file"),
        "{missing}"
    );
    fs::write(&key, "chosen-s3cret\n").unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let open = told(machine.plan(&topology("127.0.0.2"), &[]));
    assert!(
        open.contains("chmod o= ") && !open.contains("s3cret"),
        "{open}"
    );
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&key, "short\n").unwrap();
    let short = told(machine.plan(&topology("127.0.0.2"), &[]));
    assert!(
        short.contains("node.key") && short.contains("8 characters"),
        "{short}"
    );
    fs::write(&key, "chosen-s3cret\n").unwrap();
    // An address that documents have and machines do not.
    let strange = told(machine.plan(&topology("192.0.2.1"), &[]));
    assert!(
        strange.contains("node[1].host") && strange.contains("no address of this machine"),
        "{strange}"
    );

    let output = machine.plan(&topology("127.0.0.2"), &["--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("127.0.0.2:") && !text.contains("chosen-s3cret"),
        "{text}"
    );
    machine.assert_untouched();
}
