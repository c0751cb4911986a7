//! The router when nodes fail, and when clients go away.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::time::Duration;

use pegaflow::fleet::{Phase, Role};
use pegaflow::handoff::{HandoffBoard, HandoffFailure, HandoffOutcome};
use pegaflow::plan::RouterPlan;
use serde_json::{Value, json};
use support_router::*;

fn short_timeouts() -> RouterPlan {
    let short = Duration::from_millis(700);
    RouterPlan {
        first_byte_timeout: short,
        chunk_timeout: short,
        ..plan()
    }
}

fn stream(tag: u32) -> Value {
    json!({"prompt": "abc", "stream": true, "tag": tag})
}

fn failed(failure: HandoffFailure) -> Kv {
    Kv::Settle(HandoffOutcome::Failed(failure))
}

/// One prefill node that does this beside one good decode node: the client must not notice.
async fn bad_prefill(plan: RouterPlan, kv: Kv, answer: Answer, reason: &str) -> Vec<Seen> {
    let board = HandoffBoard::default();
    let p = Fake::always(&board, kv, answer).await;
    let d = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let rig = Rig::start(&board, plan, &nodes).await;
    rig.complete(&stream(1)).await.is_whole_stream("1");
    let fallback = format!("pegaflow_router_fallbacks_total{{reason=\"{reason}\"}}");
    assert_eq!(rig.sample(&fallback).await, 1.0, "{}", rig.metrics().await);
    p.active_is(0).await;
    assert_eq!(p.seen().len(), 1);
    rig.finish().await;
    d.seen()
}

#[tokio::test]
async fn whatever_prefill_does_decode_answers() {
    let hangs = RouterPlan {
        handoff_timeout: Duration::from_millis(150),
        ..plan()
    };
    let cases = [
        (plan(), Kv::Nothing, Answer::Status(500, "boom"), "status"),
        (plan(), Kv::Open, Answer::Status(503, "boom"), "status"),
        (plan(), Kv::Nothing, Answer::Reset, "transport"),
        (plan(), Kv::Open, Answer::Reset, "transport"),
        (plan(), Kv::Nothing, Answer::Tokens, "not_opened"),
        (
            plan(),
            failed(HandoffFailure::NoSpace),
            Answer::Hang,
            "no_space",
        ),
        (
            plan(),
            failed(HandoffFailure::EngineDown),
            Answer::Tokens,
            "engine_down",
        ),
        (
            plan(),
            failed(HandoffFailure::ProducerDied),
            Answer::Hang,
            "producer_died",
        ),
        (hangs.clone(), Kv::Nothing, Answer::Hang, "handoff_timeout"),
        (hangs.clone(), Kv::Open, Answer::Hang, "handoff_timeout"),
        (hangs, Kv::Open, Answer::Tokens, "handoff_timeout"),
    ];
    for (plan, kv, answer, reason) in cases {
        let on_d = bad_prefill(plan, kv, answer, reason).await;
        assert_eq!(on_d.len(), 1, "{reason}");
    }
}

#[tokio::test]
async fn a_prefill_node_that_refuses_connections_is_survived() {
    let board = HandoffBoard::default();
    let d = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [
        ("d", Role::Decode, d.addr),
        ("p", Role::Prefill, refusing().await),
    ];
    let rig = Rig::start(&board, plan(), &nodes).await;
    rig.complete(&stream(1)).await.is_whole_stream("1");
    assert!(d.seen()[0].body.get("kv_transfer_params").is_none());
    let fallback = "pegaflow_router_fallbacks_total{reason=\"connect\"}";
    assert_eq!(rig.sample(fallback).await, 1.0);
    rig.finish().await;
}

#[tokio::test]
async fn a_failed_prefill_is_tried_on_another_node_once() {
    for (kv, answer) in [
        (Kv::Nothing, Answer::Status(500, "boom")),
        (failed(HandoffFailure::ProducerDied), Answer::Hang),
    ] {
        let board = HandoffBoard::default();
        let bad = Fake::always(&board, kv, answer).await;
        let good = Fake::always(&board, Kv::Settle(READY), Answer::Tokens).await;
        let d = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
        let nodes = [
            ("d", Role::Decode, d.addr),
            ("p0", Role::Prefill, bad.addr),
            ("p1", Role::Prefill, good.addr),
        ];
        let rig = Rig::start(&board, plan(), &nodes).await;
        for tag in 0..2 {
            rig.complete(&stream(tag))
                .await
                .is_whole_stream(&tag.to_string());
        }
        assert!(!bad.seen().is_empty(), "ties go round");
        assert_eq!((good.seen().len(), d.seen().len()), (2, 2));
        let last = good.seen().pop().unwrap();
        assert_eq!(d.seen()[1].mark()["handoff"], last.mark()["handoff"]);
        let metrics = rig.metrics().await;
        let mut fallbacks = metrics
            .lines()
            .filter(|line| line.starts_with("pegaflow_router_fallbacks_total{"));
        assert!(fallbacks.all(|line| line.ends_with(" 0")), "{metrics}");
        rig.finish().await;
    }
}

