//! `pegaflow init` on scripted machines, and what becomes of its file; `completions` in a real shell.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use pegaflow::fleet::Role;
use pegaflow::topology::{Device, RuntimeSettings, Topology};

use crate::fake_nvml;
use crate::helpers::Work;
use crate::support::Site;

const TOTAL: u64 = 85_899_345_920;

fn free(index: u32) -> String {
    format!("{index} GPU-{index} {TOTAL} {TOTAL} 0 {index}\n")
}

fn busy(index: u32) -> String {
    format!("{index} GPU-{index} {TOTAL} {} 0 {index}\n", TOTAL / 2)
}

fn split(index: u32) -> String {
    format!("{index} GPU-{index} {TOTAL} {TOTAL} 1 {index}\n")
}

/// A site whose NVML tells of these GPUs; without any, it has no NVML.
fn machine(gpus: &[String]) -> Site {
    let mut site = Site::new();
    script_gpus(&mut site, gpus);
    site
}

fn script_gpus(site: &mut Site, gpus: &[String]) {
    let dir = site.path("nvml");
    fs::create_dir(&dir).unwrap();
    let library = dir.join("libnvidia-ml.so.1");
    // Named outright, so that a driver of this host is never used.
    site.env("PEGAFLOW_NVML_LIBRARY", library.to_str().unwrap());
    if !gpus.is_empty() {
        fake_nvml::build(&dir);
        fs::write(dir.join("gpus.txt"), gpus.concat()).unwrap();
        site.env("FAKE_NVML_FILE", dir.join("gpus.txt").to_str().unwrap());
    }
}

fn init(site: &Site, args: &[&str]) -> Output {
    let args = [&["init", "--output", "new.toml"], args].concat();
    site.command(&args).output().unwrap()
}

fn written(site: &Site, args: &[&str]) -> (Topology, String) {
    let ended = init(site, args);
    let stderr = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.success(), "{stderr}");
    let said = String::from_utf8(ended.stdout).unwrap();
    assert!(said.ends_with("Next: pegaflow up new.toml\n"), "{said}");
    let topology = Topology::load(&site.path("new.toml")).unwrap_or_else(|error| panic!("{error}"));
    (topology, stderr)
}

fn roles(topology: &Topology) -> Vec<(Role, u32, u32)> {
    let nodes = topology.nodes.iter();
    nodes
        .map(|node| (node.role, node.count, node.tensor_parallel))
        .collect()
}

#[test]
fn gpus_become_pairs_and_a_single_one_a_unified_node() {
    use Role::{Decode, Prefill, Unified};
    let gpus = |count| (0..count).map(free).collect::<Vec<_>>();
    for (machine_gpus, args, expected) in [
        (gpus(1), &[][..], vec![(Unified, 1, 1)]),
        (gpus(2), &[], vec![(Prefill, 1, 1), (Decode, 1, 1)]),
        (gpus(3), &[], vec![(Prefill, 1, 1), (Decode, 2, 1)]),
        (gpus(8), &[], vec![(Prefill, 4, 1), (Decode, 4, 1)]),
        (
            gpus(8),
            &["--tensor-parallel", "4"],
            vec![(Prefill, 1, 4), (Decode, 1, 4)],
        ),
        (gpus(3), &["--tensor-parallel", "2"], vec![(Unified, 1, 2)]),
        // Busy and split GPUs are left to whom they belong to.
        (
            vec![free(0), busy(1), free(2), split(3)],
            &[],
            vec![(Prefill, 1, 1), (Decode, 1, 1)],
        ),
        // Nothing is free now: the file is for when it is.
        (
            vec![busy(0), busy(1)],
            &[],
            vec![(Prefill, 1, 1), (Decode, 1, 1)],
        ),
    ] {
        let site = machine(&machine_gpus);
        let (topology, stderr) = written(&site, args);
        assert_eq!(topology.device, Device::Cuda);
        assert_eq!(roles(&topology), expected, "{machine_gpus:?} {args:?}");
        assert_eq!(topology.runtime, RuntimeSettings::Path);
        for (index, gpu) in machine_gpus.iter().enumerate() {
            let is_odd = *gpu != free(u32::try_from(index).unwrap());
            let told = stderr.contains(&format!("note: GPU {index} is "));
            assert_eq!(told, is_odd, "{index}: {stderr}");
        }
    }
}

