//! The one thing without a lock between the engine and the workers: a slot's generation. Loom tries every
//! order of loads and stores that the memory model allows.
//!
//! ```text
//! engine:  generation = 2 ── grant over the socket ──▶ new writer:  words = 2
//! loader:  generation == 1?  copy the words  generation still 1?  then the words are the old chunk's
//! ```
//!
//! Everything else that is shared is behind a mutex (the store, the hand-off board) or tokio's.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use loom::thread;

/// Which of the two sides keeps its rule.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rules {
    Kept,
    /// The loader looks at the generation again without ordering that after its copy.
    LoaderDoesNot,
    /// The writer's first word may overtake the new generation.
    WriterDoesNot,
    /// The engine hands the slot to the next writer before it raises the generation.
    EngineDoesNot,
}

struct Slot {
    generation: AtomicU32,
    words: [AtomicU64; 2],
}

fn reuse(rules: Rules) {
    loom::model(move || {
        let slot = Arc::new(Slot {
            generation: AtomicU32::new(1),
            words: [AtomicU64::new(1), AtomicU64::new(1)],
        });
        let shared = slot.clone();
        // The engine and the new writer in one thread: the socket between them orders everything.
        let writer = thread::spawn(move || {
            if rules != Rules::EngineDoesNot {
                shared.generation.store(2, Ordering::Release);
            }
            if rules != Rules::WriterDoesNot {
                // What the system calls of the socket imply.
                fence(Ordering::Release);
            }
            for word in &shared.words {
                word.store(2, Ordering::Relaxed);
            }
            if rules == Rules::EngineDoesNot {
                shared.generation.store(2, Ordering::Release);
            }
        });
        if let Some(words) = load(&slot, rules) {
            assert_eq!(words, [1, 1], "loaded what the next writer wrote");
        }
        writer.join().unwrap();
        assert_eq!(load(&slot, rules), None);
    });
}

/// What a worker does with chunk 1 of the slot.
fn load(slot: &Slot, rules: Rules) -> Option<[u64; 2]> {
    let is_current = || slot.generation.load(Ordering::Acquire) == 1;
    if !is_current() {
        return None;
    }
    let words = [0, 1].map(|at: usize| slot.words[at].load(Ordering::Relaxed));
    if rules != Rules::LoaderDoesNot {
        fence(Ordering::Acquire);
    }
    is_current().then_some(words)
}

#[test]
fn a_load_that_sees_one_generation_throughout_has_one_chunk() {
    reuse(Rules::Kept);
}

#[test]
#[should_panic(expected = "loaded what the next writer wrote")]
fn a_loader_must_order_its_second_look_after_the_copy() {
    reuse(Rules::LoaderDoesNot);
}

#[test]
#[should_panic(expected = "loaded what the next writer wrote")]
fn a_writer_must_not_overtake_the_generation() {
    reuse(Rules::WriterDoesNot);
}

#[test]
#[should_panic(expected = "loaded what the next writer wrote")]
fn the_generation_must_rise_before_the_slot_is_granted_again() {
    reuse(Rules::EngineDoesNot);
}
