//! The commands that talk to a running `up`: what operators and scripts see of them.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::client::{completion, generate, is_proven, streamed};
use crate::support::{self, HANG, Pegaflow, Site, send};
use crate::wait_until;

async fn run(site: &Site, args: &[&str]) -> Output {
    let command = tokio::process::Command::from(site.command(args)).output();
    let output = tokio::time::timeout(HANG, command).await;
    output.unwrap_or_else(|_| panic!("{args:?} hangs")).unwrap()
}

/// Standard output of a command that succeeds.
pub async fn told(site: &Site, args: &[&str]) -> String {
    let output = run(site, args).await;
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a command that succeeds says beside its result.
pub async fn said(site: &Site, args: &[&str]) -> String {
    let output = run(site, args).await;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {errors}");
    errors
}

/// The message of a command that fails with `code`.
pub async fn refused(site: &Site, args: &[&str], code: i32) -> String {
    let output = run(site, args).await;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
    errors
}

pub async fn status(site: &Site) -> Value {
    serde_json::from_str(&told(site, &["status", "--json"]).await).unwrap()
}

pub fn node<'v>(status: &'v Value, name: &str) -> &'v Value {
    let nodes = status["nodes"].as_array().unwrap();
    nodes.iter().find(|node| node["name"] == name).unwrap()
}

