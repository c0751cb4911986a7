//! kill -9 of producers and consumers at random points, on a real socket and real shared memory: every
//! byte that is ever loaded is what a committed producer wrote, and nothing is left of the dead.
//!
//! `PEGAFLOW_CRASH_SEED` repeats a storm's decisions (not its timing), `PEGAFLOW_CRASH_KILLS` sets its
//! length. `cargo test --test engine_crash -- --ignored` runs the long one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

#[path = "engine_crash/node.rs"]
mod node;
#[path = "crash_worker/spec.rs"]
mod spec;
#[path = "engine_crash/storm.rs"]
mod storm;

use std::time::Instant;

use spec::{Point, TOKEN};
use storm::{Gone, Plan, Storm};

/// Nodes in a storm, and the lives of each of them in a round.
const NODES: u64 = 4;
const LIVES: u32 = 5;

fn from_environment(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap())
}

/// A storm of at least so many kills; one of the processes' deaths is counted per incarnation.
fn storm(world: u32, verify: bool, kills: u64) {
    let seed = from_environment("PEGAFLOW_CRASH_SEED").unwrap_or_else(rand::random);
    let kills = from_environment("PEGAFLOW_CRASH_KILLS").unwrap_or(kills);
    eprintln!("PEGAFLOW_CRASH_SEED={seed} world {world}, {kills} kills");
    let started = Instant::now();
    let mut storm = Storm::new(Plan {
        seed,
        world,
        gone: Gone::Reaped,
        verify,
        lives: LIVES,
        token: TOKEN,
    });
    let (mut killed, mut verified) = (0, 0);
    // On a slow machine less happens in a life; a storm in which little happened proves little.
    while killed < kills || verified < 2 * kills && killed < 5 * kills {
        killed += storm.round();
        let tally = storm.tally();
        verified = tally.verified;
        assert_eq!(tally.wrong, [], "seed {seed}");
        storm.assert_nothing_is_left();
        storm.fill_the_arena();
    }
    let (tally, stats) = (storm.tally(), storm.engine.stats());
    eprintln!(
        "{killed} incarnations killed in {:?}: {tally:?}; {} evictions, {} stale refs, hand-offs: {} fired, \
         {:?} failed",
        started.elapsed(),
        stats.evictions,
        stats.counters.stale_refs,
        stats.counters.handoffs_fired,
        stats.counters.handoffs_failed,
    );
    assert!(verified > kills && tally.committed > kills, "{tally:?}");
    // A process may die between a load and its word about the sums.
    let compared = if verify {
        kills + 1..=tally.verified
    } else {
        0..=0
    };
    assert!(compared.contains(&tally.summed), "{tally:?}");
    assert_eq!(stats.counters.damaged_chunks, 0, "{stats:?}");
    assert!(stats.evictions > kills, "no pressure: {stats:?}");
    assert!(stats.counters.handoffs_fired > 0, "{stats:?}");
    assert!(tally.orphans > 0 && tally.reconnects > 0, "{tally:?}");
    if killed >= 50 * NODES {
        use Point as P;
        let all = [
            P::Granted,
            P::Found,
            P::Dispatched,
            P::BeforeWrite,
            P::MidWrite,
            P::Written,
            P::MidLoad,
        ];
        assert!(tally.stopped.keys().copied().eq(all), "{tally:?}");
    }
}

#[test]
fn killed_producers_and_consumers_of_one_rank_leave_nothing_behind() {
    storm(1, false, 60);
}

#[test]
fn killed_producers_and_consumers_of_two_ranks_leave_nothing_behind() {
    storm(2, false, 60);
}

#[test]
fn whatever_is_killed_no_checksum_is_wrong() {
    storm(2, true, 60);
}

#[test]
#[ignore = "long: a thousand kills; `just soak` runs it"]
fn a_thousand_kills_leave_nothing_behind() {
    storm(1, false, 500);
    storm(2, true, 500);
}

/// What the storms look for can be seen: here the engine is told of a death too early.
#[test]
fn the_harness_sees_a_reused_slot() {
    let mut storm = Storm::new(Plan {
        seed: 1,
        world: 1,
        gone: Gone::TooEarly,
        verify: false,
        lives: 3,
        token: TOKEN,
    });
    for _ in 0..20 {
        storm.round();
        let seen = storm.tally().wrong;
        // A decode node has loaded them.
        let corrupt = |event: &spec::Event| matches!(event, spec::Event::Corrupt { node, .. } if node.starts_with('d'));
        if seen.iter().any(corrupt) {
            return;
        }
    }
    panic!("slots were reused under living writers, and nobody noticed");
}

/// A process that the engine does not admit does nothing, and the storm would wait for it.
#[test]
#[should_panic(expected = "not admitted")]
fn the_harness_says_who_was_refused() {
    let mut storm = Storm::new(Plan {
        seed: 1,
        world: 1,
        gone: Gone::Reaped,
        verify: false,
        lives: 1,
        token: "another",
    });
    storm.round();
}