#[tokio::test]
async fn prefills_refusal_is_the_clients_error() {
    const TEXT: &str = r#"{"error":{"message":"too long","code":400}}"#;
    let board = HandoffBoard::default();
    let p = Fake::always(&board, Kv::Nothing, Answer::Status(400, TEXT)).await;
    let d = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let rig = Rig::start(&board, plan(), &nodes).await;
    let got = rig.complete(&stream(1)).await;
    assert_eq!((got.status, got.text.as_str()), (400, TEXT));
    assert!(d.seen().is_empty());
    rig.finish().await;
}

#[tokio::test]
async fn a_node_that_leaves_ready_is_not_waited_for() {
    let backoff = Phase::Backoff {
        delay: Duration::from_secs(1),
    };
    for (id, phase) in [
        ("p", backoff.clone()),
        ("p", Phase::Unreachable),
        ("d", backoff),
    ] {
        let board = HandoffBoard::default();
        let kv = if id == "p" {
            Kv::Open
        } else {
            Kv::Settle(STORED)
        };
        let p = Fake::scripted(&board, move |number, seen| match seen.mark().is_null() {
            true => (Kv::Nothing, Answer::Tokens),
            false => (kv, [Answer::Hang, Answer::Tokens][number.min(1)].clone()),
        })
        .await;
        let d = match id {
            "d" => Fake::always(&board, Kv::Nothing, Answer::Hang).await,
            _ => Fake::always(&board, Kv::Nothing, Answer::Tokens).await,
        };
        let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
        let rig = Rig::start(&board, plan(), &nodes).await;
        let leave = async {
            let stuck = if id == "p" { &p } else { &d };
            stuck.active_is(1).await;
            rig.set(id, phase);
        };
        let body = stream(1);
        let (got, ()) = tokio::join!(rig.complete(&body), leave);
        got.is_whole_stream("1");
        p.active_is(0).await;
        rig.finish().await;
    }
}

#[tokio::test]
async fn decode_failing_before_its_first_byte_is_tried_elsewhere() {
    for answer in [
        Answer::Status(500, "boom"),
        Answer::Reset,
        Answer::Hang,
        Answer::EndAfter(0),
        Answer::BreakAfter(0),
        Answer::StallAfter(0),
        Answer::ErrorEvent(500),
        Answer::BreakAfterRole,
        Answer::ErrorAfterRole(500),
    ] {
        let board = HandoffBoard::default();
        let p = Fake::always(&board, Kv::Settle(READY), Answer::Tokens).await;
        let bad = Fake::always(&board, Kv::Nothing, answer.clone()).await;
        let good = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
        let nodes = [
            ("d0", Role::Decode, bad.addr),
            ("d1", Role::Decode, good.addr),
            ("p", Role::Prefill, p.addr),
        ];
        let rig = Rig::start(&board, short_timeouts(), &nodes).await;
        for tag in 0..3 {
            rig.complete(&stream(tag))
                .await
                .is_whole_stream(&tag.to_string());
        }
        assert!(!bad.seen().is_empty(), "{answer:?}");
        assert!(
            good.seen()
                .iter()
                .all(|seen| seen.mark()["leg"] == "decode")
        );
        bad.active_is(0).await;
        rig.finish().await;
    }
}

#[tokio::test]
async fn without_a_decode_node_prefill_serves_whole() {
    let board = HandoffBoard::default();
    let p = Fake::scripted(&board, |_, _| (Kv::Settle(READY), Answer::Tokens)).await;
    let nodes = [
        ("d", Role::Decode, refusing().await),
        ("p", Role::Prefill, p.addr),
    ];
    let rig = Rig::start(&board, plan(), &nodes).await;
    rig.complete(&stream(1)).await.is_whole_stream("1");
    assert_eq!(p.seen().len(), 2);
    assert!(p.seen()[1].body.get("kv_transfer_params").is_none());
    let fallback = "pegaflow_router_fallbacks_total{reason=\"no_decode_node\"}";
    assert_eq!(rig.sample(fallback).await, 1.0);
    rig.finish().await;
}

