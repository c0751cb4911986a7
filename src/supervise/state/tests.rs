use proptest::prelude::*;

use super::super::gate::Obstacle;
use super::super::liveness::Canary;
use super::super::testing::plan;
use super::*;

const SECOND: Duration = Duration::from_secs(1);

pub(super) fn machine(role: Role) -> (Machine, Instant) {
    let now = Instant::now();
    (Machine::new(plan(), role, now), now)
}

fn taken() -> Event {
    Event::Gate(Some(Obstacle::Port(1)))
}

pub(super) fn start(machine: &mut Machine, now: Instant) {
    assert_eq!(machine.step(Event::Tick, now), [Action::CheckGate]);
    let actions = machine.step(Event::Gate(None), now);
    assert_eq!(actions, [Action::Spawn]);
}

pub(super) fn warm(machine: &mut Machine, now: Instant) {
    start(machine, now);
    let actions = machine.step(Event::Probe(Probe::Healthy), now);
    assert_eq!(actions, [Action::WarmUp]);
    machine.step(Event::Warm(Warmth::Warm), now);
}

pub(super) fn ready(role: Role) -> (Machine, Instant) {
    let (mut machine, now) = machine(role);
    warm(&mut machine, now);
    machine.step(Event::Proven, now);
    assert_eq!(machine.phase(), Phase::Ready);
    (machine, now)
}

#[test]
fn only_nodes_that_share_kv_are_verified() {
    let (mut unified, now) = machine(Role::Unified);
    warm(&mut unified, now);
    assert_eq!(unified.phase(), Phase::Ready);
    let (mut decode, now) = machine(Role::Decode);
    warm(&mut decode, now);
    assert_eq!(decode.phase(), Phase::Verifying);
    decode.step(Event::Unpaired, now);
    assert_eq!(decode.phase(), Phase::Ready);
    assert_eq!(decode.trust(), &KvTrust::Unproven);
    decode.step(Event::Proven, now);
    assert_eq!(decode.trust(), &KvTrust::Proven);
}

#[test]
fn an_exit_leaves_ready_at_once_and_nothing_starts_before_the_tree_is_gone() {
    let (mut node, now) = ready(Role::Decode);
    assert_eq!(node.step(Event::Exited("x".into()), now), []);
    assert_eq!(
        node.phase(),
        Phase::Backoff {
            delay: Duration::ZERO
        }
    );
    assert_eq!(node.trust(), &KvTrust::Unproven);
    assert_eq!(node.step(Event::Tick, now + SECOND), []);
    node.step(Event::Reaped(None), now + SECOND);
    start(&mut node, now + SECOND);
    assert_eq!(node.restarts(), 1);
}

#[test]
fn a_miss_is_not_a_death_but_503_is() {
    let (mut node, now) = ready(Role::Unified);
    assert_eq!(node.step(Event::Probe(Probe::Miss), now), []);
    assert_eq!(node.phase(), Phase::Unreachable);
    node.step(Event::Probe(Probe::Healthy), now);
    assert_eq!(node.phase(), Phase::Ready);
    let actions = node.step(Event::Probe(Probe::EngineDead), now);
    assert_eq!(actions, [Action::Kill]);
}

#[test]
fn silence_alone_is_no_death_but_an_unanswered_canary_is() {
    let (mut node, start) = ready(Role::Unified);
    let mut asked = None;
    let mut now = start;
    loop {
        now = node.deadline().unwrap().max(now);
        let actions = node.step(Event::Tick, now);
        if actions.contains(&Action::Kill) {
            break;
        }
        if actions.contains(&Action::Canary) {
            asked = Some(now);
        }
        if actions.contains(&Action::Probe) {
            node.step(Event::Probe(Probe::Late), now);
        }
        if actions.contains(&Action::Pulse) {
            node.step(Event::Pulse(None), now);
        }
    }
    assert!(now >= asked.unwrap() + plan().hang_timeout);
    assert!(node.reason().unwrap().contains("one token"));
}

