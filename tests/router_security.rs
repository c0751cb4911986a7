//! What clients and web pages can reach, and what reaches nodes and logs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use http::Method;
use pegaflow::fleet::{NodeKey, Role};
use pegaflow::handoff::HandoffBoard;
use pegaflow::plan::RouterPlan;
use serde_json::json;
use support_router::*;

/// A prefill and a decode node behind a router.
async fn pair(plan: RouterPlan) -> (Fake, Fake, Rig) {
    let board = HandoffBoard::default();
    let p = Fake::always(&board, Kv::Settle(READY), Answer::Tokens).await;
    let d = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let rig = Rig::start(&board, plan, &nodes).await;
    (p, d, rig)
}

const PAGE: &str = "https://chat.example.com";

fn preflight(rig: &Rig, origin: &str) -> reqwest::RequestBuilder {
    rig.http
        .request(Method::OPTIONS, rig.url("/v1/chat/completions"))
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header(
            "access-control-request-headers",
            "authorization,content-type,x-stainless-os",
        )
}

#[tokio::test]
async fn a_page_that_is_named_may_ask_without_a_key_and_still_needs_one() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    write_private(&keys, "some-secret\n");
    let mut guarded = plan();
    guarded.cors_origins = vec![PAGE.to_owned()];
    guarded.api_keys = Some(keys);
    let (p, d, rig) = pair(guarded).await;

    let got = rig.send(preflight(&rig, PAGE)).await;
    assert_eq!(got.status, 200);
    assert_eq!(got.headers["access-control-allow-origin"], PAGE);
    assert_eq!(
        got.headers["access-control-allow-headers"],
        "authorization,content-type,x-stainless-os"
    );
    assert!(
        got.headers["access-control-allow-methods"]
            .to_str()
            .unwrap()
            .contains("POST")
    );
    assert!(!got.headers.contains_key("access-control-allow-credentials"));

    let other = rig.send(preflight(&rig, "https://evil.example.com")).await;
    assert!(!other.headers.contains_key("access-control-allow-origin"));

    let body = json!({"messages": [{"role": "user", "content": "a"}], "tag": 1});
    let ask = || {
        rig.request("/v1/chat/completions", &body)
            .header("origin", PAGE)
    };
    let refused = rig.send(ask()).await;
    assert_eq!(refused.status, 401);
    // So that the page learns why.
    assert_eq!(refused.headers["access-control-allow-origin"], PAGE);
    assert!(p.seen().is_empty() && d.seen().is_empty());
    let got = rig.send(ask().bearer_auth("some-secret")).await;
    assert_eq!(got.status, 200);
    assert_eq!(got.headers["access-control-allow-origin"], PAGE);
    assert!(
        got.headers["access-control-expose-headers"]
            .to_str()
            .unwrap()
            .contains("x-request-id")
    );
    assert!(!d.seen()[0].headers.contains_key("origin"));
    rig.shutdown.graceful().cancel();
    soon("serve to return", rig.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn no_page_may_unless_it_is_named_and_every_page_where_all_are() {
    let (_p, d, rig) = pair(plan()).await;
    let got = rig.send(preflight(&rig, PAGE)).await;
    assert_eq!(got.status, 405);
    assert!(!got.headers.contains_key("access-control-allow-origin"));
    assert!(d.seen().is_empty());
    rig.finish().await;

    let mut open = plan();
    open.cors_origins = vec!["*".to_owned()];
    let (_p, _d, rig) = pair(open).await;
    let got = rig.send(preflight(&rig, "https://any.example.com")).await;
    assert_eq!(got.headers["access-control-allow-origin"], "*");
    rig.finish().await;
}

#[tokio::test]
async fn figures_can_be_apart_from_clients() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    write_private(&keys, "some-secret\n");
    let mut apart = plan();
    apart.metrics_listen = Some(([127, 0, 0, 1], 0).into());
    apart.api_keys = Some(keys);
    let (p, d, rig) = pair(apart).await;
    let figures = format!("http://{}", rig.figures.unwrap());
    let get = |base: &str, path: &str| {
        let request = rig
            .http
            .get(format!("{base}{path}"))
            .bearer_auth("some-secret");
        rig.send(request)
    };
    for path in ["/metrics", "/status"] {
        assert_eq!(get(&rig.url(""), path).await.status, 404, "{path}");
        let got = rig.send(rig.http.get(format!("{figures}{path}"))).await;
        assert_eq!(got.status, 200, "{path}");
    }
    for path in [
        "/v1/models",
        "/v1/completions",
        "/v1/embeddings",
        "/tokenize",
    ] {
        assert_eq!(get(&figures, path).await.status, 404, "{path}");
    }
    for base in [&figures, &rig.url("")] {
        assert_eq!(get(base, "/health").await.status, 200);
    }
    assert!(p.seen().is_empty() && d.seen().is_empty());
    rig.shutdown.graceful().cancel();
    soon("serve to return", rig.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_key_of_this_run_is_shown_to_its_own_nodes_alone() {
    let board = HandoffBoard::default();
    let p = Fake::always(&board, Kv::Settle(READY), Answer::Tokens).await;
    let d = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let key = NodeKey::random();
    let rig = Rig::keyed(&board, plan(), &nodes, Some(key.clone())).await;
    let shown = format!("Bearer {}", key.reveal());
    let body = json!({"prompt": "a", "max_tokens": 8, "tag": 1});
    let ask = |path: &str| {
        let request = rig
            .request(path, &body)
            .bearer_auth("a-clients")
            .header("x-api-key", "a-clients");
        rig.send(request)
    };
    for path in ["/v1/completions", "/v1/embeddings"] {
        assert_eq!(ask(path).await.status, 200);
    }
    for seen in p.seen().into_iter().chain(d.seen()) {
        assert_eq!(seen.headers["authorization"], shown.as_str());
        assert!(!seen.headers.contains_key("x-api-key"));
    }

    // Unified, too: it takes no part in hand-offs, and is no more ours for that.
    let other = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let rig = Rig::keyed(
        &board,
        plan(),
        &[("u", Role::Unified, other.addr)],
        Some(key),
    )
    .await;
    rig.fleet.update(&"u".into(), |node| node.external = true);
    let request = rig
        .request("/v1/completions", &body)
        .bearer_auth("a-clients");
    assert_eq!(rig.send(request).await.status, 200);
    assert_eq!(other.seen()[0].headers["authorization"], "Bearer a-clients");
    rig.finish().await;
}

#[tokio::test]
async fn what_steers_kv_or_routing_reaches_no_node_by_any_endpoint() {
    let stolen = json!({"pegaflow": {"handoff": "stolen", "leg": "decode"}, "remote_host": "evil"});
    let headers = [
        "x-data-parallel-rank",
        "x-prefiller-host-port",
        "x-kv-transfer-params",
        "x-session-id",
        "x-forwarded-for",
        "forwarded",
        "cookie",
        "proxy-authorization",
        "te",
        "x-pegaflow-node",
    ];
    for path in [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/score",
        "/v1/rerank",
        "/v2/rerank",
        "/v2/embed",
        "/rerank",
        "/score",
        "/pooling",
        "/classify",
        "/tokenize",
        "/detokenize",
    ] {
        let (p, d, rig) = pair(plan()).await;
        let body = json!({
            "model": "tiny", "prompt": "a", "input": "a", "tag": 1,
            "messages": [{"role": "user", "content": "a"}],
            "kv_transfer_params": stolen,
            "vllm_xargs": {"kv_transfer_params": stolen, "kept": 1},
        });
        let request = headers
            .iter()
            .fold(rig.request(path, &body), |request, name| {
                request.header(*name, "steered")
            });
        assert_eq!(rig.send(request).await.status, 200, "{path}");
        let seen: Vec<_> = p.seen().into_iter().chain(d.seen()).collect();
        assert!(!seen.is_empty(), "{path}");
        for seen in seen {
            let told = format!("{:?} {}", seen.headers, seen.body);
            for word in ["stolen", "evil", "steered"] {
                assert!(!told.contains(word), "{path}: {told}");
            }
            assert_eq!(seen.body["vllm_xargs"], json!({"kept": 1}), "{path}");
        }
        rig.finish().await;
    }
}
