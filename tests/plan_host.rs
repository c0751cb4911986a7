//! The host snapshot through the real nvml-wrapper and a scripted libnvidia-ml.so.1.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::fs;
use std::path::Path;
use std::process::Command;

use pegaflow::host::{GpuPath, HostSnapshot, Link, NvmlStatus};

mod fake_nvml;

const MARK: &str = "SNAPSHOT ";

/// This machine, whatever it has. The other tests run it in a process with an environment of its own.
#[test]
fn a_snapshot_of_this_machine_can_be_taken() {
    let snapshot = HostSnapshot::take().unwrap();
    assert!(!snapshot.cpus.is_empty() && snapshot.memory_total > 0);
    println!("\n{MARK}{}", serde_json::to_string(&snapshot).unwrap());
}

/// A snapshot taken where the scripted library is installed.
fn snapshot(script: Option<&str>, visible: Option<&str>) -> HostSnapshot {
    let directory = tempfile::tempdir().unwrap();
    let mut child = child();
    if let Some(script) = script {
        fake_nvml::build(directory.path());
        install(&mut child, directory.path(), script);
    } else {
        // Whatever this host has.
        child.env("PEGAFLOW_NVML_LIBRARY", directory.path().join("missing"));
    }
    if let Some(visible) = visible {
        child.env("CUDA_VISIBLE_DEVICES", visible);
    }
    taken(child)
}

fn child() -> Command {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child
        .args([
            "--exact",
            "a_snapshot_of_this_machine_can_be_taken",
            "--nocapture",
        ])
        .env_remove("CUDA_VISIBLE_DEVICES");
    child
}

fn install(child: &mut Command, directory: &Path, script: &str) {
    let file = directory.join("gpus.txt");
    fs::write(&file, script).unwrap();
    child
        .env("LD_LIBRARY_PATH", directory)
        .env("FAKE_NVML_FILE", file);
}

fn taken(mut child: Command) -> HostSnapshot {
    let output = child.output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let line = stdout.lines().find_map(|line| line.strip_prefix(MARK));
    serde_json::from_str(line.unwrap_or_else(|| panic!("no snapshot in {stdout}"))).unwrap()
}

fn uuids(host: &HostSnapshot) -> Vec<(u32, &str)> {
    host.gpus
        .iter()
        .map(|gpu| (gpu.index, gpu.uuid.as_str()))
        .collect()
}

#[test]
fn gpus_are_read_in_bus_order() {
    let host = snapshot(
        Some("# two, the second on an earlier bus\n0 GPU-a 100 60 0 9\n1 GPU-b 200 - 1 3\n"),
        None,
    );
    assert_eq!(host.nvml, NvmlStatus::Available);
    assert_eq!(uuids(&host), [(0, "GPU-b"), (1, "GPU-a")]);
    let [b, a] = &host.gpus[..] else {
        panic!("two GPUs")
    };
    assert_eq!(
        (a.memory_total, a.memory_free, a.mig),
        (Some(100), Some(60), false)
    );
    assert_eq!((b.memory_total, b.memory_free, b.mig), (None, None, true));
    assert_eq!(a.name, "Scripted GPU");
}

#[test]
fn a_lost_gpu_neither_hides_nor_renumbers_the_others() {
    let host = snapshot(Some("0 lost 1 1 0\n1 GPU-b 1 1 0\n"), None);
    assert_eq!(host.nvml, NvmlStatus::Available);
    assert_eq!(host.lost_gpus, [0]);
    assert_eq!(uuids(&host), [(1, "GPU-b")]);
}

/// Two halves of four: NVLink in the first, PCIe in the second.
fn eight_gpus() -> String {
    let mut script = String::new();
    for index in 0..8 {
        script += &format!("{index} GPU-{index} 100 90 0 {}\n", index + 1);
        script += &format!("is {index} name=H100 numa={}\n", index / 4);
    }
    for a in 0..8 {
        for b in a + 1..8 {
            let link = match (a / 4, b / 4) {
                (0, 0) => "nvlink",
                (1, 1) if a / 2 == b / 2 => "switch",
                (1, 1) => "hostbridge",
                _ => "system",
            };
            script += &format!("link {a} {b} {link}\n");
        }
    }
    script
}