#[test]
fn answered_canaries_and_late_probes_never_restart_a_node() {
    for role in [Role::Unified, Role::Decode] {
        let (mut node, start) = machine(role);
        warm(&mut node, start);
        let mut now = start;
        while now < start + plan().hang_timeout * 20 {
            now = node.deadline().unwrap().max(now);
            for action in node.step(Event::Tick, now) {
                let answer = match action {
                    Action::Probe => Event::Probe(Probe::Late),
                    Action::Pulse => Event::Pulse(None),
                    Action::Canary => Event::Canary(Canary::Answered),
                    other => panic!("{other:?}"),
                };
                assert_eq!(node.step(answer, now), []);
            }
        }
    }
}

#[test]
fn late_answers_take_a_node_out_only_when_they_go_on() {
    let (mut node, now) = ready(Role::Unified);
    for _ in 0..2 {
        for _ in 1..LATE_PROBES {
            assert_eq!(node.step(Event::Probe(Probe::Late), now), []);
            assert_eq!(node.phase(), Phase::Ready);
        }
        node.step(Event::Probe(Probe::Healthy), now);
    }
    for _ in 0..LATE_PROBES {
        node.step(Event::Probe(Probe::Late), now);
    }
    assert_eq!(node.phase(), Phase::Unreachable);
    node.step(Event::Probe(Probe::Healthy), now);
    assert_eq!(node.phase(), Phase::Ready);
}

fn extended(progress: impl Fn(u64) -> Event) {
    let (mut node, start_at) = machine(Role::Unified);
    start(&mut node, start_at);
    let limit = plan().start_timeout;
    let mut now = start_at + limit - SECOND;
    node.step(progress(1), now);
    assert_eq!(node.phase(), Phase::Starting);
    let actions = node.step(Event::Tick, start_at + limit);
    assert!(!actions.contains(&Action::Kill), "not extended");
    for turn in 2.. {
        node.step(progress(turn), now);
        now += SECOND * 60;
        if node.step(Event::Tick, now).contains(&Action::Kill) {
            break;
        }
    }
    assert!(now >= start_at + limit * START_EXTENSIONS);
    assert!(now < start_at + limit * (START_EXTENSIONS + 1), "for ever");
}

#[test]
fn progress_extends_the_start_but_not_for_ever() {
    extended(|_| Event::LogGrew);
    extended(|turn| Event::Memory(turn * MEMORY_STEP));
}

#[test]
fn memory_that_stays_is_no_progress() {
    let (mut node, now) = machine(Role::Unified);
    start(&mut node, now);
    node.step(Event::Memory(MEMORY_STEP * 9), now);
    let end = now + plan().start_timeout;
    for bytes in [MEMORY_STEP * 2, MEMORY_STEP * 10 - 1] {
        node.step(Event::Memory(bytes), end - SECOND);
    }
    assert!(node.step(Event::Tick, end).contains(&Action::Kill));
}

#[test]
fn a_warm_up_that_does_not_end_is_a_death_after_no_more_than_the_start_may_take() {
    let patient = plan().start_timeout;
    assert!(patient > WARM_UP_LIMIT);
    for (start_timeout, limit) in [(patient, WARM_UP_LIMIT), (SECOND * 20, SECOND * 20)] {
        let plan = SupervisorPlan {
            start_timeout,
            ..plan()
        };
        let begin = Instant::now();
        let mut node = Machine::new(plan, Role::Decode, begin);
        start(&mut node, begin);
        let warming = begin + SECOND * 3;
        node.step(Event::Probe(Probe::Healthy), warming);
        let mut now = warming;
        while node.phase() == Phase::WarmingUp {
            now = node.deadline().unwrap().max(now);
            if node.step(Event::Tick, now).contains(&Action::Probe) {
                node.step(Event::Probe(Probe::Late), now);
            }
        }
        assert_eq!(now, warming + limit);
        assert!(node.reason().unwrap().contains("warm-up"));
    }
}

#[test]
fn a_hopeless_death_is_not_retried() {
    let (mut node, now) = machine(Role::Unified);
    start(&mut node, now);
    node.step(Event::Exited("code 2".into()), now);
    let obituary = Obituary {
        text: "unrecognized".into(),
        mendable: Mendable::Never,
    };
    node.step(Event::Reaped(Some(obituary)), now);
    assert_eq!(node.phase(), Phase::Failed);
    assert_eq!(node.reason(), Some("unrecognized"));
    assert_eq!(node.deadline(), None);
}

