//! What goes wrong: a script that changes all the time, and kills.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::RngExt;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::NODES;
use crate::kills::{Victim, find};
use crate::support::{Pegaflow, Site, send};

const VICTIMS: [Victim; 4] = [
    Victim::Leader,
    Victim::Engine,
    Victim::Worker,
    Victim::Guard,
];
/// Milliseconds between two changes of the script.
const CHANGES: Range<u64> = 150..450;
/// Of a node without one, at each change.
const FAULT: f64 = 0.2;
/// Milliseconds; the longest outlive the router's timeouts.
const LASTS: Range<u64> = 200..3000;

/// What goes wrong at a node for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    Refuse,
    Reset,
    Hang,
    Error,
    /// Before the first token, each next one, the computation, the write, the read.
    SlowFirst,
    SlowTokens,
    SlowPrefill,
    SlowSave,
    SlowLoad,
    /// Work stands still there, with requests in it.
    HoldPrefill,
    HoldSave,
    HoldLoad,
    HoldDecode,
    /// `/health` is not answered.
    Deaf,
}

const FAULTS: [Fault; 14] = [
    Fault::Refuse,
    Fault::Reset,
    Fault::Hang,
    Fault::Error,
    Fault::SlowFirst,
    Fault::SlowTokens,
    Fault::SlowPrefill,
    Fault::SlowSave,
    Fault::SlowLoad,
    Fault::HoldPrefill,
    Fault::HoldSave,
    Fault::HoldLoad,
    Fault::HoldDecode,
    Fault::Deaf,
];

impl Fault {
    fn script(self, rng: &mut StdRng) -> Value {
        let probability = rng.random_range(0.2..1.0);
        let fail = |kind: &str| json!({"fail": {"kind": kind, "probability": probability}});
        let millis = rng.random_range(100..1500);
        match self {
            Self::Refuse => fail("refuse"),
            Self::Reset => fail("reset"),
            Self::Hang => fail("hang"),
            Self::Error => fail("500"),
            Self::SlowFirst => json!({"ttft_ms": millis}),
            Self::SlowTokens => json!({"itl_ms": millis / 5}),
            Self::SlowPrefill => json!({"prefill_ms": millis}),
            Self::SlowSave => json!({"save_ms": millis}),
            Self::SlowLoad => json!({"load_ms": millis}),
            Self::HoldPrefill => json!({"hold": ["prefill"]}),
            Self::HoldSave => json!({"hold": ["save"]}),
            Self::HoldLoad => json!({"hold": ["load"]}),
            Self::HoldDecode => json!({"hold": ["decode"]}),
            Self::Deaf => json!({"health": "hang"}),
        }
    }
}

/// The script without faults.
pub(super) fn calm() -> Value {
    json!({"itl_ms": 20, "prefill_ms": 10})
}

/// The script's changes.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub(super) begun: BTreeMap<Fault, u64>,
    /// By node, and until when.
    now: BTreeMap<&'static str, (Value, Instant)>,
}

impl Faults {
    /// Changes the script until then, and leaves it calm.
    pub(super) async fn play(&mut self, site: &Site, mut rng: StdRng, until: Instant) {
        while Instant::now() < until {
            self.change(&mut rng);
            let mut script = calm();
            for (node, (fault, _)) in &self.now {
                script["nodes"][node] = fault.clone();
            }
            site.script(&script.to_string());
            pause(rng.random_range(CHANGES), until).await;
        }
        site.script(&calm().to_string());
    }

    fn change(&mut self, rng: &mut StdRng) {
        let now = Instant::now();
        self.now.retain(|_, (_, end)| *end > now);
        for node in NODES {
            // Always as many numbers, so that a seed means the same in every run.
            let (draw, fault) = (
                rng.random::<f64>(),
                FAULTS[rng.random_range(0..FAULTS.len())],
            );
            let (script, lasts) = (fault.script(rng), rng.random_range(LASTS));
            if draw < FAULT && !self.now.contains_key(node) {
                *self.begun.entry(fault).or_default() += 1;
                let end = now + Duration::from_millis(lasts);
                self.now.insert(node, (script, end));
            }
        }
    }
}

/// Processes that were killed, by kind.
#[derive(Debug, Default)]
pub(super) struct Kills {
    pub(super) done: BTreeMap<String, u64>,
}

impl Kills {
    pub(super) async fn play(
        &mut self,
        up: &Pegaflow<'_>,
        mut rng: StdRng,
        until: Instant,
        every: Range<u64>,
    ) {
        loop {
            pause(rng.random_range(every.clone()), until).await;
            if Instant::now() >= until {
                return;
            }
            let node = NODES[rng.random_range(0..NODES.len())];
            let victim = VICTIMS[rng.random_range(0..VICTIMS.len())];
            let leader = up.node(node).await["pid"].as_u64();
            let leader = leader.and_then(|pid| u32::try_from(pid).ok());
            // It may be dead already, have no engine yet, or have lost its guard: then its parent is pegaflow.
            // The processes that are here are remembered, so that what they leave is found.
            let here = up.site.processes();
            let pid = leader.and_then(|leader| find(victim, leader));
            if let Some(pid) = pid.filter(|pid| *pid != up.pid() && here.contains(pid)) {
                send(pid, Signal::SIGKILL);
                *self.done.entry(format!("{victim:?}")).or_default() += 1;
            }
        }
    }
}

async fn pause(millis: u64, until: Instant) {
    let end = (Instant::now() + Duration::from_millis(millis)).min(until);
    tokio::time::sleep_until(end.into()).await;
}
