//! Who is let in.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::fs;
use std::time::{Duration, Instant};

use pegaflow::fleet::Role;
use pegaflow::handoff::HandoffBoard;
use serde_json::json;
use support_router::*;

#[tokio::test]
async fn only_those_with_a_key_are_let_in_and_keys_can_be_changed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    write_private(&file, "# for the web\nold-secret\n");
    let board = HandoffBoard::default();
    let node = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let mut guarded = plan();
    guarded.api_keys = Some(file.clone());
    let rig = Rig::start(&board, guarded, &[("u", Role::Unified, node.addr)]).await;
    let ask = |path: &str, key: &str| {
        let request = rig.request(path, &json!({"prompt": "a", "input": "a", "tag": 1}));
        rig.send(request.bearer_auth(key))
    };

    for path in [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/nowhere",
    ] {
        let got = ask(path, "new-secret").await;
        assert_eq!(
            (got.status, &got.json()["error"]["code"]),
            (401, &json!("invalid_api_key"))
        );
        assert_eq!(got.headers["www-authenticate"], "Bearer");
    }
    for path in ["/v1/models", "/status"] {
        assert_eq!(rig.get(path).await.status, 401, "{path}");
    }
    for path in ["/health", "/metrics"] {
        assert_eq!(rig.get(path).await.status, 200, "{path}");
    }
    assert!(node.seen().is_empty(), "nobody got to the node");

    assert_eq!(ask("/v1/completions", "old-secret").await.status, 200);
    let anthropic = rig.request("/v1/messages", &json!({"tag": 1}));
    assert_eq!(
        rig.send(anthropic.header("x-api-key", "old-secret"))
            .await
            .status,
        200
    );
    for seen in node.seen() {
        assert!(
            !seen.headers.contains_key("authorization"),
            "our key is no node's"
        );
        assert!(!seen.headers.contains_key("x-api-key"));
    }

    // What cannot be used changes nothing.
    fs::write(&file, "short\n").unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(ask("/v1/completions", "old-secret").await.status, 200);

    let next = folder.path().join("next");
    write_private(&next, "new-secret\n");
    fs::rename(&next, &file).unwrap();
    let end = Instant::now() + HANG;
    while ask("/v1/completions", "new-secret").await.status != 200 {
        assert!(Instant::now() < end, "the new key is never known");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(ask("/v1/completions", "old-secret").await.status, 401);
    rig.shutdown.graceful().cancel();
    soon("serve to return", rig.task).await.unwrap().unwrap();
}