#[test]
fn a_hopeless_last_word_counts_only_before_the_node_was_healthy() {
    use super::super::obituary::{End, Exit, write};
    let obituary = || {
        let tail = ["FileNotFoundError: [Errno 2] No such file or directory: '/x'".to_owned()];
        let end = End {
            exit: Exit::Code(1),
            out_of_memory: false,
        };
        let obituary = write(end, &tail);
        assert_eq!(obituary.mendable, Mendable::Never);
        Event::Reaped(Some(obituary))
    };
    let (mut node, now) = ready(Role::Decode);
    node.step(Event::Exited("code 1".into()), now);
    node.step(obituary(), now);
    start(&mut node, now);
    assert_eq!(node.phase(), Phase::Starting);
    assert_eq!(node.restarts(), 1);
    let (mut node, now) = machine(Role::Decode);
    start(&mut node, now);
    node.step(Event::Exited("code 1".into()), now);
    node.step(obituary(), now);
    assert_eq!(node.phase(), Phase::Failed);
}

#[test]
fn a_refused_node_is_stopped_and_says_why() {
    let (mut node, now) = machine(Role::Decode);
    warm(&mut node, now);
    let actions = node.step(Event::Refused("differs".into()), now);
    assert_eq!(actions, [Action::Stop(plan().stop_grace)]);
    assert_eq!(node.phase(), Phase::Failed);
    node.step(Event::Exited("code 0".into()), now);
    node.step(Event::Reaped(None), now);
    assert_eq!(node.phase(), Phase::Failed);
    assert_eq!(node.trust(), &KvTrust::Refused("differs".into()));
}

#[test]
fn a_stop_escalates_to_the_guard_and_then_gives_up() {
    let (mut node, mut now) = ready(Role::Unified);
    let mut seen = node.step(Event::Stop, now);
    for _ in 0..3 {
        now = node.deadline().unwrap();
        seen.extend(node.step(Event::Tick, now));
    }
    let grace = plan().stop_grace;
    assert_eq!(seen, [Action::Stop(grace), Action::Kill, Action::KillGuard]);
    assert!(node.is_stopped());
}

#[test]
fn a_stolen_port_is_waited_for_and_then_counts_as_a_death() {
    let (mut node, mut now) = machine(Role::Unified);
    let mut checks = 0;
    while !matches!(node.phase(), Phase::Backoff { .. }) {
        for action in node.step(Event::Tick, now) {
            assert_eq!(action, Action::CheckGate);
            checks += 1;
            node.step(taken(), now);
        }
        now = node.deadline().unwrap().max(now);
        assert!(checks < 1000);
    }
    assert!(checks > 10);
    assert!(node.reason().unwrap().contains("port 1"));
    assert_eq!(
        node.phase(),
        Phase::Backoff {
            delay: Duration::ZERO
        }
    );
}

#[test]
fn what_a_stranger_keeps_of_a_gpu_delays_a_start_but_not_for_ever() {
    let (mut node, start) = machine(Role::Unified);
    let taken = Obstacle::Gpu {
        index: 3,
        excess: 5 << 30,
    };
    let mut now = start;
    loop {
        let actions = node.step(Event::Tick, now);
        assert_eq!(actions, [Action::CheckGate]);
        if node.step(Event::Gate(Some(taken.clone())), now) == [Action::Spawn] {
            break;
        }
        assert!(node.reason().unwrap().contains("5.0 GiB of GPU 3"));
        now = node.deadline().unwrap();
    }
    assert_eq!(now, start + taken.patience());
    assert_eq!((node.phase(), node.reason()), (Phase::Starting, None));
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => Just(Event::Tick),
        4 => Just(Event::Gate(None)),
        1 => Just(taken()),
        1 => Just(Event::Gate(Some(Obstacle::Session))),
        1 => Just(Event::Gate(Some(Obstacle::Gpu { index: 0, excess: 1 }))),
        1 => Just(Event::SpawnFailed("x".into())),
        1 => Just(Event::LogGrew),
        1 => (0u64..99).prop_map(|steps| Event::Memory(steps * MEMORY_STEP)),
        6 => Just(Event::Probe(Probe::Healthy)),
        1 => Just(Event::Probe(Probe::Miss)),
        1 => Just(Event::Probe(Probe::Late)),
        1 => Just(Event::Probe(Probe::EngineDead)),
        2 => Just(Event::Pulse(None)),
        1 => Just(Event::Canary(Canary::Answered)),
        1 => Just(Event::Canary(Canary::Late)),
        1 => Just(Event::Canary(Canary::Refused("x".into()))),
        4 => Just(Event::Warm(Warmth::Warm)),
        1 => Just(Event::Warm(Warmth::Failed("x".into()))),
        3 => Just(Event::Proven),
        1 => Just(Event::Vouched),
        1 => Just(Event::Unpaired),
        1 => Just(Event::Refused("x".into())),
        1 => Just(Event::Command(Command::Drain)),
        1 => Just(Event::Command(Command::Undrain)),
        1 => Just(Event::Command(Command::Restart { limit: SECOND * 60 })),
        2 => Just(Event::Idle),
        2 => Just(Event::Exited("x".into())),
        4 => Just(Event::Reaped(None)),
        1 => Just(Event::Reaped(Some(Obituary {
            text: "x".into(),
            mendable: Mendable::Never,
        }))),
    ]
}