#[tokio::test]
async fn a_node_that_dies_and_returns_answers_after_all() {
    let board = HandoffBoard::default();
    let a = Fake::scripted(&board, |number, _| {
        (
            Kv::Nothing,
            if number < 2 {
                Answer::Reset
            } else {
                Answer::Tokens
            },
        )
    })
    .await;
    let rig = Rig::start(&board, plan(), &[("a", Role::Unified, a.addr)]).await;
    let revive = async {
        soon("two attempts", async {
            while a.seen().len() < 2 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        rig.set("a", Phase::Starting);
        rig.fleet.update(&"a".into(), |node| {
            node.incarnation = 2;
            node.phase = Phase::Ready;
        });
    };
    let body = stream(1);
    let (got, ()) = tokio::join!(rig.complete(&body), revive);
    got.is_whole_stream("1");
    rig.finish().await;
}

/// A server whose engine has died answers once or twice before it dies itself. `beside`: another node
/// answers badly for good, and must not have the last word.
async fn answers_badly_dies_and_returns(last_words: Answer, beside: bool) {
    let board = HandoffBoard::default();
    let dying = Fake::scripted(&board, move |number, _| match number {
        0 => (Kv::Nothing, last_words.clone()),
        _ => (Kv::Nothing, Answer::Tokens),
    })
    .await;
    let bad = Fake::always(&board, Kv::Nothing, Answer::Status(500, "boom")).await;
    let mut nodes = vec![("a", Role::Unified, dying.addr)];
    if beside {
        nodes.push(("b", Role::Unified, bad.addr));
    }
    let rig = Rig::start(&board, plan(), &nodes).await;
    let revive = async {
        let tried = || !dying.seen().is_empty() && bad.seen().is_empty() != beside;
        soon("an answer of every node", async {
            while !tried() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        // Until a health probe finds out.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let delay = Duration::from_millis(1);
        rig.set("a", Phase::Backoff { delay });
        tokio::time::sleep(Duration::from_millis(20)).await;
        rig.fleet.update(&"a".into(), |node| {
            node.incarnation = 2;
            node.phase = Phase::Ready;
        });
    };
    let body = stream(1);
    let (got, ()) = tokio::join!(rig.complete(&body), revive);
    got.is_whole_stream("1");
    rig.finish().await;
}

#[tokio::test]
async fn an_error_of_a_dying_node_is_not_the_answer() {
    for last_words in [
        Answer::Status(500, "the engine is dead"),
        Answer::ErrorEvent(500),
        Answer::ErrorAfterRole(500),
    ] {
        for beside in [false, true] {
            answers_badly_dies_and_returns(last_words.clone(), beside).await;
        }
    }
}

#[tokio::test]
async fn when_every_node_answers_badly_the_client_learns_why() {
    let board = HandoffBoard::default();
    let a = Fake::always(&board, Kv::Nothing, Answer::Status(500, "boom")).await;
    let b = Fake::always(&board, Kv::Nothing, Answer::Hang).await;
    let nodes = [("a", Role::Unified, a.addr)];
    let rig = Rig::start(&board, plan(), &nodes).await;
    let got = rig.complete(&stream(1)).await;
    assert_eq!(
        (got.status, got.json()["error"]["code"].clone()),
        (502, json!("status"))
    );
    rig.finish().await;

    let nodes = [("b", Role::Unified, b.addr)];
    let rig = Rig::start(&board, short_timeouts(), &nodes).await;
    let got = rig.complete(&stream(1)).await;
    assert_eq!(got.status, 504);
    assert_eq!(got.json()["error"]["code"], "first_byte_timeout");
    rig.finish().await;
}

#[tokio::test]
async fn a_stream_that_breaks_in_the_middle_says_so() {
    for (answer, code) in [
        (Answer::BreakAfter(3), "transport"),
        (Answer::EndAfter(3), "truncated"),
        (Answer::StallAfter(3), "chunk_timeout"),
    ] {
        let board = HandoffBoard::default();
        let p = Fake::always(&board, Kv::Settle(READY), Answer::Tokens).await;
        let d = Fake::always(&board, Kv::Nothing, answer).await;
        let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
        let rig = Rig::start(&board, short_timeouts(), &nodes).await;
        rig.complete(&stream(1)).await.is_broken_stream(3, code);
        assert_eq!(d.seen().len(), 1, "what was committed is not sent again");
        d.active_is(0).await;
        rig.finish().await;
    }
}

#[tokio::test]
async fn a_client_that_goes_away_stops_both_legs() {
    // In the prefill wait; in the decode wait with prefill's reply still open; in mid-stream.
    let ready = Kv::Settle(READY);
    let cases = [
        (Kv::Open, Answer::Tokens, (1, 0), "prefill"),
        (ready, Answer::Hang, (1, 1), "decode"),
        (ready, Answer::StallAfter(2), (1, 1), "stream"),
    ];
    for (kv, decode, (on_p, on_d), stage) in cases {
        let board = HandoffBoard::default();
        let p = Fake::always(&board, kv, Answer::Hang).await;
        let d = Fake::always(&board, Kv::Nothing, decode).await;
        let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
        let rig = Rig::start(&board, plan(), &nodes).await;
        let client = tokio::spawn(rig.request("/v1/completions", &stream(1)).send());
        p.active_is(on_p).await;
        d.active_is(on_d).await;
        // Before its head the task holds the connection; after it, the response does.
        client.abort();
        drop(client.await);
        p.active_is(0).await;
        d.active_is(0).await;
        rig.idle().await;
        let cancelled = format!("pegaflow_router_cancellations_total{{stage=\"{stage}\"}}");
        assert_eq!(rig.sample(&cancelled).await, 1.0, "{}", rig.metrics().await);
        rig.finish().await;
    }
}
