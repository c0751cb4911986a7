//! What a person sees of a start that goes well.

use std::fs;
use std::os::unix::fs::DirBuilderExt;

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

/// Every write to a node's log fails: lines are lost, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_log_disk_kills_nothing() {
    let site = crate::support::Site::new();
    let logs = site
        .path("state/pegaflow")
        .join(format!("test-{}", site.port))
        .join("logs");
    let mut private = fs::DirBuilder::new();
    private.recursive(true).mode(0o700).create(&logs).unwrap();
    for node in ["prefill", "decode"] {
        std::os::unix::fs::symlink("/dev/full", logs.join(format!("{node}.log"))).unwrap();
    }
    let up = site.up_ready().await;
    let lost = up.output().matches("lines are lost").count();
    assert_eq!(lost, 2, "said once for each node: {}", up.output());
    let body = crate::support::client::completion(1, 100, 8);
    assert_eq!(
        up.generate(&body).await.ending,
        crate::support::client::Ending::Complete
    );
    for node in ["prefill", "decode"] {
        assert_eq!(up.node(node).await["restarts"], 0);
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

/// Keys written on the command line count, and what a variable gave to a node is shown nowhere.
#[tokio::test(flavor = "multi_thread")]
async fn overrides_are_used_and_secrets_stay_out_of_logs() {
    let mut site = crate::support::Site::new();
    site.env("SITE_TOKEN", "hf_0123456789");
    site.script(r#"{"fatal_start": "the token hf_0123456789 is refused"}"#);
    let set = [
        "name=other",
        "supervisor.crash_limit=1",
        "node.prefill.env.TOKEN=${SITE_TOKEN}",
    ];
    let mut args = vec!["up", "topology.toml"];
    args.extend(set.iter().flat_map(|set| ["--set", *set]));
    let mut command = tokio::process::Command::from(site.command(&args));
    let ended = command.kill_on_drop(true).output();
    let ended = tokio::time::timeout(crate::support::HANG, ended).await;
    let ended = ended.expect("up ends").unwrap();
    assert_eq!(ended.status.code(), Some(1));
    let output = String::from_utf8_lossy(&ended.stderr);
    assert!(output.contains("the token *** is refused"), "{output}");
    assert!(!output.contains("hf_0123456789"), "{output}");
    for node in ["prefill", "decode"] {
        let log = site.path(&format!("state/pegaflow/other/logs/{node}.log"));
        let log = fs::read_to_string(log).unwrap();
        assert!(log.contains("the token *** is refused"), "{log}");
        assert!(!log.contains("hf_0123456789"), "{log}");
    }
}

/// A wrong override is a wrong topology, and says which argument it was.
#[tokio::test]
async fn a_wrong_override_ends_with_the_argument_in_the_message() {
    let site = crate::support::Site::new();
    let set = "node.reader.count=2";
    for command in [&["up"][..], &["prepare"], &["kv", "stats"]] {
        let args = [command, &["topology.toml", "--set", set]].concat();
        let ended = site.command(&args).output().unwrap();
        assert_eq!(ended.status.code(), Some(3), "{args:?}");
        let output = String::from_utf8_lossy(&ended.stderr);
        assert!(
            output.contains("--set 'node.reader.count=2' column 6: node"),
            "{output}"
        );
        assert!(output.contains("[0] (prefill), [1] (decode)"), "{output}");
    }
}