proptest! {
    #[test]
    fn whatever_happens(
        role in prop_oneof![Just(Role::Prefill), Just(Role::Decode), Just(Role::Unified)],
        events in prop::collection::vec((event(), 0u64..200), 1..200),
        stop_at in 0usize..400,
    ) {
        let (mut node, mut now) = machine(role);
        // A model of the world: is there a tree, has its leader exited, was it ever healthy?
        let (mut tree, mut exited, mut healthy, mut stopped) = (false, false, false, false);
        let mut held = false;
        for (index, (event, seconds)) in events.into_iter().enumerate() {
            now += Duration::from_secs(seconds);
            let event = if index == stop_at { Event::Stop } else { event };
            // The world cannot report on what is not there.
            match &event {
                Event::Exited(_) if !tree || exited => continue,
                Event::Reaped(_) | Event::SpawnFailed(_) if !tree => continue,
                Event::Reaped(_) if !exited => {
                    node.step(Event::Exited("x".into()), now);
                }
                _ => {}
            }
            exited |= matches!(event, Event::Exited(_));
            healthy |= event == Event::Probe(Probe::Healthy);
            stopped |= event == Event::Stop;
            held |= event == Event::Command(Command::Drain);
            held &= event != Event::Command(Command::Undrain);
            if matches!(event, Event::Reaped(_)) {
                tree = false;
            }
            for action in node.step(event, now) {
                match action {
                    Action::Spawn => {
                        prop_assert!(!tree && !stopped);
                        (tree, exited, healthy) = (true, false, false);
                    }
                    Action::Stop(_) | Action::Kill | Action::KillGuard | Action::WarmUp => {
                        prop_assert!(tree);
                    }
                    Action::CheckGate => prop_assert!(!tree && !stopped),
                    Action::Probe | Action::Pulse | Action::Canary => {
                        prop_assert!(tree && !exited);
                    }
                }
            }
            let phase = node.phase();
            if phase == Phase::Ready {
                prop_assert!(tree && !exited && healthy && !stopped && !held);
            }
            if phase == Phase::Draining {
                prop_assert!(tree && !exited && healthy && !stopped);
            }
            prop_assert!(!node.awaits_idle() || phase == Phase::Draining);
            prop_assert!(node.accepts().is_ok() || stopped);
            if let Phase::Backoff { delay } = phase {
                prop_assert!(delay <= plan().backoff_max);
            }
            prop_assert_eq!(role == Role::Unified, *node.trust() == KvTrust::None);
            if matches!(node.trust(), KvTrust::Proven | KvTrust::Assumed) {
                prop_assert!(matches!(phase, Phase::Ready | Phase::Unreachable | Phase::Draining));
            }
            // The clock always leads somewhere, and never spins.
            match node.deadline() {
                None => prop_assert!(phase.is_terminal()),
                Some(at) => {
                    let at = at.max(now);
                    for action in node.step(Event::Tick, at) {
                        if action == Action::CheckGate {
                            node.step(taken(), at);
                        }
                    }
                    prop_assert!(node.deadline().is_none_or(|next| next >= at));
                    now = at;
                }
            }
        }
    }
}
