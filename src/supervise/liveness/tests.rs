use proptest::prelude::*;

use super::super::testing::plan;
use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn liveness() -> (Liveness, Instant) {
    let now = Instant::now();
    (Liveness::new(&plan(), now), now)
}

fn pulse(running: f64, tokens: f64) -> Option<Pulse> {
    let mut figures = [0.0; FIGURES.len()];
    figures[1] = tokens;
    Some(Pulse { running, figures })
}

#[test]
fn a_pulse_is_read_from_prometheus_text() {
    let text = "# TYPE vllm:num_requests_running gauge\n\
        vllm:num_requests_running{engine=\"0\",model_name=\"a}b\"} 2.0\n\
        vllm:num_requests_running{engine=\"1\",model_name=\"x\"} 1.0\n\
        vllm:generation_tokens_total{engine=\"0\"} 7.0\n\
        vllm:generation_tokens_created{engine=\"0\"} 1.7e9\n";
    let read = Pulse::parse(text).unwrap();
    assert_eq!(read.running, 3.0);
    let more = text.replace("7.0", "8.0");
    assert_ne!(Pulse::parse(&more).unwrap().figures, read.figures);
    let later = text.replace("1.7e9", "1.8e9");
    assert_eq!(Pulse::parse(&later).unwrap(), read);
    assert_eq!(Pulse::parse("vllm:num_requests_running_x 3\n"), None);
    assert_eq!(metric("a 1\nb{x=\"y\"} 2\nb 3\n", "b"), Some(5.0));
}

#[test]
fn running_requests_whose_counters_stand_still_are_a_hang() {
    let (mut node, start) = liveness();
    let limit = plan().hang_timeout;
    let mut now = start;
    while now < start + limit {
        assert_eq!(node.pulse(pulse(3.0, 9.0), now), Ok(()));
        assert_eq!(node.check(now).unwrap_or_default().get(1), None);
        now += SECOND;
    }
    let cause = node.pulse(pulse(3.0, 9.0), now).unwrap_err();
    assert!(cause.contains("3 requests"), "{cause}");
}

#[test]
fn requests_that_come_and_go_are_no_sign_of_life() {
    let (mut node, start) = liveness();
    node.pulse(pulse(0.0, 9.0), start).unwrap();
    let mut now = start;
    let mut requests = 0;
    while node.check(now).is_ok() {
        now += SECOND;
        requests = 1 - requests;
        node.pulse(pulse(f64::from(requests), 9.0), now).unwrap();
        assert!(now < start + plan().hang_timeout * 2);
    }
}

#[test]
fn a_server_that_was_deaf_for_long_is_not_hung_for_what_it_first_says_again() {
    let (mut node, mut now) = liveness();
    assert_eq!(node.pulse(pulse(3.0, 9.0), now), Ok(()));
    now += plan().hang_timeout * 10;
    assert_eq!(node.pulse(pulse(3.0, 9.0), now), Ok(()));
    now += SECOND;
    assert_eq!(node.pulse(pulse(3.0, 10.0), now), Ok(()));
}

#[test]
fn an_idle_node_is_asked_and_one_that_does_not_answer_is_dead() {
    let (mut node, start) = liveness();
    let every = plan().idle_canary.unwrap();
    node.pulse(pulse(0.0, 9.0), start).unwrap();
    assert_eq!(node.check(start + every - SECOND), Ok(vec![Ask::Pulse]));
    let asked = start + every;
    node.pulse(pulse(0.0, 9.0), asked).unwrap();
    assert_eq!(node.check(asked), Ok(vec![Ask::Canary]));
    let limit = plan().hang_timeout;
    let early = node.check(asked + limit - SECOND);
    assert_eq!(early, Ok(vec![Ask::Pulse]));
    assert!(node.check(asked + limit).is_err());
}

#[test]
fn an_answered_canary_is_followed_by_the_next_after_its_interval() {
    let (mut node, start) = liveness();
    let every = plan().idle_canary.unwrap();
    node.check(start + every).unwrap();
    let answered = start + every + SECOND;
    node.canary(Canary::Answered, answered).unwrap();
    node.pulse(None, answered).unwrap();
    assert_eq!(node.canary_at(), Some(answered + every));
}

