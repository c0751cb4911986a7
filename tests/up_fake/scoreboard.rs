//! How fast deaths are seen and made up for, measured from outside: the moment of the kill here, what
//! pegaflow logged and when, and the start times that the kernel keeps.
//!
//! With `--nocapture` it prints the table of docs/reliability.md. The limits that are asserted are far
//! above it: a busy machine must not fail them.

use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;
use nix::time::{ClockId, clock_gettime};
use serde_json::Value;

use crate::kills::{Victim, pid_of};
use crate::support::client::{is_proven, metric};
use crate::support::load::{Load, check, mixed};
use crate::support::{self, Pegaflow, Site, send};

/// Kills of each kind and node.
const ROUNDS: u32 = 5;
const NODES: [&str; 2] = ["prefill", "decode"];

/// Samples of one figure, in milliseconds.
#[derive(Debug, Default)]
struct Figure(Vec<f64>);

impl Figure {
    fn print(&self, name: &str, goal: &str) {
        let (mean, most) = (self.mean(), self.most());
        let count = self.0.len();
        eprintln!("{name:<46} {goal:>9} {mean:>9.1} {most:>9.1} {count:>5}");
    }

    fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    fn most(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max)
    }
}

/// Milliseconds; what came before counts as nothing.
fn between(from: SystemTime, to: SystemTime) -> f64 {
    to.duration_since(from).unwrap_or_default().as_secs_f64() * 1000.0
}

/// One line of pegaflow's log.
struct Said {
    at: SystemTime,
    fields: Value,
}

impl Said {
    /// A node entered a phase, or a request to it failed.
    fn is(&self, node: &str, field: &str, value: &str) -> bool {
        self.fields["node"] == node && self.fields[field] == value
    }
}

/// What was said about nodes since.
fn said_since(up: &Pegaflow<'_>, since: SystemTime) -> Vec<Said> {
    let output = up.output();
    let values = output
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let lines = values.filter_map(|value| {
        let at = humantime::parse_rfc3339(value["timestamp"].as_str()?).ok()?;
        let fields = value["fields"].clone();
        Some(Said { at, fields })
    });
    lines.filter(|said| said.at >= since).collect()
}

#[derive(Debug, Default)]
struct Board {
    exit_seen: Figure,
    engine_seen: Figure,
    out_of_routing: Figure,
    respawned: Figure,
    back: Figure,
}

#[tokio::test(flavor = "multi_thread")]
async fn deaths_are_seen_and_made_up_for_in_time() {
    let mut site = Site::new();
    // Microseconds are in it.
    site.env("PEGAFLOW_LOG_FORMAT", "json");
    let topology = support::topology(site.port)
        .replace("health_interval = \"200ms\"", "")
        .replace("backoff_first = \"200ms\"", "backoff_first = \"1ms\"")
        .replace("backoff_max = \"1s\"", "backoff_max = \"1ms\"")
        .replace("crash_limit = 4", "crash_limit = 1000");
    site.topology(&topology);
    site.script(r#"{"itl_ms": 5, "prefill_ms": 20}"#);
    let up = site.up_ready().await;
    let requests = mixed(&up, 12, 12).await;
    let mut board = Board::default();
    for round in 0..ROUNDS {
        for node in NODES {
            for victim in [Victim::Leader, Victim::Engine] {
                let load = Load::start(&up, &requests, 4);
                // At another moment between two health probes each time.
                let pause = 150 + u64::from(round) * 97;
                tokio::time::sleep(Duration::from_millis(pause)).await;
                board.kill(&up, node, victim).await;
                check(&load.finish().await);
            }
        }
    }
    board.print();
    board.check();
    up.stop().await;
}

impl Board {
    async fn kill(&mut self, up: &Pegaflow<'_>, node: &str, victim: Victim) {
        let view = up.node(node).await;
        let dying = pid_of(victim, pid(&view));
        up.site.processes();
        let killed = SystemTime::now();
        send(dying, Signal::SIGKILL);
        let life = view["incarnation"].as_u64();
        let back = |view: &Value| is_proven(view) && view["incarnation"].as_u64() > life;
        let view = up.wait_for_node(node, back).await;
        self.back.0.push(between(killed, SystemTime::now()));

        let said = said_since(up, killed);
        let entered = |phase: &str| {
            let entered = said.iter().find(|said| said.is(node, "phase", phase));
            entered.unwrap_or_else(|| panic!("{phase} of {node} is not in the log"))
        };
        let (dead, next) = (entered("backoff"), entered("starting"));
        let seen = between(killed, dead.at);
        if victim == Victim::Engine {
            let reason = dead.fields["reason"].as_str().unwrap();
            assert!(reason.contains("503"), "seen otherwise: {reason}");
            self.engine_seen.0.push(seen);
        } else {
            self.exit_seen.0.push(seen);
        }
        // A request that is sent to a dead node fails at once, and so does one that waits there.
        let failed = said.iter().filter(|said| {
            let message = said.fields["message"].as_str().unwrap_or_default();
            said.fields["node"] == node && message.contains("failed") && said.at < next.at
        });
        let failed = failed.map(|said| between(dead.at, said.at));
        self.out_of_routing.0.push(failed.fold(0.0, f64::max));
        let respawned = started(pid(&view));
        self.respawned.0.push(between(dead.at, respawned));
    }

    fn print(&self) {
        eprintln!(
            "{:<46} {:>9} {:>9} {:>9} {:>5}",
            "ms", "goal", "mean", "most", "kills"
        );
        let exit = "killed leader: until its death is seen";
        self.exit_seen.print(exit, "< 100");
        let engine = "killed engine: until its 503 is seen";
        self.engine_seen.print(engine, "< 1000");
        let routing = "seen: until the last request has left it";
        self.out_of_routing.print(routing, "< 50");
        let respawned = "seen: until the next leader runs, gate included";
        self.respawned.print(respawned, "< 500");
        self.back.print("killed: until it is ready and proven", "");
    }

    fn check(&self) {
        for (name, figure, limit) in [
            ("exit seen", &self.exit_seen, 2000.0),
            ("503 seen", &self.engine_seen, 5000.0),
            ("out of routing", &self.out_of_routing, 1000.0),
            ("respawned", &self.respawned, 5000.0),
        ] {
            let mean = figure.mean();
            assert!(mean < limit, "{name}: {mean:.1} ms of {limit}");
        }
    }
}

fn pid(view: &Value) -> u32 {
    u32::try_from(view["pid"].as_u64().unwrap()).unwrap()
}

/// When the process came to be, to 10 ms.
fn started(pid: u32) -> SystemTime {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let ticks: u64 = fields.split(' ').nth(19).unwrap().parse().unwrap();
    let since_boot = Duration::from_millis(ticks * 10);
    let now = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap());
    SystemTime::now() - now.saturating_sub(since_boot)
}

