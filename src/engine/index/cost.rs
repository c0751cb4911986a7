//! What a chunk costs: time of a lookup with its pin, bytes of memory.
//!
//! `cargo test --release --lib engine::index::cost -- --ignored --nocapture` prints the figures
//! for 10^3 to 10^7 chunks. Both tests assert that a lookup among many is at most ten times as
//! expensive as one among a thousand.

use std::time::{Duration, Instant};

use super::*;

/// As vLLM's: a 32-byte hash and the group.
fn key(n: u32) -> [u8; 36] {
    let mut key = [0x5a; 36];
    let spread = u64::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    key[..8].copy_from_slice(&spread.to_le_bytes());
    key
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

struct Figures {
    lookup: Duration,
    insert: Duration,
    bytes: f64,
}

/// Prompts of 64 chunks, as many as fit; then lookups and pins all over.
fn measure(chunks: u32) -> Figures {
    let writer = Writer {
        owner: Owner {
            node: "p".into(),
            incarnation: 1,
        },
        rank: 0,
    };
    let before = resident_bytes();
    let mut index = Index::new(chunks, 1);
    let mut parent = None;
    let started = Instant::now();
    for n in 0..chunks {
        let key = &key(n);
        let owner = &writer.owner;
        let at = index
            .insert(NewChunk {
                key,
                parent,
                owner,
                since: started,
            })
            .unwrap();
        assert!(matches!(index.commit(at, &writer), Committed::Ready(_)));
        // Held until its child is there, as by a request.
        index.lease(at);
        parent.into_iter().for_each(|parent| index.unlease(parent));
        parent = Some(at);
        if n % 64 == 63 || n + 1 == chunks {
            parent
                .take()
                .into_iter()
                .for_each(|last| index.unlease(last));
        }
    }
    let insert = started.elapsed() / chunks;
    let bytes = resident_bytes().saturating_sub(before) as f64 / f64::from(chunks);

    const LOOKUPS: u32 = 20_000;
    let mut best = Duration::MAX;
    for round in 0..10 {
        let started = Instant::now();
        for n in 0..LOOKUPS {
            let any = (n + round * LOOKUPS).wrapping_mul(0x9e37_79b9) % chunks;
            let found = index.find(&key(any)).unwrap();
            assert!(index.lease(found.at));
            index.unlease(found.at);
        }
        best = best.min(started.elapsed() / LOOKUPS);
    }
    assert_eq!(index.census().ready, chunks);
    Figures {
        lookup: best,
        insert,
        bytes,
    }
}

fn compare(sizes: &[u32]) -> Vec<(u32, Figures)> {
    let figures: Vec<_> = sizes.iter().map(|&size| (size, measure(size))).collect();
    println!("chunks     lookup+pin     insert+commit  bytes/chunk");
    for (size, f) in &figures {
        println!(
            "{size:<10} {:<14?} {:<14?} {:.0}",
            f.lookup, f.insert, f.bytes
        );
    }
    let (_, small) = &figures[0];
    for (size, f) in &figures {
        assert!(f.lookup <= small.lookup * 10, "{size}: {:?}", f.lookup);
    }
    figures
}

#[test]
fn a_lookup_among_many_costs_at_most_ten_times_as_much() {
    compare(&[1_000, 100_000]);
}

#[test]
#[ignore = "a measurement: about a gigabyte, and minutes without --release"]
fn cost_from_a_thousand_to_ten_million() {
    let figures = compare(&[1_000, 10_000, 100_000, 1_000_000, 10_000_000]);
    for (size, f) in figures {
        // Below that, pages that were there before are what is measured.
        assert!(
            size < 1_000_000 || f.bytes < 128.0,
            "{size}: {} bytes",
            f.bytes
        );
    }
}
