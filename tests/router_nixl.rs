//! NIXL's way of handing KV over: what prefill says goes to one decode node, once.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pegaflow::fleet::{FleetPublisher, Phase, Role};
use pegaflow::handoff::HandoffBoard;
use pegaflow::plan::RouterPlan;
use pegaflow::topology::Connector;
use serde_json::{Value, json};
use support_router::*;

const SAID: &str = r#"{"do_remote_prefill":true,"remote_block_ids":[[4,5]],"remote_port":5600}"#;
const REPLY: &str = r#"{"choices":[],"kv_transfer_params":{"do_remote_prefill":true,"remote_block_ids":[[4,5]],"remote_port":5600}}"#;

fn said() -> Value {
    serde_json::from_str(SAID).unwrap()
}

fn nixl() -> RouterPlan {
    RouterPlan {
        connector: Connector::Nixl,
        ..plan()
    }
}

async fn node(answer: Answer) -> Fake {
    Fake::always(&HandoffBoard::default(), Kv::Nothing, answer).await
}

async fn rig(nodes: &[(&str, Role, SocketAddr)]) -> Rig {
    Rig::start(&HandoffBoard::default(), nixl(), nodes).await
}

async fn ask(rig: &Rig) -> Got {
    let body = json!({
        "model": "tiny", "prompt": "a", "max_tokens": 8, "tag": 1,
        "kv_transfer_params": {"remote_host": "evil"},
    });
    rig.send(rig.request("/v1/completions", &body)).await
}

async fn fallbacks(rig: &Rig, reason: &str) -> f64 {
    let name = format!("pegaflow_router_fallbacks_total{{reason=\"{reason}\"}}");
    rig.sample(&name).await
}

fn params(seen: &Seen) -> &Value {
    &seen.body["kv_transfer_params"]
}

#[tokio::test]
async fn prefill_is_told_to_keep_the_kv_and_decode_what_prefill_said() {
    let p = node(Answer::Status(200, REPLY)).await;
    let d = node(Answer::Tokens).await;
    let rig = rig(&[("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)]).await;
    assert_eq!(ask(&rig).await.status, 200);
    let on_p = p.seen();
    assert_eq!(on_p.len(), 1);
    assert_eq!(params(&on_p[0])["do_remote_decode"], true);
    assert!(params(&on_p[0]).get("pegaflow").is_none());
    assert_eq!(on_p[0].body["max_tokens"], 1);
    let on_d = d.seen();
    assert_eq!(on_d.len(), 1);
    assert_eq!(*params(&on_d[0]), said());
    assert_eq!(on_d[0].body["max_tokens"], 8);
    // It was taken, so nobody is told to let it go.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(d.seen().len(), 1);
}

#[tokio::test]
async fn a_decode_node_that_never_saw_it_leaves_it_to_the_next() {
    let p = node(Answer::Status(200, REPLY)).await;
    let d = node(Answer::Tokens).await;
    // Tried first: of two that are idle, the first by name is.
    let nodes = [
        ("d0", Role::Decode, refusing().await),
        ("d1", Role::Decode, d.addr),
        ("p", Role::Prefill, p.addr),
    ];
    let rig = rig(&nodes).await;
    while rig
        .sample("pegaflow_router_retries_total{leg=\"decode\",reason=\"connect\"}")
        .await
        == 0.0
    {
        assert_eq!(ask(&rig).await.status, 200);
        assert!(
            p.seen().len() < 20,
            "nobody went to the node that is not there"
        );
    }
    let last = d.seen().pop().unwrap();
    assert_eq!(*params(&last), said());
    assert_eq!(fallbacks(&rig, "claim_used").await, 0.0);
}

#[tokio::test]
async fn a_decode_node_that_may_have_read_it_is_the_last_that_gets_it() {
    let p = node(Answer::Status(200, REPLY)).await;
    let d = node(Answer::Reset).await;
    let e = node(Answer::Reset).await;
    let nodes = [
        ("d", Role::Decode, d.addr),
        ("e", Role::Decode, e.addr),
        ("p", Role::Prefill, p.addr),
    ];
    let rig = rig(&nodes).await;
    let _ = ask(&rig).await;
    let decodes = [d.seen(), e.seen()].concat();
    assert!(decodes.len() >= 2, "{decodes:?}");
    let with = decodes.iter().filter(|seen| !params(seen).is_null());
    assert_eq!(with.count(), 1, "{decodes:?}");
    assert!(fallbacks(&rig, "claim_used").await >= 1.0);
}

#[tokio::test]
async fn prefill_that_keeps_nothing_costs_nobody_an_answer() {
    for reply in [
        r#"{"choices":[]}"#,
        r#"{"choices":[],"kv_transfer_params":null}"#,
    ] {
        let p = node(Answer::Status(200, reply)).await;
        let d = node(Answer::Tokens).await;
        let rig = rig(&[("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)]).await;
        assert_eq!(ask(&rig).await.status, 200);
        assert!(d.seen()[0].body.get("kv_transfer_params").is_none());
        assert_eq!(fallbacks(&rig, "no_params").await, 1.0);
    }
}

#[tokio::test]
async fn what_no_decode_node_takes_is_let_go() {
    let fleet: Arc<OnceLock<FleetPublisher>> = Arc::default();
    let of_p = fleet.clone();
    // Decode drains while prefill computes, prefill answers in its place, and then decode is back.
    let p = Fake::scripted(&HandoffBoard::default(), move |number, _| {
        let (phase, answer) = match number {
            0 => (Phase::Draining, Answer::Status(200, REPLY)),
            _ => (Phase::Ready, Answer::Tokens),
        };
        let fleet = of_p.get().unwrap();
        fleet.update(&"d".into(), |node| node.phase = phase);
        (Kv::Nothing, answer)
    })
    .await;
    let d = node(Answer::Status(404, "no such model")).await;
    let rig = rig(&[("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)]).await;
    fleet.set(rig.fleet.clone()).ok().unwrap();
    assert_eq!(ask(&rig).await.status, 200);
    assert_eq!(p.seen().len(), 2);
    assert!(p.seen()[1].body.get("kv_transfer_params").is_none());
    let told = soon("decode is told", async {
        loop {
            if let Some(told) = d.seen().first() {
                return told.clone();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(
        (told.path.as_str(), params(&told)),
        ("/v1/completions", &said())
    );
    assert_ne!(told.body["model"], "tiny");
    assert_eq!(d.seen().len(), 1);
}
