//! `pegaflow bench` against an endpoint whose timing is known.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod conversations;
mod fake;

use std::net::SocketAddr;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use fake::{Fake, ITL, TTFT, tokens};

/// A machine that runs other tests is late.
const LATE: f64 = 40.0;

fn command(addr: SocketAddr, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow"));
    command
        .args(["bench", &format!("http://{addr}")])
        .args(args);
    command.env_remove("OPENAI_API_KEY").stdin(Stdio::null());
    command
}

async fn output(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap()
}

async fn report(command: Command) -> Value {
    let output = output(command).await;
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn is_near(report: &Value, path: &str, least: f64) {
    let value = report.pointer(path).unwrap().as_f64().unwrap();
    assert!(
        (least..least + LATE).contains(&value),
        "{path} is {value}, expected {least} or a little more"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_load_measures_what_the_endpoint_does() {
    let (addr, fake) = Fake::default().start().await;
    let args = [
        "-n",
        "40",
        "-c",
        "4",
        "--input",
        "105",
        "--output",
        "5-9",
        "--json",
        "--slo",
        "ttft=10s,tpot=10s",
    ];
    let dir = tempfile::tempdir().unwrap();
    let (page, file) = (
        dir.path().join("report.html"),
        dir.path().join("report.json"),
    );
    let mut asks = command(addr, &args);
    asks.arg("--html")
        .arg(&page)
        .arg("--output-json")
        .arg(&file);
    let report = report(asks).await;
    let written: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!(written, report);
    let page = std::fs::read_to_string(page).unwrap();
    assert_eq!(page.matches("<svg").count(), 5);
    assert!(
        page.contains("timer at http://127.0.0.1") && page.matches("<circle").count() == 40,
        "{page}"
    );
    assert_eq!((&report["ok"], &report["failed"]), (&json!(40), &json!({})));
    assert_eq!(fake.most.load(Ordering::SeqCst), 4);
    let (ttft, itl) = (TTFT.as_secs_f64() * 1e3, ITL.as_secs_f64() * 1e3);
    for path in ["/ttft/mean", "/ttft/p50"] {
        is_near(&report, path, ttft);
    }
    for path in ["/itl/p50", "/tpot/mean", "/tpot/p50"] {
        is_near(&report, path, itl);
    }
    // What was sent so far apart came so far apart: nothing was held back or lumped together.
    let gaps = fake.gaps.lock().unwrap().clone();
    let sent = gaps.iter().sum::<f64>() / gaps.len() as f64;
    let came = report["itl"]["mean"].as_f64().unwrap();
    assert_eq!(report["itl"]["count"], gaps.len());
    assert!(
        (came / sent - 1.0).abs() < 0.05,
        "sent {sent} ms apart, came {came}"
    );
    let load = fake.load();
    assert_eq!(load.len(), 40);
    assert!(
        load.iter().all(|body| tokens(body) == 105
            && body["ignore_eos"] == true
            && body["model"] == "timer")
    );
    assert_eq!(report["input_tokens"], 40 * 105);
    let asked: u64 = load
        .iter()
        .map(|body| body["max_tokens"].as_u64().unwrap())
        .sum();
    assert_eq!(report["output_tokens"], asked);
    assert_eq!(report["goodput"]["good"], 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_load_does_not_wait_for_answers_and_a_seed_repeats_it() {
    let (addr, fake) = Fake::default().start().await;
    let args = [
        "-n",
        "30",
        "--rate",
        "200",
        "--output",
        "20",
        "--input",
        "65",
        "--shared-prefix",
        "25",
        "--seed",
        "5",
        "--api",
        "chat",
    ];
    for _ in 0..2 {
        let output = output(command(addr, &args)).await;
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            text.contains(
                "30 requests, 65 tokens in, 20 out, Poisson arrivals at 200/s, 25 tokens shared"
            ),
            "{text}"
        );
        assert!(
            text.contains("30 answers in ") && text.contains("; 0 failed"),
            "{text}"
        );
        assert!(text.contains("TTFT") && text.contains("p99"), "{text}");
    }
    // 30 requests come in about 150 ms, and each takes 290.
    assert!(fake.most.load(Ordering::SeqCst) > 10, "{:?}", fake.most);
    let prompts = |bodies: &[Value]| {
        let mut prompts: Vec<String> = bodies
            .iter()
            .map(|body| body["messages"].to_string())
            .collect();
        prompts.sort();
        prompts
    };
    let load = fake.load();
    assert_eq!(prompts(&load[..30]), prompts(&load[30..]));
    let start = |body: &Value| {
        body["messages"][0]["content"]
            .as_str()
            .unwrap()
            .split(' ')
            .take(10)
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert!(load.iter().all(|body| start(body) == start(&load[0])));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_counted_by_reason_and_a_key_is_sent_and_not_shown() {
    let flaky = Fake {
        is_flaky: true,
        ..Fake::default()
    };
    let (addr, fake) = flaky.start().await;
    let mut asks = command(addr, &["-n", "12", "-c", "1", "--output", "2", "--json"]);
    asks.env("OPENAI_API_KEY", "sk-secret-of-a-test");
    let output = output(asks).await;
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    // Two came before, for the tokens of a word.
    assert_eq!(
        (&report["ok"], &report["failed"]),
        (&json!(8), &json!({"status 503": 4}))
    );
    assert!(
        fake.keys
            .lock()
            .unwrap()
            .iter()
            .all(|key| key == "Bearer sk-secret-of-a-test")
    );
    assert_eq!(fake.keys.lock().unwrap().len(), 14);
    let shown = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(!shown.contains("secret"), "{shown}");

    let hanging = Fake {
        hangs: true,
        ..Fake::default()
    };
    let (addr, _) = hanging.start().await;
    let output = self::output(command(
        addr,
        &["-n", "3", "--output", "2", "--timeout", "1s", "--json"],
    ))
    .await;
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (output.status.code(), &report["failed"]),
        (Some(1), &json!({"timeout": 3}))
    );

    let flooding = Fake {
        floods: true,
        ..Fake::default()
    };
    let (addr, _) = flooding.start().await;
    let output = self::output(command(addr, &["-n", "2", "--output", "2", "--json"])).await;
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let failed = json!({"more text than asked for": 2});
    assert_eq!(
        (output.status.code(), &report["failed"]),
        (Some(1), &failed)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_it_with_what_there_is() {
    let hanging = Fake {
        hangs: true,
        ..Fake::default()
    };
    let (addr, fake) = hanging.start().await;
    let mut asks = command(addr, &["-n", "5", "-c", "5", "--output", "2", "--json"]);
    let child = asks
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while fake.under_way.load(Ordering::SeqCst) < 5 {
        assert!(began.elapsed() < Duration::from_secs(30));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    kill(
        Pid::from_raw(child.id().try_into().unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap())
        .await
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(
        (&report["interrupted"], &report["ok"], &report["failed"]),
        (&json!(true), &json!(0), &json!({"not finished": 5}))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_use_and_absent_endpoints_say_what_is_wrong() {
    let gone = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    for (args, code, said) in [
        (&["--rate", "0"][..], 2, "--rate 0"),
        (&["--concurrency", "0"], 2, "--concurrency 0"),
        (&["--input", "9-3"], 2, "9-3"),
        (&["--shared-prefix", "600"], 2, "--shared-prefix 600"),
        (&["--slo", "itl=3ms"], 2, "itl=3ms"),
        (&["--rate", "1", "--concurrency", "1"], 2, "--concurrency"),
        (&[], 6, "does not answer"),
    ] {
        let output = output(command(gone, args)).await;
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }
}
