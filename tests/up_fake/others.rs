//! Nodes with a `url`: others started them.

use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::support::client::{Ending, completion, get};
use crate::support::{self, Site, free_port};
use crate::wait_until;

/// A fake vLLM of somebody else; killed when dropped.
struct Other {
    child: Child,
    port: u16,
}

impl Other {
    fn start(site: &Site, model: &str) -> Self {
        let port = free_port();
        let child = Command::new(site.path("bin/vllm"))
            .args(["serve", model, "--served-model-name", model, "--port"])
            .arg(port.to_string())
            .env("FAKE_VLLM_SCRIPT", site.path("other.json"))
            .env(support::MARK, site.path("elsewhere"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, port }
    }

    async fn figure(&self, name: &str) -> f64 {
        let text = get(&format!("http://127.0.0.1:{}/metrics", self.port))
            .await
            .unwrap();
        support::client::metric(&text, name)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // Its engine and workers end with their sockets, or with the site.
        let tree = support::processes::tree(self.child.id());
        for pid in tree {
            support::send(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_of_others_is_routed_to_and_left_alone() {
    let site = Site::new();
    let other = Other::start(&site, "large");
    let url = format!("http://127.0.0.1:{}", other.port);
    let node = format!("\n[[node]]\nname = \"far\"\nrole = \"unified\"\nurl = \"{url}\"\n");
    site.topology(&(support::topology(site.port) + &node));
    let up = site.up_ready().await;
    let far = up
        .wait_for_node("far", |node| node["phase"] == "ready")
        .await;
    assert_eq!(
        (&far["external"], &far["kv"]),
        (&json!(true), &json!("none"))
    );
    assert_eq!(far["pid"], Value::Null);
    assert!(up.output().contains(&url), "{}", up.output());

    let models: Value = serde_json::from_str(&up.get("/v1/models").await).unwrap();
    let names: Vec<_> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| &model["id"])
        .collect();
    assert_eq!(names, ["large", "tiny"]);
    let mut body = completion(1, 64, 8);
    let ours = up.generate(&body).await;
    assert_eq!(ours.ending, Ending::Complete);
    assert_eq!(other.figure("vllm:fake_requests_total").await, 0.0);
    body["model"] = json!("large");
    assert_eq!(up.generate(&body).await.ending, Ending::Complete);
    assert_eq!(other.figure("vllm:fake_requests_total").await, 1.0);
    body["model"] = json!("huge");
    assert!(
        matches!(up.generate(&body).await.ending, Ending::Refused(why) if why.contains("`large`"))
    );

    let refused = site.command(&["restart", "far"]).output().unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("started by others"));
    up.stop().await;
    // It serves whoever else asks it.
    assert_eq!(other.figure("vllm:fake_requests_total").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_a_host_and_a_key_serves_another_pegaflow() {
    const KEY: &str = "chosen-for-both";
    let (theirs, ours) = (Site::new(), Site::new());
    for site in [&theirs, &ours] {
        let file = site.path("node.key");
        std::fs::write(&file, format!("{KEY}\n")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    let port = free_port();
    let key = format!("node_key_file = {:?}\n", theirs.path("node.key"));
    let near = format!(
        "[[node]]\nname = \"lent\"\nrole = \"unified\"\nhost = \"127.0.0.2\"\nport = {port}\n\
         served_model_name = \"large\"\n"
    );
    let text = support::topology(theirs.port);
    let (settings, _) = text.split_once("[[node]]").unwrap();
    let chosen = format!("[supervisor]\n{key}");
    theirs.topology(&(settings.replacen("[supervisor]\n", &chosen, 1) + &near));
    let lender = theirs.up_ready().await;
    assert_eq!(
        lender.node("lent").await["addr"],
        format!("127.0.0.2:{port}")
    );
    assert_eq!(
        crate::support::client::node_key(&lender.node("lent").await),
        KEY
    );

    let far = format!(
        "\n[[node]]\nname = \"far\"\nrole = \"unified\"\nurl = \"http://127.0.0.2:{port}\"\nkey_file = {:?}\n",
        ours.path("node.key")
    );
    ours.topology(&(support::topology(ours.port) + &far));
    let up = ours.up_ready().await;
    up.wait_for_node("far", |node| node["phase"] == "ready")
        .await;
    let mut body = completion(1, 64, 8);
    body["model"] = json!("large");
    assert_eq!(up.generate(&body).await.ending, Ending::Complete);
    assert_eq!(lender.generate(&body).await.ending, Ending::Complete);
    for shown in [up.output(), lender.output(), up.get("/status").await] {
        assert!(!shown.contains(KEY), "{shown}");
    }
    up.stop().await;
    lender.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_away_holds_up_nobody_and_serves_when_it_comes() {
    let site = Site::new();
    let port = free_port();
    let node = format!(
        "\n[[node]]\nname = \"far\"\nrole = \"unified\"\nurl = \"http://127.0.0.1:{port}\"\n"
    );
    site.topology(&(support::topology(site.port) + &node));
    let up = site.up_ready().await;
    assert_eq!(up.node("far").await["phase"], "down");
    assert_eq!(
        up.generate(&completion(1, 64, 8)).await.ending,
        Ending::Complete
    );
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port))
        .await
        .unwrap();
    let app = axum::Router::new().route("/health", axum::routing::get(async || ()));
    let served = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    wait_until(
        async || up.node("far").await["phase"] == "ready",
        "the node is ready",
    )
    .await;
    served.abort();
    up.stop().await;
}
