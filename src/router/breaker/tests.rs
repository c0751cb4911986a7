use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn failure() -> LegError {
    LegError::Truncated
}

fn opened(start: Instant) -> Breaker {
    let mut breaker = Breaker::new(1, start);
    for count in 1..=IN_A_ROW {
        assert!(breaker.lets_through(start));
        assert_eq!(breaker.failed(start), count == IN_A_ROW);
    }
    breaker
}

#[test]
fn failures_in_a_row_open_it_and_an_answer_between_does_not_let_them() {
    let start = Instant::now();
    let breaker = opened(start);
    assert_eq!(breaker.label(start), "open");
    assert!(!breaker.lets_through(start));
    assert!(!breaker.lets_through(start + FIRST - MS));
    assert!(breaker.lets_through(start + FIRST));
    let mut breaker = Breaker::new(1, start);
    for _ in 0..IN_A_ROW - 1 {
        assert!(!breaker.failed(start));
    }
    breaker.answered(start);
    assert!(!breaker.failed(start));
    assert_eq!(breaker.label(start), "closed");
}

#[test]
fn half_of_many_open_it_within_the_window_only() {
    let run = |pause: Duration| {
        let mut now = Instant::now();
        let mut breaker = Breaker::new(1, now);
        let mut opened = false;
        for _ in 0..MANY {
            opened |= breaker.failed(now);
            breaker.answered(now);
            now += pause;
        }
        opened
    };
    assert!(run(Duration::ZERO));
    assert!(!run(WINDOW / 4));
}

#[test]
fn one_request_decides_after_the_time_is_up() {
    let start = Instant::now();
    let mut breaker = opened(start);
    let later = start + FIRST;
    assert_eq!(breaker.send(later), Some(true));
    assert_eq!(breaker.label(later), "half_open");
    assert!(!breaker.lets_through(later), "the others wait for it");
    assert_eq!(breaker.send(later), None);
    breaker.answered(later);
    assert!(breaker.lets_through(later));
    assert_eq!(breaker.label(later), "closed");
    // It takes as many failures again.
    assert!(!breaker.failed(later));
}

#[test]
fn each_failed_trial_doubles_the_time_up_to_the_longest() {
    let start = Instant::now();
    let (mut breaker, mut now, mut lasts) = (opened(start), start, FIRST);
    for _ in 0..10 {
        now += lasts;
        assert_eq!(breaker.send(now), Some(true));
        assert!(breaker.failed(now));
        lasts = (lasts * 2).min(LONGEST);
        assert!(!breaker.lets_through(now + lasts - MS));
        assert!(breaker.lets_through(now + lasts));
    }
    assert_eq!(lasts, LONGEST);
}

#[test]
fn what_was_sent_before_it_opened_does_not_lengthen_it() {
    let start = Instant::now();
    let mut breaker = opened(start);
    for _ in 0..100 {
        assert!(!breaker.failed(start + FIRST - MS));
    }
    assert!(breaker.lets_through(start + FIRST));
}

#[test]
fn a_client_that_goes_away_lets_the_next_request_decide() {
    let breakers = Breakers::default();
    let node = view(1);
    let start = Instant::now();
    for _ in 0..IN_A_ROW {
        send(&breakers, &node, start).failed(&failure(), start);
    }
    assert!(!breakers.lets_through(&node, Duty::Answer, start));
    let later = start + FIRST;
    let trial = send(&breakers, &node, later);
    assert!(!breakers.lets_through(&node, Duty::Answer, later));
    drop(trial);
    let now = Instant::now().max(later);
    assert!(breakers.lets_through(&node, Duty::Answer, now));
    send(&breakers, &node, now).answered(now);
    assert!(breakers.is_quiet(), "{:?}", breakers.states(now));
}

#[test]
fn legs_and_incarnations_are_apart() {
    let breakers = Breakers::default();
    let start = Instant::now();
    let (old, new) = (view(1), view(2));
    let mut late = send(&breakers, &old, start);
    for _ in 0..IN_A_ROW {
        send(&breakers, &old, start).failed(&failure(), start);
    }
    assert!(!breakers.lets_through(&old, Duty::Answer, start));
    assert!(breakers.lets_through(&old, Duty::Prefill, start));
    assert!(breakers.lets_through(&new, Duty::Answer, start));
    // The new one's first failure starts its own count, and the old one's last word says nothing of it.
    assert!(!send(&breakers, &new, start).failed(&failure(), start));
    late.failed(&failure(), start);
    late.answered(start);
    assert!(breakers.lets_through(&new, Duty::Answer, start));
    let states: Vec<_> = breakers.states(start).into_values().collect();
    assert_eq!(states, ["closed"]);
}

#[test]
fn that_a_node_left_is_not_counted_again() {
    let breakers = Breakers::default();
    let start = Instant::now();
    for _ in 0..100 {
        let lost = LegError::NodeLost { phase: "down" };
        assert!(!send(&breakers, &view(1), start).failed(&lost, start));
    }
    assert!(breakers.is_quiet());
}

fn view(incarnation: u64) -> NodeView {
    let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
    let mut node = NodeView::pending("n".into(), crate::fleet::Role::Decode, addr);
    node.incarnation = incarnation;
    node
}

/// As a last resort, where the breaker is open.
fn send(breakers: &Breakers, node: &NodeView, now: Instant) -> Trial {
    let trial = breakers.send(node, Duty::Answer, now);
    trial.unwrap_or_else(|| breakers.insist(node, Duty::Answer))
}

proptest! {
    /// Whatever happens, and in whatever order: it is never open for longer than the longest time, so a node that
    /// works is found out.
    #[test]
    fn it_is_never_shut_for_ever(events in prop::collection::vec((0u8..4, 0u64..20_000), 0..200)) {
        let mut now = Instant::now();
        let mut breaker = Breaker::new(1, now);
        let mut deciding = false;
        for (event, pause) in events {
            now += MS * u32::try_from(pause).unwrap();
            match event {
                0 => breaker.answered(now),
                1 => drop(breaker.failed(now)),
                2 => deciding |= breaker.send(now) == Some(true),
                _ => breaker.undecided(now),
            }
            deciding &= matches!(breaker.state, State::HalfOpen { .. });
            if let State::Open { until, lasts } = breaker.state {
                prop_assert!(lasts <= LONGEST && until <= now + LONGEST);
            }
            // Half open means that somebody is on the way who will say something.
            prop_assert_eq!(deciding, matches!(breaker.state, State::HalfOpen { .. }));
            prop_assert!(deciding || breaker.lets_through(now + LONGEST));
        }
    }
}
