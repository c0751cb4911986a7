mod fakes;

use std::net::SocketAddr;

use crate::fleet::FleetPublisher;

use super::*;

const GRACE: Duration = Duration::from_secs(60);

fn fleet(nodes: &[(&str, Role, Phase, KvTrust)]) -> FleetSnapshot {
    let addr = SocketAddr::from(([127, 0, 0, 1], 1));
    let views = nodes.iter().map(|(name, role, phase, trust)| {
        let mut view = NodeView::pending((*name).into(), *role, addr);
        view.phase = phase.clone();
        view.trust = trust.clone();
        view
    });
    (*FleetPublisher::new(views).snapshot()).clone()
}

fn step(fleet: &FleetSnapshot, grace: Duration) -> Step {
    next_step(fleet, grace, |_, _| None)
}

#[test]
fn an_unproven_pair_is_examined_and_a_proven_partner_is_preferred() {
    let fleet = fleet(&[
        ("d", Role::Decode, Phase::Verifying, KvTrust::Unproven),
        ("p0", Role::Prefill, Phase::Verifying, KvTrust::Unproven),
        ("p1", Role::Prefill, Phase::Ready, KvTrust::Proven),
    ]);
    let Step::Examine(pair) = step(&fleet, GRACE) else {
        panic!("nothing to examine");
    };
    assert_eq!(pair.0.id.as_str(), "p1");
    assert_eq!(pair.1.id.as_str(), "d");
}

#[test]
fn a_proven_pair_is_left_alone() {
    let fleet = fleet(&[
        ("d", Role::Decode, Phase::Ready, KvTrust::Proven),
        ("p", Role::Prefill, Phase::Ready, KvTrust::Proven),
    ]);
    assert!(matches!(step(&fleet, GRACE), Step::Wait(None)));
}

#[test]
fn a_node_waits_for_a_partner_that_may_come_but_not_for_a_dead_one() {
    let waiting = |phase| {
        fleet(&[
            ("d", Role::Decode, Phase::Verifying, KvTrust::Unproven),
            ("p", Role::Prefill, phase, KvTrust::Unproven),
        ])
    };
    let starting = waiting(Phase::Starting);
    assert!(matches!(step(&starting, GRACE), Step::Wait(Some(_))));
    assert!(matches!(step(&starting, Duration::ZERO), Step::Unpaired(_)));
    let failed = waiting(Phase::Failed);
    assert!(matches!(step(&failed, GRACE), Step::Unpaired(_)));
}

#[test]
fn partners_are_of_one_pool() {
    let nodes = [
        ("d0", Role::Decode, "a"),
        ("d1", Role::Decode, "b"),
        ("p0", Role::Prefill, "a"),
        ("p1", Role::Prefill, "b"),
    ];
    let addr = SocketAddr::from(([127, 0, 0, 1], 1));
    let views = nodes.map(|(name, role, pool)| {
        let mut view = NodeView::pending(name.into(), role, addr).in_pool(pool);
        let late = name == "p0";
        view.phase = if late {
            Phase::Starting
        } else {
            Phase::Verifying
        };
        view
    });
    let fleet = FleetPublisher::new(views).snapshot();
    let Step::Examine(pair) = step(&fleet, GRACE) else {
        panic!("nothing to examine");
    };
    assert_eq!((pair.0.id.as_str(), pair.1.id.as_str()), ("p1", "d1"));
}

#[test]
fn a_blocked_pair_is_looked_at_again_in_time() {
    let fleet = fleet(&[
        ("d", Role::Decode, Phase::Verifying, KvTrust::Unproven),
        ("p", Role::Prefill, Phase::Verifying, KvTrust::Unproven),
    ]);
    let step = next_step(&fleet, GRACE, |_, _| Some(GRACE));
    assert!(matches!(step, Step::Wait(Some(wait)) if wait == GRACE));
}
