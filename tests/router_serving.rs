//! The router when the nodes do as they should.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use pegaflow::fleet::{KvTrust, Phase, Role};
use pegaflow::handoff::HandoffBoard;
use serde_json::{Value, json};
use support_router::*;

async fn pair(board: &HandoffBoard, prefill: Answer) -> (Fake, Fake, Rig) {
    let p = Fake::always(board, Kv::Settle(READY), prefill).await;
    let d = Fake::always(board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let rig = Rig::start(board, plan(), &nodes).await;
    (p, d, rig)
}

#[tokio::test]
async fn a_split_request_goes_to_both_and_streams() {
    let board = HandoffBoard::default();
    let (p, d, rig) = pair(&board, Answer::Tokens).await;
    let body = json!({"prompt": "abc", "max_tokens": 8, "stream": true, "tag": 7,
        "kv_transfer_params": {"pegaflow": {"handoff": "stolen"}}});
    let request = rig
        .request("/v1/completions", &body)
        .header("x-request-id", "mine")
        .header("authorization", "Bearer secret");
    let got = rig.send(request).await;
    got.is_whole_stream("7");
    assert_eq!(got.headers["x-request-id"], "mine");
    assert!(
        got.headers["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/event-stream")
    );

    let (on_p, on_d) = (&p.seen()[0], &d.seen()[0]);
    assert_eq!((p.seen().len(), d.seen().len()), (1, 1));
    assert_eq!(on_p.path, "/v1/completions");
    assert_eq!(on_p.body["max_tokens"], 1);
    assert_eq!(on_p.body["stream"], false);
    assert_eq!(
        (&on_p.mark()["leg"], &on_d.mark()["leg"]),
        (&json!("prefill"), &json!("decode"))
    );
    assert_eq!(on_p.mark()["handoff"], on_d.mark()["handoff"]);
    assert_ne!(on_p.mark()["handoff"], "stolen");
    assert_eq!(on_d.body["max_tokens"], 8);
    assert_eq!(
        (&on_p.headers["x-request-id"], &on_d.headers["x-request-id"]),
        (&"mine-p".parse().unwrap(), &"mine-d".parse().unwrap())
    );
    assert_eq!(on_p.headers["authorization"], "Bearer secret");
    assert_eq!(on_d.headers["authorization"], "Bearer secret");
    let done =
        "pegaflow_router_requests_total{endpoint=\"completions\",outcome=\"ok\",path=\"split\"";
    assert_eq!(rig.sample(done).await, 1.0);
    assert_eq!(
        rig.sample("pegaflow_router_handoff_wait_seconds_count")
            .await,
        1.0
    );
    rig.finish().await;
}

#[tokio::test]
async fn a_chat_that_is_not_streamed_is_answered_whole() {
    let board = HandoffBoard::default();
    let (p, d, rig) = pair(&board, Answer::Tokens).await;
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "tag": 1});
    let got = rig.send(rig.request("/v1/chat/completions", &body)).await;
    assert_eq!((got.status, &got.json()["object"]), (200, &json!("text")));
    assert!(got.headers.contains_key("x-request-id"));
    assert_eq!(d.seen()[0].path, "/v1/chat/completions");
    assert_eq!(p.seen()[0].body["messages"], body["messages"]);
    rig.finish().await;
}

#[tokio::test]
async fn decode_does_not_wait_for_prefills_reply() {
    let board = HandoffBoard::default();
    let (p, _d, rig) = pair(&board, Answer::Hang).await;
    let got = rig
        .complete(&json!({"prompt": "abc", "stream": true, "tag": 1}))
        .await;
    got.is_whole_stream("1");
    // The reply is still awaited aside, and still counted on its node; the end drops it.
    p.active_is(1).await;
    rig.shutdown.graceful().cancel();
    soon("serve to return", rig.task).await.unwrap().unwrap();
    p.active_is(0).await;
    assert_eq!(board.waiting(), 0);
}

#[tokio::test]
async fn prefill_is_cancelled_when_the_store_had_everything() {
    let board = HandoffBoard::default();
    let p = Fake::always(&board, Kv::Settle(STORED), Answer::Hang).await;
    let d = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let rig = Rig::start(&board, plan(), &nodes).await;
    rig.complete(&json!({"prompt": "abc", "stream": true, "tag": 1}))
        .await
        .is_whole_stream("1");
    p.active_is(0).await;
    rig.finish().await;
}

#[tokio::test]
async fn a_request_for_one_token_is_served_by_one_node() {
    let board = HandoffBoard::default();
    let (p, d, rig) = pair(&board, Answer::Tokens).await;
    let got = rig
        .complete(&json!({"prompt": "abc", "max_tokens": 1}))
        .await;
    assert_eq!(got.status, 200);
    assert_eq!((p.seen().len(), d.seen().len()), (1, 0));
    assert!(p.seen()[0].body.get("kv_transfer_params").is_none());
    rig.finish().await;
}

