//! Clients that leave: their requests end at the nodes, and the store keeps nothing for them.

use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::support::client::{Answer, completion, generate, metric, streamed};
use crate::support::{self, Pegaflow, Site};
use crate::wait_until;

/// A hand-off that fired for nobody is held for this long, and for as long again.
const HANDOFF_DEADLINE: Duration = Duration::from_secs(4);
/// From the client's leave to a store without anything pending or pinned.
const SETTLED: Duration = Duration::from_secs(15);

fn site() -> Site {
    let site = Site::new();
    let topology = support::topology(site.port);
    let deadline = format!(
        "[kv]\nhandoff_deadline = \"{}s\"",
        HANDOFF_DEADLINE.as_secs()
    );
    // Nothing but the client's leave ends a request.
    let topology = topology.replace(
        "first_byte_timeout = \"10s\"",
        "first_byte_timeout = \"5m\"",
    );
    site.topology(&topology.replace("[kv]", &deadline));
    site
}

fn send(up: &Pegaflow<'_>) -> JoinHandle<Answer> {
    let (url, body) = (up.url(), streamed(completion(5, 200, 1000)));
    tokio::spawn(async move { generate(&url, &body).await })
}

async fn running(up: &Pegaflow<'_>, node: &str) -> bool {
    up.node_metric(node, "vllm:num_requests_running").await > 0.0
}

async fn aborted(up: &Pegaflow<'_>, node: &str) -> f64 {
    up.node_metric(node, "vllm:fake_aborted_total").await
}

async fn in_store(up: &Pegaflow<'_>, what: &str) -> f64 {
    metric(
        &up.get("/metrics").await,
        &format!("pegaflow_engine_{what}"),
    )
}

async fn assert_store_settles(up: &Pegaflow<'_>) {
    let left = Instant::now();
    for what in ["slots_pending", "slots_leased", "handoffs_open"] {
        wait_until(async || in_store(up, what).await == 0.0, what).await;
    }
    assert!(left.elapsed() < SETTLED, "{:?}", left.elapsed());
}

/// Decode has not heard of the request: what prefill computes is of no use to anybody.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_while_prefill_computes_aborts_it() {
    let site = site();
    let up = site.up_ready().await;
    let legs = "vllm:fake_requests_total";
    let before = (
        aborted(&up, "prefill").await,
        up.node_metric("decode", legs).await,
    );
    site.script(r#"{"nodes": {"prefill": {"prefill_ms": 4000}}}"#);
    let request = send(&up);
    wait_until(async || running(&up, "prefill").await, "prefill computes").await;
    wait_until(
        async || in_store(&up, "slots_pending").await > 0.0,
        "chunks are pending",
    )
    .await;
    request.abort();
    wait_until(
        async || !running(&up, "prefill").await,
        "prefill has stopped",
    )
    .await;
    assert_eq!(
        aborted(&up, "prefill").await - before.0,
        1.0,
        "it was not left to finish"
    );
    assert_store_settles(&up).await;
    assert_eq!(up.node_metric("decode", legs).await, before.1);
    up.stop().await;
}

/// Decode writes the answer while prefill's own reply, which nobody waits for, is still to come.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_aborts_both_legs() {
    let site = site();
    let up = site.up_ready().await;
    let before = (aborted(&up, "prefill").await, aborted(&up, "decode").await);
    site.script(r#"{"nodes": {"prefill": {"ttft_ms": 60000}, "decode": {"itl_ms": 50}}}"#);
    let request = send(&up);
    for node in ["decode", "prefill"] {
        wait_until(async || running(&up, node).await, "both legs run").await;
    }
    request.abort();
    for node in ["decode", "prefill"] {
        wait_until(async || !running(&up, node).await, "both legs have stopped").await;
    }
    let after = (aborted(&up, "prefill").await, aborted(&up, "decode").await);
    assert_eq!((after.0 - before.0, after.1 - before.1), (1.0, 1.0));
    assert_store_settles(&up).await;
    up.stop().await;
}
