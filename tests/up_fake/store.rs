//! `pegaflow kv`: the store as whoever operates it sees it.

use pegaflow::host::HostSnapshot;
use serde_json::{Value, json};

use crate::support::client::{completion, is_proven};
use crate::support::{HANG, Site, topology};

fn kv(site: &Site, action: &str) -> Value {
    let output = site
        .command(&["kv", action, "topology.toml"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{action}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_can_be_looked_at_and_emptied() {
    let site = Site::new();
    let up = site.up_ready().await;
    up.generate(&completion(1, 320, 4)).await;
    let stats = kv(&site, "stats");
    assert!(stats["ready"].as_u64().unwrap() >= 10, "{stats}");

    let namespaces = kv(&site, "namespaces");
    assert_eq!(namespaces.as_array().unwrap().len(), 1, "{namespaces}");
    // A scheduler and a worker of prefill and of decode.
    let sessions = kv(&site, "inspect")["sessions"].clone();
    let mut nodes: Vec<_> = sessions.as_array().unwrap().iter().collect();
    nodes.retain(|session| session["node"] == "prefill");
    assert_eq!(nodes.len(), 2, "{sessions}");

    crate::wait_until(
        async || kv(&site, "flush")["held"] == json!(0) && kv(&site, "stats")["ready"] == json!(0),
        "the store is empty",
    )
    .await;
    // And goes on.
    up.generate(&completion(1, 320, 4)).await;
    assert!(kv(&site, "stats")["ready"].as_u64().unwrap() >= 10);
    up.stop().await;
}

/// Two pairs whose KV has another shape, behind one endpoint.
#[tokio::test(flavor = "multi_thread")]
async fn each_pool_hands_off_within_itself() {
    let site = Site::new();
    let text = topology(site.port);
    let (head, _) = text.split_once("[[node]]").unwrap();
    let nodes = [("a", 1), ("b", 2)].map(|(pool, ranks)| {
        let node = |role: &str| {
            format!(
                "[[node]]\nname = \"{role}-{pool}\"\nrole = \"{role}\"\npool = \"{pool}\"\n\
                 tensor_parallel = {ranks}\n"
            )
        };
        node("prefill") + &node("decode")
    });
    site.topology(&(head.to_owned() + &nodes.concat()));
    let up = site.up_ready().await;
    for node in ["prefill-a", "decode-a", "prefill-b", "decode-b"] {
        up.wait_for_node(node, is_proven).await;
    }
    let loaded = async |node: &str| {
        let name = "vllm:external_prefix_cache_hits_total";
        up.node_metric(node, name).await
    };
    let before = [loaded("decode-a").await, loaded("decode-b").await];
    for seed in 0..6 {
        let body = completion(seed, 320, 16);
        let whole = up.whole("decode-a", &body).await;
        assert_eq!(up.generate(&body).await.text, whole.text);
    }
    let after = [loaded("decode-a").await, loaded("decode-b").await];
    // Requests in turn: three to each pair, and each found its own pool's KV.
    for (before, after) in before.into_iter().zip(after) {
        assert!(after - before >= 3.0 * 320.0 - 32.0, "{before} {after}");
    }
    let stats = kv(&site, "stats");
    for pool in ["a", "b"] {
        assert!(
            stats["pools"][pool]["used"].as_u64().unwrap() > 0,
            "{stats}"
        );
    }
    up.stop().await;
}

/// Where 2 MiB pages are set aside (CI does that), the arena is made of them and hand-offs go through
/// it; elsewhere `up` says which command sets them aside.
#[tokio::test(flavor = "multi_thread")]
async fn huge_pages_are_used_or_their_absence_is_explained() {
    let site = Site::new();
    let text = topology(site.port).replace("\"64MiB\"", "\"16MiB\"\nhugepages = \"on\"");
    site.topology(&text);
    if HostSnapshot::take().unwrap().memory.hugepages.free < 8 {
        let output = site.command(&["up", "topology.toml"]).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(4), "{errors}");
        assert!(
            errors.contains("kv.hugepages") && errors.contains("nr_hugepages"),
            "{errors}"
        );
        return;
    }
    let up = site.up_ready().await;
    for seed in 0..3 {
        let body = completion(seed, 640, 8);
        let whole = up.whole("decode", &body).await;
        assert_eq!(up.generate(&body).await.text, whole.text);
    }
    assert!(kv(&site, "stats")["loaded_chunks"].as_u64().unwrap() >= 60);
    let taken = HostSnapshot::take().unwrap().memory.hugepages;
    assert!(
        taken.free + 8 <= taken.total,
        "the arena is not in huge pages: {taken:?}"
    );
    up.stop().await;
    let given_back = HostSnapshot::take().unwrap().memory.hugepages;
    assert!(given_back.free >= taken.free + 8, "{given_back:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_does_not_run_is_said_so() {
    let site = Site::new();
    let output = tokio::time::timeout(
        HANG,
        tokio::process::Command::from(site.command(&["kv", "stats", "nobody"])).output(),
    );
    let output = output.await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(6), "6: not running");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(errors.contains("`nobody` is not running"), "{errors}");
}