#[tokio::test]
async fn a_fleet_that_cannot_split_serves_whole_and_says_so() {
    let board = HandoffBoard::default();
    let (p, d, rig) = pair(&board, Answer::Tokens).await;
    let body = json!({"prompt": "abc", "kv_transfer_params": {"x": 1}});
    let state = async || rig.get("/health").await.json()["status"].clone();
    assert_eq!(state().await, "ok");
    rig.fleet
        .update(&"p".into(), |node| node.trust = KvTrust::Unproven);
    assert_eq!(state().await, "degraded");
    assert_eq!(rig.complete(&body).await.status, 200);
    assert_eq!((p.seen().len(), d.seen().len()), (0, 1));
    rig.set("d", Phase::Failed);
    assert_eq!(rig.complete(&body).await.status, 200);
    assert_eq!((p.seen().len(), d.seen().len()), (1, 1));
    for seen in [&p.seen()[0], &d.seen()[0]] {
        assert!(seen.body.get("kv_transfer_params").is_none());
    }
    rig.set("p", Phase::CrashLoop);
    let got = rig.get("/health").await;
    assert_eq!(
        (got.status, got.json()["status"].clone()),
        (503, json!("unavailable"))
    );
    assert!(got.headers.contains_key("retry-after"));
    rig.finish().await;
}

#[tokio::test]
async fn unified_nodes_share_the_load() {
    let board = HandoffBoard::default();
    let a = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let b = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [("a", Role::Unified, a.addr), ("b", Role::Unified, b.addr)];
    let rig = Rig::start(&board, plan(), &nodes).await;
    for _ in 0..6 {
        assert_eq!(rig.complete(&json!({"prompt": "abc"})).await.status, 200);
    }
    assert_eq!((a.seen().len(), b.seen().len()), (3, 3));
    rig.finish().await;
}

#[tokio::test]
async fn the_other_paths_answer_in_openai_shape() {
    let board = HandoffBoard::default();
    let (_p, _d, rig) = pair(&board, Answer::Tokens).await;
    let models = rig.get("/v1/models").await.json();
    assert_eq!(
        (&models["object"], &models["data"][0]["id"]),
        (&json!("list"), &json!("tiny"))
    );
    assert_eq!(
        rig.get("/status").await.json()["fleet"]["nodes"]["p"]["phase"],
        "ready"
    );
    for (got, status) in [
        (rig.get("/nothing").await, 404),
        (rig.get("/v1/completions").await, 405),
        (rig.complete(&json!([1])).await, 400),
        (
            rig.send(rig.http.post(rig.url("/v1/completions")).body("{"))
                .await,
            400,
        ),
        (
            rig.complete(&json!({"prompt": "x".repeat(2 << 20)})).await,
            413,
        ),
    ] {
        assert_eq!(got.status, status);
        let error = &got.json()["error"];
        for key in ["message", "type", "code"] {
            assert!(error[key].is_string(), "{error}");
        }
        assert!(error.get("param").is_some());
    }
    rig.finish().await;
}

#[tokio::test]
async fn a_full_house_queues_and_then_refuses() {
    let board = HandoffBoard::default();
    let a = Fake::scripted(&board, |number, _| {
        (
            Kv::Nothing,
            if number == 0 {
                Answer::StallAfter(1)
            } else {
                Answer::Tokens
            },
        )
    })
    .await;
    let mut tight = plan();
    (tight.max_in_flight, tight.max_queue) = (1, 1);
    let rig = Rig::start(&board, tight, &[("a", Role::Unified, a.addr)]).await;
    let body = json!({"prompt": "abc", "stream": true, "tag": 1});
    let first = soon("the first", rig.request("/v1/completions", &body).send())
        .await
        .unwrap();
    let queued = rig.complete(&body);
    let refused = async {
        while rig.get("/status").await.json()["queued"] != 1 {
            tokio::task::yield_now().await;
        }
        let got = rig.complete(&body).await;
        drop(first);
        got
    };
    let (queued, refused) = tokio::join!(queued, refused);
    queued.is_whole_stream("1");
    assert_eq!(refused.status, 429);
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(refused.json()["error"]["code"], "queue_full");
    rig.finish().await;
}

#[tokio::test]
async fn a_request_waits_until_a_node_is_ready_or_patience_ends() {
    let board = HandoffBoard::default();
    let a = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let mut short = plan();
    short.queue_timeout = Duration::from_millis(100);
    let nodes = [("a", Role::Unified, a.addr)];
    let rig = Rig::start(&board, short, &nodes).await;
    rig.set("a", Phase::Starting);
    let got = rig.complete(&json!({"prompt": "abc"})).await;
    assert_eq!(
        (got.status, got.json()["error"]["code"].clone()),
        (503, json!("no_ready_node"))
    );
    assert_eq!(got.headers["retry-after"], "5");
    rig.set(
        "a",
        Phase::Backoff {
            delay: Duration::from_secs(40),
        },
    );
    let got = rig.complete(&json!({"prompt": "abc"})).await;
    let message = got.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("a: backoff"), "{message}");
    assert!(
        message.contains("next try in 40 s") || message.contains("in 39 s"),
        "{message}"
    );
    rig.finish().await;

    let rig = Rig::start(&board, plan(), &nodes).await;
    rig.set("a", Phase::Starting);
    let body = json!({"prompt": "abc"});
    let waiting = rig.complete(&body);
    let start = async {
        while rig.get("/status").await.json()["queued"] != 1 {
            tokio::task::yield_now().await;
        }
        rig.set("a", Phase::Ready);
    };
    assert_eq!(tokio::join!(waiting, start).0.status, 200);
    rig.finish().await;
}

