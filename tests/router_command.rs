//! `pegaflow router`, as a process in front of nodes that others started.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::process::{Output, Stdio};

use nix::sys::signal::Signal;
use pegaflow::handoff::HandoffBoard;
use serde_json::{Value, json};
use support_router::command::{RouterProcess, router_command};
use support_router::*;

fn stream(tag: u32) -> Value {
    json!({"model": "tiny", "prompt": "abc", "max_tokens": 8, "stream": true, "tag": tag})
}

fn url(node: &Fake) -> String {
    format!("http://{}", node.addr)
}

async fn node(answer: Answer) -> Fake {
    Fake::always(&HandoffBoard::default(), Kv::Nothing, answer).await
}

#[tokio::test]
async fn a_prompt_goes_to_prefill_and_with_its_reply_to_decode() {
    const REPLY: &str = r#"{"choices":[],"kv_transfer_params":{"remote_block_ids":[7]}}"#;
    let (p, d) = (
        node(Answer::Status(200, REPLY)).await,
        node(Answer::Tokens).await,
    );
    let flags = ["--prefill", &url(&p), "--decode", &url(&d)];
    let router = RouterProcess::started(&flags, &["prefill", "decode"]).await;
    router.complete(&stream(1)).await.is_whole_stream("1");
    let chat = json!({"model": "tiny", "messages": [{"role": "user", "content": "a"}], "tag": 2});
    let got = router
        .send(router.post("/v1/chat/completions", &chat))
        .await;
    assert_eq!((got.status, &got.json()["tag"]), (200, &json!("2")));

    let (on_p, on_d) = (p.seen(), d.seen());
    assert_eq!((on_p.len(), on_d.len()), (2, 2));
    assert_eq!(
        (&on_p[0].body["max_tokens"], &on_p[0].body["stream"]),
        (&json!(1), &json!(false))
    );
    assert_eq!(
        (&on_d[0].body["max_tokens"], &on_d[0].body["stream"]),
        (&json!(8), &json!(true))
    );
    let params = &on_d[0].body["kv_transfer_params"];
    assert_eq!(params["remote_block_ids"], json!([7]));
    assert_eq!(on_d[0].mark()["handoff"], on_p[0].mark()["handoff"]);
    assert_eq!(on_d[1].path, "/v1/chat/completions");

    assert_eq!(
        router.get("/v1/models").await.json()["data"][0]["id"],
        "tiny"
    );
    assert_eq!(router.get("/health").await.json()["status"], "ok");
    assert_eq!(router.node("prefill").await["kv"], "assumed");
    assert_eq!(
        router
            .sample("pegaflow_router_handoff_wait_seconds_count")
            .await,
        2.0
    );
    let metrics = router.get("/metrics").await.text;
    let mut fallbacks = metrics
        .lines()
        .filter(|line| line.starts_with("pegaflow_router_fallbacks_total{"));
    assert!(fallbacks.all(|line| line.ends_with(" 0")), "{metrics}");
    router.stop().await;
}

#[tokio::test]
async fn unified_nodes_answer_alone_and_share_the_load() {
    let (a, b) = (node(Answer::Tokens).await, node(Answer::Tokens).await);
    let flags = ["--unified", &url(&a), &url(&b)];
    let router = RouterProcess::started(&flags, &["unified-0", "unified-1"]).await;
    for tag in 0..4 {
        router
            .complete(&stream(tag))
            .await
            .is_whole_stream(&tag.to_string());
    }
    assert_eq!((a.seen().len(), b.seen().len()), (2, 2));
    assert!(a.seen()[0].body.get("kv_transfer_params").is_none());
    router.stop().await;
}

#[tokio::test]
async fn a_prefill_node_that_fails_costs_a_retry_and_the_last_one_a_recomputation() {
    for bad in [Answer::Reset, Answer::Status(500, "boom")] {
        let (bad, good) = (node(bad).await, node(Answer::Tokens).await);
        let d = node(Answer::Tokens).await;
        let flags = ["--prefill", &url(&bad), &url(&good), "--decode", &url(&d)];
        let names = ["prefill-0", "prefill-1", "decode"];
        let router = RouterProcess::started(&flags, &names).await;
        for tag in 0..4 {
            router
                .complete(&stream(tag))
                .await
                .is_whole_stream(&tag.to_string());
        }
        assert!(!bad.seen().is_empty(), "ties go round");
        assert_eq!((good.seen().len(), d.seen().len()), (4, 4));
        drop(good);
        router.phase_is("prefill-1", "down").await;
        router.complete(&stream(9)).await.is_whole_stream("9");
        assert!(d.seen()[4].body.get("kv_transfer_params").is_none());
        router.stop().await;
    }
}

