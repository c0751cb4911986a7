//! Kill, restart, kill again: what a fleet holds of the machine after many deaths is what it held after
//! the first ones.
//!
//! ```text
//! requests ─▶ kill -9 of the next victim ─▶ one more request ─▶ both nodes proven ─▶ answers right?
//!    ▲                                                                                  │
//!    └──────────────────────────────────────────────────────────────────────────────────┘
//! ```

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::task::JoinSet;

use crate::census::{Census, Resident};
use crate::kills::{Victim, pid_of};
use crate::support::client::{Answer, Ending, generate, is_proven, metric};
use crate::support::load::{Expected, check, mixed};
use crate::support::{self, HANG, Pegaflow, Site, send};

const NODES: [&str; 2] = ["prefill", "decode"];
const VICTIMS: [Victim; 4] = [
    Victim::Leader,
    Victim::Engine,
    Victim::Worker,
    Victim::Guard,
];
/// Requests under way at each kill.
const REQUESTS: usize = 3;
/// Allocators grow at first; so does whatever has a bounded size.
const WARM_UP: usize = 20;

/// How many, and how often to look.
struct Plan {
    kills: usize,
    every: usize,
    /// Without any request, before the baseline is taken: threads and connections that are kept for a
    /// while are given up.
    rest: Duration,
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_cycles_leave_nothing() {
    let plan = Plan {
        kills: 16,
        every: 8,
        rest: Duration::from_secs(5),
    };
    run(plan, 8).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: a thousand kills; `just soak` runs it"]
async fn a_thousand_kill_cycles() {
    let plan = Plan {
        kills: 1000,
        every: 100,
        rest: Duration::from_secs(12),
    };
    run(plan, WARM_UP).await;
}

fn site() -> Site {
    let site = Site::new();
    let topology = support::topology(site.port)
        .replace("backoff_first = \"200ms\"", "backoff_first = \"1ms\"")
        .replace("backoff_max = \"1s\"", "backoff_max = \"1ms\"")
        .replace(
            "crash_limit = 4",
            "crash_limit = 1000\nlog_bytes = \"1MiB\"\nlog_files = 1",
        )
        .replace("crash_window = \"60s\"", "crash_window = \"10s\"")
        .replace(
            "capacity = \"64MiB\"",
            "capacity = \"64MiB\"\nhandoff_deadline = \"3s\"",
        );
    site.topology(&topology);
    site.script(r#"{"itl_ms": 5, "prefill_ms": 20}"#);
    site
}

async fn run(plan: Plan, warm_up: usize) {
    let site = site();
    let up = site.up_ready().await;
    let mut cycles = Cycles {
        requests: mixed(&up, 12, 12).await,
        up: &up,
        tally: Tally::default(),
        resident: vec![],
    };
    for number in 0..warm_up {
        cycles.cycle(number).await;
    }
    tokio::time::sleep(plan.rest).await;
    let baseline = Census::take(&up).await;
    cycles.resident.clear();
    let started = Instant::now();
    for number in 1..=plan.kills {
        cycles.cycle(number).await;
        if number % plan.every == 0 {
            let now = settled(&up, &baseline).await;
            eprintln!(
                "{number} kills after {:?}: {:?}",
                started.elapsed(),
                cycles.tally
            );
            if number == plan.kills {
                eprintln!("{:<28} {:>9} {:>9}", "", "baseline", "now");
                eprintln!("{}", now.beside(&baseline));
            }
        }
    }
    cycles.assert_memory(plan.every);
    print_stages(&up.get("/metrics").await);
    up.stop().await;
}

/// Waits until nothing is more than at the baseline, and fails with what is.
async fn settled(up: &Pegaflow<'_>, baseline: &Census) -> Census {
    let started = Instant::now();
    loop {
        let now = Census::take(up).await;
        let grown = now.grown_since(baseline);
        if grown.is_empty() {
            return now;
        }
        assert!(
            started.elapsed() < HANG,
            "more than at the baseline, and it stays: {grown:#?}\n{}",
            now.beside(baseline)
        );
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// How requests ended.
#[derive(Debug, Default)]
struct Tally {
    requests: usize,
    complete: usize,
    /// With an error event, after a right beginning.
    broken_off: usize,
    /// Answered with an error, or not to the end, before anything had come.
    lost: usize,
    hung: usize,
}

struct Cycles<'a> {
    up: &'a Pegaflow<'a>,
    requests: Vec<Expected>,
    tally: Tally,
    resident: Vec<Resident>,
}

impl Cycles<'_> {
    async fn cycle(&mut self, number: usize) {
        let node = NODES[number % 2];
        let victim = VICTIMS[number / 2 % 4];
        let view = self.up.node(node).await;
        let incarnation = view["incarnation"].as_u64();
        let leader = u32::try_from(view["pid"].as_u64().unwrap()).unwrap();
        let mut running = JoinSet::new();
        let mut ask = |at: usize| {
            let expected = self.requests[(number * 5 + at) % self.requests.len()].clone();
            let url = self.up.url();
            running.spawn(async move {
                let answer = generate(&url, &expected.body).await;
                (expected, answer)
            });
        };
        (0..REQUESTS).for_each(&mut ask);
        // Somewhere between the first byte of the first and the last one of the last.
        tokio::time::sleep(Duration::from_millis(number as u64 * 13 % 120)).await;
        self.up.site.processes();
        send(pid_of(victim, leader), Signal::SIGKILL);
        ask(REQUESTS);
        let back = |view: &Value| is_proven(view) && view["incarnation"].as_u64() > incarnation;
        self.up.wait_for_node(node, back).await;
        for node in NODES {
            self.up.wait_for_node(node, is_proven).await;
        }
        let answers = running.join_all().await;
        self.count(&answers);
        check(&answers);
        self.resident.push(Resident::of(self.up.pid()));
    }

    fn count(&mut self, answers: &[(Expected, Answer)]) {
        let tally = &mut self.tally;
        tally.requests += answers.len();
        for (_, answer) in answers {
            match &answer.ending {
                Ending::Complete => tally.complete += 1,
                Ending::Hung => tally.hung += 1,
                Ending::ErrorEvent(_) if !answer.text.is_empty() => tally.broken_off += 1,
                _ => tally.lost += 1,
            }
        }
    }

    /// The median of the last `window` cycles beside that of the first ones.
    fn assert_memory(&self, window: usize) {
        let (first, last) = (
            &self.resident[..window],
            &self.resident[self.resident.len() - window..],
        );
        for (name, of) in [
            ("resident", (|it| it.all) as fn(&Resident) -> u64),
            ("of its own", |it| it.own),
        ] {
            let (before, after) = (median(first, of), median(last, of));
            eprintln!("KiB {name}: median of the first {window} {before}, of the last {after}");
            let limit = before + (before / 10).max(4096);
            assert!(after <= limit, "{name}: from {before} to {after} KiB");
        }
    }
}

fn median(of: &[Resident], figure: fn(&Resident) -> u64) -> u64 {
    let mut values: Vec<u64> = of.iter().map(figure).collect();
    values.sort_unstable();
    values[values.len() / 2]
}

/// What pegaflow's own histogram says about all these restarts.
fn print_stages(metrics: &str) {
    for stage in ["seen", "gate", "spawn", "ready"] {
        let value = |part: &str, more: &str| {
            let name = format!("pegaflow_node_restart_seconds_{part}{{");
            let samples = metrics.lines().filter(|line| line.starts_with(&name));
            let ours = samples.filter(|line| line.contains(&format!("stage=\"{stage}\"")));
            metric(
                &ours
                    .filter(|line| line.contains(more))
                    .collect::<Vec<_>>()
                    .join("\n"),
                &name,
            )
        };
        let count = value("count", "");
        let mean = value("sum", "") * 1000.0 / count;
        eprint!("{stage:<6} {count} times, mean {mean:.1} ms");
        for limit in ["0.032", "0.128", "0.512", "1.024"] {
            let within = value("bucket", &format!("le=\"{limit}\""));
            eprint!(", {within} within {limit} s");
        }
        eprintln!();
    }
}