/// All slots busy and a long queue, in the nodes and in front of them, for more than three times
/// `hang_timeout`: that is what nodes are for.
#[tokio::test(flavor = "multi_thread")]
async fn saturated_nodes_are_never_restarted() {
    const LOAD: Duration = Duration::from_secs(8);
    let site = Site::new();
    let impatient = "hang_timeout = \"2s\"\nidle_canary = \"1s\"";
    let topology = support::topology(site.port)
        .replace("hang_timeout = \"10s\"", impatient)
        .replace(
            "first_byte_timeout = \"10s\"",
            "first_byte_timeout = \"60s\"",
        )
        .replace("handoff_timeout = \"5s\"", "handoff_timeout = \"60s\"")
        .replace(
            "queue_timeout = \"30s\"",
            "queue_timeout = \"60s\"\nmax_in_flight = 32",
        )
        .replace("\nrole = ", "\nargs = [\"--max-num-seqs\", \"4\"]\nrole = ");
    site.topology(&topology);
    let up = site.up_ready().await;
    let requests = mixed(&up, 12, 16).await;
    site.script(r#"{"itl_ms": 20, "ttft_ms": 50, "prefill_ms": 50}"#);
    let load = Load::start(&up, &requests, 64);
    let started = Instant::now();
    let (mut looks, mut busy, mut queued, mut late) = (0, 0, 0, 0);
    while started.elapsed() < LOAD {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let waiting = up.node_metric("decode", "vllm:num_requests_waiting").await;
        let running = up.node_metric("decode", "vllm:num_requests_running").await;
        let metrics = up.get("/metrics").await;
        looks += 1;
        busy += u32::from(running >= 4.0);
        late += u32::from(waiting >= 4.0);
        queued += u32::from(metric(&metrics, "pegaflow_router_queued ") >= 16.0);
    }
    let answers = load.finish().await;
    check(&answers);
    let slowest = answers.iter().map(|(_, answer)| answer.total).max();
    eprintln!(
        "{} requests in {:?}, the slowest {slowest:?}; of {looks} looks, all slots busy {busy}, a queue in the \
         node {late}, one in front of it {queued}",
        answers.len(),
        started.elapsed(),
    );
    assert!(
        busy * 2 > looks && late * 2 > looks && queued * 2 > looks,
        "not saturated"
    );
    for node in NODES {
        let view = up.node(node).await;
        assert_eq!(view["restarts"], 0, "{view}");
        assert!(is_proven(&view), "{view}");
    }
    up.stop().await;
}
