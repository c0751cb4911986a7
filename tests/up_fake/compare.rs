//! `pegaflow bench compare`: two topologies in turn, the same load on both, and nothing left.

use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::commands::{refused, told};
use crate::support::{self, Site};
use crate::wait_until;

/// `pair.toml` and `two.toml`.
fn site() -> Site {
    let site = Site::new();
    let pair = support::topology(site.port);
    std::fs::write(site.path("pair.toml"), &pair).unwrap();
    let first = pair.split("[[node]]").next().unwrap();
    let kv = first.split("[kv]").next().unwrap();
    let rest = first.split("[router]").nth(1).unwrap();
    let two = format!("{kv}[router]{rest}[[node]]\nname = \"u\"\nrole = \"unified\"\ncount = 2\n");
    std::fs::write(site.path("two.toml"), two).unwrap();
    site
}

#[tokio::test(flavor = "multi_thread")]
async fn both_get_the_same_loads_in_turn_and_nothing_is_left() {
    let site = site();
    site.script(r#"{"itl_ms": 4, "prefill_ms": 30}"#);
    let args = [
        "bench",
        "compare",
        "pair.toml",
        "two.toml",
        "-n",
        "12",
        "--rounds",
        "2",
        "--rate",
        "40,80",
        "--input",
        "40-60",
        "--output",
        "8",
        "--json",
        "--html",
        "report.html",
    ];
    let report: Value = serde_json::from_str(&told(&site, &args).await).unwrap();
    assert_eq!(report["names"], serde_json::json!(["pair", "two"]));
    let loads = report["loads"].as_array().unwrap();
    let rates: Vec<_> = loads
        .iter()
        .map(|load| load["rate"].as_f64().unwrap())
        .collect();
    assert_eq!(rates, [40.0, 80.0]);
    for load in loads {
        let rounds = load["rounds"].as_array().unwrap();
        assert_eq!(rounds.len(), 2);
        let all: Vec<&Value> = rounds
            .iter()
            .flat_map(|round| round.as_array().unwrap())
            .collect();
        for report in &all {
            assert_eq!(
                (&report["ok"], &report["failed"]),
                (&12.into(), &serde_json::json!({}))
            );
            // The same prompts everywhere.
            assert_eq!(report["input_tokens"], all[0]["input_tokens"]);
            assert!(report["ttft"]["p50"].as_f64().unwrap() >= 30.0, "{report}");
            assert_eq!(report["itl"]["count"], 12 * 7);
        }
    }
    let page = std::fs::read_to_string(site.path("report.html")).unwrap();
    assert!(
        page.contains("pair beside two: 2 rounds in turn") && page.contains("<svg"),
        "{page}"
    );
    assert!(!page.contains("NaN") && !page.contains("src="), "{page}");
    site.assert_nothing_left(Duration::from_secs(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_rate_it_finds_out_what_the_second_one_can_do() {
    let site = site();
    site.script(r#"{"itl_ms": 1, "prefill_ms": 5}"#);
    let args = [
        "bench",
        "compare",
        "pair.toml",
        "two.toml",
        "-n",
        "6",
        "--rounds",
        "1",
        "--input",
        "40",
        "--output",
        "4",
    ];
    let text = told(&site, &args).await;
    assert!(
        text.contains("two alone does ") && text.contains(" requests/s with 8 at a time"),
        "{text}"
    );
    assert_eq!(text.matches("Poisson arrivals at ").count(), 3, "{text}");
    for line in [
        "TTFT mean",
        "TPOT p99",
        "ITL p99",
        "pair: under way in each quarter",
        "two: under way",
    ] {
        assert!(text.contains(line), "{text}");
    }
    site.assert_nothing_left(Duration::from_secs(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_ends_the_instance_that_runs() {
    let site = site();
    site.script(r#"{"itl_ms": 500}"#);
    let args = [
        "bench",
        "compare",
        "pair.toml",
        "two.toml",
        "--rounds",
        "1",
        "--rate",
        "1",
        "--output",
        "64",
    ];
    let mut command = site.command(&args);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let runs = async || !site.run_dirs().is_empty() && !site.processes().is_empty();
    wait_until(runs, "an instance").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    kill(
        Pid::from_raw(i32::try_from(child.id()).unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    let output = tokio::time::timeout(support::HANG, output)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("It was interrupted"), "{said}");
    site.assert_nothing_left(Duration::from_secs(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_work_is_refused_before_anything_starts() {
    let site = site();
    for (args, code, said) in [
        (&["pair.toml", "absent.toml"][..], 3, "absent.toml"),
        (&["pair.toml", "two.toml", "--rate", "0"], 2, "--rate 0"),
        (&["pair.toml", "two.toml", "--rate", "inf"], 2, "--rate inf"),
        (
            &["pair.toml", "two.toml", "--shared-prefix", "9000"],
            2,
            "--shared-prefix",
        ),
        (&["pair.toml"], 2, "<B>"),
    ] {
        let all = [&["bench", "compare"], args].concat();
        let message = refused(&site, &all, code).await;
        assert!(message.contains(said), "{args:?}: {message}");
    }
    assert!(site.run_dirs().is_empty());
}
