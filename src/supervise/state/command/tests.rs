use std::time::{Duration, Instant};

use crate::fleet::{KvTrust, Phase, Role};

use super::super::super::testing::plan;
use super::super::tests::{machine, ready, start, warm};
use super::super::{Action, Event, Machine, Probe};
use super::{Command, Refusal};

const LIMIT: Duration = Duration::from_secs(30);
const RESTART: Event = Event::Command(Command::Restart { limit: LIMIT });
const DRAIN: Event = Event::Command(Command::Drain);
const UNDRAIN: Event = Event::Command(Command::Undrain);

fn stop() -> [Action; 1] {
    [Action::Stop(plan().stop_grace)]
}

/// The leader ends, and everything else with it.
fn gone(node: &mut Machine, now: Instant) {
    node.step(Event::Exited("x".into()), now);
    node.step(Event::Reaped(None), now);
}

#[test]
fn a_restart_waits_for_the_last_request_and_is_no_death() {
    let (mut node, now) = ready(Role::Decode);
    assert_eq!(node.step(RESTART, now), []);
    assert_eq!(node.phase(), Phase::Draining);
    assert_eq!(node.trust(), &KvTrust::Proven, "it loads what it was sent");
    assert!(node.awaits_idle());
    assert_eq!(node.step(Event::Idle, now), stop());
    assert_eq!(node.phase(), Phase::Stopping);
    assert_eq!(node.trust(), &KvTrust::Unproven);
    gone(&mut node, now);
    assert_eq!(node.phase(), Phase::Pending, "at once, however often");
    start(&mut node, now);
    assert_eq!(node.restarts(), 1);
}

#[test]
fn a_restart_waits_no_longer_than_it_was_told() {
    let (mut node, now) = ready(Role::Unified);
    node.step(RESTART, now);
    let mut at = now;
    loop {
        let next = node.deadline().unwrap();
        assert!(next <= now + LIMIT);
        at = at.max(next);
        let actions = node.step(Event::Tick, at);
        if actions == stop() {
            break;
        }
        node.step(Event::Probe(Probe::Healthy), at);
    }
    assert_eq!(at, now + LIMIT);
}

#[test]
fn a_node_that_serves_nobody_yet_is_restarted_at_once() {
    let (mut starting, now) = machine(Role::Decode);
    start(&mut starting, now);
    assert_eq!(starting.step(RESTART, now), stop());
    let (mut verifying, now) = machine(Role::Decode);
    warm(&mut verifying, now);
    assert_eq!(verifying.step(RESTART, now), stop());
}

#[test]
fn a_restart_clears_a_crash_loop_and_its_history() {
    let (mut node, now) = machine(Role::Unified);
    for _ in 0..2 {
        let mut deaths = 0;
        while node.phase() != Phase::CrashLoop {
            let at = node.deadline().unwrap().max(now);
            node.step(Event::Tick, at);
            node.step(Event::Gate(None), at);
            gone(&mut node, at);
            deaths += 1;
        }
        assert_eq!(deaths, plan().crash_limit, "as many as a new node");
        assert_eq!(node.deadline(), None);
        assert_eq!(node.step(RESTART, now), []);
        assert_eq!(node.phase(), Phase::Pending);
    }
}

#[test]
fn a_refused_node_may_be_tried_again() {
    let (mut node, now) = machine(Role::Decode);
    warm(&mut node, now);
    node.step(Event::Refused("differs".into()), now);
    node.step(RESTART, now);
    gone(&mut node, now);
    start(&mut node, now);
    assert_eq!(node.trust(), &KvTrust::Unproven);
}

#[test]
fn a_backoff_is_cut_short() {
    let (mut node, now) = ready(Role::Unified);
    for _ in 0..2 {
        gone(&mut node, now);
        let at = node.deadline().unwrap().max(now);
        if at > now {
            break;
        }
        node.step(Event::Tick, at);
        node.step(Event::Gate(None), at);
    }
    assert!(matches!(node.phase(), Phase::Backoff { delay } if delay > Duration::ZERO));
    node.step(RESTART, now);
    assert_eq!((node.phase(), node.deadline()), (Phase::Pending, Some(now)));
}

#[test]
fn a_drain_outlives_deaths_and_restarts_until_it_is_taken_back() {
    let (mut node, now) = ready(Role::Unified);
    node.step(DRAIN, now);
    assert_eq!(node.phase(), Phase::Draining);
    assert!(!node.awaits_idle(), "idle is what it is meant to be");
    assert_eq!(node.step(Event::Idle, now), []);
    for again in [false, true] {
        if again {
            node.step(RESTART, now);
            node.step(Event::Idle, now);
        }
        gone(&mut node, now);
        warm(&mut node, now);
        assert_eq!(node.phase(), Phase::Draining);
    }
    node.step(UNDRAIN, now);
    assert_eq!(node.phase(), Phase::Ready);
}

#[test]
fn a_drained_node_that_does_not_answer_is_unreachable_when_it_comes_back() {
    let (mut node, now) = ready(Role::Unified);
    node.step(DRAIN, now);
    node.step(Event::Probe(Probe::Miss), now);
    assert_eq!(node.phase(), Phase::Draining);
    node.step(UNDRAIN, now);
    assert_eq!(node.phase(), Phase::Unreachable);
    node.step(DRAIN, now);
    node.step(Event::Probe(Probe::Healthy), now);
    node.step(UNDRAIN, now);
    assert_eq!(node.phase(), Phase::Ready);
}

#[test]
fn a_node_that_stops_takes_no_commands() {
    let (mut node, now) = ready(Role::Unified);
    node.step(Event::Stop, now);
    assert_eq!(node.accepts(), Err(Refusal::Stopping));
    assert_eq!(node.step(RESTART, now), []);
    gone(&mut node, now);
    assert!(node.is_stopped());
    assert_eq!(node.accepts(), Err(Refusal::Stopping));
}

#[test]
fn a_shutdown_ends_a_restart_that_is_under_way() {
    let (mut node, now) = ready(Role::Unified);
    node.step(RESTART, now);
    node.step(Event::Idle, now);
    node.step(Event::Stop, now);
    gone(&mut node, now);
    assert!(node.is_stopped());
}
