//! What one call of the store costs, by Criterion: `cargo bench --bench store`.
//!
//! Through the socket of a real engine, one client, nothing else going on. The parts of a call that
//! can be had alone (encoding, decoding) are measured beside it, to see where the time goes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod rig;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pegaflow::engine::protocol::{ClientMessage, KeyQuery, SlotRef, decode, encode_frame};
use rig::{Node, Rig, commit, fill, finish, keys, query, slices};
use serde_bytes::ByteBuf;

const ROW: u64 = 64;
const P: Node = Node {
    name: "p",
    row_bytes: ROW,
};
const D: Node = Node {
    name: "d",
    row_bytes: ROW,
};
const PREFIXES: [usize; 3] = [64, 512, 2048];

/// A prefix that is all hits: found and leased in one call. Ending the leases is not timed.
fn lookup_and_pin(c: &mut Criterion) {
    let mut group = c.benchmark_group("lookup+pin");
    for chunks in PREFIXES {
        let rig = Rig::start(4 * chunks as u64, ROW);
        let (mut worker, mut p) = rig.join_both(P);
        let (_d_worker, mut d) = rig.join_both(D);
        let prefix = keys(1, chunks);
        let prefix = slices(&prefix);
        fill(&mut worker, &mut p, &prefix);
        group.throughput(Throughput::Elements(chunks as u64));
        group.bench_function(BenchmarkId::from_parameter(chunks), |b| {
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    let started = Instant::now();
                    let found = d.lookup(query("r", &prefix)).unwrap();
                    spent += started.elapsed();
                    assert!(found.states.iter().all(|&state| state == 1));
                    d.send(&finish("r")).unwrap();
                    // Answered after `finish` has been handled.
                    d.lookup(query("s", &prefix[..1])).unwrap();
                }
                spent
            });
        });
    }
    group.finish();
}

/// Slots for new chunks, and their commit, with an arena that has to evict for them.
fn store_and_commit(c: &mut Criterion) {
    let mut group = c.benchmark_group("store");
    for chunks in PREFIXES {
        let rig = Rig::start(2 * chunks as u64, ROW);
        let (mut worker, mut p) = rig.join_both(P);
        let mut seed = 0;
        group.throughput(Throughput::Elements(chunks as u64));
        group.bench_function(BenchmarkId::from_parameter(chunks), |b| {
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    seed += 1;
                    let new = keys(seed, chunks);
                    let new = slices(&new);
                    let started = Instant::now();
                    let granted = p.store(query("r", &new)).unwrap();
                    spent += started.elapsed();
                    assert!(granted.ok);
                    let refs = SlotRef::decode_all(&granted.refs).unwrap();
                    worker.send(&commit(&refs, 0)).unwrap();
                    while p.lookup(query("s", &new)).unwrap().states.contains(&2) {}
                    p.send(&finish("s")).unwrap();
                    p.send(&finish("r")).unwrap();
                }
                spent
            });
        });
    }
    group.finish();
}

/// The part of a call of 2,048 keys that is neither socket nor index.
fn messages(c: &mut Criterion) {
    let message = ClientMessage::Lookup(KeyQuery {
        seq: 7,
        request: "cmpl-0123456789abcdef-0-01234567".into(),
        handoff: None,
        keys: ByteBuf::from(keys(1, 2048).concat()),
        key_len: 36,
    });
    let frame = encode_frame(&message).unwrap();
    let mut group = c.benchmark_group("message");
    group.bench_function("encode lookup of 2048", |b| {
        b.iter(|| encode_frame(&message).unwrap());
    });
    group.bench_function("decode lookup of 2048", |b| {
        b.iter(|| decode::<ClientMessage>(&frame[4..]).unwrap());
    });
    group.finish();
}

criterion_group! {
    name = calls;
    config = Criterion::default().sample_size(50).measurement_time(Duration::from_secs(4));
    targets = lookup_and_pin, store_and_commit, messages
}
criterion_main!(calls);
