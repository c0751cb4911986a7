//! Which node a request meets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::time::Duration;

use pegaflow::fleet::Role;
use pegaflow::handoff::HandoffBoard;
use pegaflow::plan::RouterPlan;
use serde_json::{Value, json};
use support_router::*;
use tokio_util::sync::CancellationToken;

async fn unified(answer: Answer) -> (Fake, Fake, Rig) {
    let board = HandoffBoard::default();
    let a = Fake::always(&board, Kv::Nothing, answer.clone()).await;
    let b = Fake::always(&board, Kv::Nothing, answer).await;
    let nodes = [("a", Role::Unified, a.addr), ("b", Role::Unified, b.addr)];
    let rig = Rig::start(&board, plan(), &nodes).await;
    (a, b, rig)
}

fn prompt(text: &str) -> Value {
    json!({"prompt": text, "tag": 1})
}

fn held(text: &str) -> Value {
    json!({"prompt": text, "stream": true, "max_tokens": 1_000, "tag": 1})
}

/// A stream that has begun and goes on.
async fn begun(rig: &Rig, body: &Value) -> reqwest::Response {
    let request = rig.request("/v1/completions", body).send();
    soon("a stream", request).await.unwrap()
}

fn counts(nodes: [&Fake; 2]) -> [usize; 2] {
    nodes.map(|node| node.seen().len())
}

#[tokio::test]
async fn many_small_requests_weigh_less_than_a_large_one() {
    let (a, b, rig) = unified(Answer::StallAfter(1)).await;
    let large = begun(&rig, &held(&"x".repeat(400_000))).await;
    let on_a = counts([&a, &b]) == [1, 0];
    let mut small = Vec::new();
    for _ in 0..6 {
        small.push(begun(&rig, &held("hi")).await);
    }
    let other = if on_a { &b } else { &a };
    assert_eq!(other.seen().len(), 6);
    let busy = if on_a { "a" } else { "b" };
    let tokens = format!("pegaflow_router_node_in_flight_tokens{{node=\"{busy}\"}}");
    assert!(rig.sample(&tokens).await > 90_000.0);
    let status = rig.get("/status").await.json();
    assert_eq!(status["load_by_node"][busy]["requests"], 1);
    drop((large, small));
    rig.idle().await;
    assert_eq!(rig.sample(&tokens).await, 0.0);
    rig.finish().await;
}

#[tokio::test]
async fn a_node_of_weight_three_gets_three_times_as_much() {
    let (a, b, rig) = unified(Answer::StallAfter(1)).await;
    rig.fleet.update(&"a".into(), |node| node.weight = 3);
    let mut streams = Vec::new();
    for _ in 0..12 {
        streams.push(begun(&rig, &held("hi")).await);
    }
    assert_eq!(counts([&a, &b]), [9, 3]);
    drop(streams);
    rig.finish().await;
}

#[tokio::test]
async fn a_closed_node_gets_nothing_whatever_speaks_for_it() {
    let (a, b, rig) = unified(Answer::Tokens).await;
    let body = prompt(&"x".repeat(5_000));
    let session = |rig: &Rig| {
        rig.request("/v1/completions", &body)
            .header("x-session-id", "s")
    };
    for _ in 0..3 {
        assert_eq!(rig.send(session(&rig)).await.status, 200);
    }
    let (warm, other) = if a.seen().is_empty() {
        ("b", &a)
    } else {
        ("a", &b)
    };
    assert_eq!(other.seen().len(), 0, "a session stays together");
    rig.traffic.close(&warm.into());
    for _ in 0..3 {
        assert_eq!(rig.send(session(&rig)).await.status, 200);
    }
    assert_eq!(other.seen().len(), 3);
    rig.traffic.open(&warm.into());
    assert_eq!(rig.send(session(&rig)).await.status, 200);
    assert_eq!(other.seen().len(), 3);
    rig.finish().await;
}

#[tokio::test]
async fn sessions_stay_together_and_apart_from_each_other() {
    let (a, b, rig) = unified(Answer::Tokens).await;
    for session in 0..16 {
        let before = counts([&a, &b]);
        for _ in 0..4 {
            let request = rig.request("/v1/completions", &prompt("hi"));
            let request = request.header("x-session-id", format!("session-{session}"));
            assert_eq!(rig.send(request).await.status, 200);
        }
        let after = counts([&a, &b]);
        let moved = [after[0] - before[0], after[1] - before[1]];
        assert!(moved == [4, 0] || moved == [0, 4], "{moved:?}");
    }
    assert!(counts([&a, &b]).iter().all(|count| *count > 0));
    assert!(a.seen()[0].headers.get("x-session-id").is_none());
    rig.finish().await;
}

#[tokio::test]
async fn a_session_leaves_a_node_that_is_far_behind() {
    let (a, b, rig) = unified(Answer::StallAfter(1)).await;
    let stream = async || {
        let request = rig.request("/v1/completions", &held(&"x".repeat(40_000)));
        let request = request.header("x-session-id", "s");
        soon("a stream", request.send()).await.unwrap()
    };
    let mut streams = Vec::new();
    for _ in 0..8 {
        streams.push(stream().await);
    }
    let [least, most] = {
        let mut counts = counts([&a, &b]);
        counts.sort_unstable();
        counts
    };
    // 11,000 tokens each: the fourth and the seventh would be more than twice the least and 16,384 on top.
    assert_eq!(
        (least, most),
        (2, 6),
        "it stays where it can, and not for ever"
    );
    drop(streams);
    rig.finish().await;
}

