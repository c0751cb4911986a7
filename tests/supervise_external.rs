//! Nodes that others started: looked at, and drained, over real sockets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::time::Duration;

use pegaflow::fleet::{FleetPublisher, FleetWatch, NodeId, Phase, Role};
use pegaflow::handoff::HandoffBoard;
use pegaflow::notify::Vitals;
use pegaflow::plan::ExternalNode;
use pegaflow::reach::Reaches;
use pegaflow::supervise::{Command, ExternalDeps, Refusal, orders, watch_external};
use pegaflow::traffic::Traffic;
use support_router::*;
use tokio_util::sync::CancellationToken;

async fn phase_is(watch: &mut FleetWatch, id: &NodeId, phase: Phase) {
    let there = watch.wait_for(|fleet| fleet.node(id).unwrap().phase == phase);
    soon("a phase", there).await.unwrap();
}

#[tokio::test]
async fn one_that_is_drained_gets_nothing_new_and_is_not_restarted() {
    let board = HandoffBoard::default();
    let fake = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let addr = fake.addr;
    let node = ExternalNode {
        id: "far".into(),
        role: Role::Unified,
        pool: "default".to_owned(),
        weight: 1,
        url: format!("http://{addr}").parse().unwrap(),
        key_file: None,
        ca_file: None,
    };
    let id = node.id.clone();
    let fleet = FleetPublisher::new([node.view()]);
    let mut watch = fleet.watch();
    let (orders, desk) = orders([&id].into_iter());
    let end = CancellationToken::new();
    let deps = ExternalDeps {
        health_interval: Duration::from_millis(20),
        fleet,
        traffic: Traffic::default(),
        orders: desk,
        reaches: Reaches::default(),
        vitals: Vitals::default(),
    };
    let watching = tokio::spawn(watch_external(vec![node], deps, end.clone()));
    phase_is(&mut watch, &id, Phase::Ready).await;
    assert_eq!(watch.now().node(&id).unwrap().models[..], ["tiny"]);

    orders.give(&id, Command::Drain).await.unwrap();
    phase_is(&mut watch, &id, Phase::Draining).await;
    // Looks go on, and do not make it ready.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(watch.now().node(&id).unwrap().phase, Phase::Draining);
    let limit = Duration::from_secs(1);
    let refused = orders.give(&id, Command::Restart { limit }).await;
    assert_eq!(refused, Err(Refusal::Others));
    drop(fake);
    phase_is(&mut watch, &id, Phase::Down).await;
    let back = Fake::at(addr, &board, |_, _| (Kv::Nothing, Answer::Tokens)).await;
    phase_is(&mut watch, &id, Phase::Draining).await;
    orders.give(&id, Command::Undrain).await.unwrap();
    phase_is(&mut watch, &id, Phase::Ready).await;
    assert_eq!(watch.now().node(&id).unwrap().incarnation, 2);

    end.cancel();
    soon("the watch to end", watching).await.unwrap();
    drop(back);
}
