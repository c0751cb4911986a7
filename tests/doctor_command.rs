//! `pegaflow doctor`, and `pegaflow plan --probe`, as commands on scripted drivers: the real nvml-wrapper and the real cudarc.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

mod fake_nvml;

const GIB: u64 = 1 << 30;

/// Two scripted GPUs, and a Python that answers as the shim's check does.
struct Machine {
    dir: tempfile::TempDir,
    port: u16,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["run", "state", "cache", "home", "model", "tmp"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let machine = Self { dir, port };
        fs::write(machine.path("model/config.json"), "{}").unwrap();
        machine.python(r#"echo noise; echo '{"vllm": "9.9", "problems": []}'"#);
        fake_nvml::build(machine.dir.path());
        fake_nvml::build_cuda(machine.dir.path());
        machine.gpus(&format!(
            "0 GPU-a {total} {total} 0 1\n1 GPU-b {total} {total} 0 2\n",
            total = 80 * GIB
        ));
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn gpus(&self, script: &str) {
        fs::write(self.path("gpus.txt"), script).unwrap();
    }

    fn python(&self, body: &str) {
        fs::write(self.path("python"), format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(self.path("python"), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        self.verb("doctor", &[&["--json"], args].concat())
    }

    fn verb(&self, verb: &str, args: &[&str]) -> Command {
        let topology = format!(
            "model = \"./model\"\n[runtime]\nkind = \"python\"\npython = \"./python\"\n\
             [router]\nlisten = \"127.0.0.1:{}\"\n[kv]\ncapacity = \"32MiB\"\nhugepages = \"off\"\n\
             [[node]]\nrole = \"prefill\"\n[[node]]\nrole = \"decode\"\n",
            self.port
        );
        fs::write(self.path("t.toml"), topology).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow"));
        command
            .args([verb, "t.toml"])
            .args(args)
            .current_dir(self.dir.path())
            .env("HOME", self.path("home"))
            .env("TMPDIR", self.path("tmp"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env("PEGAFLOW_CACHE_DIR", self.path("cache"))
            .env("PEGAFLOW_NVML_LIBRARY", self.path("libnvidia-ml.so.1"))
            .env("LD_LIBRARY_PATH", self.dir.path())
            .env("FAKE_NVML_FILE", self.path("gpus.txt"))
            .env_remove("CUDA_VISIBLE_DEVICES");
        command
    }

    fn doctor(&self, cuda: &str) -> Findings {
        let output = self.command(&[]).env("FAKE_CUDA", cuda).output().unwrap();
        Findings::of(&output)
    }

    /// Neither files nor processes.
    fn assert_nothing_left(&self) {
        for name in ["run", "state", "cache", "tmp"] {
            let left = fs::read_dir(self.path(name)).unwrap().count();
            assert_eq!(left, 0, "something was left in {name}");
        }
        let mark = self.dir.path().to_str().unwrap().as_bytes();
        let ours = fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            environment.windows(mark.len()).any(|part| part == mark)
        });
        assert_eq!(ours.count(), 0, "processes were left");
    }
}

struct Findings {
    code: Option<i32>,
    all: Vec<Value>,
}

impl Findings {
    fn of(output: &Output) -> Self {
        let json: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {output:?}"));
        let all = json["findings"].as_array().unwrap().clone();
        let failed = all.iter().filter(|finding| finding["status"] == "failed");
        assert_eq!(json["failed"], failed.count());
        for finding in &all {
            let remedy = finding["remedy"].as_str().unwrap_or_default();
            let ok = finding["status"] == "ok";
            assert!(ok || !remedy.is_empty(), "no remedy: {finding}");
        }
        Self {
            code: output.status.code(),
            all,
        }
    }

    fn get(&self, check: &str) -> &Value {
        let found = self.all.iter().find(|finding| finding["check"] == check);
        found.unwrap_or_else(|| panic!("no {check} in {:#?}", self.all))
    }

    #[track_caller]
    fn assert_failed(&self, check: &str, text: &str) {
        let finding = self.get(check);
        assert_eq!(finding["status"], "failed", "{finding}");
        assert!(
            finding["what"].as_str().unwrap().contains(text),
            "{finding}"
        );
        assert_eq!(self.code, Some(4));
    }
}

#[test]
fn a_machine_that_is_well_passes() {
    let machine = Machine::new();
    let found = machine.doctor("");
    assert_eq!(found.code, Some(0), "{:#?}", found.all);
    for check in ["driver", "gpu 0", "gpu 1", "ports", "topology", "vllm"] {
        assert_eq!(found.get(check)["status"], "ok", "{}", found.get(check));
    }
    for check in ["copy 0", "copy 1"] {
        // How fast this machine copies is another matter.
        let what = found.get(check)["what"].as_str().unwrap();
        assert!(
            what.contains("GB/s to the GPU") && what.contains("256.0 MiB"),
            "{what}"
        );
        assert!(what.contains("CUDA 12.8"), "{what}");
    }
    for (check, other) in [("copy 0", 1), ("copy 1", 0)] {
        let what = found.get(check)["what"].as_str().unwrap();
        assert!(
            what.contains(&format!("reaches GPU {other} by itself")),
            "{what}"
        );
    }
    assert!(found.get("vllm")["what"].as_str().unwrap().contains("9.9"));
    machine.assert_nothing_left();
}

#[test]
fn each_fault_of_a_gpu_is_found() {
    let machine = Machine::new();
    let found = machine.doctor("nolock");
    found.assert_failed("copy 0", "cuMemHostRegister");
    let remedy = found.get("copy 0")["remedy"].as_str().unwrap();
    assert!(remedy.contains("ulimit"), "{remedy}");
    machine.doctor("nogpu").assert_failed("copy 1", "cuInit");
    let apart = machine.doctor("apart");
    let what = apart.get("copy 0")["what"].as_str().unwrap();
    assert!(what.contains("reaches no other GPU"), "{what}");
    let slow = machine.doctor("slow");
    assert_eq!(
        slow.get("copy 0")["status"],
        "warning",
        "{}",
        slow.get("copy 0")
    );

    machine.gpus(&format!("0 lost 1 1 0\n1 GPU-b {0} {0} 1 2\n", 80 * GIB));
    let found = machine.doctor("");
    found.assert_failed("gpu 0", "does not answer");
    assert_eq!(found.get("gpu 1")["status"], "warning");
    found.assert_failed("topology", "too few usable GPUs");

    fs::remove_file(machine.path("libcuda.so.1")).unwrap();
    machine.gpus(&format!("0 GPU-a {0} {0} 0 1\n", 80 * GIB));
    machine.doctor("").assert_failed("copy 0", "libcuda");
    machine.assert_nothing_left();
}

#[test]
fn a_plan_shows_what_the_probe_of_its_gpus_found() {
    let machine = Machine::new();
    let plan = |cuda: &str, args: &[&str]| {
        let mut command = machine.verb("plan", args);
        let output = command.env("FAKE_CUDA", cuda).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let json = |cuda: &str, args: &[&str]| -> Value {
        serde_json::from_str(&plan(cuda, &[&["--json"], args].concat())).unwrap()
    };
    // Nobody asked for it: no context on a GPU that may be at work.
    let unprobed = json("nolock", &[]);
    assert!(unprobed["nodes"][0]["gpus"][0].get("probe").is_none());

    let probed = json("", &["--probe"]);
    for node in [0, 1] {
        let gpus = probed["nodes"][node]["gpus"].as_array().unwrap();
        let [gpu] = gpus.as_slice() else {
            panic!("{gpus:?}");
        };
        let what = gpu["probe"].as_str().unwrap();
        assert!(what.contains("GB/s to the GPU"), "{what}");
    }
    let text = plan("", &["--probe"]);
    assert!(text.contains("  GPU 1: "), "{text}");
    let told = |plan: &Value, text: &str| {
        let warnings = plan["warnings"].as_array().unwrap();
        let texts = warnings.iter().filter_map(Value::as_str);
        texts.filter(|warning| warning.contains(text)).count()
    };
    assert_eq!(told(&probed, "GPU "), 0, "{}", probed["warnings"]);
    let unlocked = json("nolock", &["--probe"]);
    assert_eq!(told(&unlocked, "cuMemHostRegister"), 2);
    assert_eq!(told(&unlocked, "ulimit -l"), 2);
    let one = ["--probe", "--set", "node[1].gpus=[1]"];
    assert_eq!(told(&json("slow", &one), "the link is slow"), 2);
    fs::remove_file(machine.path("libcuda.so.1")).unwrap();
    assert_eq!(told(&json("", &["--probe"]), "libcuda is missing"), 2);
    machine.assert_nothing_left();
}

#[test]
fn a_gpu_that_hangs_is_given_up() {
    let machine = Machine::new();
    let started = Instant::now();
    let mut command = machine.command(&["--gpu-limit", "500ms"]);
    let found = Findings::of(&command.env("FAKE_CUDA", "hang").output().unwrap());
    found.assert_failed("copy 0", "had not finished");
    found.assert_failed("copy 1", "had not finished");
    assert!(started.elapsed() < Duration::from_secs(60));
    machine.assert_nothing_left();
}

#[test]
fn a_vllm_that_lacks_hooks_or_is_broken_is_found() {
    let machine = Machine::new();
    machine.python(r#"echo '{"vllm": "0.1", "problems": ["no lookup()", "no wait()"]}'"#);
    machine
        .doctor("")
        .assert_failed("vllm", "no lookup(); no wait()");
    machine.python(r#"echo '{"vllm": null, "problems": []}'"#);
    machine.doctor("").assert_failed("vllm", "no vLLM");
    machine.python("echo Traceback >&2; exit 1");
    machine.doctor("").assert_failed("vllm", "Traceback");
    fs::remove_file(machine.path("python")).unwrap();
    machine
        .doctor("")
        .assert_failed("vllm", "no Python interpreter");
    machine.assert_nothing_left();
}

#[test]
fn without_gpus_they_are_not_checked() {
    let machine = Machine::new();
    machine.gpus("");
    let found = machine.doctor("");
    found.assert_failed("driver", "shows no GPU");
    assert_eq!(found.get("copy")["status"], "not_checked");
    assert_eq!(found.get("copy")["what"], "not checked: no GPU");

    // Nobody said that there have to be any.
    let mut command = machine.command(&[]);
    command.env("PEGAFLOW_NVML_LIBRARY", machine.path("missing"));
    let with = Findings::of(&command.output().unwrap());
    with.assert_failed("driver", "no NVIDIA driver");
    let output = Command::new(env!("CARGO_BIN_EXE_pegaflow"))
        .args(["doctor"])
        .env("HOME", machine.path("home"))
        .env("PATH", "/usr/bin:/bin")
        .env("PEGAFLOW_NVML_LIBRARY", machine.path("missing"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("not checked  driver"), "{text}");
}

#[test]
fn a_topology_that_is_wrong_is_not_looked_at() {
    let machine = Machine::new();
    let output = machine.command(&["--set", "modell=1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
}