#[tokio::test]
async fn without_the_header_there_are_no_sessions() {
    let board = HandoffBoard::default();
    let a = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let b = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [("a", Role::Unified, a.addr), ("b", Role::Unified, b.addr)];
    let none = RouterPlan {
        session_header: None,
        ..plan()
    };
    let rig = Rig::start(&board, none, &nodes).await;
    for _ in 0..4 {
        let request = rig.request("/v1/completions", &prompt("hi"));
        let request = request.header("x-session-id", "s");
        assert_eq!(rig.send(request).await.status, 200);
    }
    assert_eq!(counts([&a, &b]), [2, 2]);
    rig.finish().await;
}

async fn two_pairs(prefill: Answer) -> ([Fake; 2], [Fake; 2], Rig) {
    let board = HandoffBoard::default();
    let kv = match prefill {
        Answer::Hang => Kv::Open,
        _ => Kv::Settle(READY),
    };
    let p = [
        Fake::always(&board, kv, prefill.clone()).await,
        Fake::always(&board, kv, prefill).await,
    ];
    let d = [
        Fake::always(&board, Kv::Nothing, Answer::Tokens).await,
        Fake::always(&board, Kv::Nothing, Answer::Tokens).await,
    ];
    let nodes = [
        ("d0", Role::Decode, d[0].addr),
        ("d1", Role::Decode, d[1].addr),
        ("p0", Role::Prefill, p[0].addr),
        ("p1", Role::Prefill, p[1].addr),
    ];
    let rig = Rig::start(&board, plan(), &nodes).await;
    (p, d, rig)
}

#[tokio::test]
async fn repeated_prefixes_meet_the_same_nodes_and_new_ones_take_turns() {
    let (p, d, rig) = two_pairs(Answer::Tokens).await;
    let text = |which: u32, tail: u32| format!("{}{tail}", format!("{which:08}").repeat(1_000));
    for tail in 0..6 {
        for which in 0..2 {
            assert_eq!(rig.complete(&prompt(&text(which, tail))).await.status, 200);
            rig.idle().await;
        }
    }
    for nodes in [&p, &d] {
        assert_eq!(counts([&nodes[0], &nodes[1]]), [6, 6]);
        for node in nodes {
            let seen = node.seen();
            let begins = |seen: &Seen| seen.body["prompt"].as_str().unwrap()[..8].to_owned();
            assert!(seen.iter().all(|one| begins(one) == begins(&seen[0])));
        }
    }
    // A new incarnation has an empty cache: its prefixes are new again, and go where it is their turn.
    let first = p[0].seen()[0].body["prompt"].as_str().unwrap()[..8].to_owned();
    rig.fleet.update(&"p0".into(), |node| node.incarnation = 2);
    let again = format!("{}x", first.repeat(1_000));
    let before = counts([&p[0], &p[1]]);
    for _ in 0..2 {
        assert_eq!(rig.complete(&prompt(&again)).await.status, 200);
        rig.idle().await;
    }
    let after = counts([&p[0], &p[1]]);
    assert_eq!(after[0] + after[1], before[0] + before[1] + 2);
    assert!(after == [before[0] + 2, before[1]] || after == [before[0], before[1] + 2]);
    rig.finish().await;
}

#[tokio::test]
async fn a_warm_node_that_is_busy_is_passed_by() {
    let (p, _d, rig) = two_pairs(Answer::Hang).await;
    let text = "x".repeat(8_000);
    let mut clients = Vec::new();
    for count in 1..=4 {
        clients.push(tokio::spawn(
            rig.request("/v1/completions", &prompt(&text)).send(),
        ));
        soon("a prompt", async {
            while counts([&p[0], &p[1]]).iter().sum::<usize>() < count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
    // What is warm saves half of the prompt: less than one more of them takes.
    assert_eq!(counts([&p[0], &p[1]]), [2, 2]);
    for client in clients {
        client.abort();
        drop(client.await);
    }
    rig.finish().await;
}

/// Two looks at the fleet for one request, and a change between them, once made everybody wait for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nobody_is_stuck_while_nodes_change_all_the_time() {
    let board = HandoffBoard::default();
    let p = Fake::always(&board, Kv::Settle(READY), Answer::Tokens).await;
    let d = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [("p", Role::Prefill, p.addr), ("d", Role::Decode, d.addr)];
    let rig = Rig::start(&board, plan(), &nodes).await;
    let (fleet, stop) = (rig.fleet.clone(), CancellationToken::new());
    let (changing, watching, guard) = (stop.clone(), stop.clone(), stop.drop_guard());
    std::thread::spawn(move || {
        std::thread::sleep(HANG);
        if !watching.is_cancelled() {
            // Whoever could fail the test is stuck as well.
            eprintln!("the router is stuck");
            std::process::abort();
        }
    });
    let changes = std::thread::spawn(move || {
        let mut weight = 0;
        while !changing.is_cancelled() {
            weight = weight % 7 + 1;
            fleet.update(&"d".into(), |node| node.weight = weight);
        }
    });
    let requests = (0..8).map(async |_| {
        for _ in 0..100 {
            let request = rig.request("/v1/completions", &prompt("a"));
            let got = soon("an answer", request.send()).await.unwrap();
            assert_eq!(got.status(), 200);
        }
    });
    futures_util::future::join_all(requests).await;
    drop(guard);
    changes.join().unwrap();
}
