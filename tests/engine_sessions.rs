//! Who gets a session at the engine's socket, who is refused, and how sessions end.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_engine;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use pegaflow::engine::client::{Client, ClientError};
use pegaflow::engine::protocol::{
    ClientMessage as M, Hello, KeyQuery, RefusalCode, SessionKind, VERSION, encode_frame,
};
use pegaflow::engine::{Engine, EngineError};
use pegaflow::handoff::{HandoffBoard, HandoffFailure, HandoffOutcome};
use prometheus_client::registry::Registry;
use serde_bytes::ByteBuf;
use support_engine::*;

#[tokio::test]
async fn a_killed_producer_fails_its_handoff_and_its_slots_wait_for_the_reaper() {
    let fixture = Fixture::new();
    let worker = fixture.join("p", SessionKind::Worker);
    let mut p = fixture.join("p", SessionKind::Scheduler);
    let mut d = fixture.join("d", SessionKind::Scheduler);
    let (k1, k2) = (key(1), key(2));
    let keys: [&[u8]; 2] = [&k1, &k2];
    let mut ticket = fixture.expect("h");
    p.send(&open("h", 2)).unwrap();
    let granted = p.store(query(&keys, Some("h"))).unwrap();
    assert_eq!(refs(&granted).len(), 2);

    drop(worker);
    let died = HandoffOutcome::Failed(HandoffFailure::ProducerDied);
    assert_eq!(outcome(&mut ticket).await, died);
    assert_eq!(d.lookup(query(&keys, None)).unwrap().states, [0, 0]);
    assert_eq!(fixture.engine.stats().quarantined, 2);

    assert!(is_closed(&mut p), "the scheduler goes with its worker");
    fixture.engine.incarnation_gone(&"p".into(), 1);
    let stats = fixture.engine.stats();
    assert_eq!((stats.quarantined, stats.used), (0, 0));
    let late = fixture.connect(hello("p", SessionKind::Worker));
    assert!(
        matches!(&late, Err(ClientError::Refused(r)) if r.code == RefusalCode::BadHello),
        "{late:?}"
    );
    let mut next = hello("p", SessionKind::Worker);
    next.incarnation = 2;
    fixture.connect(next).unwrap();
}

#[test]
fn refusals_name_what_is_wrong() {
    let fixture = Fixture::new();
    let _known = fixture.join("p", SessionKind::Worker);
    let with = |change: fn(&mut Hello)| {
        let mut hello = hello("d", SessionKind::Worker);
        change(&mut hello);
        match fixture.connect(hello) {
            Err(ClientError::Refused(refused)) => refused,
            other => panic!("not refused: {other:?}"),
        }
    };
    let mut codes = Vec::new();
    let cases: [fn(&mut Hello); 6] = [
        |h| h.version = VERSION + 1,
        |h| h.token = "secreT".into(),
        |h| h.row_bytes = 0,
        |h| h.rank = 1,
        |h| h.row_bytes = 999,
        |h| h.world = 2,
    ];
    for case in cases {
        codes.push(with(case).code);
    }
    use RefusalCode as C;
    let wanted = [
        C::Version,
        C::Token,
        C::BadHello,
        C::BadHello,
        C::RowBytes,
        C::Namespace,
    ];
    assert_eq!(codes, wanted);
    let refused = with(|h| {
        h.namespace.insert("dtype".into(), "float16".into());
        h.namespace.remove("model");
        h.namespace.insert("tp".into(), "2".into());
    });
    assert_eq!(refused.code, C::Namespace);
    for part in ["dtype", "bfloat16", "float16", "model", "tiny", "tp"] {
        assert!(refused.message.contains(part), "{}", refused.message);
    }
    let last = &fixture.engine.stats().counters.refusals[0];
    assert_eq!(last.fields, ["dtype", "model", "tp"]);
}

#[test]
fn an_arena_that_cannot_hold_one_chunk_is_refused_and_another_namespace_may_follow() {
    let fixture = Fixture::new();
    let mut big = hello("p", SessionKind::Worker);
    big.row_bytes = 1 << 40;
    let refused = fixture.connect(big);
    assert!(
        matches!(&refused, Err(ClientError::Refused(r)) if r.code == RefusalCode::Capacity),
        "{refused:?}"
    );
    let first = fixture.join("p", SessionKind::Worker);
    let epoch = first.welcome().epoch;
    drop(first);
    fixture.until("left", |f| f.engine.stats().sessions.is_empty());
    let mut other = hello("p", SessionKind::Worker);
    other.namespace.insert("dtype".into(), "float16".into());
    other.row_bytes = 500;
    let other = fixture.connect(other).unwrap();
    assert_eq!(other.welcome().epoch, epoch + 1);
    assert_eq!(other.welcome().stride, 512);
}

