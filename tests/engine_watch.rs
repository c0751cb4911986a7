//! A router in another process waits for hand-offs at the engine's real socket.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_engine;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pegaflow::engine::Engine;
use pegaflow::engine::protocol::{
    ClientMessage as M, HandoffName, ServerMessage, SessionKind, VERSION, Watch, Watching,
    encode_frame,
};
use pegaflow::engine::remote::{RemoteEngine, follow};
use pegaflow::handoff::{
    HandoffBoard, HandoffFailure, HandoffId, HandoffOutcome, HandoffState, HandoffTicket,
};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use support_engine::*;
use tokio_util::task::AbortOnDropHandle;

const DOWN: HandoffOutcome = HandoffOutcome::Failed(HandoffFailure::EngineDown);

/// The router's side: its board, whether it is connected, and what ends it.
struct Router {
    board: HandoffBoard,
    connected: Gauge,
    _following: AbortOnDropHandle<()>,
}

impl Router {
    fn start(fixture: &Fixture, token: &str) -> Self {
        let (board, connected) = (HandoffBoard::default(), Gauge::default());
        let engine = RemoteEngine {
            socket_path: fixture.socket.clone(),
            token: token.to_owned(),
        };
        let following = tokio::spawn(follow(engine, board.clone(), connected.clone()));
        Self {
            board,
            connected,
            _following: AbortOnDropHandle::new(following),
        }
    }

    async fn connected(fixture: &Fixture) -> Self {
        let router = Self::start(fixture, "secret");
        router.becomes(1).await;
        router
    }

    async fn becomes(&self, connected: i64) {
        until("the connection changes", || {
            self.connected.get() == connected
        })
        .await;
    }

    fn expect(&self, id: &str) -> HandoffTicket {
        self.board.register(HandoffId::from(id))
    }
}

