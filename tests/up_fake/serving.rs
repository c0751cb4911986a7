//! Requests through healthy nodes: right answers, at once, each its own.

use std::time::Duration;

use serde_json::json;

use crate::support::client::{Ending, chat, completion, generate, metric, streamed};
use crate::support::load::{check, mixed};
use crate::support::{self, HANG, Site};

/// Far below every timeout in the topology: a request that waited for one is seen.
const QUICK: Duration = Duration::from_millis(1500);

#[tokio::test(flavor = "multi_thread")]
async fn answers_through_prefill_and_decode_equal_whole_ones() {
    let site = Site::new();
    let up = site.up_ready().await;
    let before = up
        .node_metric("decode", "vllm:external_prefix_cache_hits_total")
        .await;
    for (seed, length) in [(1, 1), (2, 31), (3, 32), (4, 33), (5, 64), (6, 1280)] {
        let body = completion(seed, length, 32);
        let whole = up.whole("decode", &body).await;
        for body in [body.clone(), streamed(body)] {
            let answer = up.generate(&body).await;
            assert_eq!(
                (answer.ending, answer.text),
                (Ending::Complete, whole.text.clone())
            );
            assert_eq!(answer.tokens, 32);
        }
    }
    let body = chat(7, 100, 16);
    let whole = up.whole("decode", &body).await;
    assert_eq!(up.generate(&body).await.text, whole.text);
    assert_eq!(up.generate(&streamed(body)).await.text, whole.text);
    let loaded = up
        .node_metric("decode", "vllm:external_prefix_cache_hits_total")
        .await
        - before;
    let chat_tokens = 2 * (8 * 100 / 4 / 32 * 32);
    let least = 2 * (32 + 32 + 64 + 1280) + chat_tokens;
    assert!(
        loaded >= f64::from(least),
        "decode loaded {loaded} tokens of at least {least}"
    );
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_hand_off_waits_for_a_timeout() {
    let site = Site::new();
    let up = site.up_ready().await;
    for length in [1, 31, 32, 33, 320] {
        for repetition in 0..3 {
            let answer = up.generate(&completion(length, length, 4)).await;
            assert_eq!(answer.ending, Ending::Complete);
            assert!(
                answer.total < QUICK,
                "{length} tokens, time {repetition}: {answer:?}"
            );
        }
    }
    let metrics = up.get("/metrics").await;
    assert_eq!(
        metric(&metrics, "pegaflow_router_fallbacks_total"),
        0.0,
        "{metrics}"
    );
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_concurrent_requests_each_get_their_own_answer() {
    let site = Site::new();
    site.script(r#"{"itl_ms": 1, "prefill_ms": 5}"#);
    let up = site.up_ready().await;
    let requests = mixed(&up, 50, 16).await;
    let url = up.url();
    let seen = async || {
        let requests = "vllm:fake_requests_total";
        let decode = up.node_metric("decode", requests).await;
        (decode, up.node_metric("prefill", requests).await)
    };
    let before = seen().await;
    let tasks = (0..200).map(|turn| {
        let (expected, url) = (requests[turn % requests.len()].clone(), url.clone());
        tokio::spawn(async move {
            let answer = generate(&url, &expected.body).await;
            (expected, answer)
        })
    });
    let tasks: Vec<_> = tasks.collect();
    let mut answers = Vec::new();
    for task in tasks {
        answers.push(task.await.unwrap());
    }
    assert_eq!(answers.len(), 200);
    check(&answers);
    let after = seen().await;
    let seen = (after.0 - before.0, after.1 - before.1);
    assert_eq!(
        seen,
        (200.0, 200.0),
        "each was prefilled once and decoded once"
    );
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_node_of_tensor_parallel_two_hands_off() {
    let site = Site::new();
    let topology = support::topology(site.port);
    site.topology(&topology.replace("\nrole = ", "\ntensor_parallel = 2\nrole = "));
    let up = site.up_ready().await;
    let body = completion(9, 500, 16);
    let whole = up.whole("decode", &body).await;
    assert_eq!(up.generate(&body).await.text, whole.text);
    assert!(
        up.node_metric("decode", "vllm:external_prefix_cache_hits_total")
            .await
            >= 480.0
    );
    up.stop().await;
}

/// Wrong bytes stored by prefill, and wrong bytes loaded by decode.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_kv_is_never_served() {
    for node in ["prefill", "decode"] {
        let site = Site::new();
        site.script(&json!({"nodes": {node: {"corrupt_kv": true}}}).to_string());
        let mut up = site.up();
        // It gives up by itself, since nothing serves and nothing will.
        let status = up.wait(HANG).await;
        assert_eq!(status.code(), Some(1), "1: failed while running");
        let output = up.output();
        assert!(!output.contains("pegaflow is ready"), "ready with wrong KV");
        assert!(output.contains("give different answers"), "{output}");
        site.assert_nothing_left(Duration::from_secs(1)).await;
    }
}
