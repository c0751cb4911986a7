//! `pegaflow restart`, `drain`, `undrain`: what they do to nodes, and what to clients.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::commands::{node, refused, said, status, told};
use crate::support::client::{Ending, completion, generate, is_proven, metric, streamed};
use crate::support::load::{Expected, Load, check};
use crate::support::{self, HANG, Pegaflow, Site, send};
use crate::wait_until;

/// One prefill node `p`, and two decode nodes.
fn two_decoders() -> Site {
    let site = Site::new();
    let topology = support::topology(site.port)
        .replace("name = \"prefill\"", "name = \"p\"")
        .replace("name = \"decode\"", "name = \"d\"\ncount = 2");
    site.topology(&topology);
    site
}

async fn requests(up: &Pegaflow<'_>) -> Vec<Expected> {
    requests_of(up, "d-0").await
}

/// What `node` answers by itself is right.
async fn requests_of(up: &Pegaflow<'_>, node: &str) -> Vec<Expected> {
    let mut requests = Vec::new();
    for seed in 0..8 {
        let body = completion(seed, 40 * seed + 1, 24);
        let text = up.whole(node, &body).await.text;
        let body = if seed % 2 == 0 { streamed(body) } else { body };
        requests.push(Expected { body, text });
    }
    requests
}

async fn served(up: &Pegaflow<'_>, node: &str) -> f64 {
    up.node_metric(node, "vllm:fake_requests_total").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_loses_no_request() {
    let site = two_decoders();
    site.script(r#"{"itl_ms": 5, "prefill_ms": 10}"#);
    let up = site.up_ready().await;
    let load = Load::start(&up, &requests(&up).await, 6);
    tokio::time::sleep(Duration::from_millis(300)).await;
    for role in ["decode", "prefill"] {
        told(&site, &["restart", "--rolling", role, "--limit", "30s"]).await;
    }
    let answers = load.finish().await;
    check(&answers);
    assert!(answers.len() >= 30, "only {} requests", answers.len());
    for name in ["d-0", "d-1", "p"] {
        let view = up.node(name).await;
        assert_eq!(view["incarnation"], 2, "{view}");
        assert_eq!(view["reason"], "restarted as asked");
        assert!(is_proven(&view), "{view}");
    }
    up.stop().await;
}

/// With one node of each role there is no other way: it is not refused, but said what it means.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_node_of_a_role_is_restarted_with_a_word_and_loses_no_request() {
    let site = Site::new();
    site.script(r#"{"itl_ms": 5, "prefill_ms": 10}"#);
    let up = site.up_ready().await;
    let load = Load::start(&up, &requests_of(&up, "decode").await, 4);
    for (role, means) in [("decode", "served whole"), ("prefill", "without hand-offs")] {
        let said = said(&site, &["restart", role, "--limit", "30s"]).await;
        assert!(said.contains(&format!("No other {role} node")), "{said}");
        assert!(said.contains(means), "{said}");
        assert!(!said.contains("--rolling"), "{said}");
    }
    check(&load.finish().await);
    up.stop().await;

    // Nothing is left meanwhile: requests wait for it.
    let site = Site::new();
    let topology = support::topology(site.port);
    let (general, _) = topology.split_once("[[node]]").unwrap();
    let node = "[[node]]\nname = \"u\"\nrole = \"unified\"\ncount = 2\n";
    site.topology(&format!("{general}{node}").replace("[kv]\ncapacity = \"64MiB\"\n", ""));
    let up = site.up_ready().await;
    site.script(r#"{"startup_ms": 1000}"#);
    let load = Load::start(&up, &requests_of(&up, "u-0").await, 4);
    let said = said(&site, &["restart", "unified", "--limit", "30s"]).await;
    assert!(said.contains("requests wait"), "{said}");
    assert!(said.contains("--rolling"), "{said}");
    check(&load.finish().await);
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_gives_requests_only_so_much_time() {
    let site = two_decoders();
    site.script(r#"{"itl_ms": 50}"#);
    let up = site.up_ready().await;
    let whole = completion(1, 64, 200);
    let right = up.whole("d-0", &whole).await.text;
    let (url, body) = (up.url(), streamed(whole));
    let request = tokio::spawn(async move { generate(&url, &body).await });
    let busy = async || {
        let all = status(&site).await;
        let mut nodes = ["d-0", "d-1"].into_iter();
        nodes.find(|name| node(&all, name)["in_flight"] == 1)
    };
    wait_until(async || busy().await.is_some(), "a node runs it").await;
    let name = busy().await.unwrap();
    told(&site, &["restart", name, "--limit", "300ms"]).await;
    assert!(is_proven(&up.node(name).await));
    // Its node is gone; the stream goes on at the other one.
    let answer = request.await.unwrap();
    assert_eq!((answer.ending, answer.text), (Ending::Complete, right));
    assert_eq!(
        metric(&up.get("/metrics").await, "pegaflow_router_replays_total"),
        1.0
    );
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_node_gets_nothing_until_it_is_undrained() {
    let site = two_decoders();
    let up = site.up_ready().await;
    told(&site, &["drain", "d-0"]).await;
    assert_eq!(node(&status(&site).await, "d-0")["phase"], "draining");
    let before = served(&up, "d-0").await;
    for seed in 0..6 {
        let answer = up.generate(&completion(seed, 100, 4)).await;
        assert_eq!(answer.ending, Ending::Complete);
    }
    assert_eq!(served(&up, "d-0").await, before, "it is sent nothing");

    // The last one of its role only by force.
    let message = refused(&site, &["drain", "d-1"], 1).await;
    assert!(message.contains("served whole"), "{message}");
    assert!(message.contains("--force"), "{message}");
    assert_eq!(up.node("d-1").await["phase"], "ready");
    told(&site, &["drain", "d-1", "--force"]).await;
    assert_eq!(status(&site).await["state"], "degraded");
    let alone = served(&up, "p").await;
    assert_eq!(
        up.generate(&completion(9, 100, 4)).await.ending,
        Ending::Complete
    );
    assert_eq!(served(&up, "p").await - alone, 1.0);

    // It stays drained whatever becomes of its process.
    let leader = up.node("d-0").await["pid"].as_u64().unwrap();
    send(u32::try_from(leader).unwrap(), Signal::SIGKILL);
    let again = |view: &Value| view["phase"] == "draining" && view["incarnation"] == 2;
    up.wait_for_node("d-0", again).await;
    told(&site, &["restart", "d-0"]).await;
    assert_eq!(up.node("d-0").await["phase"], "draining");

    told(&site, &["undrain", "decode"]).await;
    for name in ["d-0", "d-1"] {
        up.wait_for_node(name, is_proven).await;
    }
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_for_running_requests_and_breaks_none() {
    let site = two_decoders();
    site.script(r#"{"itl_ms": 40}"#);
    let up = site.up_ready().await;
    let (url, body) = (up.url(), streamed(completion(1, 64, 50)));
    let request = tokio::spawn(async move { generate(&url, &body).await });
    let running = async || {
        let all = status(&site).await;
        ["d-0", "d-1"]
            .iter()
            .any(|name| node(&all, name)["in_flight"] == 1)
    };
    wait_until(running, "it runs").await;
    let message = refused(&site, &["drain", "decode", "--force", "--wait", "50ms"], 1).await;
    assert!(message.contains("1 running"), "{message}");
    told(&site, &["drain", "decode", "--force"]).await;
    assert!(!running().await, "it returns when nothing runs any more");
    let answer = request.await.unwrap();
    assert_eq!((answer.ending, answer.tokens), (Ending::Complete, 50));
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_loop_is_seen_mended_and_cleared() {
    let site = Site::new();
    let up = site.up_ready().await;
    site.script(&json!({"nodes": {"decode": {"crash_start": true}}}).to_string());
    let leader = up.node("decode").await["pid"].as_u64().unwrap();
    send(u32::try_from(leader).unwrap(), Signal::SIGKILL);
    let looping = |view: &Value| view["phase"] == "crash_loop";
    up.wait_for_node("decode", looping).await;
    // Not mended: it comes to the same, and the command says so.
    let message = refused(&site, &["restart", "decode"], 1).await;
    assert!(message.contains("crash_loop"), "{message}");
    assert!(message.contains("Error"), "the last words: {message}");
    site.script("{}");
    told(&site, &["restart", "decode"]).await;
    assert!(is_proven(&up.node("decode").await));
    let answer = up.generate(&completion(1, 100, 4)).await;
    assert_eq!(answer.ending, Ending::Complete);
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_refused_with_the_reason() {
    let site = Site::new();
    let topology = support::topology(site.port);
    site.topology(&topology.replace("drain_timeout = \"2s\"", "drain_timeout = \"60s\""));
    site.script(r#"{"itl_ms": 50}"#);
    let mut up = site.up_ready().await;
    for verb in ["restart", "drain", "undrain"] {
        for target in ["nobody", "unified", "../stop"] {
            let message = refused(&site, &[verb, target], 1).await;
            assert!(message.contains("decode (decode)"), "{message}");
        }
    }
    let (url, body) = (up.url(), streamed(completion(1, 64, 60)));
    let request = tokio::spawn(async move { generate(&url, &body).await });
    wait_until(
        async || node(&status(&site).await, "decode")["in_flight"] == 1,
        "a request keeps pegaflow from ending",
    )
    .await;
    told(&site, &["stop"]).await;
    let message = refused(&site, &["restart", "decode"], 1).await;
    assert!(message.contains("stopping"), "{message}");
    assert_eq!(request.await.unwrap().ending, Ending::Complete);
    assert_eq!(up.wait(HANG).await.code(), Some(0));
    site.assert_nothing_left(Duration::from_secs(1)).await;
}
