//! Requests that follow from others: turns of a conversation, and what was recorded.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fake::{Fake, tokens};
use crate::{command, output, report};

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_has_everything_in_its_prompt_that_was_said_before() {
    for api in ["chat", "completions"] {
        let (addr, fake) = Fake::default().start().await;
        // Seven requests are three conversations, of which the last one is short.
        let args = [
            "-n", "7", "-c", "1", "--turns", "3", "--input", "25", "--output", "3", "--api", api,
            "--json",
        ];
        let report = report(command(addr, &args)).await;
        assert_eq!((&report["ok"], &report["failed"]), (&json!(7), &json!({})));
        let said = report["load"].as_str().unwrap();
        assert!(said.contains("3 turns a conversation"), "{said}");
        let load = fake.load();
        let lengths: Vec<usize> = load.iter().map(tokens).collect();
        let [first, second, third] = &load[..3] else {
            panic!()
        };
        if api == "chat" {
            let messages = third["messages"].as_array().unwrap();
            let roles: Vec<_> = messages
                .iter()
                .map(|it| it["role"].as_str().unwrap())
                .collect();
            assert_eq!(roles, ["user", "assistant", "user", "assistant", "user"]);
            assert_eq!(messages[1]["content"], "xxx", "the answer");
            assert_eq!(messages[0], first["messages"][0]);
            assert_eq!(messages[..3], second["messages"].as_array().unwrap()[..]);
        } else {
            let text = |body: &Value| body["prompt"].as_str().unwrap().to_owned();
            assert!(text(second).starts_with(&format!("{} xxx ", text(first))));
            assert!(text(third).starts_with(&format!("{} xxx ", text(second))));
        }
        // Ten words and their frame; each turn adds an answer, which is one word, and ten more.
        assert_eq!(lengths, [25, 47, 69, 25, 47, 69, 25]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_goes_on_after_an_answer_that_failed_and_everybody_thinks_first() {
    let flaky = Fake {
        is_flaky: true,
        ..Fake::default()
    };
    let (addr, fake) = flaky.start().await;
    let args = [
        "-n", "12", "-c", "1", "--turns", "4", "--output", "1", "--think", "100ms", "--json",
    ];
    let begun = Instant::now();
    let report = report(command(addr, &args)).await;
    // The two questions before the load are the first two that are counted.
    let sent = fake.load().len();
    let failed = &report["failed"];
    assert!(
        sent < 12 && failed["not finished"] == json!(12 - sent),
        "{report}"
    );
    assert_eq!(
        report["ok"].as_u64().unwrap() + failed["status 503"].as_u64().unwrap(),
        sent as u64
    );
    assert!(begun.elapsed() >= Duration::from_millis(100) * (sent as u32 - 3));
}

fn file(dir: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_is_replayed_when_it_says_and_shares_what_it_shares() {
    let (addr, fake) = Fake::default().start().await;
    let dir = tempfile::tempdir().unwrap();
    let line = |at: u32, blocks: [u32; 2]| {
        json!({"timestamp": at, "input_length": 1005, "output_length": 2, "hash_ids": blocks})
            .to_string()
            + "\n"
    };
    let text = [line(0, [1, 2]), line(2_000, [1, 3]), line(4_000, [4, 2])].concat();
    let trace = file(&dir, "mooncake.jsonl", &text);
    let trace = trace.to_str().unwrap();
    let args = ["--trace", trace, "--speed", "4", "--json"];
    let report = report(command(addr, &args)).await;
    assert_eq!(
        (&report["ok"], &report["input_tokens"]),
        (&json!(3), &json!(3 * 1005))
    );
    assert_eq!(
        report["load"],
        "3 requests of mooncake.jsonl, as recorded, 4 times as fast"
    );
    let seconds = report["seconds"].as_f64().unwrap();
    assert!((1.0..3.0).contains(&seconds), "{seconds}");
    let words = |body: &Value, from: usize, to: usize| {
        let prompt = body["prompt"].as_str().unwrap().split(' ').skip(from);
        prompt.take(to - from).collect::<Vec<_>>().join(" ")
    };
    let load = fake.load();
    // A block has 512 tokens, which are 256 words here.
    assert_eq!(words(&load[0], 0, 256), words(&load[1], 0, 256));
    assert_ne!(words(&load[0], 256, 400), words(&load[1], 256, 400));
    assert_ne!(words(&load[0], 0, 256), words(&load[2], 0, 256));
    assert_eq!(words(&load[0], 256, 400), words(&load[2], 256, 400));
}

#[tokio::test(flavor = "multi_thread")]
async fn conversations_of_a_file_are_asked_as_they_were() {
    let (addr, fake) = Fake::default().start().await;
    let dir = tempfile::tempdir().unwrap();
    let one = |name: &str| {
        json!({"id": name, "conversations": [
            {"from": "human", "value": format!("first of {name}")}, {"from": "gpt", "value": "twelve chars"},
            {"from": "human", "value": format!("second of {name}")}, {"from": "gpt", "value": "four"},
        ]})
    };
    let trace = file(
        &dir,
        "share.json",
        &json!([one("a"), one("b"), one("c")]).to_string(),
    );
    let trace = trace.to_str().unwrap();
    let args = [
        "--trace", trace, "--turns", "2", "--api", "chat", "--rate", "inf", "--json",
    ];
    let report = report(command(addr, &args)).await;
    assert_eq!(report["ok"], 6);
    let asked: BTreeSet<_> = fake
        .load()
        .iter()
        .map(|body| body["messages"].as_array().unwrap().last().unwrap()["content"].to_string())
        .collect();
    assert_eq!(asked.len(), 6, "{asked:?}");
    let outputs: Vec<_> = fake
        .load()
        .iter()
        .map(|body| body["max_tokens"].as_u64().unwrap())
        .collect();
    assert_eq!(
        (
            outputs.iter().sum::<u64>(),
            fake.most.load(Ordering::SeqCst)
        ),
        (3 * (3 + 1), 3)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_that_is_none_says_so_and_what_it_forbids_is_refused() {
    let (addr, _) = Fake::default().start().await;
    let dir = tempfile::tempdir().unwrap();
    let text = file(&dir, "notes.txt", "not a trace\n");
    let text = text.to_str().unwrap();
    for (args, said) in [
        (&["--trace", text][..], "is no trace"),
        (&["--trace", "/nowhere/x"], "cannot read /nowhere/x"),
        (&["--trace", text, "--input", "5"], "cannot be used with"),
        (&["--speed", "2"], "--trace"),
        (&["--trace", text, "--speed", "0"], "is no trace"),
        (&["--turns", "0"], "--turns"),
    ] {
        let output = output(command(addr, args)).await;
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }
}
