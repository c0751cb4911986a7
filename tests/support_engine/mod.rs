//! An engine in a directory of its own, and words to say to it.

#![allow(dead_code, reason = "not every test file uses everything")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pegaflow::engine::client::{Client, ClientError, Query};
use pegaflow::engine::protocol::{
    ClientMessage as M, Commit, Granted, HandoffName, Hello, Open, RequestName, SessionKind,
    SlotRef, VERSION,
};
use pegaflow::engine::{Engine, EngineConfig};
use pegaflow::handoff::{HandoffBoard, HandoffId, HandoffOutcome, HandoffTicket};
use pegaflow::plan::{ArenaPlan, PoolPlan};
use prometheus_client::registry::Registry;

pub const LIMIT: Duration = Duration::from_secs(20);
pub const ROW: u64 = 1000;

pub struct Fixture {
    pub engine: Engine,
    pub board: HandoffBoard,
    pub registry: Registry,
    pub socket: PathBuf,
    _dir: tempfile::TempDir,
}

pub fn config(socket: PathBuf) -> EngineConfig {
    EngineConfig {
        socket_path: socket,
        token: "secret".into(),
        pools: vec![PoolPlan::only(4096 + 32 * 1024)],
        handoff_deadline: Duration::from_secs(20),
        arena: ArenaPlan::default(),
    }
}

impl Fixture {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut EngineConfig)) -> Self {
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

    pub fn connect(&self, hello: Hello) -> Result<Client, ClientError> {
        Client::connect(&self.socket, hello, LIMIT)
    }

    pub fn join(&self, node: &str, kind: SessionKind) -> Client {
        self.connect(hello(node, kind)).unwrap()
    }

    pub fn expect(&self, id: &str) -> HandoffTicket {
        self.board.register(HandoffId::from(id))
    }

    /// Waits until the engine has seen what was sent without an answer.
    pub fn until(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let started = Instant::now();
        while !done(self) {
            assert!(started.elapsed() < LIMIT, "never: {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

pub fn hello(node: &str, kind: SessionKind) -> Hello {
    Hello {
        version: VERSION,
        token: "secret".into(),
        node: node.into(),
        incarnation: 1,
        kind,
        rank: 0,
        world: 1,
        replicated: false,
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

pub fn key(n: u8) -> Vec<u8> {
    [[n; 32].as_slice(), &[0; 4]].concat()
}

pub fn query<'a>(keys: &'a [&'a [u8]], handoff: Option<&'a str>) -> Query<'a> {
    Query {
        request: "r",
        handoff,
        keys,
    }
}

pub fn refs(granted: &Granted) -> Vec<SlotRef> {
    SlotRef::decode_all(&granted.refs).unwrap()
}

pub fn commit(refs: &[SlotRef]) -> M {
    M::Commit(Commit {
        refs: SlotRef::encode_all(refs.iter().copied()),
        bytes: ROW * refs.len() as u64,
        micros: 5,
    })
}

pub fn open(id: &str, chunks: u32) -> M {
    M::Open(Open {
        request: "r".into(),
        handoff: id.into(),
        chunks,
    })
}

pub fn seal(id: &str) -> M {
    M::Seal(HandoffName { handoff: id.into() })
}

pub async fn outcome(ticket: &mut HandoffTicket) -> HandoffOutcome {
    tokio::time::timeout(LIMIT, ticket.settled()).await.unwrap()
}

pub const fn ready(chunks: u32, already_stored: bool) -> HandoffOutcome {
    HandoffOutcome::Ready {
        chunks,
        already_stored,
    }
}

/// The session has ended: the engine says nothing any more.
pub fn is_closed(client: &mut Client) -> bool {
    client.lookup(query(&[], None)).is_err()
}

/// What a scrape says.
pub fn metrics(fixture: &Fixture) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &fixture.registry).unwrap();
    text
}

pub fn finish(request: &str) -> M {
    let request = request.to_owned();
    M::Finish(RequestName { request })
}