async fn until(what: &str, done: impl Fn() -> bool) {
    let waiting = async {
        while !done() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    let waited = tokio::time::timeout(LIMIT, waiting).await;
    assert!(waited.is_ok(), "never: {what}");
}

async fn opened(ticket: &mut HandoffTicket) {
    assert!(tokio::time::timeout(LIMIT, ticket.opened()).await.unwrap());
}

#[tokio::test]
async fn it_hears_what_a_router_of_the_engines_process_hears() {
    let fixture = Fixture::new();
    let router = Router::connected(&fixture).await;
    let mut worker = fixture.join("p", SessionKind::Worker);
    let mut p = fixture.join("p", SessionKind::Scheduler);
    let keys = [key(1), key(2)];
    let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();

    let mut ticket = router.expect("h");
    until("the engine knows who waits", || {
        fixture.board.waiting() == 1
    })
    .await;
    p.send(&open("h", 2)).unwrap();
    opened(&mut ticket).await;
    let granted = p.store(query(&keys, Some("h"))).unwrap();
    p.send(&seal("h")).unwrap();
    worker.send(&commit(&refs(&granted))).unwrap();
    assert_eq!(outcome(&mut ticket).await, ready(2, false));
    // It is held for the decode node until the router has its answer.
    assert_eq!(fixture.engine.inspect().handoffs.len(), 1);
    drop(ticket);
    until("nobody waits any more", || fixture.board.waiting() == 0).await;
    until("nothing is held", || {
        fixture.engine.inspect().handoffs.is_empty()
    })
    .await;

    let mut again = router.expect("h2");
    until("the engine knows who waits", || {
        fixture.board.waiting() == 1
    })
    .await;
    p.send(&open("h2", 2)).unwrap();
    p.lookup(query(&keys, Some("h2"))).unwrap();
    assert_eq!(outcome(&mut again).await, ready(2, true));

    let mut lost = router.expect("h3");
    until("the engine knows both", || fixture.board.waiting() == 2).await;
    p.send(&open("h3", 2)).unwrap();
    opened(&mut lost).await;
    drop(p);
    let died = HandoffOutcome::Failed(HandoffFailure::ProducerDied);
    assert_eq!(outcome(&mut lost).await, died);
}

/// The prefill node's word overtakes the router's.
#[tokio::test]
async fn what_came_before_the_router_asked_is_told_too() {
    let fixture = Fixture::new();
    let router = Router::connected(&fixture).await;
    let mut p = fixture.join("p", SessionKind::Scheduler);
    let _worker = fixture.join("p", SessionKind::Worker);
    p.send(&open("early", 2)).unwrap();
    p.send(&open("done", 0)).unwrap();
    p.send(&seal("done")).unwrap();
    p.lookup(query(&[], None)).unwrap();
    let (mut early, mut done) = (router.expect("early"), router.expect("done"));
    opened(&mut early).await;
    assert_eq!(outcome(&mut done).await, ready(0, true));
    p.send(&M::Abort(HandoffName {
        handoff: "early".into(),
    }))
    .unwrap();
    let aborted = HandoffOutcome::Failed(HandoffFailure::Aborted);
    assert_eq!(outcome(&mut early).await, aborted);
}

#[tokio::test]
async fn while_there_is_no_engine_nobody_waits_and_it_is_found_again() {
    let mut fixture = Fixture::new();
    let router = Router::connected(&fixture).await;
    let mut waiting = router.expect("h");
    until("the engine knows who waits", || {
        fixture.board.waiting() == 1
    })
    .await;
    let fresh = HandoffBoard::default();
    let old = std::mem::replace(
        &mut fixture.engine,
        engine_elsewhere(fixture.socket.with_extension("other")),
    );
    old.shutdown(LIMIT).await;
    assert_eq!(outcome(&mut waiting).await, DOWN);
    router.becomes(0).await;
    assert_eq!(router.expect("h2").state(), HandoffState::Settled(DOWN));

    let config = config(fixture.socket.clone());
    fixture.engine = Engine::start(config, fresh.clone(), &mut Registry::default()).unwrap();
    fixture.board = fresh;
    router.becomes(1).await;
    let mut ticket = router.expect("h3");
    let mut p = fixture.join("p", SessionKind::Scheduler);
    until("the engine knows who waits", || {
        fixture.board.waiting() == 1
    })
    .await;
    p.send(&open("h3", 0)).unwrap();
    p.send(&seal("h3")).unwrap();
    assert_eq!(outcome(&mut ticket).await, ready(0, true));
}

fn engine_elsewhere(socket: std::path::PathBuf) -> Engine {
    Engine::start(
        config(socket),
        HandoffBoard::default(),
        &mut Registry::default(),
    )
    .unwrap()
}

#[tokio::test]
async fn who_does_not_know_the_token_hears_nothing() {
    let fixture = Fixture::new();
    let router = Router::start(&fixture, "another");
    until("the board is off", || {
        router.expect("h").state() == HandoffState::Settled(DOWN)
    })
    .await;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert_eq!(router.connected.get(), 0);
    assert_eq!(fixture.board.waiting(), 0);
}

/// Says these messages after `watch`; true when the engine closes the connection for it.
fn is_refused(fixture: &Fixture, messages: &[M]) -> bool {
    let mut stream = UnixStream::connect(&fixture.socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let watch = M::Watch(Watch {
        version: VERSION,
        token: "secret".into(),
    });
    for message in std::iter::once(&watch).chain(messages) {
        stream.write_all(&encode_frame(message).unwrap()).unwrap();
    }
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_router_may_not_say_closes_its_connection_and_harms_nobody() {
    let fixture = Fixture::new();
    let mut node = fixture.join("p", SessionKind::Scheduler);
    let name = |length| HandoffName {
        handoff: "x".repeat(length),
    };
    for wrong in [
        vec![M::Await(name(0))],
        vec![M::Await(name(1025))],
        vec![M::Await(name(100_000))],
        vec![M::Await(name(10)), M::Seal(name(10))],
        vec![open("h", 2)],
        vec![M::Hello(hello("q", SessionKind::Scheduler))],
    ] {
        assert!(is_refused(&fixture, &wrong), "{wrong:?}");
    }
    until("their tickets are gone", || fixture.board.waiting() == 0).await;
    assert!(node.lookup(query(&[], None)).is_ok());
    let mut nodes_word = fixture.join("p2", SessionKind::Scheduler);
    nodes_word.send(&M::Await(name(10))).unwrap();
    assert!(is_closed(&mut nodes_word));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_hangs_up_again_and_again_is_tried_less_and_less_often() {
    let dir = tempfile::tempdir().unwrap();
    let socket_path = dir.path().join("s");
    let listener = UnixListener::bind(&socket_path).unwrap();
    let tries = Arc::new(AtomicUsize::new(0));
    let count = tries.clone();
    std::thread::spawn(move || {
        let watching = ServerMessage::Watching(Watching { version: VERSION });
        let answer = encode_frame(&watching).unwrap();
        while let Ok((mut stream, _)) = listener.accept() {
            count.fetch_add(1, Ordering::SeqCst);
            let mut hello = [0; 4];
            let _ = stream.read_exact(&mut hello);
            let _ = stream.write_all(&answer);
        }
    });
    let engine = RemoteEngine {
        socket_path,
        token: "secret".to_owned(),
    };
    let following = follow(engine, HandoffBoard::default(), Gauge::default());
    let _ = tokio::time::timeout(std::time::Duration::from_secs(3), following).await;
    // After 0.1, 0.2, 0.4, 0.8, 1.6 s, each a fifth more or less; not every 0.1 s.
    let tries = tries.load(Ordering::SeqCst);
    assert!((2..=7).contains(&tries), "{tries}");
}
