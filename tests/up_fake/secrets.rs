//! The key that nodes want to be shown.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::Site;
use crate::support::client::{Ending, completion, get, node_key};

fn texts(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            texts(&path, found);
        } else if kind.is_file() && entry.metadata().unwrap().len() < 32 << 20 {
            let text = String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
            found.push((path.display().to_string(), text));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_uses_a_node_past_the_router_and_the_key_is_shown_nowhere() {
    let mut site = Site::new();
    site.env("PEGAFLOW_LOG", "trace");
    let up = site.up_ready().await;
    let view = up.node("decode").await;
    let key = node_key(&view);
    assert!(key.len() >= 32, "{}", key.len());
    assert_eq!(key, node_key(&up.node("prefill").await));

    let base = format!("http://{}", view["addr"].as_str().unwrap());
    let http = reqwest::Client::new();
    for path in [
        "/v1/models",
        "/v1/completions",
        "/v2/rerank",
        "/inference/v1/generate",
    ] {
        for shown in [None, Some("wrong")] {
            let mut request = http.post(format!("{base}{path}")).body("{}");
            if let Some(shown) = shown {
                request = request.bearer_auth(shown);
            }
            assert_eq!(request.send().await.unwrap().status(), 401, "{path}");
        }
    }
    // What the supervisor looks at is open.
    for path in ["/health", "/metrics"] {
        assert!(
            !get(&format!("{base}{path}"))
                .await
                .unwrap()
                .contains("Unauthorized")
        );
    }
    let body = completion(1, 100, 8);
    let whole = up.whole("decode", &body).await;
    assert_eq!(whole.ending, Ending::Complete);
    // A client's own key is nothing to a node.
    let request = http
        .post(format!("{}/v1/completions", up.url()))
        .bearer_auth("a-client's")
        .body(body.to_string());
    let reply = request.send().await.unwrap();
    assert_eq!(reply.status(), 200);
    let reply: Value = serde_json::from_str(&reply.text().await.unwrap()).unwrap();
    assert_eq!(reply["choices"][0]["text"], whole.text);

    let mut shown = vec![("what it wrote".to_owned(), up.output())];
    for path in ["/status", "/metrics", "/health"] {
        shown.push((path.to_owned(), up.get(path).await));
    }
    for command in [
        &["status", "--json"][..],
        &["plan", "topology.toml"],
        &["plan", "topology.toml", "--json"],
        &["logs", "--lines", "10000"],
    ] {
        let output = site.command(command).output().unwrap();
        assert!(output.status.success(), "{command:?}: {output:?}");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8(text).unwrap();
        assert!(!text.is_empty(), "{command:?}");
        shown.push((format!("{command:?}"), text));
    }
    for pid in site.processes() {
        let argv = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        shown.push((
            format!("arguments of {pid}"),
            String::from_utf8_lossy(&argv).into_owned(),
        ));
    }
    for folder in ["run", "state", "cache"] {
        texts(&site.path(folder), &mut shown);
    }
    assert!(
        shown.iter().any(|(place, _)| place.ends_with(".log")),
        "no node's log was read"
    );
    for (place, text) in &shown {
        assert!(!text.contains(&key), "{place} shows it");
    }
    up.stop().await;

    let up = site.up_ready().await;
    assert_ne!(
        key,
        node_key(&up.node("decode").await),
        "each run has its own"
    );
    up.stop().await;
}