async fn pid_of(up: &Pegaflow<'_>, node: &str) -> u32 {
    u32::try_from(up.node(node).await["pid"].as_u64().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn status_tells_the_nodes_and_why_one_died() {
    let site = Site::new();
    site.script(r#"{"itl_ms": 50}"#);
    let up = site.up_ready().await;
    let name = format!("test-{}", site.port);
    let all = status(&site).await;
    assert_eq!(all["name"], json!(name));
    assert_eq!(all["state"], "ready");
    assert_eq!(all["pid"], json!(up.pid()));
    assert_eq!(all["url"], json!(up.url()));
    let decode = node(&all, "decode");
    for (key, value) in [
        ("phase", json!("ready")),
        ("role", json!("decode")),
        ("kv", json!("proven")),
        ("restarts", json!(0)),
        ("in_flight", json!(0)),
        ("reason", json!(null)),
        ("address", up.node("decode").await["addr"].clone()),
    ] {
        assert_eq!(decode[key], value, "{key}");
    }

    let (url, body) = (up.url(), streamed(completion(1, 64, 60)));
    let request = tokio::spawn(async move { generate(&url, &body).await });
    wait_until(
        async || node(&status(&site).await, "decode")["in_flight"] == 1,
        "the request is seen",
    )
    .await;
    request.await.unwrap();

    send(pid_of(&up, "decode").await, Signal::SIGKILL);
    let back = |view: &Value| is_proven(view) && view["restarts"] == 1;
    up.wait_for_node("decode", back).await;
    let after = status(&site).await;
    let decode = node(&after, "decode");
    assert_eq!(decode["restarts"], 1);
    let reason = decode["reason"].as_str().unwrap();
    assert!(reason.contains("SIGKILL"), "{reason}");

    // By name, by file, and as a table without colours.
    for which in [name.as_str(), "topology.toml"] {
        let table = told(&site, &["status", which]).await;
        assert!(!table.contains('\u{1b}'), "{table}");
        for text in ["NODE", "prefill", "decode", reason] {
            assert!(table.contains(text), "{text:?} in {table}");
        }
    }
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn status_watch_goes_on_until_the_end() {
    let site = Site::new();
    let up = site.up_ready().await;
    let args = ["status", "--watch", "--json", "--interval", "50ms"];
    let mut watch = site.command(&args).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    for _ in 0..3 {
        let look: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(look["state"], "ready");
    }
    up.stop().await;
    let status = tokio::task::spawn_blocking(move || watch.wait());
    let status = tokio::time::timeout(HANG, status).await.unwrap().unwrap();
    assert_eq!(status.unwrap().code(), Some(6), "6: it runs no more");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_instance_the_commands_say_so() {
    let site = Site::new();
    for args in [
        &["status"][..],
        &["status", "nobody"],
        &["status", "--name", "nobody"],
        &["stop", "topology.toml"],
        &["down"],
        &["logs", "--name", "nobody"],
        &["kv", "stats", "nobody"],
    ] {
        refused(&site, args, 6).await;
    }
    refused(&site, &["status", "a/b"], 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_several_instances_one_has_to_be_named() {
    let site = Site::new();
    let first = site.up_ready().await;
    let name = format!("test-{}", site.port);
    let port = support::free_port();
    site.topology(&support::topology(port));
    let mut second = site.up();
    second.wait_for_log("pegaflow is ready").await;
    let message = refused(&site, &["status", "--json"], 2).await;
    assert!(message.contains(&name), "{message}");
    assert!(message.contains(&format!("test-{port}")), "{message}");
    let mine = told(&site, &["status", "--json", "--name", &name]).await;
    assert_eq!(
        serde_json::from_str::<Value>(&mine).unwrap()["pid"],
        json!(first.pid())
    );

    told(&site, &["down", &format!("test-{port}")]).await;
    assert_eq!(second.wait(HANG).await.code(), Some(0));
    assert_eq!(status(&site).await["name"], json!(name));
    first.stop().await;
}

/// A `pegaflow logs -f` and its lines; killed when dropped.
struct Follower {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Follower {
    fn start(site: &Site, args: &[&str]) -> Self {
        let mut command = site.command(&["logs", "--follow"]);
        let mut child = command.args(args).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Reads on to a line that contains all of `texts`.
    async fn until(mut self, texts: &[&str]) -> Self {
        let texts: Vec<String> = texts.iter().map(ToString::to_string).collect();
        let reading = tokio::task::spawn_blocking(move || {
            loop {
                let line = self.lines.next().expect("the log ended").unwrap();
                if texts.iter().all(|text| line.contains(text)) {
                    return self;
                }
            }
        });
        tokio::time::timeout(HANG, reading).await.unwrap().unwrap()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const FIRST_LINE: &str = "vLLM API server version";

#[tokio::test(flavor = "multi_thread")]
async fn logs_follow_what_is_written_to_the_end() {
    let site = Site::new();
    let up = site.up_ready().await;
    let of_one = Follower::start(&site, &["decode"])
        .until(&[FIRST_LINE])
        .await;
    let of_all = Follower::start(&site, &[]);
    let of_all = of_all.until(&["[decode] ", FIRST_LINE]).await;
    let of_all = of_all.until(&["[prefill] ", FIRST_LINE]).await;
    // What is new: the first line of its next life.
    send(pid_of(&up, "decode").await, Signal::SIGKILL);
    let of_one = of_one.until(&[FIRST_LINE]).await;
    let mut of_all = of_all.until(&["[decode] ", FIRST_LINE]).await;
    up.wait_for_node("decode", is_proven).await;

    let last = told(&site, &["logs", "decode", "-n", "1"]).await;
    assert_eq!(last.lines().count(), 1, "{last}");
    let message = refused(&site, &["logs", "nobody"], 1).await;
    assert!(message.contains("decode, prefill"), "{message}");

    up.stop().await;
    let end = tokio::task::spawn_blocking(move || of_all.child.wait());
    let end = tokio::time::timeout(HANG, end).await.unwrap().unwrap();
    assert_eq!(
        end.unwrap().code(),
        Some(0),
        "the instance's end is the log's"
    );
    drop(of_one);

    // Out of the files.
    let name = format!("test-{}", site.port);
    for args in [
        &["logs", "decode"][..],
        &["logs", "decode", "-f", "--name", &name],
    ] {
        let text = told(&site, args).await;
        assert_eq!(text.matches(FIRST_LINE).count(), 2, "{text}");
    }
    let message = refused(&site, &["logs", "nobody"], 1).await;
    assert!(message.contains("decode, prefill"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_pegaflow_leaves_its_logs_readable() {
    let site = Site::new();
    let mut up = site.up_ready().await;
    up.signal(Signal::SIGKILL);
    up.wait(HANG).await;
    let text = told(&site, &["logs", "prefill"]).await;
    assert!(text.contains(FIRST_LINE), "{text}");
    refused(&site, &["status", "topology.toml"], 6).await;
    site.assert_nothing_left(support::GONE_LIMIT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_lets_requests_finish_and_force_does_not() {
    for force in [false, true] {
        let site = Site::new();
        let topology = support::topology(site.port);
        site.topology(&topology.replace("drain_timeout = \"2s\"", "drain_timeout = \"60s\""));
        site.script(r#"{"itl_ms": 50}"#);
        let mut up = site.up_ready().await;
        let (url, body) = (up.url(), streamed(completion(1, 64, 60)));
        let request = tokio::spawn(async move { generate(&url, &body).await });
        wait_until(
            async || node(&status(&site).await, "decode")["in_flight"] == 1,
            "the request runs",
        )
        .await;
        told(
            &site,
            if force {
                &["stop", "--force"]
            } else {
                &["stop"]
            },
        )
        .await;
        if !force {
            assert_eq!(status(&site).await["state"], "stopping");
        }
        let answer = request.await.unwrap();
        assert_eq!(answer.tokens == 60, !force, "{answer:?}");
        assert_eq!(up.wait(HANG).await.code(), Some(0));
        site.assert_nothing_left(Duration::from_secs(1)).await;
    }
}
