//! Nodes that keep failing are left alone, retries are limited, and what is not worth splitting is not split.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pegaflow::fleet::Role;
use pegaflow::handoff::HandoffBoard;
use pegaflow::plan::RouterPlan;
use serde_json::{Value, json};
use support_router::*;

/// As the router has it.
const IN_A_ROW: usize = 5;

fn prompt() -> Value {
    json!({"prompt": "abc", "tag": 1})
}

/// A node that answers 500 until it is told that it is well.
async fn sick(board: &HandoffBoard) -> (Fake, Arc<AtomicBool>) {
    let well = Arc::new(AtomicBool::new(false));
    let told = well.clone();
    let node = Fake::scripted(board, move |_, _| {
        let answer = match told.load(Ordering::SeqCst) {
            true => Answer::Tokens,
            false => Answer::Status(500, "boom"),
        };
        (Kv::Nothing, answer)
    });
    (node.await, well)
}

async fn breaker(rig: &Rig, node: &str, leg: &str) -> Value {
    rig.get("/status").await.json()["breakers"][node][leg].clone()
}

#[tokio::test]
async fn a_node_that_keeps_failing_is_left_alone_and_found_again_when_it_is_well() {
    let board = HandoffBoard::default();
    let (bad, well) = sick(&board).await;
    let good = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [
        ("a", Role::Unified, bad.addr),
        ("b", Role::Unified, good.addr),
    ];
    let rig = Rig::start(&board, plan(), &nodes).await;
    let started = Instant::now();
    for _ in 0..60 {
        assert_eq!(rig.complete(&prompt()).await.status, 200);
    }
    // One more for each time that it was tried again: after 1 s, then 2 s, ...
    let most = IN_A_ROW + started.elapsed().as_secs() as usize;
    let asked = bad.seen().len();
    assert!((IN_A_ROW..=most).contains(&asked), "{asked} of {most}");
    let opened = "pegaflow_router_breakers_opened_total{leg=\"answer\"}";
    assert!(rig.sample(opened).await >= 1.0);

    well.store(true, Ordering::SeqCst);
    soon("the node to be found well", async {
        while breaker(&rig, "a", "answer").await != Value::Null {
            assert_eq!(rig.complete(&prompt()).await.status, 200);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let before = bad.seen().len();
    for _ in 0..10 {
        assert_eq!(rig.complete(&prompt()).await.status, 200);
    }
    assert_eq!(bad.seen().len() - before, 5, "it has its share again");
    let state = "pegaflow_router_breaker_state{node=\"a\",leg=\"answer\"}";
    assert_eq!(rig.sample(state).await, 0.0);
    rig.finish().await;
}

#[tokio::test]
async fn a_client_s_mistakes_open_nothing() {
    let board = HandoffBoard::default();
    let p = Fake::always(&board, Kv::Nothing, Answer::Status(400, "too long")).await;
    let d = Fake::always(&board, Kv::Nothing, Answer::Status(422, "no")).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let rig = Rig::start(&board, plan(), &nodes).await;
    let one_token = json!({"prompt": "abc", "max_tokens": 1});
    for _ in 0..4 * IN_A_ROW {
        assert_eq!(rig.complete(&prompt()).await.status, 400);
        assert_eq!(rig.complete(&one_token).await.status, 400);
    }
    assert_eq!(rig.get("/status").await.json()["breakers"], json!({}));
    rig.finish().await;
}

#[tokio::test]
async fn the_last_node_is_asked_whatever_its_breaker_says() {
    let board = HandoffBoard::default();
    let (only, well) = sick(&board).await;
    let rig = Rig::start(&board, plan(), &[("a", Role::Unified, only.addr)]).await;
    let body = prompt();
    let failing = join_all((0..IN_A_ROW).map(|_| rig.complete(&body)));
    let then = async {
        soon("the breaker to open", async {
            while !["open", "half_open"]
                .map(Value::from)
                .contains(&breaker(&rig, "a", "answer").await)
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        well.store(true, Ordering::SeqCst);
        assert_eq!(rig.complete(&body).await.status, 200, "at once");
        assert_eq!(breaker(&rig, "a", "answer").await, Value::Null);
    };
    let (got, ()) = tokio::join!(failing, then);
    assert!(got.iter().all(|got| got.status == 502));
    assert_eq!(only.seen().len(), IN_A_ROW + 1);
    rig.finish().await;
}

#[tokio::test]
async fn decode_does_not_wait_for_a_prefill_node_that_keeps_hanging_nor_pays_for_it() {
    let board = HandoffBoard::default();
    let p = Fake::always(&board, Kv::Nothing, Answer::Hang).await;
    let d = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let hangs = RouterPlan {
        handoff_timeout: Duration::from_millis(200),
        ..plan()
    };
    let rig = Rig::start(&board, hangs, &nodes).await;
    for _ in 0..IN_A_ROW {
        assert_eq!(rig.complete(&prompt()).await.status, 200);
    }
    assert_eq!(rig.complete(&prompt()).await.status, 200);
    assert_ne!(breaker(&rig, "p", "prefill").await, Value::Null);
    assert_eq!(breaker(&rig, "p", "answer").await, Value::Null);
    assert_eq!(breaker(&rig, "d", "answer").await, Value::Null);
    let fallback = "pegaflow_router_fallbacks_total{reason=\"breaker_open\"}";
    assert_eq!(rig.sample(fallback).await, 1.0);
    assert_eq!((p.seen().len(), d.seen().len()), (IN_A_ROW, IN_A_ROW + 1));
    rig.finish().await;
}

#[tokio::test]
async fn a_fleet_that_fails_is_not_asked_many_times_over() {
    const REQUESTS: usize = 60;
    const PLACES: usize = 8;
    let board = HandoffBoard::default();
    let bad = [
        sick(&board).await.0,
        sick(&board).await.0,
        sick(&board).await.0,
    ];
    let nodes = [
        ("a", Role::Unified, bad[0].addr),
        ("b", Role::Unified, bad[1].addr),
        ("c", Role::Unified, bad[2].addr),
    ];
    let few = RouterPlan {
        max_in_flight: PLACES,
        ..plan()
    };
    let rig = Rig::start(&board, few, &nodes).await;
    let started = Instant::now();
    let body = prompt();
    let got = join_all((0..REQUESTS).map(|_| rig.complete(&body))).await;
    assert!(got.iter().all(|got| got.status == 502));
    let asked: usize = bad.iter().map(|node| node.seen().len()).sum();
    let seconds = started.elapsed().as_secs() as usize + 1;
    let most = PLACES + REQUESTS / 5 + seconds;
    assert!(
        asked - REQUESTS <= most,
        "{asked} for {REQUESTS}, {most} more allowed"
    );
    let denied = "pegaflow_router_retries_denied_total{leg=\"whole\"}";
    assert!(rig.sample(denied).await > 0.0);
    rig.finish().await;
}

async fn pair(plan: RouterPlan, prefill: Kv, decode: Answer) -> (Fake, Fake, Rig) {
    let board = HandoffBoard::default();
    let p = Fake::always(&board, prefill, Answer::Hang).await;
    let d = Fake::always(&board, Kv::Nothing, decode).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let rig = Rig::start(&board, plan, &nodes).await;
    (p, d, rig)
}

fn whole(reason: &str) -> String {
    format!(
        "pegaflow_router_requests_total{{endpoint=\"completions\",outcome=\"ok\",path=\"whole\",reason=\"{reason}\"}}"
    )
}

#[tokio::test]
async fn short_prompts_are_served_whole_where_that_is_asked_for() {
    let from_100 = RouterPlan {
        split_min_tokens: 100,
        ..plan()
    };
    let (p, d, rig) = pair(from_100, Kv::Settle(STORED), Answer::Tokens).await;
    assert_eq!(
        rig.complete(&json!({"prompt": "x".repeat(300)}))
            .await
            .status,
        200
    );
    assert_eq!((p.seen().len(), d.seen().len()), (0, 1));
    assert_eq!(rig.sample(&whole("short_prompt")).await, 1.0);
    assert_eq!(
        rig.complete(&json!({"prompt": "x".repeat(500)}))
            .await
            .status,
        200
    );
    assert_eq!((p.seen().len(), d.seen().len()), (1, 2));
    rig.finish().await;
}

#[tokio::test]
async fn an_idle_decode_node_relieves_a_busy_prefill_node() {
    let from_1000 = RouterPlan {
        split_max_backlog: 1_000,
        ..plan()
    };
    let (p, d, rig) = pair(from_1000, Kv::Open, Answer::StallAfter(1)).await;
    let body = json!({"prompt": "x".repeat(5_000), "stream": true});
    let send = || rig.request("/v1/completions", &body).send();
    let first = tokio::spawn(send());
    p.active_is(1).await;
    let second = soon("a stream", send()).await.unwrap();
    assert_eq!((p.seen().len(), d.seen().len()), (1, 1));
    assert!(d.seen()[0].mark().is_null());
    // Now decode is busy too.
    let third = tokio::spawn(send());
    p.active_is(2).await;
    assert_eq!(d.seen().len(), 1);
    drop(second);
    for client in [first, third] {
        client.abort();
        drop(client.await);
    }
    rig.idle().await;
    let cancelled = whole("prefill_busy").replace("ok", "cancelled");
    assert_eq!(rig.sample(&cancelled).await, 1.0);
    rig.finish().await;
}
