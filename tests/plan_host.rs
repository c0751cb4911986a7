//! The host snapshot through the real nvml-wrapper and a scripted libnvidia-ml.so.1.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::fs;
use std::process::Command;

use pegaflow::host::{HostSnapshot, NvmlStatus};

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
    let mut child = Command::new(std::env::current_exe().unwrap());
    child
        .args([
            "--exact",
            "a_snapshot_of_this_machine_can_be_taken",
            "--nocapture",
        ])
        .env_remove("CUDA_VISIBLE_DEVICES");
    if let Some(script) = script {
        child.env("LD_LIBRARY_PATH", directory.path());
        fake_nvml::build(directory.path());
        let file = directory.path().join("gpus.txt");
        fs::write(&file, script).unwrap();
        child.env("FAKE_NVML_FILE", file);
    } else {
        // Whatever this host has.
        child.env("PEGAFLOW_NVML_LIBRARY", directory.path().join("missing"));
    }
    if let Some(visible) = visible {
        child.env("CUDA_VISIBLE_DEVICES", visible);
    }
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
    assert_eq!(uuids(&host), [(1, "GPU-b")]);
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
