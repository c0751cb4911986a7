//! Everything at once: requests at a given rate, while nodes refuse, reset, hang, answer 500, are slow
//! and are killed, in any order, two prefill and two decode nodes of them.
//!
//! ```text
//!  requests at a rate ─▶ router ─▶ prefill, prefill-b, decode, decode-b
//!        │                           ▲ script, every some hundred ms   ▲ kill -9, every some seconds
//!        ▼                           └────────────── faults ───────────┘
//!     ledger: right, refused with a reason, broken off with a reason; anything else is a violation
//!        │ the faults end
//!        ▼
//!     all nodes return, every request is answered; nothing is held; the router counted the same
//! ```
//!
//! `PEGAFLOW_CHAOS_SEED` plays the faults of a run again; what they hit is up to the machine. On one that is slower
//! `PEGAFLOW_CHAOS_SECONDS` and `PEGAFLOW_CHAOS_RATE` make less of the long form.

mod faults;
mod ledger;

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use self::faults::Faults;
use self::ledger::Ledger;
use crate::census::Census;
use crate::support::client::{Ending, generate, is_proven, metric};
use crate::support::load::{Expected, mixed};
use crate::support::{self, HANG, Pegaflow, Site};

const NODES: [&str; 4] = ["prefill", "prefill-b", "decode", "decode-b"];

/// How long, and how much.
struct Plan {
    time: Duration,
    /// Requests a second.
    rate: u32,
    /// Requests at a time; what is due beyond that is not sent, but counted.
    at_a_time: usize,
    /// Milliseconds between two kills.
    kills: std::ops::Range<u64>,
}