#[test]
fn without_a_gpu_to_use_it_is_a_topology_for_cpus() {
    for (gpus, why) in [
        (vec![], "no GPU here"),
        (vec!["broken\n".to_owned()], "no GPU here"),
        (vec![split(0)], "split by MIG"),
        (vec![free(0)], "--tensor-parallel 2"),
    ] {
        let site = machine(&gpus);
        let (topology, stderr) = written(&site, &["--tensor-parallel", "2"]);
        assert_eq!(topology.device, Device::Cpu);
        assert!(stderr.contains(why), "{why}: {stderr}");
        assert!(matches!(topology.runtime, RuntimeSettings::Managed { .. }));
    }
}

/// The file starts a fleet as it is: on GPUs with the `vllm` on PATH, and on CPUs with one that is made.
#[tokio::test(flavor = "multi_thread")]
async fn what_init_wrote_can_be_prepared_and_started() {
    let mut cpu = Work::Install.site();
    script_gpus(&mut cpu, &[]);
    let gpu = machine(&[free(0), free(1)]);
    for site in [cpu, gpu] {
        written(&site, &["--model", "./model"]);
        let ended = site.command(&["prepare", "new.toml"]).output().unwrap();
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success(), "{stderr}");
        assert!(String::from_utf8_lossy(&ended.stdout).contains("model "));

        let text = fs::read_to_string(site.path("new.toml")).unwrap();
        let text = text.replace("127.0.0.1:8000", &format!("127.0.0.1:{}", site.port));
        site.topology(&format!("name = \"test-{}\"\n{text}", site.port));
        site.up_ready().await.stop().await;
    }
}

#[test]
fn a_file_is_replaced_only_when_that_is_asked_for() {
    let site = machine(&[]);
    written(&site, &[]);
    let file = site.path("new.toml");
    let mode = || file.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode() & 0o133, 0, "nobody else may write: {:o}", mode());

    fs::write(&file, "mine").unwrap();
    let ended = init(&site, &[]);
    assert_eq!(ended.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("--force"));
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");

    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let link = site.path("link.toml");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let ended = site
        .command(&["init", "--output", "link.toml", "--force"])
        .output()
        .unwrap();
    assert!(ended.status.success());
    assert_eq!(mode(), 0o600, "a file that was private stays so");
    assert!(link.symlink_metadata().unwrap().is_symlink());
    Topology::load(&file).unwrap();
    let names = fs::read_dir(site.path(".")).unwrap();
    let drafts = names.filter(|name| {
        let name = name.as_ref().unwrap().file_name();
        name.to_string_lossy().ends_with(".new")
    });
    assert_eq!(drafts.count(), 0);
}

#[test]
fn the_model_is_what_was_asked_for_and_a_wrong_one_writes_nothing() {
    let site = machine(&[free(0)]);
    let ended = init(&site, &["--model", "a/b/c"]);
    assert_eq!(ended.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("Hugging Face id"));
    assert!(!site.path("new.toml").exists());

    // From here, also where the file lies elsewhere.
    fs::create_dir(site.path("sub")).unwrap();
    let args = ["init", "--output", "sub/new.toml", "--model", "./model"];
    assert!(site.command(&args).output().unwrap().status.success());
    let text = fs::read_to_string(site.path("sub/new.toml")).unwrap();
    let model = site.path("model");
    assert!(
        text.contains(&format!("model = \"{}\"", model.display())),
        "{text}"
    );

    let ended = site
        .command(&["init", "-o", "-", "--model", "o/n"])
        .output()
        .unwrap();
    let text = String::from_utf8(ended.stdout).unwrap();
    let topology = Topology::parse(&text, Path::new("t.toml")).unwrap();
    assert_eq!(topology.served_model_name, "n");
}

#[test]
fn bash_completes_commands_with_the_script() {
    let site = Site::new();
    let complete = |line: &str| {
        let words = line.split(' ').count();
        let script = format!(
            "source <({} completions bash) && COMP_WORDS=({line}) COMP_CWORD={} && \
             _pegaflow pegaflow '{}' && echo \"${{COMPREPLY[@]}}\"",
            env!("CARGO_BIN_EXE_pegaflow"),
            words - 1,
            line.split(' ').next_back().unwrap(),
        );
        let ended = Command::new("bash").args(["-c", &script]).output().unwrap();
        let stderr = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(ended.status.success(), "{stderr}");
        String::from_utf8(ended.stdout).unwrap()
    };
    assert_eq!(complete("pegaflow pre").trim(), "prepare");
    assert_eq!(complete("pegaflow up --se").trim(), "--set");
    assert!(!complete("pegaflow __").contains("guard"));
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        let ended = site.command(&["completions", shell]).output().unwrap();
        let script = String::from_utf8(ended.stdout).unwrap();
        assert!(
            script.contains("prepare") && !script.contains("__guard"),
            "{shell}"
        );
    }
}
