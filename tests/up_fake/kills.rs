//! `kill -9` of each process of a node under load.

use std::time::Duration;

use nix::sys::signal::Signal;

use crate::support::client::is_proven;
use crate::support::load::{Load, check, mixed};
use crate::support::{Site, processes, send};

/// One process of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    Leader,
    Engine,
    Worker,
    Guard,
}

pub fn pid_of(victim: Victim, leader: u32) -> u32 {
    find(victim, leader).unwrap()
}

/// None: there is no such process now.
pub fn find(victim: Victim, leader: u32) -> Option<u32> {
    let child = |pid| processes::children(pid).first().copied();
    match victim {
        Victim::Leader => Some(leader),
        Victim::Engine => child(leader),
        Victim::Worker => child(child(leader)?),
        Victim::Guard => processes::parent(leader),
    }
}

async fn kill_under_load(node: &str, victim: Victim) {
    let site = Site::new();
    site.script(r#"{"itl_ms": 5, "prefill_ms": 20}"#);
    let up = site.up_ready().await;
    let requests = mixed(&up, 12, 24).await;
    let load = Load::start(&up, &requests, 8);
    tokio::time::sleep(Duration::from_millis(400)).await;

    let view = up.wait_for_node(node, is_proven).await;
    let incarnation = view["incarnation"].as_u64().unwrap();
    let leader = u32::try_from(view["pid"].as_u64().unwrap()).unwrap();
    let old = processes::tree(leader);
    assert!(old.len() >= 3, "leader, engine and worker: {old:?}");
    site.processes();
    send(pid_of(victim, leader), Signal::SIGKILL);

    let back = |view: &serde_json::Value| {
        is_proven(view) && view["incarnation"].as_u64() > Some(incarnation)
    };
    up.wait_for_node(node, back).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    let answers = load.finish().await;
    // Streams go on at another node.
    check(&answers);
    assert!(
        answers.len() >= 30,
        "only {} requests: no load",
        answers.len()
    );

    let alive: Vec<_> = old
        .iter()
        .copied()
        .filter(|pid| processes::is_alive(*pid))
        .collect();
    assert!(
        alive.is_empty(),
        "{:?}",
        alive.iter().map(|pid| processes::describe(*pid))
    );
    assert_eq!(processes::shm_of(&old), Vec::<String>::new());
    up.stop().await;
}

macro_rules! kill_tests {
    ($($name:ident: $node:literal, $victim:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            kill_under_load($node, Victim::$victim).await;
        }
    )*};
}

kill_tests! {
    killed_prefill_leader_loses_nothing_and_returns: "prefill", Leader;
    killed_prefill_engine_loses_nothing_and_returns: "prefill", Engine;
    killed_prefill_worker_loses_nothing_and_returns: "prefill", Worker;
    killed_prefill_guard_loses_nothing_and_returns: "prefill", Guard;
    killed_decode_leader_loses_nothing_and_returns: "decode", Leader;
    killed_decode_engine_loses_nothing_and_returns: "decode", Engine;
    killed_decode_worker_loses_nothing_and_returns: "decode", Worker;
    killed_decode_guard_loses_nothing_and_returns: "decode", Guard;
}
