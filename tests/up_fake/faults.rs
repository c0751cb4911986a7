//! Nodes that fail by themselves.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::kills::{Victim, pid_of};
use crate::support::client::{Ending, completion, generate, is_proven, streamed};
use crate::support::{self, HANG, Site, send};
use crate::wait_until;

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

/// A server whose engine has died answers 500 to all it has, and takes seconds to die itself.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_only_node_computed_when_its_engine_died_is_answered_after_all() {
    let site = Site::new();
    let topology = support::topology(site.port);
    let (general, _) = topology.split_once("[[node]]").unwrap();
    site.topology(&format!(
        "{general}[[node]]\nname = \"alone\"\nrole = \"unified\"\n"
    ));
    let up = site.up_ready().await;
    let body = completion(1, 100, 8);
    let whole = up.whole("alone", &body).await;
    for (restarts, body) in [(1, body.clone()), (2, streamed(body))] {
        site.script(r#"{"prefill_ms": 600000}"#);
        let leader = up.node("alone").await["pid"].as_u64().unwrap();
        let engine = pid_of(Victim::Engine, u32::try_from(leader).unwrap());
        let url = up.url();
        let request = tokio::spawn(async move { generate(&url, &body).await });
        let runs = async || up.node_metric("alone", "vllm:num_requests_running").await > 0.0;
        wait_until(runs, "the node computes the prompt").await;
        site.script("{}");
        send(engine, Signal::SIGKILL);
        let answer = request.await.unwrap();
        assert_eq!(answer.ending, Ending::Complete, "{answer:?}");
        assert_eq!(answer.text, whole.text);
        assert_eq!(up.node("alone").await["restarts"], restarts);
    }
    up.stop().await;
}

/// With only prefill or only decode left.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_loop_is_visible_and_the_rest_serves_degraded() {
    for node in ["prefill", "decode"] {
        let site = Site::new();
        let mut up = site.up_ready().await;
        let body = completion(1, 100, 8);
        let whole = up.whole("decode", &body).await;
        site.script(&json!({"nodes": {node: {"crash_start": true}}}).to_string());
        let pid = u32::try_from(up.node(node).await["pid"].as_u64().unwrap()).unwrap();
        send(pid, Signal::SIGKILL);
        let view = up
            .wait_for_node(node, |view| view["phase"] == "crash_loop")
            .await;
        assert!(view["reason"].is_string(), "{view}");
        up.wait_for_log("degraded: ").await;
        let health = up.get("/health").await;
        assert!(health.contains("degraded"), "{health}");
        let answer = up.generate(&body).await;
        assert_eq!((answer.ending, answer.text), (Ending::Complete, whole.text));
        up.stop().await;
    }
}

/// A client learns which nodes there are, why they are gone, and when they are tried again.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_names_the_dead_nodes_and_their_reasons() {
    let site = Site::new();
    let topology = support::topology(site.port)
        .replace("queue_timeout = \"30s\"", "queue_timeout = \"2s\"")
        .replace("backoff_first = \"200ms\"", "backoff_first = \"50s\"")
        .replace("backoff_max = \"1s\"", "backoff_max = \"60s\"");
    site.topology(&topology);
    let up = site.up_ready().await;
    site.script(r#"{"crash_start": true}"#);
    for node in ["prefill", "decode"] {
        let pid = u32::try_from(up.node(node).await["pid"].as_u64().unwrap()).unwrap();
        send(pid, Signal::SIGKILL);
    }
    let down = |view: &serde_json::Value| view["restarts"] == 1 && view["phase"] == "backoff";
    for node in ["prefill", "decode"] {
        up.wait_for_node(node, down).await;
    }
    let Ending::Refused(why) = up.generate(&completion(1, 100, 8)).await.ending else {
        panic!("served by nobody");
    };
    for part in [
        "503",
        "prefill: backoff",
        "decode: backoff",
        "scripted crash at start",
        "next try in ",
    ] {
        assert!(why.contains(part), "{part}: {why}");
    }
    up.stop().await;
}

/// The canary runs again after every restart: a decode node that now loads wrongly gets no KV.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_kv_after_a_restart_is_not_served() {
    let site = Site::new();
    let mut up = site.up_ready().await;
    let body = completion(1, 100, 8);
    let whole = up.whole("decode", &body).await;
    site.script(r#"{"nodes": {"decode": {"corrupt_kv": true}}}"#);
    let pid = u32::try_from(up.node("decode").await["pid"].as_u64().unwrap()).unwrap();
    send(pid, Signal::SIGKILL);
    up.wait_for_log("give different answers").await;
    for seed in [1, 2] {
        let body = completion(seed, 100, 8);
        let answer = up.generate(&body).await;
        assert_eq!(answer.ending, Ending::Complete);
        assert!(seed != 1 || answer.text == whole.text, "{answer:?}");
    }
    assert!(!is_proven(&up.node("decode").await));
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
