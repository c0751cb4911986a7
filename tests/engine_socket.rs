//! The engine over its real socket and its real shared memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pegaflow::engine::client::{Client, ClientError, Query};
use pegaflow::engine::protocol::{
    ClientMessage as M, Commit, Discard, Granted, HandoffName, Hello, Loaded, Open, RefusalCode,
    RequestName, SessionKind, SlotRef, encode_frame,
};
use pegaflow::engine::{Engine, EngineConfig, EngineError};
use pegaflow::handoff::{
    HandoffBoard, HandoffFailure, HandoffId, HandoffOutcome, HandoffState, HandoffTicket,
};
use pegaflow::plan::ArenaPlan;
use prometheus_client::registry::Registry;
use serde_bytes::ByteBuf;

const LIMIT: Duration = Duration::from_secs(20);
const ROW: u64 = 1000;

struct Fixture {
    engine: Engine,
    board: HandoffBoard,
    registry: Registry,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

fn config(socket: PathBuf) -> EngineConfig {
    EngineConfig {
        socket_path: socket,
        token: "secret".into(),
        capacity: 4096 + 32 * 1024,
        arena: ArenaPlan::default(),
        handoff_deadline: Duration::from_secs(20),
    }
}

impl Fixture {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut EngineConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("engine.sock");
        let board = HandoffBoard::default();
        let mut registry = Registry::default();
        let mut config = config(socket.clone());
        change(&mut config);
        let engine = Engine::start(config, board.clone(), &mut registry).unwrap();
        Self {
            engine,
            board,
            registry,
            socket,
            _dir: dir,
        }
    }

    fn connect(&self, hello: Hello) -> Result<Client, ClientError> {
        Client::connect(&self.socket, hello, LIMIT)
    }

    fn join(&self, node: &str, kind: SessionKind) -> Client {
        self.connect(hello(node, kind)).unwrap()
    }

    fn expect(&self, id: &str) -> HandoffTicket {
        self.board.register(HandoffId::from(id))
    }

    /// Waits until the engine has seen what was sent without an answer.
    fn until(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let started = Instant::now();
        while !done(self) {
            assert!(started.elapsed() < LIMIT, "never: {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn hello(node: &str, kind: SessionKind) -> Hello {
    Hello {
        version: 1,
        token: "secret".into(),
        node: node.into(),
        incarnation: 1,
        kind,
        rank: 0,
        world: 1,
        namespace: [("dtype", "bfloat16"), ("model", "tiny")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into(),
        row_bytes: match kind {
            SessionKind::Scheduler => 0,
            SessionKind::Worker => ROW,
        },
        pid: std::process::id(),
    }
}

fn key(n: u8) -> Vec<u8> {
    [[n; 32].as_slice(), &[0; 4]].concat()
}

fn query<'a>(keys: &'a [&'a [u8]], handoff: Option<&'a str>) -> Query<'a> {
    Query {
        request: "r",
        handoff,
        keys,
    }
}

fn refs(granted: &Granted) -> Vec<SlotRef> {
    SlotRef::decode_all(&granted.refs).unwrap()
}

fn commit(refs: &[SlotRef]) -> M {
    M::Commit(Commit {
        refs: SlotRef::encode_all(refs.iter().copied()),
        bytes: ROW * refs.len() as u64,
        micros: 5,
    })
}

fn open(id: &str, chunks: u32) -> M {
    M::Open(Open {
        request: "r".into(),
        handoff: id.into(),
        chunks,
    })
}

fn seal(id: &str) -> M {
    M::Seal(HandoffName { handoff: id.into() })
}

async fn outcome(ticket: &mut HandoffTicket) -> HandoffOutcome {
    tokio::time::timeout(LIMIT, ticket.settled()).await.unwrap()
}

const fn ready(chunks: u32, already_stored: bool) -> HandoffOutcome {
    HandoffOutcome::Ready {
        chunks,
        already_stored,
    }
}

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
        let request = "r".to_owned();
        client.send(&M::Finish(RequestName { request })).unwrap();
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

    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &fixture.registry).unwrap();
    for line in [
        "pegaflow_engine_up 1",
        "pegaflow_engine_slots_ready 2",
        "pegaflow_engine_saved_bytes_total 2000",
        "pegaflow_engine_handoffs_total{outcome=\"already_stored\"} 2",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
}

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

    drop(p);
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
        |h| h.version = 2,
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
    let bad_keys = M::Lookup(pegaflow::engine::protocol::KeyQuery {
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
    let lookup = M::Lookup(pegaflow::engine::protocol::KeyQuery {
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
