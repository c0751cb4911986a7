//! Nodes that neither work nor die, and nodes that are only slow.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::kills::{Victim, pid_of};
use crate::support::client::{Ending, completion, generate, is_proven, streamed};
use crate::support::load::{Load, check, mixed};
use crate::support::{self, Pegaflow, Site, send};
use crate::wait_until;

/// A hang is decided after two seconds, an idle node asked after one.
fn impatient() -> Site {
    let site = Site::new();
    let impatient = "hang_timeout = \"2s\"\nidle_canary = \"1s\"";
    let topology = support::topology(site.port).replace("hang_timeout = \"10s\"", impatient);
    site.topology(&topology);
    site
}

async fn leader(up: &Pegaflow<'_>, node: &str) -> u32 {
    let view = up.wait_for_node(node, is_proven).await;
    u32::try_from(view["pid"].as_u64().unwrap()).unwrap()
}

/// Waits until the node was restarted, and says why.
async fn restarted(up: &Pegaflow<'_>, node: &str) -> String {
    let dead = |view: &Value| view["phase"] == "backoff" || view["restarts"].as_u64() > Some(0);
    let view = up.wait_for_node(node, dead).await;
    let why = view["reason"].as_str().unwrap_or_default().to_owned();
    let back = |view: &Value| is_proven(view) && view["restarts"].as_u64() == Some(1);
    up.wait_for_node(node, back).await;
    why
}

async fn idle_hang(victim: Victim) {
    for node in ["prefill", "decode"] {
        let site = impatient();
        let up = site.up_ready().await;
        let pid = pid_of(victim, leader(&up, node).await);
        site.processes();
        send(pid, Signal::SIGSTOP);
        let why = restarted(&up, node).await;
        assert!(why.starts_with("hung: "), "{node}: {why}");
        let answer = up.generate(&completion(1, 100, 8)).await;
        assert_eq!(answer.ending, Ending::Complete);
        up.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_node_whose_engine_stands_still_is_restarted() {
    idle_hang(Victim::Engine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_node_whose_server_stands_still_is_restarted() {
    idle_hang(Victim::Leader).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_node_whose_engine_stands_still_is_restarted_and_its_client_told() {
    let site = impatient();
    let up = site.up_ready().await;
    let pid = pid_of(Victim::Engine, leader(&up, "decode").await);
    site.processes();
    send(pid, Signal::SIGSTOP);
    let (url, body) = (up.url(), streamed(completion(1, 64, 8)));
    let request = tokio::spawn(async move { generate(&url, &body).await });
    let running = async || up.node_metric("decode", "vllm:num_requests_running").await > 0.0;
    wait_until(running, "decode runs the request").await;
    let why = restarted(&up, "decode").await;
    assert!(why.contains("requests running"), "{why}");
    assert_eq!(request.await.unwrap().ending, Ending::Complete, "retried");
    up.stop().await;
}

/// Until a node has answered its first request, nothing but the deadline of its start finds a hang.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_server_stands_still_in_its_warm_up_is_restarted() {
    let site = Site::new();
    let topology = support::topology(site.port);
    site.topology(&topology.replace("start_timeout = \"30s\"", "start_timeout = \"8s\""));
    let up = site.up_ready().await;
    site.script(r#"{"nodes": {"decode": {"ttft_ms": 600000}}}"#);
    send(leader(&up, "decode").await, Signal::SIGKILL);
    let view = up
        .wait_for_node("decode", |view| view["phase"] == "warming_up")
        .await;
    site.script("{}");
    send(
        u32::try_from(view["pid"].as_u64().unwrap()).unwrap(),
        Signal::SIGSTOP,
    );
    let back = |view: &Value| is_proven(view) && view["restarts"].as_u64() == Some(2);
    let view = up.wait_for_node("decode", back).await;
    let why = view["reason"].as_str().unwrap_or_default();
    assert!(
        why.contains("warm-up request did not end within 8s"),
        "{why}"
    );
    up.stop().await;
}

/// A guard that stands still sees no death; its node's is seen all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_death_that_a_stopped_guard_does_not_tell_is_found() {
    let site = impatient();
    let up = site.up_ready().await;
    let leader = leader(&up, "decode").await;
    send(pid_of(Victim::Guard, leader), Signal::SIGSTOP);
    site.processes();
    send(leader, Signal::SIGKILL);
    let back = |view: &Value| is_proven(view) && view["restarts"].as_u64() == Some(1);
    up.wait_for_node("decode", back).await;
    up.stop().await;
}

/// Slow, queued, deaf to probes: whatever the load does, a node that makes progress is left alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_only_slow_is_never_restarted() {
    let site = impatient();
    let up = site.up_ready().await;
    site.script(r#"{"itl_ms": 2}"#);
    let requests = mixed(&up, 12, 32).await;
    let slow = json!({"itl_ms": 30, "ttft_ms": 300, "prefill_ms": 200});
    site.script(&slow.to_string());
    let load = Load::start(&up, &requests, 32);
    let started = Instant::now();
    let mut deaf = false;
    // Several times what a hang takes to be decided.
    while started.elapsed() < Duration::from_secs(12) {
        deaf = !deaf;
        let mut script = slow.clone();
        if deaf {
            script["health"] = json!("hang");
        }
        site.script(&script.to_string());
        tokio::time::sleep(Duration::from_millis(1500)).await;
    }
    site.script(&slow.to_string());
    check(&load.finish().await);
    for node in ["prefill", "decode"] {
        let view = up.node(node).await;
        assert_eq!(view["restarts"], 0, "{view}");
    }
    up.stop().await;
}
