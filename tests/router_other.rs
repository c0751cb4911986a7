//! What the router passes on to one node: every endpoint of vLLM but completions and chat.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use pegaflow::fleet::Role;
use pegaflow::handoff::HandoffBoard;
use serde_json::{Value, json};
use support_router::*;

/// A prefill and a decode node that answer `answer`.
async fn pair(answer: Answer) -> (Fake, Fake, Rig) {
    let board = HandoffBoard::default();
    let p = Fake::always(&board, Kv::Settle(READY), answer.clone()).await;
    let d = Fake::always(&board, Kv::Nothing, answer).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let rig = Rig::start(&board, plan(), &nodes).await;
    (p, d, rig)
}

#[tokio::test]
async fn other_endpoints_go_to_one_node_as_they_are() {
    let (p, d, rig) = pair(Answer::Tokens).await;
    let body = json!({"model": "tiny", "input": "abc", "tag": 3,
        "kv_transfer_params": {"pegaflow": {"handoff": "stolen"}}});
    let request = rig
        .request("/v1/embeddings?dimensions=8", &body)
        .header("x-request-id", "mine")
        .header("x-api-key", "secret")
        .header("anthropic-version", "2023-06-01");
    let got = rig.send(request).await;
    assert_eq!((got.status, &got.json()["tag"]), (200, &json!("3")));
    assert_eq!(got.headers["x-request-id"], "mine");

    assert!(p.seen().is_empty(), "nothing of it is prefill's");
    let seen = &d.seen()[0];
    assert_eq!(
        (seen.method.as_str(), seen.path.as_str()),
        ("POST", "/v1/embeddings")
    );
    assert_eq!(seen.query.as_deref(), Some("dimensions=8"));
    assert_eq!(seen.headers["x-request-id"], "mine-d");
    assert_eq!(seen.headers["x-api-key"], "secret");
    assert_eq!(seen.headers["anthropic-version"], "2023-06-01");
    assert_eq!(
        seen.body,
        json!({"model": "tiny", "input": "abc", "tag": 3})
    );
    let counted = "pegaflow_router_requests_total{endpoint=\"other\",outcome=\"ok\",\
                   path=\"whole\",reason=\"other_endpoint\"}";
    assert_eq!(rig.sample(counted).await, 1.0);
    rig.finish().await;
}

#[tokio::test]
async fn a_body_that_is_not_json_and_a_request_without_one() {
    let (_p, d, rig) = pair(Answer::Tokens).await;
    let form = rig
        .http
        .post(rig.url("/v1/audio/transcriptions"))
        .header("content-type", "multipart/form-data; boundary=x")
        .body("--x\r\ncontent-disposition: form-data; name=\"a\"\r\n\r\n\u{1}\r\n--x--\r\n");
    assert_eq!(rig.send(form).await.status, 200);
    assert_eq!(rig.get("/v1/responses/resp_1").await.status, 200);
    let seen = d.seen();
    assert_eq!(
        seen[0].headers["content-type"],
        "multipart/form-data; boundary=x"
    );
    assert_eq!(
        (seen[1].method.as_str(), seen[1].path.as_str()),
        ("GET", "/v1/responses/resp_1")
    );
    assert!(!seen[1].headers.contains_key("content-type"));
    rig.finish().await;
}

#[tokio::test]
async fn a_stream_of_named_events_ends_as_its_body_does() {
    let (_p, _d, rig) = pair(Answer::EndAfter(3)).await;
    let body = json!({"input": "abc", "stream": true, "tag": 1});
    let got = rig.send(rig.request("/v1/responses", &body)).await;
    assert_eq!(got.status, 200);
    assert_eq!(got.text.matches("\"token\":").count(), 3);
    assert!(!got.text.contains("error"), "{}", got.text);
    let ok = "pegaflow_router_requests_total{endpoint=\"other\",outcome=\"ok\"";
    assert_eq!(rig.sample(ok).await, 1.0);
    rig.finish().await;
}

#[tokio::test]
async fn a_broken_stream_of_named_events_ends_with_a_named_error() {
    let (_p, _d, rig) = pair(Answer::BreakAfter(2)).await;
    let body = json!({"messages": [], "max_tokens": 9, "stream": true, "tag": 1});
    let got = rig.send(rig.request("/v1/messages", &body)).await;
    assert_eq!(got.text.matches("\"token\":").count(), 2);
    let last = got.text.trim_end().rsplit("\n\n").next().unwrap();
    let json = last.strip_prefix("event: error\ndata: ").unwrap();
    let event: Value = serde_json::from_str(json).unwrap();
    assert_eq!(event["type"], "error");
    assert_eq!(event["code"], "transport");
    assert_eq!(event["error"]["code"], "transport");
    rig.finish().await;
}

#[tokio::test]
async fn a_node_that_fails_is_replaced() {
    let board = HandoffBoard::default();
    let bad = Fake::always(&board, Kv::Nothing, Answer::Reset).await;
    let good = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [
        ("bad", Role::Unified, bad.addr),
        ("good", Role::Decode, good.addr),
    ];
    let rig = Rig::start(&board, plan(), &nodes).await;
    let got = rig
        .send(rig.request("/tokenize", &json!({"prompt": "abc"})))
        .await;
    assert_eq!(got.status, 200);
    assert!(!bad.seen().is_empty());
    assert_eq!(good.seen().len(), 1);
    rig.finish().await;
}

#[tokio::test]
async fn what_is_not_for_clients_reaches_no_node() {
    let (p, d, rig) = pair(Answer::Tokens).await;
    for path in [
        "/sleep",
        "/v1/load_lora_adapter",
        "/v1/%2e%2e/sleep",
        "/collective_rpc",
    ] {
        let got = rig.send(rig.request(path, &json!({}))).await;
        assert_eq!(
            (got.status, &got.json()["error"]["code"]),
            (404, &json!("not_found")),
            "{path}"
        );
    }
    let upgrade = rig
        .http
        .get(rig.url("/v1/anything"))
        .header("connection", "Upgrade")
        .header("upgrade", "websocket");
    for request in [upgrade, rig.http.get(rig.url("/v1/realtime"))] {
        let got = rig.send(request).await;
        assert_eq!(
            (got.status, &got.json()["error"]["code"]),
            (501, &json!("websocket"))
        );
    }
    assert!(p.seen().is_empty() && d.seen().is_empty());
    rig.finish().await;
}

#[tokio::test]
async fn a_model_is_looked_up_here() {
    let (_p, d, rig) = pair(Answer::Tokens).await;
    assert_eq!(rig.get("/v1/models/tiny").await.json()["id"], "tiny");
    let got = rig.get("/v1/models/org/large").await;
    assert_eq!(
        (got.status, &got.json()["error"]["code"]),
        (404, &json!("model_not_found"))
    );
    assert!(
        got.json()["error"]["message"]
            .as_str()
            .unwrap()
            .contains("`tiny`")
    );
    assert!(d.seen().is_empty());
    rig.finish().await;
}
