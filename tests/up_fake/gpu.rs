//! `configs/1p1d.toml` as it is shipped, on a scripted libnvidia-ml.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::fake_nvml;
use crate::support::client::{self, Ending, completion, is_proven};
use crate::support::{GONE_LIMIT, HANG, Pegaflow, Site, processes, send};

const TOTAL: u64 = 85_899_345_920;
/// What `up` says while it waits for memory.
const WAITING: &str = "waiting up to 8 s for GPU memory";

/// The scripted machine: two GPUs, and who holds their memory.
fn two_gpus(free: u64, holders: &[u32]) -> String {
    let holders: Vec<String> = holders.iter().map(u32::to_string).collect();
    let holders = holders.join(",");
    format!("0 GPU-aaaa {TOTAL} {free} 0 1 {holders}\n1 GPU-bbbb {TOTAL} {free} 0 2 {holders}\n")
}

pub fn free_gpus() -> String {
    two_gpus(TOTAL - (1 << 30), &[])
}

fn busy_gpus(holders: &[u32]) -> String {
    two_gpus(1 << 30, holders)
}

/// What NVML is on this machine.
pub enum Library<'s> {
    Missing,
    Scripted(&'s str),
}

/// The shipped config, but for the port and the store's size: other work may need the memory.
pub fn gpu_site(library: Library<'_>) -> Site {
    let mut site = Site::new();
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    for (name, ours) in [
        ("1p1d.toml", "topology.toml"),
        ("1p1d-cpu.toml", "topology-cpu.toml"),
    ] {
        let text = fs::read_to_string(shipped.join(name)).unwrap();
        let (old, new) = ("127.0.0.1:8000", format!("127.0.0.1:{}", site.port));
        assert!(text.contains(old), "{name}");
        let text = text.replace(old, &new).replace("\"16GiB\"", "\"64MiB\"");
        fs::write(site.path(ours), text).unwrap();
    }
    site.env("HF_HUB_OFFLINE", "1");
    let dir = site.path("nvml");
    fs::create_dir(&dir).unwrap();
    // Named outright, so that a driver of this host is never used.
    let file = dir.join("libnvidia-ml.so.1");
    site.env("PEGAFLOW_NVML_LIBRARY", file.to_str().unwrap());
    if let Library::Scripted(gpus) = library {
        fake_nvml::build(&dir);
        set_gpus(&site, gpus);
        let script = site.path("nvml/gpus.txt");
        site.env("FAKE_NVML_FILE", script.to_str().unwrap());
    }
    site
}

fn set_gpus(site: &Site, gpus: &str) {
    let draft = site.path("nvml/gpus.new");
    fs::write(&draft, gpus).unwrap();
    fs::rename(draft, site.path("nvml/gpus.txt")).unwrap();
}

async fn leader(up: &Pegaflow<'_>, node: &str) -> u32 {
    u32::try_from(up.node(node).await["pid"].as_u64().unwrap()).unwrap()
}

/// The GPUs that every process of a node sees, from what the node says and from the kernel.
async fn visible(up: &Pegaflow<'_>, node: &str) -> String {
    let addr = up.node(node).await["addr"].as_str().unwrap().to_owned();
    let text = client::get(&format!("http://{addr}/_fake/env")).await;
    let environment: Value = serde_json::from_str(&text.unwrap()).unwrap();
    assert_eq!(environment["CUDA_DEVICE_ORDER"], "PCI_BUS_ID");
    let gpus = environment["CUDA_VISIBLE_DEVICES"].as_str().unwrap();

    let tree = processes::tree(leader(up, node).await);
    assert!(tree.len() >= 3, "leader, engine and worker: {tree:?}");
    let of_all = processes::with_environment(&format!("CUDA_VISIBLE_DEVICES={gpus}"));
    assert!(
        of_all.is_superset(&tree),
        "{node}: not all see {gpus:?} only"
    );
    gpus.to_owned()
}

