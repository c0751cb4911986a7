//! What the router shows of a request: figures, headers, its line in the log.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use http::HeaderMap;
use pegaflow::fleet::Role;
use pegaflow::handoff::{HandoffBoard, HandoffId};
use serde_json::{Value, json};
use support_router::command::router_command;
use support_router::*;

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn stream(tag: u32) -> Value {
    json!({"prompt": "abc", "stream": true, "tag": tag})
}

/// Milliseconds by name.
fn server_timing(headers: &HeaderMap) -> BTreeMap<String, f64> {
    let text = headers["server-timing"].to_str().unwrap();
    let entries = text.split(", ").map(|entry| {
        let (name, took) = entry.split_once(";dur=").unwrap();
        (name.to_owned(), took.parse().unwrap())
    });
    entries.collect()
}

#[tokio::test]
async fn every_step_of_a_split_stream_is_timed() {
    const KV_AFTER: u64 = 60;
    const APART: u64 = 20;
    let board = HandoffBoard::default();
    let p = Fake::always(&board, Kv::Open, Answer::Tokens).await;
    let d = Fake::always(&board, Kv::Nothing, Answer::Paced(APART)).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let rig = Rig::start(&board, plan(), &nodes).await;
    let body = stream(1);
    let kv = async {
        soon("the prefill leg", async {
            while p.seen().is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        tokio::time::sleep(Duration::from_millis(KV_AFTER)).await;
        let id = HandoffId::from(p.seen()[0].mark()["handoff"].as_str().unwrap());
        board.settle(&id, READY);
    };
    let (got, ()) = tokio::join!(rig.complete(&body), kv);
    got.is_whole_stream("1");

    let timing = server_timing(&got.headers);
    let names: Vec<_> = timing.keys().map(String::as_str).collect();
    assert_eq!(names, ["decode", "prefill", "queue", "total"]);
    assert!(timing["prefill"] >= KV_AFTER as f64, "{timing:?}");
    let parts = timing["queue"] + timing["prefill"] + timing["decode"];
    // Each is rounded by itself.
    assert!(parts <= timing["total"] + 0.2, "{timing:?}");

    rig.idle().await;
    let router = |name: &str| format!("pegaflow_router_{name}");
    let (waited, span) = (KV_AFTER as f64 / 1e3, (7 * APART) as f64 / 1e3);
    for (series, labels, count, least) in [
        ("queue_seconds", "", 1.0, 0.0),
        ("handoff_wait_seconds", "", 1.0, waited),
        ("dispatch_seconds", "", 1.0, 0.0),
        ("leg_seconds", "{leg=\"prefill\"}", 1.0, 0.0),
        ("leg_seconds", "{leg=\"decode\"}", 1.0, span),
        ("leg_first_byte_seconds", "{leg=\"decode\"}", 1.0, 0.0),
        ("ttft_seconds", "{path=\"split\"}", 1.0, waited),
        ("itl_seconds", "{path=\"split\"}", 7.0, span),
        ("tpot_seconds", "{path=\"split\"}", 1.0, span / 7.0),
        ("request_seconds", "{path=\"split\"}", 1.0, waited + span),
        ("leg_seconds", "{leg=\"whole\"}", 0.0, 0.0),
        ("ttft_seconds", "{path=\"whole\"}", 0.0, 0.0),
    ] {
        let of = |part: &str| router(&format!("{series}_{part}{labels} "));
        assert_eq!(rig.sample(&of("count")).await, count, "{series}{labels}");
        let sum = rig.sample(&of("sum")).await;
        assert!(sum >= least && sum < 20.0, "{series}{labels}: {sum}");
    }
    rig.finish().await;
}

#[tokio::test]
async fn a_whole_answer_is_timed_too() {
    let board = HandoffBoard::default();
    let a = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let rig = Rig::start(&board, plan(), &[("a", Role::Unified, a.addr)]).await;
    let got = rig.complete(&json!({"prompt": "abc", "tag": 1})).await;
    assert_eq!(got.status, 200);
    let timing = server_timing(&got.headers);
    let names: Vec<_> = timing.keys().map(String::as_str).collect();
    assert_eq!(names, ["queue", "total", "whole"]);
    let count = "pegaflow_router_leg_seconds_count{leg=\"whole\"}";
    assert_eq!(rig.sample(count).await, 1.0);
    let itl = "pegaflow_router_itl_seconds_count{path=\"whole\"}";
    assert_eq!(rig.sample(itl).await, 0.0, "it is no stream");
    rig.finish().await;
}

#[tokio::test]
async fn a_trace_reaches_both_legs_unchanged_and_none_is_made_up() {
    let board = HandoffBoard::default();
    let p = Fake::always(&board, Kv::Settle(READY), Answer::Tokens).await;
    let d = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [("d", Role::Decode, d.addr), ("p", Role::Prefill, p.addr)];
    let rig = Rig::start(&board, plan(), &nodes).await;
    let traced = rig
        .request("/v1/completions", &stream(1))
        .header("traceparent", TRACE)
        .header("tracestate", "a=1,b=2");
    rig.send(traced).await.is_whole_stream("1");
    rig.complete(&stream(2)).await.is_whole_stream("2");
    for node in [&p, &d] {
        let seen = node.seen();
        assert_eq!(seen[0].headers["traceparent"], TRACE);
        assert_eq!(seen[0].headers["tracestate"], "a=1,b=2");
        assert!(!seen[1].headers.contains_key("traceparent"));
    }
    rig.finish().await;
}

#[tokio::test]
async fn every_answer_names_its_request() {
    let board = HandoffBoard::default();
    let a = Fake::scripted(&board, |_, seen| {
        let answer = match seen.body["tag"].as_u64() {
            Some(500) => Answer::Status(500, "boom"),
            Some(3) => Answer::BreakAfter(3),
            _ => Answer::Tokens,
        };
        (Kv::Nothing, answer)
    })
    .await;
    let rig = Rig::start(&board, plan(), &[("a", Role::Unified, a.addr)]).await;
    let post = |path: &str, body: &Value| rig.request(path, body);
    let completion = |tag: u32| post("/v1/completions", &stream(tag));
    for (request, status) in [
        (completion(1), 200),
        (completion(3), 200),
        (completion(500), 502),
        (post("/v1/completions", &json!([1])), 400),
        (post("/nothing", &json!({})), 404),
        (rig.http.get(rig.url("/v1/models/none")), 404),
        (rig.http.get(rig.url("/v1/completions")), 405),
        (rig.http.get(rig.url("/v1/realtime")), 501),
    ] {
        let got = rig.send(request.header("x-request-id", "mine")).await;
        assert_eq!(got.status, status, "{}", got.text);
        assert_eq!(got.headers["x-request-id"], "mine", "{status}");
        if status != 200 {
            assert_eq!(got.json()["request_id"], "mine");
        } else if got.text.contains("error") {
            let last = got.text.trim_end().rsplit("data: ").next().unwrap();
            let event: Value = serde_json::from_str(last).unwrap();
            assert_eq!(event["request_id"], "mine");
        }
    }
    // An id that is no word is replaced, in the header and in the body.
    let odd = post("/nothing", &json!({})).header("x-request-id", "two words");
    let got = rig.send(odd).await;
    let id = got.headers["x-request-id"].to_str().unwrap().to_owned();
    assert_eq!((id.len(), &got.json()["request_id"]), (16, &json!(id)));
    rig.finish().await;
}

/// What `pegaflow router` logs of one request, with these flags and this filter.
async fn logged(flags: &[&str], filter: &str) -> Vec<Value> {
    let a = Fake::always(&HandoffBoard::default(), Kv::Nothing, Answer::Tokens).await;
    let url = format!("http://{}", a.addr);
    let node = ["--unified", url.as_str(), "--log-format", "json"];
    let (command, port) = router_command(&[&node[..], flags].concat());
    let mut child = tokio::process::Command::from(command)
        .env("PEGAFLOW_LOG", filter)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let base = format!("http://127.0.0.1:{port}");
    soon("the node to be ready", async {
        loop {
            let health = http.get(format!("{base}/health")).send().await;
            if health.is_ok_and(|answer| answer.status() == 200) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let body = json!({"prompt": "a secret prompt", "stream": true, "tag": 1}).to_string();
    let request = http
        .post(format!("{base}/v1/completions?api=secret"))
        .header("content-type", "application/json")
        .header("authorization", "Bearer secret")
        .header("x-request-id", "mine")
        .header("traceparent", TRACE)
        .body(body);
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 200);
    answer.text().await.unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let mut text = String::new();
    let mut stderr = child.stderr.take().unwrap();
    let read = tokio::io::AsyncReadExt::read_to_string(&mut stderr, &mut text);
    soon("the log", read).await.unwrap();
    soon("the end", child.wait()).await.unwrap();
    assert!(!text.contains("secret"), "{text}");
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines
        .filter(|line: &Value| line["fields"]["message"] == "request")
        .collect()
}

#[tokio::test]
async fn a_request_is_one_line_in_the_log_where_it_is_asked_for() {
    assert!(logged(&[], "info").await.is_empty());
    for (flags, filter, level) in [
        (&["--access-log"][..], "info", "INFO"),
        (&[][..], "pegaflow=debug", "DEBUG"),
    ] {
        let lines = logged(flags, filter).await;
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert_eq!(lines[0]["level"], level);
        let fields = &lines[0]["fields"];
        for (name, value) in [
            ("id", json!("mine")),
            ("trace", json!(TRACE)),
            ("method", json!("POST")),
            ("path", json!("/v1/completions")),
            ("status", json!(200)),
            ("outcome", json!("ok")),
            ("way", json!("whole")),
            ("reason", json!("no_pair")),
            ("answer", json!("unified")),
            ("retries", json!(0)),
            ("events", json!(7)),
        ] {
            assert_eq!(fields[name], value, "{name} in {fields}");
        }
        for name in ["queue_ms", "answer_ms", "ttft_ms", "total_ms"] {
            assert!(fields[name].is_number(), "{name} in {fields}");
        }
        assert!(fields.get("prefill").is_none() && fields.get("prefill_ms").is_none());
    }
}

#[tokio::test]
async fn the_nodes_figures_are_there_too_and_a_silent_node_costs_only_its_own() {
    let board = HandoffBoard::default();
    let speaks = async |text: &'static str| {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let app = axum::Router::new().route("/metrics", axum::routing::get(async move || text));
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        addr
    };
    let good = speaks("# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine=\"0\"} 3.0\nnonsense\n").await;
    let bad = speaks("").await;
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (silent_addr, gone_addr) = (silent.local_addr().unwrap(), gone.local_addr().unwrap());
    drop(gone);
    let nodes = [
        ("bad", Role::Decode, bad),
        ("gone", Role::Decode, gone_addr),
        ("good", Role::Prefill, good),
        ("silent", Role::Decode, silent_addr),
    ];
    let rig = Rig::start(&board, plan(), &nodes).await;
    rig.set("bad", pegaflow::fleet::Phase::Draining);
    let started = std::time::Instant::now();
    let got = rig.get("/metrics/all").await;
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(got.status, 200);
    let own = rig.metrics().await;
    let own_families = own.lines().filter(|line| line.starts_with("# TYPE"));
    assert!(own_families.clone().count() > 10);
    for line in own_families.chain([
        "pegaflow_node_scraped{node=\"bad\"} 1",
        "pegaflow_node_scraped{node=\"gone\"} 0",
        "pegaflow_node_scraped{node=\"good\"} 1",
        "pegaflow_node_scraped{node=\"silent\"} 0",
        "# TYPE vllm:num_requests_running gauge",
        "vllm:num_requests_running{node=\"good\",engine=\"0\"} 3.0",
    ]) {
        assert_eq!(
            got.text.lines().filter(|found| *found == line).count(),
            1,
            "{line}\n{}",
            got.text
        );
    }
    assert!(got.text.ends_with("} 3.0\n# EOF\n"), "{}", got.text);
    assert_eq!(got.text.matches("# EOF").count(), 1);

    // Nobody is asked who does not run.
    for node in ["gone", "silent"] {
        rig.set(node, pegaflow::fleet::Phase::CrashLoop);
    }
    let got = rig.get("/metrics/all").await;
    assert!(!got.text.contains("scraped{node=\"gone\"}"), "{}", got.text);
    rig.finish().await;
}