#[test]
fn the_ways_between_eight_gpus_are_read() {
    let host = snapshot(Some(&eight_gpus()), None);
    assert_eq!(host.gpus.len(), 8);
    assert_eq!(host.gpu_paths.len(), 28);
    let link = |a, b| {
        let path = |path: &&GpuPath| (path.a, path.b) == (a, b);
        host.gpu_paths.iter().find(path).map(|path| path.link)
    };
    assert_eq!(link(0, 3), Some(Link::NvLink));
    assert_eq!(link(4, 5), Some(Link::Switch));
    assert_eq!(link(5, 6), Some(Link::HostBridge));
    assert_eq!(link(3, 4), Some(Link::System));
    let numa: Vec<_> = host.gpus.iter().filter_map(|gpu| gpu.numa_node).collect();
    assert_eq!(numa, [0, 0, 0, 0, 1, 1, 1, 1]);
    let address = host.gpus[2].pci.unwrap().to_string();
    assert_eq!(
        (host.gpus[2].name.as_str(), address.as_str()),
        ("H100", "00fa:03:00.0")
    );
}

/// Links are told by NVML's order, which is not the bus order that the indices follow.
#[test]
fn ways_follow_the_gpus_when_they_are_renumbered() {
    let script = "0 GPU-a 1 1 0 9\n1 GPU-b 1 1 0 3\n2 GPU-c 1 1 0 5\nlink 0 1 nvlink\n";
    let host = snapshot(Some(script), None);
    assert_eq!(uuids(&host), [(0, "GPU-b"), (1, "GPU-c"), (2, "GPU-a")]);
    let [path] = host.gpu_paths[..] else {
        panic!("{:?}", host.gpu_paths)
    };
    assert_eq!((path.a.min(path.b), path.a.max(path.b)), (0, 2));
}

#[test]
fn who_holds_memory_is_named_where_it_can_be_seen() {
    // This process, and one above the largest pid that Linux gives.
    let script = format!("0 GPU-a 100 40 0 1 {},4194305\n", std::process::id());
    let host = snapshot(Some(&script), None);
    let [ours, unseen] = &host.gpus[0].holders[..] else {
        panic!("two holders: {:?}", host.gpus)
    };
    let name = fs::read_to_string("/proc/self/comm").unwrap();
    assert_eq!(ours.name.as_deref(), Some(name.trim_end()));
    assert_eq!((unseen.name.as_deref(), unseen.memory), (None, Some(30)));
}

#[test]
fn what_an_old_driver_cannot_tell_is_unknown() {
    let directory = tempfile::tempdir().unwrap();
    fake_nvml::build_old(directory.path());
    let mut child = child();
    let script = "0 GPU-a 100 60 1 1 77\n1 GPU-b 100 60 0 2\nlink 0 1 nvlink\n";
    install(&mut child, directory.path(), script);
    let host = taken(child);
    assert_eq!(host.nvml, NvmlStatus::Available);
    assert_eq!(uuids(&host), [(0, "GPU-a"), (1, "GPU-b")]);
    assert_eq!(host.gpu_paths, []);
    let gpu = &host.gpus[0];
    assert!(!gpu.mig && gpu.holders.is_empty() && gpu.numa_node.is_none());
    assert_eq!(gpu.memory_free, Some(60));
}

#[test]
fn the_users_own_choice_is_respected() {
    let script = "0 GPU-a 1 1 0\n1 GPU-b 1 1 0\n2 GPU-c 1 1 0\n";
    let host = snapshot(Some(script), Some("2,GPU-a"));
    assert_eq!(uuids(&host), [(0, "GPU-a"), (2, "GPU-c")]);
}

#[test]
fn no_gpu_a_broken_driver_and_no_driver_are_told_apart() {
    let host = snapshot(Some(""), None);
    assert_eq!((host.nvml, host.gpus.len()), (NvmlStatus::Available, 0));
    let host = snapshot(Some("broken\n"), None);
    assert!(
        matches!(host.nvml, NvmlStatus::Failed(_)),
        "{:?}",
        host.nvml
    );
    assert!(host.gpus.is_empty() && !host.cpus.is_empty());
}

#[test]
fn a_machine_without_the_library_has_no_gpus() {
    if [
        "/usr/lib",
        "/usr/lib64",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
    ]
    .iter()
    .any(|directory| {
        std::path::Path::new(directory)
            .join("libnvidia-ml.so.1")
            .exists()
    }) {
        eprintln!("skipped: this machine has the real library");
        return;
    }
    let host = snapshot(None, None);
    assert!(
        matches!(host.nvml, NvmlStatus::Missing(_)),
        "{:?}",
        host.nvml
    );
    assert!(host.gpus.is_empty());
}