async fn assignment(up: &Pegaflow<'_>) -> BTreeMap<&'static str, String> {
    let mut seen = BTreeMap::new();
    for node in ["prefill", "decode"] {
        seen.insert(node, visible(up, node).await);
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn each_node_sees_its_own_gpu_and_only_that_also_after_it_returned() {
    let site = gpu_site(Library::Scripted(&free_gpus()));
    let up = site.up_ready().await;
    let before = assignment(&up).await;
    let distinct: BTreeSet<&str> = before.values().map(String::as_str).collect();
    assert_eq!(distinct, BTreeSet::from(["0", "1"]));

    for node in ["decode", "prefill"] {
        let incarnation = up.node(node).await["incarnation"].as_u64();
        send(leader(&up, node).await, Signal::SIGKILL);
        let back = |view: &Value| is_proven(view) && view["incarnation"].as_u64() > incarnation;
        up.wait_for_node(node, back).await;
        assert_eq!(assignment(&up).await, before, "after the death of {node}");
    }
    let answer = up.generate(&with_model(completion(1, 100, 4))).await;
    assert_eq!(answer.ending, Ending::Complete);
    up.stop().await;
}

fn with_model(mut body: Value) -> Value {
    body.as_object_mut().unwrap().remove("model");
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_gpu_the_message_names_the_cpu_config() {
    for library in [
        Library::Missing,
        Library::Scripted(""),
        Library::Scripted("broken\n"),
    ] {
        let site = gpu_site(library);
        let mut up = site.up();
        let status = up.wait(Duration::from_secs(10)).await;
        assert_eq!(status.code(), Some(4), "4: this machine cannot run it");
        assert!(up.output().contains("topology-cpu.toml"), "{}", up.output());
        site.assert_nothing_left(Duration::from_secs(1)).await;
    }
}

/// The driver frees the memory of killed nodes some time after their end.
#[tokio::test(flavor = "multi_thread")]
async fn up_right_after_a_kill_waits_for_the_old_nodes_memory() {
    let site = gpu_site(Library::Scripted(&free_gpus()));
    let mut up = site.up_ready().await;
    let holders = [leader(&up, "prefill").await, leader(&up, "decode").await];
    set_gpus(&site, &busy_gpus(&holders));
    up.signal(Signal::SIGKILL);
    up.wait(HANG).await;

    let mut again = site.up();
    again.wait_for_log(WAITING).await;
    let (pids, output) = (
        format!("pids {}, {}", holders[0], holders[1]),
        again.output(),
    );
    assert!(output.contains(&format!("GPU 0 ({pids})")), "{output}");
    assert!(output.contains(&format!("GPU 1 ({pids})")), "{output}");
    tokio::time::sleep(Duration::from_secs(2)).await;
    set_gpus(&site, &free_gpus());
    again.wait_for_log("pegaflow is ready").await;
    assert_eq!(again.output().matches(WAITING).count(), 1, "said once");
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_leftovers_never_free_is_refused_after_a_while() {
    let site = gpu_site(Library::Scripted(&busy_gpus(&[dead_pid()])));
    let started = Instant::now();
    let mut up = site.up();
    let status = up.wait(Duration::from_secs(20)).await;
    assert_eq!(status.code(), Some(4), "4: this machine cannot run it");
    assert!(
        started.elapsed() >= Duration::from_secs(8),
        "it did not wait"
    );
    assert!(up.output().contains(WAITING));
    site.assert_nothing_left(GONE_LIMIT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_somebody_else_uses_is_refused_at_once() {
    let site = gpu_site(Library::Scripted(&busy_gpus(&[std::process::id()])));
    let mut up = site.up();
    let status = up.wait(Duration::from_secs(20)).await;
    assert_eq!(status.code(), Some(4), "4: this machine cannot run it");
    assert!(!up.output().contains(WAITING), "{}", up.output());
    assert!(
        up.output().contains("too few usable GPUs"),
        "{}",
        up.output()
    );
    site.assert_nothing_left(GONE_LIMIT).await;
}

/// A pid that nobody has.
fn dead_pid() -> u32 {
    let mut dead = std::process::Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    dead.id()
}

async fn returns(up: &Pegaflow<'_>, node: &str) {
    let back = |view: &Value| is_proven(view) && view["restarts"].as_u64() == Some(1);
    up.wait_for_node(node, back).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_not_started_again_before_its_gpu_memory_is_free() {
    let site = gpu_site(Library::Scripted(&free_gpus()));
    let up = site.up_ready().await;
    set_gpus(&site, &busy_gpus(&[dead_pid()]));
    send(leader(&up, "decode").await, Signal::SIGKILL);
    let waits = |view: &Value| {
        let reason = view["reason"].as_str().unwrap_or_default();
        reason.contains("waits before its start") && reason.contains("GiB of GPU ")
    };
    up.wait_for_node("decode", waits).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let view = up.node("decode").await;
    assert_eq!(
        (&view["phase"], &view["restarts"]),
        (&"backoff".into(), &0.into())
    );
    set_gpus(&site, &free_gpus());
    returns(&up, "decode").await;
    assert!(
        !up.output().contains("is started although"),
        "{}",
        up.output()
    );
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_never_comes_free_delays_a_restart_for_some_seconds_only() {
    let site = gpu_site(Library::Scripted(&free_gpus()));
    let up = site.up_ready().await;
    set_gpus(&site, &busy_gpus(&[dead_pid()]));
    let killed = Instant::now();
    send(leader(&up, "decode").await, Signal::SIGKILL);
    returns(&up, "decode").await;
    assert!(
        killed.elapsed() >= Duration::from_secs(15),
        "it did not wait"
    );
    assert!(up.output().contains("is started although"));
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_that_came_since_does_not_delay_a_restart() {
    let site = gpu_site(Library::Scripted(&free_gpus()));
    let up = site.up_ready().await;
    set_gpus(&site, &busy_gpus(&[std::process::id()]));
    send(leader(&up, "decode").await, Signal::SIGKILL);
    returns(&up, "decode").await;
    assert!(
        !up.output().contains("waits before its start"),
        "{}",
        up.output()
    );
    up.stop().await;
}

/// The driver fails, then hangs, then its library is gone: nothing waits for it for long.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_returns_without_a_driver_that_could_be_asked() {
    let site = gpu_site(Library::Scripted(&free_gpus()));
    let up = site.up_ready().await;
    for restarts in 1..=3 {
        match restarts {
            1 => set_gpus(&site, "broken\n"),
            2 => set_gpus(&site, &("hang\n".to_owned() + &free_gpus())),
            _ => fs::remove_file(site.path("nvml/libnvidia-ml.so.1")).unwrap(),
        }
        send(leader(&up, "decode").await, Signal::SIGKILL);
        let back = |view: &Value| is_proven(view) && view["restarts"] == restarts;
        up.wait_for_node("decode", back).await;
        let answer = up.generate(&with_model(completion(1, 100, 4))).await;
        assert_eq!(answer.ending, Ending::Complete);
    }
    assert_eq!(up.node("prefill").await["restarts"], 0);
    up.stop().await;
}

/// The shipped topology with other text in it.
fn edit(site: &Site, old: &str, new: &str) {
    let file = site.path("topology.toml");
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(old), "{old}");
    fs::write(file, text.replace(old, new)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_and_decode_are_placed_close_together_and_beside_the_arena() {
    let mut script = String::new();
    for index in 0..8 {
        // The freest GPUs lie apart.
        let free = TOTAL - (1 << 30) * (1 + u64::from(index % 7 != 0));
        script += &format!("{index} GPU-{index} {TOTAL} {free} 0 {}\n", index + 1);
    }
    script += "link 1 2 system\nlink 4 6 nvlink\n";
    let site = gpu_site(Library::Scripted(&script));
    let up = site.up_ready().await;
    let seen = assignment(&up).await;
    let gpus: BTreeSet<&str> = seen.values().map(String::as_str).collect();
    assert_eq!(gpus, BTreeSet::from(["4", "6"]));
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_share_one_gpu_when_the_topology_says_so() {
    let one = format!("0 GPU-aaaa {TOTAL} {} 0 1\n", TOTAL - (1 << 30));
    let site = gpu_site(Library::Scripted(&one));
    for role in ["prefill", "decode"] {
        let role = format!("role = \"{role}\"\n");
        let shared =
            format!("{role}share_gpus = true\ngpu_memory_fraction = 0.45\nkv_cache = \"4GiB\"\n");
        edit(&site, &role, &shared);
    }
    let up = site.up_ready().await;
    assert!(assignment(&up).await.values().all(|gpus| gpus == "0"));
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_gpu_is_refused_with_the_name_of_who_holds_it() {
    let site = gpu_site(Library::Scripted(&busy_gpus(&[std::process::id()])));
    let role = "role = \"prefill\"\ngpus = ";
    edit(&site, &format!("{role}\"auto\""), &format!("{role}[1]"));
    let mut up = site.up();
    let status = up.wait(Duration::from_secs(20)).await;
    assert_eq!(status.code(), Some(4), "4: this machine cannot run it");
    let name = fs::read_to_string("/proc/self/comm").unwrap();
    let held = format!("held by {} (pid {})", name.trim_end(), std::process::id());
    let output = up.output();
    assert!(
        output.contains(&held) && output.contains("79.0 GiB"),
        "{output}"
    );
    site.assert_nothing_left(GONE_LIMIT).await;
}

/// The figures of one GPU, as `/v1/status` and `pegaflow status --json` tell them.
fn figures(site: &Site, index: usize) -> Value {
    let output = site.command(&["status", "--json"]).output().unwrap();
    let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    status["gpus"][index].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_gpus_are_watched_while_the_nodes_run() {
    let more = "is 0 util=37 temp=61 ecc=0\nis 1 util=5 temp=40\n";
    let site = gpu_site(Library::Scripted(&(free_gpus() + more)));
    let up = site.up_ready().await;
    let is = async |wanted: Value| {
        crate::wait_until(
            async || {
                let seen = figures(&site, 0);
                let wanted = wanted.as_object().unwrap().iter();
                wanted.clone().all(|(key, value)| seen[key] == *value)
            },
            &wanted.to_string(),
        )
        .await;
    };
    is(json!({"index": 0, "uuid": "GPU-aaaa", "answers": true, "memory_used": 1 << 30, "memory_total": TOTAL,
        "utilization_percent": 37, "temperature_celsius": 61, "ecc_uncorrected": 0, "xids": 0, "last_xid": null}))
    .await;
    let metrics = up.get("/metrics").await;
    for line in [
        "pegaflow_gpu_up{gpu=\"0\",uuid=\"GPU-aaaa\"} 1",
        "pegaflow_gpu_memory_used_bytes{gpu=\"1\",uuid=\"GPU-bbbb\"} 1073741824",
        "pegaflow_gpu_utilization_percent{gpu=\"0\",uuid=\"GPU-aaaa\"} 37",
        "pegaflow_gpu_xid_errors_total{gpu=\"0\",uuid=\"GPU-aaaa\"} 0",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }

    set_gpus(
        &site,
        &(free_gpus() + "is 0 util=99 temp=90 ecc=2 xid=48\n"),
    );
    is(json!({"utilization_percent": 99, "ecc_uncorrected": 2, "xids": 1, "last_xid": 48})).await;
    assert!(up.output().contains("Xid 48"), "{}", up.output());
    let table = site.command(&["status"]).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.contains("99% busy") && table.contains("last Xid 48"),
        "{table}"
    );

    // One is lost, then the driver hangs: nothing waits for it.
    set_gpus(&site, &free_gpus().replace("GPU-aaaa", "lost"));
    is(json!({"uuid": "GPU-aaaa", "answers": false, "memory_used": null, "xids": 1})).await;
    set_gpus(&site, &("hang\n".to_owned() + &free_gpus()));
    crate::wait_until(
        async || figures(&site, 1)["answers"] == false,
        "a hanging driver is seen",
    )
    .await;
    up.stop().await;
}