#[tokio::test]
async fn a_node_that_is_gone_is_down_and_serves_again_when_it_is_back() {
    let (p, d) = (node(Answer::Tokens).await, node(Answer::Tokens).await);
    let gone = node(Answer::Tokens).await;
    let flags = ["--prefill", &url(&p), "--decode", &url(&d), &url(&gone)];
    let names = ["prefill", "decode-0", "decode-1"];
    let router = RouterProcess::started(&flags, &names).await;
    let addr = gone.addr;
    drop(gone);
    // Before a look finds it down as well as after: no client notices.
    for tag in 0..20 {
        router
            .complete(&stream(tag))
            .await
            .is_whole_stream(&tag.to_string());
    }
    router.phase_is("decode-1", "down").await;
    let health = router.get("/health").await;
    assert_eq!(
        (health.status, &health.json()["status"]),
        (200, &json!("degraded"))
    );
    let node = router.node("decode-1").await;
    assert!(
        node["reason"].as_str().unwrap().contains("refused"),
        "{node}"
    );

    let back = Fake::at(addr, &HandoffBoard::default(), |_, _| {
        (Kv::Nothing, Answer::Tokens)
    })
    .await;
    router.phase_is("decode-1", "ready").await;
    assert_eq!(router.node("decode-1").await["incarnation"], 2);
    for tag in 0..4 {
        router
            .complete(&stream(tag))
            .await
            .is_whole_stream(&tag.to_string());
    }
    assert!(!back.seen().is_empty());
    router.stop().await;
}

#[tokio::test]
async fn requests_wait_for_the_first_node_and_for_a_while_only() {
    let addr = refusing().await;
    let flags = [
        "--unified",
        &format!("http://{addr}"),
        "--queue-timeout",
        "300ms",
    ];
    let router = RouterProcess::start(&flags).await;
    router.phase_is("unified", "down").await;
    let health = router.get("/health").await;
    assert_eq!(health.status, 503);
    assert!(health.headers.contains_key("retry-after"));
    let got = router.complete(&stream(1)).await;
    assert_eq!(
        (got.status, &got.json()["error"]["code"]),
        (503, &json!("no_ready_node"))
    );
    assert!(got.text.contains("unified: down"), "{}", got.text);
    router.stop().await;

    let flags = ["--unified", &format!("http://{addr}")];
    let router = RouterProcess::start(&flags).await;
    let body = stream(2);
    let later = async {
        soon("a queued request", async {
            while router.sample("pegaflow_router_queued").await == 0.0 {}
        })
        .await;
        Fake::at(addr, &HandoffBoard::default(), |_, _| {
            (Kv::Nothing, Answer::Tokens)
        })
        .await
    };
    let (got, _node) = tokio::join!(router.complete(&body), later);
    got.is_whole_stream("2");
    router.stop().await;
}

#[tokio::test]
async fn a_signal_lets_what_runs_finish_and_a_second_one_does_not() {
    // Prefill never answers: the request is under way until decode gets it anyway.
    let (p, d) = (node(Answer::Hang).await, node(Answer::Tokens).await);
    let (to_p, to_d) = (url(&p), url(&d));
    let flags = [
        "--prefill",
        &to_p,
        "--decode",
        &to_d,
        "--handoff-timeout",
        "2s",
    ];
    let mut router = RouterProcess::started(&flags, &["prefill", "decode"]).await;
    let body = stream(1);
    let signal = async {
        p.active_is(1).await;
        router.signal(Signal::SIGTERM);
    };
    let (got, ()) = tokio::join!(router.complete(&body), signal);
    got.is_whole_stream("1");
    assert_eq!(router.ended().await, Some(0));

    let flags = ["--prefill", &to_p, "--decode", &to_d];
    let mut router = RouterProcess::started(&flags, &["prefill", "decode"]).await;
    let request = tokio::spawn(router.post("/v1/completions", &body).send());
    p.active_is(1).await;
    router.signal(Signal::SIGINT);
    soon("the listener to close", async {
        while router.http.get(&router.url).send().await.is_ok() {}
    })
    .await;
    assert!(!request.is_finished());
    router.signal(Signal::SIGINT);
    assert_eq!(router.ended().await, Some(0));
    assert!(soon("the request's end", request).await.unwrap().is_err());
    p.active_is(0).await;
}

fn refused(flags: &[&str]) -> Output {
    let (mut command, _) = router_command(flags);
    command.stderr(Stdio::piped()).output().unwrap()
}

#[tokio::test]
async fn wrong_flags_and_a_taken_port_end_it_at_once() {
    for flags in [
        &[][..],
        &["--prefill", "http://127.0.0.1:1"],
        &["--unified", "ftp://127.0.0.1:1"],
        &["--unified", "127.0.0.1:1"],
        &["--unified", "http://127.0.0.1:1", "http://127.0.0.1:1"],
    ] {
        let output = refused(flags);
        assert_eq!(output.status.code(), Some(2), "{flags:?}");
        assert!(!output.stderr.is_empty());
    }
    let taken = node(Answer::Tokens).await;
    let port = taken.addr.port().to_string();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_pegaflow"));
    command.args(["router", "--unified", "http://127.0.0.1:1", "--port", &port]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains(&port), "{text}");
}
