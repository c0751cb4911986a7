//! Sessions that end while a worker of theirs is writing, step by step: the slots that it may still
//! write are nobody else's until it has said that it is done, or is dead.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

#[path = "../fuzz/rig.rs"]
mod rig;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use pegaflow::engine::client::{Client, Query};
use pegaflow::engine::protocol::{
    ClientMessage as M, Granted, KeyQuery, MAX_FRAME, ServerMessage, SessionKind, SlotRef, decode,
    encode_frame,
};
use rig::{LIMIT, Rig, hello, key};
use serde_bytes::ByteBuf;

/// Stores one key after the other until there is no more space; the slots that were granted.
fn take_all(scheduler: &mut Client) -> BTreeSet<u32> {
    let mut slots = BTreeSet::new();
    for n in 100.. {
        let granted = scheduler
            .store(Query {
                request: "take",
                handoff: None,
                keys: &[&key(n)],
            })
            .unwrap();
        if !granted.ok {
            break;
        }
        let refs = SlotRef::decode_all(&granted.refs).unwrap();
        slots.extend(refs.iter().map(|at| at.slot));
    }
    slots
}

fn slots_of(granted: &Granted) -> BTreeSet<u32> {
    let refs = SlotRef::decode_all(&granted.refs).unwrap();
    refs.iter().map(|at| at.slot).collect()
}

/// Afterwards everything but the good node's chunks can be had by somebody else.
fn assert_all_free_when_gone(rig: &mut Rig, node: &str) {
    rig.engine.incarnation_gone(&node.into(), 1);
    rig.engine.incarnation_gone(&"other".into(), 1);
    let stats = rig.engine.stats();
    assert_eq!((stats.pending, stats.quarantined), (0, 0), "{stats:#?}");
    let mut last = hello("last", SessionKind::Scheduler);
    last.incarnation = 2;
    let mut last = Client::connect(&rig.socket, last, LIMIT).unwrap();
    assert_eq!(take_all(&mut last).len(), rig::FREE_SLOTS);
    rig.assert_alive();
}

#[test]
fn a_scheduler_that_stalls_in_a_frame_and_returns_frees_nothing_its_worker_writes() {
    let mut rig = Rig::start();
    // Alive and writing, all the time.
    let _worker = Client::connect(&rig.socket, hello("p", SessionKind::Worker), LIMIT).unwrap();
    let mut scheduler = UnixStream::connect(&rig.socket).unwrap();
    scheduler.set_read_timeout(Some(LIMIT)).unwrap();
    let store = M::Store(KeyQuery {
        seq: 1,
        request: "r".into(),
        handoff: None,
        keys: ByteBuf::from([key(50), key(51), key(52)].concat()),
        key_len: 12,
    });
    for message in [M::Hello(hello("p", SessionKind::Scheduler)), store] {
        scheduler
            .write_all(&encode_frame(&message).unwrap())
            .unwrap();
    }
    assert!(matches!(read(&mut scheduler), ServerMessage::Welcome(_)));
    let ServerMessage::Granted(granted) = read(&mut scheduler) else {
        panic!("not granted");
    };
    let written = slots_of(&granted);
    assert_eq!(written.len(), 3);

    // The beginning of a frame, and no more: the engine gives up on the session.
    scheduler.write_all(&[9, 0, 0, 0, 0x82]).unwrap();
    let mut rest = Vec::new();
    scheduler.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());

    let mut back = Client::connect(&rig.socket, hello("p", SessionKind::Scheduler), LIMIT).unwrap();
    let keys = [50, 51, 52].map(key);
    let keys = keys.each_ref().map(Vec::as_slice);
    let query = Query {
        request: "r",
        handoff: None,
        keys: &keys,
    };
    let found = back.lookup(query).unwrap();
    assert_eq!(
        found.states.as_slice(),
        [0, 0, 0],
        "half-written chunks are invisible"
    );
    let mut other =
        Client::connect(&rig.socket, hello("other", SessionKind::Scheduler), LIMIT).unwrap();
    let taken = take_all(&mut other);
    assert_eq!(taken.len(), rig::FREE_SLOTS - 3);
    assert!(taken.is_disjoint(&written), "{taken:?} {written:?}");
    drop((back, other));
    assert_all_free_when_gone(&mut rig, "p");
}

#[test]
fn a_scheduler_that_reconnects_is_granted_other_slots_than_its_worker_still_writes() {
    let mut rig = Rig::start();
    let _worker = Client::connect(&rig.socket, hello("p", SessionKind::Worker), LIMIT).unwrap();
    let mut written = BTreeSet::new();
    for _ in 0..3 {
        let mut scheduler =
            Client::connect(&rig.socket, hello("p", SessionKind::Scheduler), LIMIT).unwrap();
        let granted = scheduler
            .store(Query {
                request: "r",
                handoff: None,
                keys: &[&key(50), &key(51)],
            })
            .unwrap();
        let slots = slots_of(&granted);
        assert_eq!(slots.len(), 2, "granted anew");
        assert!(slots.is_disjoint(&written), "{slots:?} {written:?}");
        written.extend(slots);
        drop(scheduler);
        rig.until("the session ends", |rig| rig.engine.stats().pending == 0);
    }
    let mut other =
        Client::connect(&rig.socket, hello("other", SessionKind::Scheduler), LIMIT).unwrap();
    assert!(take_all(&mut other).is_disjoint(&written));
    drop(other);
    assert_all_free_when_gone(&mut rig, "p");
}

fn read(stream: &mut UnixStream) -> ServerMessage {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).unwrap();
    let len = u32::from_le_bytes(prefix) as usize;
    assert!(len <= MAX_FRAME);
    let mut body = vec![0; len];
    stream.read_exact(&mut body).unwrap();
    decode(&body).unwrap()
}