#[tokio::test]
async fn draining_lets_a_stream_finish_and_its_deadline_drops_it() {
    let board = HandoffBoard::default();
    let a = Fake::always(&board, Kv::Nothing, Answer::StallAfter(2)).await;
    let nodes = [("a", Role::Unified, a.addr)];
    let mut short = plan();
    short.drain_timeout = Duration::from_millis(100);
    let rig = Rig::start(&board, short, &nodes).await;
    let body = json!({"prompt": "abc", "stream": true, "tag": 1});
    let held = soon("head", rig.request("/v1/completions", &body).send())
        .await
        .unwrap();
    rig.shutdown.graceful().cancel();
    soon("serve to return", rig.task).await.unwrap().unwrap();
    assert!(
        soon("the rest", held.text()).await.is_err(),
        "a dropped stream is no clean end"
    );
    a.active_is(0).await;
}

#[tokio::test]
async fn forcing_the_end_does_not_wait_for_the_drain() {
    let board = HandoffBoard::default();
    let a = Fake::always(&board, Kv::Nothing, Answer::Hang).await;
    let rig = Rig::start(&board, plan(), &[("a", Role::Unified, a.addr)]).await;
    let client = tokio::spawn(
        rig.request("/v1/completions", &json!({"prompt": "x"}))
            .send(),
    );
    a.active_is(1).await;
    rig.shutdown.advance();
    rig.shutdown.advance();
    soon("serve to return", rig.task).await.unwrap().unwrap();
    a.active_is(0).await;
    assert!(soon("the client", client).await.unwrap().is_err());
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_node_from_producing() {
    let board = HandoffBoard::default();
    let a = Fake::always(&board, Kv::Nothing, Answer::Flood).await;
    let rig = Rig::start(&board, plan(), &[("a", Role::Unified, a.addr)]).await;
    let body = json!({"prompt": "abc", "stream": true});
    let held = soon("head", rig.request("/v1/completions", &body).send())
        .await
        .unwrap();
    let produced = soon("the flood to stop", async {
        loop {
            let before = flooded();
            tokio::time::sleep(Duration::from_millis(300)).await;
            if flooded() == before {
                break before;
            }
        }
    })
    .await;
    // What is left of it is in the kernel's socket buffers.
    assert!(
        produced < FLOOD / 4,
        "{produced} bytes were taken from the node"
    );
    drop(held);
    a.active_is(0).await;
    rig.finish().await;

    let mut strict = plan();
    strict.chunk_timeout = Duration::from_millis(700);
    let rig = Rig::start(&board, strict, &[("a", Role::Unified, a.addr)]).await;
    let held = soon("head", rig.request("/v1/completions", &body).send())
        .await
        .unwrap();
    // It still holds its connection, and yet its place is taken away.
    rig.idle().await;
    drop(held);
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_at_once_are_answered_once_each() {
    let board = HandoffBoard::default();
    let p0 = Fake::always(&board, Kv::Settle(READY), Answer::Tokens).await;
    let p1 = Fake::always(&board, Kv::Settle(STORED), Answer::Tokens).await;
    let d0 = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let d1 = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [
        ("d0", Role::Decode, d0.addr),
        ("d1", Role::Decode, d1.addr),
        ("p0", Role::Prefill, p0.addr),
        ("p1", Role::Prefill, p1.addr),
    ];
    let mut narrow = plan();
    narrow.max_in_flight = 40;
    let rig = Rig::start(&board, narrow, &nodes).await;
    let got = join_all((0..200).map(|tag| {
        let rig = &rig;
        async move {
            let path = ["/v1/completions", "/v1/chat/completions"][tag % 2];
            let stream = tag % 3 == 0;
            let body = json!({"prompt": "abc", "messages": [], "stream": stream, "tag": tag});
            (tag, stream, rig.send(rig.request(path, &body)).await)
        }
    }))
    .await;
    for (tag, stream, got) in &got {
        match stream {
            true => got.is_whole_stream(&tag.to_string()),
            false => assert_eq!(got.json()["tag"], tag.to_string(), "{}", got.status),
        }
    }
    let tags = |fakes: [&Fake; 2]| -> Vec<u64> {
        let all = fakes.into_iter().flat_map(Fake::seen);
        all.map(|seen| seen.body["tag"].as_u64().unwrap()).collect()
    };
    for fakes in [[&p0, &p1], [&d0, &d1]] {
        let tags = tags(fakes);
        assert_eq!(tags.len(), 200, "each leg is sent once");
        assert_eq!(BTreeSet::from_iter(tags).len(), 200);
    }
    let handoffs: BTreeSet<String> = d0
        .seen()
        .iter()
        .chain(&d1.seen())
        .map(|seen| seen.mark()["handoff"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(handoffs.len(), 200);
    let _: Value = rig.get("/status").await.json();
    rig.finish().await;
}
