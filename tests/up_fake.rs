//! The whole binary on the scripted fake vLLM: what users and operators see.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod fake_nvml;
mod support;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use support::client::{Ending, chat, completion, generate, is_proven, metric, streamed};
use support::load::{Load, MayBreak, check, mixed};
use support::{GONE_LIMIT, HANG, Site, processes, send};

/// Far below every timeout in the topology: a request that waited for one is seen.
const QUICK: Duration = Duration::from_millis(1500);

#[tokio::test(flavor = "multi_thread")]
async fn answers_through_prefill_and_decode_equal_whole_ones() {
    let site = Site::new();
    let up = site.up_ready().await;
    let before = up
        .node_metric("decode", "vllm:external_prefix_cache_hits_total")
        .await;
    for (seed, length) in [(1, 1), (2, 31), (3, 32), (4, 33), (5, 64), (6, 1280)] {
        let body = completion(seed, length, 32);
        let whole = up.whole("decode", &body).await;
        for body in [body.clone(), streamed(body)] {
            let answer = up.generate(&body).await;
            assert_eq!(
                (answer.ending, answer.text),
                (Ending::Complete, whole.text.clone())
            );
            assert_eq!(answer.tokens, 32);
        }
    }
    let body = chat(7, 100, 16);
    let whole = up.whole("decode", &body).await;
    assert_eq!(up.generate(&body).await.text, whole.text);
    assert_eq!(up.generate(&streamed(body)).await.text, whole.text);
    let loaded = up
        .node_metric("decode", "vllm:external_prefix_cache_hits_total")
        .await
        - before;
    let chat_tokens = 2 * (8 * 100 / 4 / 32 * 32);
    let least = 2 * (32 + 32 + 64 + 1280) + chat_tokens;
    assert!(
        loaded >= f64::from(least),
        "decode loaded {loaded} tokens of at least {least}"
    );
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_hand_off_waits_for_a_timeout() {
    let site = Site::new();
    let up = site.up_ready().await;
    for length in [1, 31, 32, 33, 320] {
        for repetition in 0..3 {
            let answer = up.generate(&completion(length, length, 4)).await;
            assert_eq!(answer.ending, Ending::Complete);
            assert!(
                answer.total < QUICK,
                "{length} tokens, time {repetition}: {answer:?}"
            );
        }
    }
    let metrics = up.get("/metrics").await;
    assert_eq!(
        metric(&metrics, "pegaflow_router_fallbacks_total"),
        0.0,
        "{metrics}"
    );
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_concurrent_requests_each_get_their_own_answer() {
    let site = Site::new();
    site.script(r#"{"itl_ms": 1, "prefill_ms": 5}"#);
    let up = site.up_ready().await;
    let requests = mixed(&up, 50, 16).await;
    let url = up.url();
    let count = |node| up.node_metric(node, "vllm:fake_requests_total");
    let before = (count("prefill").await, count("decode").await);
    let tasks = (0..200).map(|turn| {
        let (expected, url) = (requests[turn % requests.len()].clone(), url.clone());
        tokio::spawn(async move {
            let answer = generate(&url, &expected.body).await;
            (expected, answer)
        })
    });
    let tasks: Vec<_> = tasks.collect();
    let mut answers = Vec::new();
    for task in tasks {
        answers.push(task.await.unwrap());
    }
    assert_eq!(answers.len(), 200);
    check(&answers, MayBreak::Nothing);
    let after = (count("prefill").await, count("decode").await);
    assert_eq!(
        after.1 - before.1,
        200.0,
        "decode answered each request once"
    );
    assert!(after.0 - before.0 <= 200.0, "prefill saw a request twice");
    up.stop().await;
}

/// Which process of a node is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Leader,
    Engine,
    Worker,
    Guard,
}

fn pid_of(victim: Victim, leader: u32) -> u32 {
    let child = |pid| processes::children(pid)[0];
    match victim {
        Victim::Leader => leader,
        Victim::Engine => child(leader),
        Victim::Worker => child(child(leader)),
        Victim::Guard => processes::parent(leader).unwrap(),
    }
}

async fn kill_under_load(node: &str, victim: Victim) {
    let site = Site::new();
    site.script(r#"{"itl_ms": 5, "prefill_ms": 20}"#);
    let up = site.up_ready().await;
    let requests = mixed(&up, 12, 24).await;
    let load = Load::start(&up, &requests, 8);
    tokio::time::sleep(Duration::from_millis(400)).await;

    let view = up.wait_for_node(node, is_proven).await;
    let incarnation = view["incarnation"].as_u64().unwrap();
    let leader = u32::try_from(view["pid"].as_u64().unwrap()).unwrap();
    let old = processes::tree(leader);
    assert!(old.len() >= 3, "leader, engine and worker: {old:?}");
    site.processes();
    send(pid_of(victim, leader), Signal::SIGKILL);

    let back = |view: &serde_json::Value| {
        is_proven(view) && view["incarnation"].as_u64() > Some(incarnation)
    };
    up.wait_for_node(node, back).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    let answers = load.finish().await;
    let may_break = if node == "decode" {
        MayBreak::BegunStreams
    } else {
        MayBreak::Nothing
    };
    check(&answers, may_break);
    assert!(
        answers.len() >= 30,
        "only {} requests: no load",
        answers.len()
    );

    let alive: Vec<_> = old
        .iter()
        .copied()
        .filter(|pid| processes::is_alive(*pid))
        .collect();
    assert!(
        alive.is_empty(),
        "{:?}",
        alive.iter().map(|pid| processes::describe(*pid))
    );
    assert_eq!(processes::shm_of(&old), Vec::<String>::new());
    up.stop().await;
}

macro_rules! kill_tests {
    ($($name:ident: $node:literal, $victim:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            kill_under_load($node, Victim::$victim).await;
        }
    )*};
}

kill_tests! {
    killed_prefill_leader_loses_nothing_and_returns: "prefill", Leader;
    killed_prefill_engine_loses_nothing_and_returns: "prefill", Engine;
    killed_prefill_worker_loses_nothing_and_returns: "prefill", Worker;
    killed_prefill_guard_loses_nothing_and_returns: "prefill", Guard;
    killed_decode_leader_loses_nothing_unbegun_and_returns: "decode", Leader;
    killed_decode_engine_loses_nothing_unbegun_and_returns: "decode", Engine;
    killed_decode_worker_loses_nothing_unbegun_and_returns: "decode", Worker;
    killed_decode_guard_loses_nothing_unbegun_and_returns: "decode", Guard;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_dies_of_its_own_returns() {
    let site = Site::new();
    let up = site.up_ready().await;
    let body = completion(1, 100, 16);
    let whole = up.whole("decode", &body).await;
    let incarnation = up.node("decode").await["incarnation"].as_u64();
    site.script(r#"{"nodes": {"decode": {"die_after_tokens": 0}}}"#);
    let requests = tokio::spawn({
        let (url, body) = (up.url(), body.clone());
        async move { generate(&url, &body).await }
    });
    up.wait_for_node("decode", |view| view["phase"] != "ready")
        .await;
    site.script("{}");
    let answer = requests.await.unwrap();
    assert_eq!((answer.ending, answer.text), (Ending::Complete, whole.text));
    let back =
        |view: &serde_json::Value| is_proven(view) && view["incarnation"].as_u64() > incarnation;
    up.wait_for_node("decode", back).await;
    up.stop().await;
}

async fn fault_is_retried(fail: serde_json::Value) {
    for node in ["decode", "prefill"] {
        let site = Site::new();
        let mut topology = support::topology(site.port);
        topology = topology.replace(
            "first_byte_timeout = \"10s\"",
            "first_byte_timeout = \"1s\"",
        );
        site.topology(&topology);
        let up = site.up_ready().await;
        let body = completion(3, 200, 8);
        let whole = up.whole("decode", &body).await;
        site.script(&json!({"nodes": {node: {"fail": fail}}}).to_string());
        for body in [body.clone(), streamed(body)] {
            let answer = up.generate(&body).await;
            assert_eq!(answer.ending, Ending::Complete, "{node} {fail}");
            assert_eq!(answer.text, whole.text, "{node} {fail}");
        }
        site.script("{}");
        up.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_500_is_retried() {
    fault_is_retried(json!({"kind": "500", "next": 1})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_connection_is_retried() {
    fault_is_retried(json!({"kind": "reset", "next": 1})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_request_is_retried_after_its_timeout() {
    fault_is_retried(json!({"kind": "hang", "next": 1})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_aborts_both_legs() {
    let site = Site::new();
    site.script(r#"{"itl_ms": 50}"#);
    let up = site.up_ready().await;
    let body = streamed(completion(5, 200, 1000));
    let url = up.url();
    let request = tokio::spawn(async move { generate(&url, &body).await });
    let running = || up.node_metric("decode", "vllm:num_requests_running");
    wait_until(async || running().await > 0.0, "decode runs it").await;
    request.abort();
    wait_until(async || running().await == 0.0, "decode has stopped").await;
    assert!(up.node_metric("decode", "vllm:fake_aborted_total").await >= 1.0);
    assert_eq!(
        up.node_metric("prefill", "vllm:num_requests_running").await,
        0.0
    );
    up.stop().await;
}

async fn wait_until(condition: impl AsyncFn() -> bool, what: &str) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < HANG, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_pegaflow_leaves_nothing_and_starts_again() {
    let site = Site::new();
    let mut up = site.up_ready().await;
    assert!(
        site.processes().len() >= 9,
        "pegaflow, 2 guards, 2 x (leader, engine, worker)"
    );
    up.signal(Signal::SIGKILL);
    let status = up.wait(HANG).await;
    assert!(!status.success());
    site.assert_nothing_left(GONE_LIMIT).await;

    let again = site.up_ready().await;
    assert_eq!(
        again.generate(&completion(1, 100, 4)).await.ending,
        Ending::Complete
    );
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_pegaflow_leaves_nothing_although_nodes_ignore_term_and_start() {
    let site = Site::new();
    site.script(r#"{"ignore_term": true, "startup_ms": 60000}"#);
    let mut up = site.up();
    wait_until(async || site.processes().len() >= 9, "all processes run").await;
    up.signal(Signal::SIGKILL);
    up.wait(HANG).await;
    site.assert_nothing_left(GONE_LIMIT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_while_nodes_start_ends_clean() {
    let site = Site::new();
    site.script(r#"{"startup_ms": 60000}"#);
    let mut up = site.up();
    wait_until(async || site.processes().len() >= 9, "all processes run").await;
    up.signal(Signal::SIGINT);
    up.wait(Duration::from_secs(20)).await;
    site.assert_nothing_left(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_forces_the_end() {
    let site = Site::new();
    let topology = support::topology(site.port);
    site.topology(&topology.replace("drain_timeout = \"2s\"", "drain_timeout = \"60s\""));
    let mut up = site.up_ready().await;
    site.script(r#"{"ignore_term": true, "itl_ms": 100}"#);
    let (url, body) = (up.url(), streamed(completion(1, 64, 1000)));
    let request = tokio::spawn(async move { generate(&url, &body).await });
    wait_until(
        async || up.node_metric("decode", "vllm:num_requests_running").await > 0.0,
        "decode runs the request",
    )
    .await;
    up.signal(Signal::SIGINT);
    up.wait_for_log("once more to force").await;
    up.signal(Signal::SIGINT);
    up.wait(Duration::from_secs(5)).await;
    site.assert_nothing_left(Duration::from_secs(1)).await;
    let answer = tokio::time::timeout(HANG, request).await.unwrap().unwrap();
    assert_ne!(answer.ending, Ending::Hung);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_up_says_what_runs() {
    let site = Site::new();
    let up = site.up_ready().await;
    let output = site.command(&["up", "topology.toml"]).output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(!output.status.success(), "{text}");
    assert!(text.contains(&up.pid().to_string()), "{text}");
    assert!(text.contains(&site.port.to_string()), "{text}");
    assert_eq!(
        up.generate(&completion(1, 100, 4)).await.ending,
        Ending::Complete
    );
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_loop_is_visible_and_the_rest_serves() {
    let site = Site::new();
    let up = site.up_ready().await;
    let body = completion(1, 100, 8);
    let whole = up.whole("decode", &body).await;
    site.script(r#"{"nodes": {"prefill": {"crash_start": true}}}"#);
    let pid = u32::try_from(up.node("prefill").await["pid"].as_u64().unwrap()).unwrap();
    send(pid, Signal::SIGKILL);
    let view = up
        .wait_for_node("prefill", |view| view["phase"] == "crash_loop")
        .await;
    assert!(view["reason"].is_string(), "{view}");
    let answer = up.generate(&body).await;
    assert_eq!((answer.ending, answer.text), (Ending::Complete, whole.text));
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fatal_start_is_not_retried() {
    let site = Site::new();
    site.script(r#"{"fatal_start": "unrecognized arguments: --no-such-flag"}"#);
    let mut up = site.up();
    up.wait_for_log("--no-such-flag").await;
    let status = up.wait(HANG).await;
    assert!(!status.success());
    site.assert_nothing_left(Duration::from_secs(1)).await;
}

/// Wrong bytes stored by prefill, and wrong bytes loaded by decode.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_kv_is_never_served() {
    for node in ["prefill", "decode"] {
        let site = Site::new();
        site.script(&json!({"nodes": {node: {"corrupt_kv": true}}}).to_string());
        let mut up = site.up();
        // It gives up by itself, since nothing serves and nothing will.
        let status = up.wait(HANG).await;
        assert_eq!(status.code(), Some(1), "1: failed while running");
        let output = up.output();
        assert!(!output.contains("pegaflow is ready"), "ready with wrong KV");
        assert!(output.contains("give different answers"), "{output}");
        site.assert_nothing_left(Duration::from_secs(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_node_of_tensor_parallel_two_hands_off() {
    let site = Site::new();
    let topology = support::topology(site.port);
    site.topology(&topology.replace("\nrole = ", "\ntensor_parallel = 2\nrole = "));
    let up = site.up_ready().await;
    let body = completion(9, 500, 16);
    let whole = up.whole("decode", &body).await;
    assert_eq!(up.generate(&body).await.text, whole.text);
    assert!(
        up.node_metric("decode", "vllm:external_prefix_cache_hits_total")
            .await
            >= 480.0
    );
    up.stop().await;
}

/// `configs/1p1d.toml` as it is shipped, but for the port.
fn gpu_site(gpus: Option<&str>) -> Site {
    let mut site = Site::new();
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    for name in ["1p1d.toml", "1p1d-cpu.toml"] {
        let text = fs::read_to_string(shipped.join(name)).unwrap();
        let (old, new) = ("127.0.0.1:8000", format!("127.0.0.1:{}", site.port));
        assert!(text.contains(old), "{name}");
        fs::write(site.path(name), text.replace(old, &new)).unwrap();
    }
    fs::rename(site.path("1p1d.toml"), site.path("topology.toml")).unwrap();
    fs::rename(site.path("1p1d-cpu.toml"), site.path("topology-cpu.toml")).unwrap();
    site.env("HF_HUB_OFFLINE", "1");
    let library = site.path("nvml");
    fs::create_dir(&library).unwrap();
    site.env("LD_LIBRARY_PATH", library.to_str().unwrap());
    if let Some(gpus) = gpus {
        fake_nvml::build(&library);
        fs::write(library.join("gpus.txt"), gpus).unwrap();
        site.env("FAKE_NVML_FILE", library.join("gpus.txt").to_str().unwrap());
    }
    site
}

const TWO_GPUS: &str =
    "0 GPU-aaaa 85899345920 85000000000 0\n1 GPU-bbbb 85899345920 85000000000 0\n";

#[tokio::test(flavor = "multi_thread")]
async fn the_gpu_config_gives_each_node_its_own_gpu() {
    let site = gpu_site(Some(TWO_GPUS));
    let up = site.up_ready().await;
    let mut seen = Vec::new();
    for node in ["prefill", "decode"] {
        let addr = up.node(node).await["addr"].as_str().unwrap().to_owned();
        let text = support::client::get(&format!("http://{addr}/_fake/env"))
            .await
            .unwrap();
        let environment: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(environment["CUDA_DEVICE_ORDER"], "PCI_BUS_ID");
        seen.push(
            environment["CUDA_VISIBLE_DEVICES"]
                .as_str()
                .unwrap()
                .to_owned(),
        );
    }
    seen.sort();
    assert_eq!(seen, ["0", "1"]);

    let view = up.node("decode").await;
    let incarnation = view["incarnation"].as_u64();
    send(
        u32::try_from(view["pid"].as_u64().unwrap()).unwrap(),
        Signal::SIGKILL,
    );
    let back =
        |view: &serde_json::Value| is_proven(view) && view["incarnation"].as_u64() > incarnation;
    up.wait_for_node("decode", back).await;
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_gpu_the_message_names_the_cpu_config() {
    for gpus in [None, Some("")] {
        let site = gpu_site(gpus);
        let mut up = site.up();
        let status = up.wait(Duration::from_secs(10)).await;
        assert_eq!(status.code(), Some(4), "4: this machine cannot run it");
        assert!(up.output().contains("topology-cpu.toml"), "{}", up.output());
        site.assert_nothing_left(Duration::from_secs(1)).await;
    }
}