#[test]
fn a_node_that_no_canary_reaches_is_dead_in_time_however_often_it_is_asked() {
    let (mut node, start) = liveness();
    let asked = start + plan().idle_canary.unwrap();
    let mut now = asked;
    while node.check(now).is_ok() {
        node.pulse(None, now).unwrap();
        if node.in_flight {
            node.canary(Canary::Late, now).unwrap();
        }
        now += SECOND;
        assert!(now <= asked + plan().hang_timeout);
    }
    assert_eq!(now, asked + plan().hang_timeout);
}

#[test]
fn a_canary_that_waits_behind_a_rush_is_no_hang() {
    let (mut node, start) = liveness();
    let (every, limit) = (plan().idle_canary.unwrap(), plan().hang_timeout);
    let asked = start + every;
    assert!(node.check(asked).unwrap().contains(&Ask::Canary));
    let mut now = asked;
    for tokens in 0..1000 {
        now += SECOND;
        node.pulse(pulse(99.0, f64::from(tokens)), now).unwrap();
        assert!(node.check(now).is_ok());
    }
    assert!(now > asked + limit);
    // Its call ends at last; nobody holds that against the node.
    node.canary(Canary::Late, now).unwrap();
}

#[test]
fn refusals_count_in_a_row_and_are_soon_repeated() {
    let (mut node, mut now) = liveness();
    let refused = || Canary::Refused("HTTP 500".into());
    node.canary(refused(), now).unwrap();
    node.canary(refused(), now).unwrap();
    node.canary(Canary::Answered, now).unwrap();
    for _ in 1..REFUSALS {
        node.canary(refused(), now).unwrap();
        now += ASK_AGAIN;
        assert!(node.check(now).unwrap().contains(&Ask::Canary));
    }
    let cause = node.canary(refused(), now).unwrap_err();
    assert!(cause.contains("HTTP 500"), "{cause}");
}

#[test]
fn without_canaries_only_a_silent_node_is_asked() {
    let now = Instant::now();
    let quiet = SupervisorPlan {
        idle_canary: None,
        ..plan()
    };
    let mut node = Liveness::new(&quiet, now);
    let later = now + quiet.hang_timeout * 5;
    node.pulse(pulse(0.0, 1.0), later).unwrap();
    assert_eq!(node.check(later), Ok(vec![]));
    let silent = later + quiet.hang_timeout;
    assert!(node.check(silent).unwrap().contains(&Ask::Canary));
    assert!(node.check(silent + quiet.hang_timeout).is_err());
}

proptest! {
    /// A node that is seen to make progress now and then, however late or seldom it answers, and
    /// whatever becomes of its canaries, short of refusing them, is never called dead.
    #[test]
    fn who_makes_progress_is_never_dead(
        steps in prop::collection::vec((1u64..9, 0u32..4, any::<bool>()), 1..300),
        busy in any::<bool>(),
    ) {
        let (mut node, mut now) = liveness();
        let mut progressed = now;
        let mut tokens = 0.0;
        for (seconds, kind, late) in steps {
            now += SECOND * u32::try_from(seconds).unwrap();
            if kind == 0 || now - progressed > plan().hang_timeout / 2 {
                tokens += 1.0;
                progressed = now;
                prop_assert_eq!(node.pulse(pulse(f64::from(u8::from(busy)), tokens), now), Ok(()));
            } else if kind == 1 {
                prop_assert_eq!(node.pulse(None, now), Ok(()));
            } else {
                prop_assert_eq!(node.pulse(pulse(f64::from(u8::from(busy)), tokens), now), Ok(()));
            }
            prop_assert!(node.check(now).is_ok());
            if late && node.in_flight {
                prop_assert_eq!(node.canary(Canary::Late, now), Ok(()));
            }
        }
    }

    /// A node that never says anything again is dead within a bounded time.
    #[test]
    fn who_stays_silent_is_dead_in_time(running in 0u8..3, every in prop::option::of(1u64..60)) {
        let now = Instant::now();
        let plan = SupervisorPlan { idle_canary: every.map(Duration::from_secs), ..plan() };
        let mut node = Liveness::new(&plan, now);
        node.pulse(pulse(f64::from(running), 5.0), now).unwrap();
        let patience = plan.idle_canary.unwrap_or(plan.hang_timeout) + plan.hang_timeout;
        let mut at = now;
        loop {
            at = node.deadline().unwrap().max(at);
            prop_assert!(at <= now + patience);
            match node.check(at) {
                Err(_) => break,
                Ok(asks) if asks.contains(&Ask::Pulse) => node.pulse(None, at).unwrap(),
                Ok(_) => {}
            }
        }
    }
}