#[test]
fn hostile_peers_lose_their_session_and_nobody_else_does() {
    let fixture = Fixture::new();
    let _worker = fixture.join("p", SessionKind::Worker);
    let mut good = fixture.join("p", SessionKind::Scheduler);
    let say_hello = encode_frame(&M::Hello(hello("d", SessionKind::Scheduler))).unwrap();
    let bad_keys = M::Lookup(KeyQuery {
        seq: 1,
        request: "r".into(),
        handoff: None,
        keys: ByteBuf::from(vec![1; 37]),
        key_len: 36,
    });
    let hostile: Vec<(&str, Vec<u8>)> = vec![
        ("no hello", encode_frame(&seal("h")).unwrap()),
        ("long hello", [0xff, 0xff, 0xff, 0x00].into()),
        ("garbage", b"GET / HTTP/1.1\r\n\r\n".into()),
        ("nothing inside", vec![0; 4]),
        ("huge frame", [say_hello.as_slice(), &[0xff; 8]].concat()),
        (
            "unknown op",
            [say_hello.as_slice(), &[8, 0, 0, 0], b"\x81\xa2op\xa3rob"].concat(),
        ),
        (
            "bad keys",
            [say_hello.clone(), encode_frame(&bad_keys).unwrap()].concat(),
        ),
        (
            "a worker's message",
            [say_hello.clone(), encode_frame(&commit(&[])).unwrap()].concat(),
        ),
        (
            "hello twice",
            [say_hello.clone(), say_hello.clone()].concat(),
        ),
    ];
    let count = hostile.len() as u64;
    for (what, bytes) in hostile {
        let mut stream = UnixStream::connect(&fixture.socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(&bytes).unwrap();
        let mut answer = Vec::new();
        // The engine may close with our bytes unread, which is a reset.
        if let Err(error) = stream.read_to_end(&mut answer) {
            assert_eq!(
                error.kind(),
                std::io::ErrorKind::ConnectionReset,
                "{what}: {error}"
            );
        }
    }
    fixture.until("all closed", |f| f.engine.stats().sessions.len() == 2);
    assert_eq!(fixture.engine.stats().counters.sessions_broken, count);
    let k1 = key(1);
    assert_eq!(good.lookup(query(&[&k1], None)).unwrap().states, [0]);
    assert!(fixture.engine.is_running());
}

#[tokio::test]
async fn the_socket_is_private_stale_ones_are_replaced_and_shutdown_removes_it() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("engine.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let start = || {
        let board = HandoffBoard::default();
        Engine::start(config(socket.clone()), board, &mut Registry::default())
    };
    let engine = start().unwrap();
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(matches!(start(), Err(EngineError::InUse(_))));

    let mut client = Client::connect(&socket, hello("p", SessionKind::Worker), LIMIT).unwrap();
    engine.shutdown(LIMIT).await;
    assert!(!socket.exists());
    assert!(client.lookup(query(&[], None)).is_err());

    std::fs::write(&socket, "mine").unwrap();
    assert!(matches!(start(), Err(EngineError::NotASocket(_))));
}

#[test]
fn a_peer_that_does_not_read_its_answers_is_closed_while_others_are_served() {
    let fixture = Fixture::new();
    let mut good = fixture.join("p", SessionKind::Scheduler);
    let mut slow = fixture.join("d", SessionKind::Scheduler);
    let lookup = M::Lookup(KeyQuery {
        seq: 1,
        request: "r".into(),
        handoff: None,
        keys: ByteBuf::from(vec![7; 36 * 20_000]),
        key_len: 36,
    });
    let flood = std::thread::spawn(move || while slow.send(&lookup).is_ok() {});
    let k1 = key(1);
    fixture.until("closed", |f| {
        good.lookup(query(&[&k1], None)).unwrap();
        f.engine.stats().sessions.len() == 1
    });
    flood.join().unwrap();
    assert_eq!(fixture.engine.stats().counters.sessions_broken, 1);
}

#[tokio::test]
async fn the_sessions_of_an_incarnation_end_together_and_come_back() {
    let fixture = Fixture::new();
    let mut worker = fixture.join("p", SessionKind::Worker);
    let p = fixture.join("p", SessionKind::Scheduler);
    let mut d = fixture.join("d", SessionKind::Scheduler);
    drop(p);
    fixture.until("p left", |f| f.engine.stats().sessions.len() == 1);
    let reset = |error: pegaflow::engine::client::ClientError| {
        assert!(matches!(error, ClientError::Io(_)), "{error}");
    };
    reset(worker.lookup(query(&[], None)).unwrap_err());
    let again = fixture.join("p", SessionKind::Worker);
    let mut first = fixture.join("p", SessionKind::Scheduler);
    // The engine has not seen the end of the first one, but its successor is there.
    let mut second = fixture.join("p", SessionKind::Scheduler);
    assert!(is_closed(&mut first));
    let k1 = key(1);
    assert_eq!(second.lookup(query(&[&k1], None)).unwrap().states, [0]);
    assert_eq!(d.lookup(query(&[&k1], None)).unwrap().states, [0]);
    let lost = &fixture.engine.stats().counters.sessions_lost;
    assert_eq!(
        *lost,
        [("closed", 1), ("replaced", 1), ("sibling", 2)].into()
    );
    let text = metrics(&fixture);
    let line = "pegaflow_engine_sessions_lost_total{why=\"sibling\"} 2";
    assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    drop(again);
}
