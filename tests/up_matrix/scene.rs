//! Brings a fleet to a moment, and strikes.

use std::collections::BTreeSet;
use std::process::Output;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::cell::{Cell, Moment, Target};
use crate::support::client::{Answer, chat, completion, generate, get, metric, streamed};
use crate::support::{self, HANG, Pegaflow, Site, processes, send};

/// Tokens per answer; `Stage::Decode` of the fakes keeps the third back.
const TOKENS: u32 = 12;

/// A fleet in which a hang is found after four seconds, or ten of a start.
pub fn site() -> Site {
    let site = Site::new();
    let topology = support::topology(site.port)
        .replace("queue_timeout = \"30s\"", "queue_timeout = \"60s\"")
        .replace("drain_timeout = \"2s\"", "drain_timeout = \"30s\"")
        .replace("start_timeout = \"30s\"", "start_timeout = \"10s\"")
        .replace(
            "hang_timeout = \"10s\"",
            "hang_timeout = \"4s\"\nidle_canary = \"1s\"",
        )
        .replace("crash_limit = 4", "crash_limit = 10");
    site.topology(&topology);
    site
}

/// A request and who waits for its answer.
pub struct Request {
    pub body: Value,
    pub answer: JoinHandle<Answer>,
}

impl Request {
    pub fn send(up: &Pegaflow<'_>, body: Value) -> Self {
        let url = up.url();
        let sent = body.clone();
        let answer = tokio::spawn(async move { generate(&url, &sent).await });
        Self { body, answer }
    }
}

/// A fleet at its moment.
pub struct Scene<'s> {
    pub up: Pegaflow<'s>,
    pub requests: Vec<Request>,
    /// `pegaflow drain`, where it waits.
    pub drain: Option<JoinHandle<Output>>,
    /// Restarts of the node so far.
    pub restarts: u64,
    /// The processes of the node, with its guard.
    pub tree: BTreeSet<u32>,
    leader: u32,
}

impl<'s> Scene<'s> {
    pub async fn set(site: &'s Site, cell: Cell) -> Self {
        let node = cell.node();
        let hold = |stage: &str| json!({"nodes": {node: {"hold": [stage]}}}).to_string();
        let mut scene = match cell.moment {
            Moment::Starting => Self::first_start(site, node, &hold("start"), "starting").await,
            Moment::WarmUp => Self::first_start(site, node, &hold("prefill"), "warming_up").await,
            _ => Self {
                up: site.up_ready().await,
                requests: Vec::new(),
                drain: None,
                restarts: 0,
                tree: BTreeSet::new(),
                leader: 0,
            },
        };
        match cell.moment {
            Moment::Starting | Moment::WarmUp => scene.ask(1),
            Moment::Idle => {}
            Moment::Prefill => scene.work(site, node, &hold("prefill")).await,
            Moment::Save => {
                // Its answer does not wait for what it saves.
                site.script(&hold("save"));
                scene.ask(1);
                scene.engine_has("slots_pending").await;
            }
            Moment::Load => {
                scene.work(site, node, &hold("load")).await;
                scene.engine_has("slots_leased").await;
            }
            Moment::Decode => scene.decode(site, node, &hold("decode")).await,
            Moment::Draining => {
                scene.decode(site, node, &hold("decode")).await;
                let drain = site.command(&["drain", node, "--force", "--wait", "60s"]);
                let mut drain = tokio::process::Command::from(drain);
                drain.kill_on_drop(true);
                scene.drain = Some(tokio::spawn(async move { drain.output().await.unwrap() }));
                scene.phase(node, "draining", 1).await;
            }
            Moment::Restarting => {
                site.script(&hold("start"));
                send(leader(&scene.up.node(node).await), Signal::SIGKILL);
                scene.phase(node, "starting", 2).await;
                scene.restarts = 1;
                scene.ask(1);
            }
        }
        scene.leader = scene.whole_tree(node).await;
        scene.tree = processes::tree(processes::parent(scene.leader).unwrap());
        site.processes();
        scene
    }

    async fn first_start(site: &'s Site, node: &str, script: &str, phase: &str) -> Self {
        site.script(script);
        let scene = Self {
            up: site.up(),
            requests: Vec::new(),
            drain: None,
            restarts: 0,
            tree: BTreeSet::new(),
            leader: 0,
        };
        scene.phase(node, phase, 1).await;
        scene
    }

    /// Sends a stream and a request that wants its answer whole, which no request before resembles.
    pub fn ask(&mut self, seed: u32) {
        let first = streamed(completion(seed * 2, 100, TOKENS));
        let second = chat(seed * 2 + 1, 60, TOKENS);
        let requests = [first, second].map(|body| Request::send(&self.up, body));
        self.requests.extend(requests);
    }

    /// Until the node has both requests.
    async fn work(&mut self, site: &Site, node: &str, script: &str) {
        site.script(script);
        self.ask(1);
        let all = self.requests.len() as f64;
        let busy = async || self.up.node_metric(node, "vllm:num_requests_running").await >= all;
        until("the node has the requests", busy).await;
    }

    /// Until the node has given the first tokens of both.
    async fn decode(&mut self, site: &Site, node: &str, script: &str) {
        let given =
            async |up: &Pegaflow<'_>| up.node_metric(node, "vllm:generation_tokens_total").await;
        let before = given(&self.up).await;
        self.work(site, node, script).await;
        let wanted = before + 2.0 * self.requests.len() as f64;
        let both = async || given(&self.up).await >= wanted;
        until("two tokens of each answer", both).await;
    }

    async fn engine_has(&self, gauge: &str) {
        let name = format!("pegaflow_engine_{gauge} ");
        let has = async || metric(&self.up.get("/metrics").await, &name) > 0.0;
        until(gauge, has).await;
    }

    /// Also while pegaflow does not answer yet.
    async fn phase(&self, node: &str, phase: &str, incarnation: u64) {
        let url = format!("{}/status", self.up.url());
        let there = async || {
            let text = get(&url).await.unwrap_or_default();
            let status: Value = serde_json::from_str(&text).unwrap_or_default();
            let view = &status["fleet"]["nodes"][node];
            view["phase"] == phase && view["incarnation"] == incarnation && view["pid"].is_u64()
        };
        until(phase, there).await;
    }

    /// The leader, once there are its engine and a worker.
    async fn whole_tree(&self, node: &str) -> u32 {
        let leader = leader(&self.up.node(node).await);
        let whole = async || processes::tree(leader).len() >= 3;
        until("leader, engine and worker", whole).await;
        leader
    }

    /// Sends the cell's signal, and releases what the moment held.
    pub async fn strike(&self, cell: Cell) {
        let child = |pid| processes::children(pid)[0];
        let victim = match cell.target {
            Target::Leader => self.leader,
            Target::Engine => child(self.leader),
            Target::Worker => child(child(self.leader)),
            Target::Guard => processes::parent(self.leader).unwrap(),
            Target::Supervisor => self.up.pid(),
        };
        send(victim, cell.signal);
        if cell.signal == Signal::SIGSEGV {
            // Rust's handler lets the first one pass: a real fault would come again at once.
            let dead = async || {
                send(victim, cell.signal);
                !processes::is_alive(victim)
            };
            until("dead of SIGSEGV", dead).await;
        }
        self.up.site.script("{}");
    }
}

pub fn leader(view: &Value) -> u32 {
    u32::try_from(view["pid"].as_u64().unwrap()).unwrap()
}

/// Waits for something that happens soon.
pub async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < HANG, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
