//! Checksums and reports of damage over the engine's real socket and its real shared memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_engine;

use std::fs::File;
use std::os::unix::fs::FileExt;

use pegaflow::engine::client::Client;
use pegaflow::engine::protocol::{ClientMessage as M, Damaged, Hello, SessionKind, SlotRef};
use pegaflow::handoff::{HandoffFailure, HandoffOutcome};
use support_engine::*;

fn verifying() -> Fixture {
    Fixture::with(|config| config.arena.verify = true)
}

fn report(refs: &[SlotRef]) -> M {
    M::Damaged(Damaged {
        refs: SlotRef::encode_all(refs.iter().copied()),
    })
}

fn file(worker: &Client) -> File {
    File::from(worker.arena().unwrap().try_clone().unwrap())
}

fn of_rank(node: &str, rank: u32) -> Hello {
    Hello {
        rank,
        world: 3,
        ..hello(node, SessionKind::Worker)
    }
}

/// A value of one metric without labels.
fn metric(fixture: &Fixture, name: &str) -> u64 {
    let prefix = format!("pegaflow_engine_{name} ");
    let text = metrics(fixture);
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(&prefix)).unwrap();
    value.parse().unwrap()
}

#[tokio::test]
async fn every_rank_has_a_checksum_of_its_own_for_every_slot_between_generations_and_rows() {
    let fixture = Fixture::with(|config| {
        config.arena.verify = true;
        config.pools[0].capacity = 1 << 20;
    });
    let workers: Vec<_> = (0..3)
        .map(|rank| fixture.connect(of_rank("p", rank)).unwrap())
        .collect();
    let welcome = *workers[0].welcome();
    let mut taken: Vec<(u64, u64)> = vec![(0, u64::from(welcome.slots) * 4)];
    for worker in &workers {
        let welcome = worker.welcome();
        let end = u64::from(welcome.slots) * 4;
        taken.push((
            welcome.checksum_offset,
            welcome.checksum_offset.checked_add(end).unwrap(),
        ));
        let last = SlotRef {
            slot: welcome.slots - 1,
            generation: 1,
        };
        let place = worker.checksum_offset(last).unwrap();
        assert_eq!(place + 4, welcome.checksum_offset + end);
        assert!(place.is_multiple_of(4));
    }
    taken.push((welcome.header_bytes, welcome.arena_bytes));
    assert!(taken.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    assert_eq!(welcome.header_bytes % 4096, 0);
    // What the engine writes there are generations and nothing else.
    let mut sums = vec![0xff; usize::try_from(taken[3].1 - taken[1].0).unwrap()];
    file(&workers[0])
        .read_exact_at(&mut sums, taken[1].0)
        .unwrap();
    assert!(sums.iter().all(|byte| *byte == 0));

    let plain = Fixture::new();
    let worker = plain.join("p", SessionKind::Worker);
    assert_eq!(worker.welcome().checksum_offset, 0);
    assert_eq!(worker.checksum_offset(SlotRef::NONE), None);
}

#[tokio::test]
async fn what_all_ranks_have_alike_is_stored_once_and_read_by_all() {
    let fixture = verifying();
    let alike = |node: &str, rank| Hello {
        replicated: true,
        ..of_rank(node, rank)
    };
    let of_scheduler = |node: &str| Hello {
        world: 3,
        replicated: true,
        ..hello(node, SessionKind::Scheduler)
    };
    let join = |node: &str, rank| fixture.connect(alike(node, rank)).unwrap();
    let mut p_workers: Vec<_> = (0..3).map(|rank| join("p", rank)).collect();
    let mut p = fixture.connect(of_scheduler("p")).unwrap();
    let mut d = fixture.connect(of_scheduler("d")).unwrap();
    let d_workers: Vec<_> = (0..3).map(|rank| join("d", rank)).collect();
    let welcome = *p_workers[0].welcome();
    assert_eq!(welcome.stride, ROW.next_multiple_of(64));
    for worker in p_workers.iter().chain(&d_workers) {
        let told = worker.welcome();
        assert_eq!(
            (told.stride, told.rank_offset, told.checksum_offset),
            (welcome.stride, 0, welcome.checksum_offset)
        );
    }

    let k = key(1);
    let keys: [&[u8]; 1] = [&k];
    let places = refs(&p.store(query(&keys, None)).unwrap());
    // Nobody but rank 0 can make it Ready.
    p_workers[2].send(&commit(&places)).unwrap();
    fixture.until("the commit is refused", |f| {
        f.engine.stats().counters.stale_refs == 1
    });
    assert_eq!(fixture.engine.stats().ready, 0);
    file(&p_workers[0])
        .write_all_at(&[0x5a; ROW as usize], p_workers[0].offset(places[0]))
        .unwrap();
    p_workers[0].send(&commit(&places)).unwrap();
    fixture.until("it is Ready", |f| f.engine.stats().ready == 1);
    assert_eq!(d.lookup(query(&keys, None)).unwrap().states.as_slice(), [1]);
    for worker in &d_workers {
        let mut row = [0; ROW as usize];
        let place = worker.offset(places[0]);
        file(worker).read_exact_at(&mut row, place).unwrap();
        assert_eq!(row, [0x5a; ROW as usize]);
    }

    // Who thinks otherwise would read a row that is not there.
    let other = Hello {
        incarnation: 2,
        ..of_rank("p", 1)
    };
    let refused = fixture.connect(other).unwrap_err().to_string();
    assert!(
        refused.contains("replicated is true in the store and false at p"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_damaged_chunk_is_saved_anew_and_whoever_counted_on_it_is_told() {
    let fixture = verifying();
    let mut p_worker = fixture.join("p", SessionKind::Worker);
    let mut p = fixture.join("p", SessionKind::Scheduler);
    let mut d = fixture.join("d", SessionKind::Scheduler);
    let mut d_worker = fixture.join("d", SessionKind::Worker);
    let (k1, k2) = (key(1), key(2));
    let keys: [&[u8]; 2] = [&k1, &k2];

    let granted = p.store(query(&keys[..1], None)).unwrap();
    let places = refs(&granted);
    let (row, sum) = (0xaa, 0x1234_5678u32);
    let arena = file(&p_worker);
    arena
        .write_all_at(&[row; ROW as usize], p_worker.offset(places[0]))
        .unwrap();
    let kept = p_worker.checksum_offset(places[0]).unwrap();
    arena.write_all_at(&sum.to_ne_bytes(), kept).unwrap();
    p_worker.send(&commit(&places)).unwrap();
    fixture.until("it is committed", |f| f.engine.stats().ready == 1);
    let found = d.lookup(query(&keys[..1], None)).unwrap();
    assert_eq!(found.states.as_slice(), [1]);
    let mut read = [0; 4];
    let kept = d_worker.checksum_offset(places[0]).unwrap();
    file(&d_worker).read_exact_at(&mut read, kept).unwrap();
    assert_eq!(u32::from_ne_bytes(read), sum);

    // A hand-off that counts on it, and waits for another chunk.
    let mut ticket = fixture.expect("h");
    p.send(&open("h", 2)).unwrap();
    let granted = p.store(query(&keys, Some("h"))).unwrap();
    assert_eq!(granted.new.as_slice(), [1, 0, 0, 0]);
    d_worker.send(&report(&places)).unwrap();
    let damaged = HandoffOutcome::Failed(HandoffFailure::Damaged);
    assert_eq!(outcome(&mut ticket).await, damaged);
    assert_eq!(metric(&fixture, "damaged_chunks_total"), 1);
    assert_eq!(metric(&fixture, "slots_damaged"), 1);
    let found = d.lookup(query(&keys[..1], None)).unwrap();
    assert_eq!(found.states.as_slice(), [0]);
    let granted = p.store(query(&keys[..1], None)).unwrap();
    assert_eq!(granted.new.len(), 4);
    assert_ne!(refs(&granted), places);

    // No lease of this node, so no word of its worker counts.
    p_worker.send(&commit(&refs(&granted))).unwrap();
    p_worker.send(&report(&refs(&granted))).unwrap();
    fixture.until("the report is counted", |f| {
        f.engine.stats().counters.stale_refs == 1
    });
    let counted = serde_json::to_value(fixture.engine.stats()).unwrap();
    assert_eq!(
        (&counted["damaged_chunks"], &counted["ready"]),
        (&1.into(), &1.into())
    );
    let found = d.lookup(query(&keys[..1], None)).unwrap();
    assert_eq!(found.states.as_slice(), [1]);
}
