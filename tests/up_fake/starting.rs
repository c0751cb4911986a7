//! What a person sees of a start that goes well.

use std::fs;

use serde_json::Value;

use crate::helpers::Work;
use crate::support::client;

/// Two nodes, one download, with the user's variables; the nodes inherit them as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_downloaded_once_with_the_users_variables() {
    let mut site = Work::Download.site();
    site.env("HF_TOKEN", "hf_secret");
    site.env("HTTPS_PROXY", "http://127.0.0.1:9");
    let up = site.up_ready().await;
    let downloads = fs::read_to_string(site.path("downloads")).unwrap();
    assert_eq!(downloads, "hf_secret http://127.0.0.1:9\n");
    assert!(up.output().contains("model: looking for owner/name"));
    assert!(!up.output().contains("hf_secret"), "a secret is shown");

    for node in ["prefill", "decode"] {
        let addr = up.node(node).await["addr"].as_str().unwrap().to_owned();
        let text = client::get(&format!("http://{addr}/_fake/env")).await;
        let environment: Value = serde_json::from_str(&text.unwrap()).unwrap();
        assert_eq!(environment["env"]["HF_TOKEN"], "hf_secret");
        assert_eq!(environment["env"]["HTTPS_PROXY"], "http://127.0.0.1:9");
    }
    up.stop().await;
}

/// Each line on the console says whose it is, and each node has a file of its own.
#[tokio::test(flavor = "multi_thread")]
async fn node_logs_are_shown_with_a_prefix_and_kept_in_files() {
    let site = crate::support::Site::new();
    let up = site.up_ready().await;
    let output = up.output();
    for node in ["prefill", "decode"] {
        let shown = |line: &&str| line.contains(node) && line.contains("startup complete");
        assert_eq!(output.lines().filter(shown).count(), 1, "{node}: {output}");
        let log = site
            .path("state/pegaflow")
            .join(format!("test-{}", site.port));
        let log = fs::read_to_string(log.join(format!("logs/{node}.log"))).unwrap();
        assert!(log.contains("startup complete"), "{node}: {log}");
    }
    up.stop().await;
}