#[tokio::test(flavor = "multi_thread")]
async fn chaos_is_survived() {
    run(Plan {
        time: Duration::from_secs(10),
        rate: 20,
        at_a_time: 256,
        kills: 1000..2500,
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: ten minutes; `just soak` runs it"]
async fn chaos_of_ten_minutes_is_survived() {
    let seconds = from_environment("PEGAFLOW_CHAOS_SECONDS").unwrap_or(600);
    let rate = from_environment("PEGAFLOW_CHAOS_RATE").map_or(200, |rate| rate.try_into().unwrap());
    run(Plan {
        time: Duration::from_secs(seconds),
        rate,
        at_a_time: 512,
        kills: 2000..6000,
    })
    .await;
}

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// Whatever hangs is given up in seconds, and a node may die as often as it likes.
fn site() -> Site {
    let site = Site::new();
    let mut text = support::topology(site.port);
    for (usual, here) in [
        (
            "first_byte_timeout = \"10s\"",
            "first_byte_timeout = \"2s\"",
        ),
        ("chunk_timeout = \"5s\"", "chunk_timeout = \"2s\""),
        ("handoff_timeout = \"5s\"", "handoff_timeout = \"2s\""),
        ("queue_timeout = \"30s\"", "queue_timeout = \"6s\""),
        ("start_timeout = \"30s\"", "start_timeout = \"10s\""),
        ("hang_timeout = \"10s\"", "hang_timeout = \"5s\""),
        (
            "capacity = \"64MiB\"",
            "capacity = \"64MiB\"\nhandoff_deadline = \"3s\"",
        ),
        (
            "crash_limit = 4",
            "crash_limit = 1000\nlog_bytes = \"1MiB\"\nlog_files = 1",
        ),
    ] {
        assert!(text.contains(usual), "{usual}");
        text = text.replace(usual, here);
    }
    for (name, role) in [("prefill-b", "prefill"), ("decode-b", "decode")] {
        text += &format!("\n[[node]]\nname = \"{name}\"\nrole = \"{role}\"\n");
    }
    site.topology(&text);
    site.script(&faults::calm().to_string());
    site
}

async fn run(plan: Plan) {
    let seed = from_environment("PEGAFLOW_CHAOS_SEED").unwrap_or_else(rand::random);
    eprintln!("PEGAFLOW_CHAOS_SEED={seed}");
    let mut seeds = StdRng::seed_from_u64(seed);
    let mut next = || StdRng::seed_from_u64(seeds.random());
    let site = site();
    let up = site.up_ready().await;
    for node in NODES {
        up.wait_for_node(node, is_proven).await;
    }
    let requests = mixed(&up, 24, 8).await;

    let until = Instant::now() + plan.time;
    let mut faults = Faults::default();
    let mut kills = faults::Kills::default();
    let mut ledger = Ledger::default();
    tokio::join!(
        faults.play(&site, next(), until),
        kills.play(&up, next(), until, plan.kills.clone()),
        ask(&up, &requests, &plan, &mut ledger, until),
    );

    eprintln!("{}", ledger.table(plan.time));
    eprintln!("faults: {:?}\nkills: {:?}", faults.begun, kills.done);
    let metrics = up.get("/metrics").await;
    eprintln!("{}", ledger::router_counters(&metrics));
    ledger.assert_no_violation();
    assert!(!faults.begun.is_empty(), "nothing went wrong");
    assert!(!kills.done.is_empty(), "nothing was killed");
    returned(&up, &requests).await;
    at_rest(&up).await;
    ledger.assert_router_agrees(&up.get("/metrics").await, requests.len());
    up.stop().await;
    ledger.assert_load(plan.time, plan.rate);
}

/// Asks at the plan's rate, whatever becomes of the requests before.
async fn ask(
    up: &Pegaflow<'_>,
    requests: &[Expected],
    plan: &Plan,
    ledger: &mut Ledger,
    until: Instant,
) {
    let mut due = tokio::time::interval(Duration::from_secs(1) / plan.rate);
    let mut running = JoinSet::new();
    while Instant::now() < until {
        tokio::select! {
            _ = due.tick() => {
                let number = ledger.due;
                ledger.due += 1;
                if running.len() >= plan.at_a_time {
                    ledger.unsent += 1;
                    continue;
                }
                let (expected, url) = (request(requests, number), up.url());
                running.spawn(async move {
                    let answer = generate(&url, &expected.body).await;
                    (expected, answer)
                });
            }
            Some(done) = running.join_next() => ledger.enter(&done.unwrap()),
        }
    }
    while let Some(done) = running.join_next().await {
        ledger.enter(&done.unwrap());
    }
}

/// Every other one has a prompt that the store cannot know yet.
fn request(requests: &[Expected], number: u64) -> Expected {
    let mut expected = requests[number as usize % requests.len()].clone();
    if number / requests.len() as u64 % 2 == 1 {
        expected.body["cache_salt"] = json!(format!("chaos-{number}"));
    }
    expected
}

/// All nodes are back, and every request is answered.
async fn returned(up: &Pegaflow<'_>, requests: &[Expected]) {
    let mut restarts = Vec::new();
    for node in NODES {
        let view = up.wait_for_node(node, is_proven).await;
        restarts.push(format!("{node} {}", view["restarts"]));
    }
    eprintln!("restarts: {}", restarts.join(", "));
    for expected in requests {
        let answer = up.generate(&expected.body).await;
        assert!(
            answer.ending == Ending::Complete && answer.text == expected.text,
            "without faults: {answer:?}"
        );
    }
}

/// Nobody holds anything for a request that has ended.
async fn at_rest(up: &Pegaflow<'_>) {
    let started = Instant::now();
    loop {
        let mut held = Census::take(up).await.held();
        let status: Value = serde_json::from_str(&up.get("/status").await).unwrap();
        for (name, none) in [
            ("in_flight", json!(0)),
            ("queued", json!(0)),
            ("handoffs_waiting", json!(0)),
            ("in_flight_by_node", json!({})),
        ] {
            if status[name] != none {
                held.push(format!("{name}: {}", status[name]));
            }
        }
        let metrics = up.get("/metrics").await;
        for gauge in ["node_in_flight{", "node_in_flight_tokens{"] {
            let name = format!("pegaflow_router_{gauge}");
            assert!(metrics.contains(&name), "{name} is missing");
            if metric(&metrics, &name) > 0.0 {
                held.push(name);
            }
        }
        for node in NODES {
            for gauge in ["vllm:num_requests_running", "vllm:num_requests_waiting"] {
                let count = up.node_metric(node, gauge).await;
                if count > 0.0 {
                    held.push(format!("{node} {gauge}: {count}"));
                }
            }
        }
        if held.is_empty() {
            return;
        }
        assert!(started.elapsed() < HANG, "held for nobody: {held:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
