//! Chunks and hand-offs over the engine's real socket and its real shared memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_engine;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use pegaflow::engine::protocol::{ClientMessage as M, Discard, Loaded, SessionKind, SlotRef};
use pegaflow::handoff::{HandoffFailure, HandoffOutcome, HandoffState};
use support_engine::*;

#[tokio::test]
async fn bytes_written_by_the_prefill_worker_are_read_by_the_decode_worker() {
    let fixture = Fixture::new();
    let mut p_worker = fixture.join("p", SessionKind::Worker);
    let mut p = fixture.join("p", SessionKind::Scheduler);
    let mut d = fixture.join("d", SessionKind::Scheduler);
    let mut d_worker = fixture.join("d", SessionKind::Worker);
    assert!(p.arena().is_none() && d_worker.arena().is_some());
    let (k1, k2) = (key(1), key(2));
    let keys: [&[u8]; 2] = [&k1, &k2];

    let mut ticket = fixture.expect("h");
    p.send(&open("h", 2)).unwrap();
    let found = p.lookup(query(&keys, Some("h"))).unwrap();
    assert_eq!(found.states.as_slice(), [0, 0]);
    assert_eq!(ticket.state(), HandoffState::Open);
    let granted = p.store(query(&keys, Some("h"))).unwrap();
    assert!(granted.ok);
    assert_eq!(granted.new.as_slice(), [0, 0, 0, 0, 1, 0, 0, 0]);
    let slots = refs(&granted);
    p.send(&seal("h")).unwrap();

    let found = d.lookup(query(&keys, None)).unwrap();
    assert_eq!(found.states.as_slice(), [2, 2], "nothing is committed yet");

    let file = File::from(p_worker.arena().unwrap().try_clone().unwrap());
    for (at, fill) in slots.iter().zip([0xaa, 0xbb]) {
        file.write_all_at(&[fill; ROW as usize], p_worker.offset(*at))
            .unwrap();
        p_worker.send(&commit(&[*at])).unwrap();
    }
    assert_eq!(outcome(&mut ticket).await, ready(2, false));

    let found = d.lookup(query(&keys, Some("h"))).unwrap();
    assert_eq!(found.states.as_slice(), [1, 1]);
    let hits = SlotRef::decode_all(&found.refs).unwrap();
    assert_eq!(hits, slots);
    let file = File::from(d_worker.arena().unwrap().try_clone().unwrap());
    for (at, fill) in hits.iter().zip([0xaa, 0xbb]) {
        let mut bytes = [0; ROW as usize];
        file.read_exact_at(&mut bytes, d_worker.offset(*at))
            .unwrap();
        assert_eq!(bytes, [fill; ROW as usize]);
        let mut generation = [0; 4];
        file.read_exact_at(&mut generation, u64::from(at.slot) * 4)
            .unwrap();
        assert_eq!(u32::from_ne_bytes(generation), at.generation);
    }
    d_worker
        .send(&M::Loaded(Loaded {
            chunks: 2,
            bytes: 2 * ROW,
            micros: 7,
            failed: 1,
        }))
        .unwrap();

    // The same prompt again: it fires while prefill is being scheduled.
    let mut again = fixture.expect("h2");
    p.send(&open("h2", 2)).unwrap();
    p.lookup(query(&keys, Some("h2"))).unwrap();
    assert_eq!(outcome(&mut again).await, ready(2, true));
    // A prompt below one chunk.
    let mut empty = fixture.expect("h3");
    p.send(&open("h3", 0)).unwrap();
    p.send(&seal("h3")).unwrap();
    assert_eq!(outcome(&mut empty).await, ready(0, true));

    fixture.until("loaded", |f| f.engine.stats().counters.loaded_chunks == 2);
    for (client, id) in [(&mut p, "h2"), (&mut d, "h2")] {
        client.lookup(query(&keys, Some(id))).unwrap();
        client.send(&finish("r")).unwrap();
    }
    fixture.until("all leases ended", |f| f.engine.stats().leased == 0);
    let stats = fixture.engine.stats();
    assert_eq!((stats.ready, stats.pending, stats.used), (2, 0, 2));
    assert_eq!(stats.sessions.len(), 4);
    assert_eq!(stats.counters.handoffs_fired, 3);
    assert_eq!(stats.counters.handoffs_already_stored, 2);
    assert_eq!(stats.counters.saved_bytes, 2 * ROW);
    assert_eq!(stats.counters.failed_loads, 1);
    let json = serde_json::to_value(&stats).unwrap();
    assert_eq!(json["saved_chunks"], 2);

    let text = metrics(&fixture);
    for line in [
        "pegaflow_engine_up 1",
        "pegaflow_engine_slots_ready 2",
        "pegaflow_engine_saved_bytes_total{node=\"p\"} 2000",
        "pegaflow_engine_loaded_bytes_total{node=\"d\"} 2000",
        "pegaflow_engine_lookup_hits_total{node=\"d\"} 4",
        "pegaflow_engine_sessions{node=\"d\",kind=\"worker\"} 1",
        "pegaflow_engine_save_duration_seconds_count 2",
        "pegaflow_engine_load_duration_seconds_bucket{le=\"0.0001\"} 1",
        "pegaflow_engine_handoff_duration_seconds_count 3",
        "pegaflow_engine_handoffs_released_total{how=\"looked_up\"} 3",
        "pegaflow_engine_oldest_lease_age_seconds 0.0",
        "pegaflow_engine_handoffs_total{outcome=\"already_stored\"} 2",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn a_discarded_chunk_fails_the_handoff_and_is_never_seen() {
    let fixture = Fixture::new();
    let mut worker = fixture.join("p", SessionKind::Worker);
    let mut p = fixture.join("p", SessionKind::Scheduler);
    let k1 = key(1);
    let keys: [&[u8]; 1] = [&k1];
    let mut ticket = fixture.expect("h");
    p.send(&open("h", 1)).unwrap();
    let slots = refs(&p.store(query(&keys, Some("h"))).unwrap());
    p.send(&seal("h")).unwrap();
    let bytes = SlotRef::encode_all(slots.clone());
    worker.send(&M::Discard(Discard { refs: bytes })).unwrap();
    let failed = HandoffOutcome::Failed(HandoffFailure::SaveFailed);
    assert_eq!(outcome(&mut ticket).await, failed);
    worker.send(&commit(&slots)).unwrap();
    fixture.until("stale", |f| f.engine.stats().counters.stale_refs == 1);
    assert_eq!(p.lookup(query(&keys, None)).unwrap().states, [0]);
}

#[tokio::test]
async fn a_handoff_that_nobody_completes_fails_at_its_deadline() {
    let fixture = Fixture::with(|c| c.handoff_deadline = Duration::from_millis(100));
    let _worker = fixture.join("p", SessionKind::Worker);
    let mut p = fixture.join("p", SessionKind::Scheduler);
    let mut ticket = fixture.expect("h");
    p.send(&open("h", 1)).unwrap();
    let late = HandoffOutcome::Failed(HandoffFailure::Deadline);
    assert_eq!(outcome(&mut ticket).await, late);
    assert_eq!(fixture.engine.stats().reserved, 0);
}

#[tokio::test]
async fn a_handoff_whose_client_left_is_given_up_at_once() {
    let fixture = Fixture::new();
    let mut worker = fixture.join("p", SessionKind::Worker);
    let mut p = fixture.join("p", SessionKind::Scheduler);
    let k1 = key(1);
    let keys: [&[u8]; 1] = [&k1];
    let running = fixture.expect("h1");
    p.send(&open("h1", 3)).unwrap();
    let mut fired = fixture.expect("h2");
    p.send(&open("h2", 1)).unwrap();
    let slots = refs(&p.store(query(&keys, Some("h2"))).unwrap());
    p.send(&seal("h2")).unwrap();
    worker.send(&commit(&slots)).unwrap();
    assert_eq!(outcome(&mut fired).await, ready(1, false));
    let stats = fixture.engine.stats();
    assert_eq!((stats.leased, stats.reserved), (1, 3));
    drop((running, fired));
    fixture.until("given up", |f| f.engine.stats().handoffs_open == 0);
    let stats = fixture.engine.stats();
    assert_eq!((stats.leased, stats.reserved, stats.ready), (0, 0, 1));
    assert_eq!(stats.counters.handoffs_failed["abandoned"], 1);
}
