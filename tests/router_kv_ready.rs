//! `POST /kv_ready`: prefill nodes that others started announce that the KV is ready.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::time::{Duration, Instant};

use pegaflow::fleet::{KvTrust, Role};
use pegaflow::handoff::HandoffBoard;
use pegaflow::plan::RouterPlan;
use pegaflow::topology::KvReady;
use serde_json::{Value, json};
use support_router::*;
use tempfile::TempDir;

const ADMIN: &str = "admin-of-tests";
const CLIENT: &str = "client-of-tests";

/// A plan with an admin key and an API key, and the folder that holds them.
fn guarded(kv_ready: KvReady) -> (RouterPlan, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let (admin, keys) = (folder.path().join("admin"), folder.path().join("keys"));
    write_private(&admin, ADMIN);
    write_private(&keys, CLIENT);
    let mut plan = plan();
    plan.kv_ready = kv_ready;
    plan.admin_key_file = Some(admin);
    plan.api_keys = Some(keys);
    (plan, folder)
}

/// A prefill node that answers at once, and a decode node, both of others.
async fn pair(plan: RouterPlan) -> (Fake, Fake, Rig) {
    let board = HandoffBoard::default();
    let p = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let d = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let rig = Rig::start(&board, plan, &nodes).await;
    for id in ["d", "p"] {
        rig.fleet.update(&id.into(), |node| {
            (node.trust, node.external) = (KvTrust::Assumed, true);
        });
    }
    (p, d, rig)
}

fn ask(rig: &Rig) -> reqwest::RequestBuilder {
    let body = json!({"model": "tiny", "prompt": "a", "max_tokens": 8, "tag": 1});
    rig.request("/v1/completions", &body).bearer_auth(CLIENT)
}

async fn announce(rig: &Rig, key: &str, said: &Value) -> Got {
    rig.send(rig.request("/kv_ready", said).bearer_auth(key))
        .await
}

/// The hand-off that the prefill node was asked for.
async fn handoff(p: &Fake) -> String {
    soon("a prefill leg", async {
        loop {
            if let Some(seen) = p.seen().first() {
                return seen.mark()["handoff"].as_str().unwrap().to_owned();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
}

async fn figure(rig: &Rig, start: &str) -> f64 {
    rig.sample(start).await
}

async fn end(rig: Rig) {
    rig.shutdown.graceful().cancel();
    soon("serve to return", rig.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn decode_waits_for_the_word_of_a_node_with_the_admin_key() {
    let (plan, _folder) = guarded(KvReady::Callback);
    let (p, d, rig) = pair(plan).await;
    let answer = tokio::spawn(ask(&rig).send());
    let id = handoff(&p).await;
    let said = json!({"handoff": id});
    for wrong in ["", CLIENT, "nonsense"] {
        let got = announce(&rig, wrong, &said).await;
        assert_eq!(
            (got.status, &got.json()["error"]["code"]),
            (401, &json!("invalid_admin_key"))
        );
    }
    // What is said of others changes nothing, and is no error.
    assert_eq!(
        announce(&rig, ADMIN, &json!({"handoff": "unknown"}))
            .await
            .status,
        204
    );
    for broken in [
        json!([]),
        json!({}),
        json!({"handoff": 5}),
        json!({"handoff": "a".repeat(9000)}),
    ] {
        assert_eq!(announce(&rig, ADMIN, &broken).await.status, 400);
    }
    // Long after P's reply, decode still waits.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(d.seen().is_empty() && !answer.is_finished());

    assert_eq!(announce(&rig, ADMIN, &said).await.status, 204);
    assert_eq!(
        soon("an answer", answer).await.unwrap().unwrap().status(),
        200
    );
    assert_eq!(d.seen()[0].mark()["handoff"], id.as_str());
    assert_eq!(
        figure(&rig, "pegaflow_router_handoff_wait_seconds_count").await,
        1.0
    );
    // The admin key is no client's.
    let as_client = rig
        .send(rig.http.get(rig.url("/v1/models")).bearer_auth(ADMIN))
        .await;
    assert_eq!(as_client.status, 401);
    end(rig).await;
}

#[tokio::test]
async fn a_failure_that_is_announced_or_silence_lets_decode_compute() {
    let (plan, _folder) = guarded(KvReady::Callback);
    let (p, d, rig) = pair(plan).await;
    let answer = tokio::spawn(ask(&rig).send());
    let said = json!({"handoff": handoff(&p).await, "failed": "no_space"});
    assert_eq!(announce(&rig, ADMIN, &said).await.status, 204);
    assert_eq!(
        soon("an answer", answer).await.unwrap().unwrap().status(),
        200
    );
    let counted = "pegaflow_router_fallbacks_total{reason=\"no_space\"}";
    assert_eq!(figure(&rig, counted).await, 1.0);

    let began = Instant::now();
    assert_eq!(rig.send(ask(&rig)).await.status, 200);
    assert!(
        began.elapsed() > Duration::from_secs(4),
        "{:?}",
        began.elapsed()
    );
    let counted = "pegaflow_router_fallbacks_total{reason=\"not_opened\"}";
    assert_eq!(figure(&rig, counted).await, 1.0);
    assert_eq!(d.seen().len(), 2);
    end(rig).await;
}

#[tokio::test]
async fn without_an_admin_key_there_is_no_such_path() {
    let (_p, _d, rig) = pair(plan()).await;
    let got = announce(&rig, "anything", &json!({"handoff": "a"})).await;
    assert_eq!(
        (got.status, &got.json()["error"]["code"]),
        (404, &json!("not_found"))
    );
    rig.finish().await;

    // Their reply is the sign then, as without a callback.
    let (plan, _folder) = guarded(KvReady::Reply);
    let (_p, d, rig) = pair(plan).await;
    assert_eq!(rig.send(ask(&rig)).await.status, 200);
    assert!(d.seen()[0].mark()["handoff"].is_string());
    end(rig).await;
}
