//! A real engine on a real socket, and sessions with it as the nodes have them.
#![allow(dead_code, reason = "each benchmark uses its own part")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pegaflow::engine::client::{Client, Query};
use pegaflow::engine::protocol::{
    ClientMessage, Commit, Hello, RequestName, SessionKind, SlotRef, VERSION,
};
use pegaflow::engine::{Engine, EngineConfig};
use pegaflow::handoff::HandoffBoard;
use prometheus_client::registry::Registry;

pub const TOKEN: &str = "benchmark";
/// For whatever should never take long.
pub const LIMIT: Duration = Duration::from_secs(30);
/// One 8B model's chunk: 36 layers of 64 KiB.
pub const WIDE_ROW: u64 = 36 * 65536;

/// Who speaks, and how wide its rows are.
#[derive(Debug, Clone, Copy)]
pub struct Node {
    pub name: &'static str,
    pub row_bytes: u64,
}

pub struct Rig {
    pub engine: Engine,
    pub board: HandoffBoard,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Rig {
    /// An engine whose arena will hold `slots` rows of `row_bytes`.
    pub fn start(slots: u64, row_bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("engine.sock");
        let board = HandoffBoard::default();
        let engine = start_engine(&socket, (slots + 2) * (row_bytes + 68), board.clone());
        Self {
            engine,
            board,
            socket,
            _dir: dir,
        }
    }

    pub fn join(&self, node: Node, kind: SessionKind) -> Client {
        Client::connect(&self.socket, hello(node, kind), LIMIT).unwrap()
    }

    /// The worker and the scheduler of one node.
    pub fn join_both(&self, node: Node) -> (Client, Client) {
        let worker = self.join(node, SessionKind::Worker);
        (worker, self.join(node, SessionKind::Scheduler))
    }
}

pub fn start_engine(socket: &Path, capacity: u64, board: HandoffBoard) -> Engine {
    let config = EngineConfig {
        socket_path: socket.to_owned(),
        token: TOKEN.into(),
        pools: vec![pegaflow::plan::PoolPlan::only(capacity)],
        handoff_deadline: LIMIT,
        arena: pegaflow::plan::ArenaPlan::default(),
    };
    Engine::start(config, board, &mut Registry::default()).unwrap()
}

fn hello(node: Node, kind: SessionKind) -> Hello {
    Hello {
        version: VERSION,
        token: TOKEN.into(),
        node: node.name.into(),
        incarnation: 1,
        kind,
        rank: 0,
        world: 1,
        replicated: false,
        namespace: [("model".to_owned(), "benchmark".to_owned())].into(),
        row_bytes: match kind {
            SessionKind::Scheduler => 0,
            SessionKind::Worker => node.row_bytes,
        },
        pid: std::process::id(),
    }
}

/// `count` keys as vLLM makes them: a 32-byte hash and the KV group 0. Other seeds, other keys.
pub fn keys(seed: u64, count: usize) -> Vec<Vec<u8>> {
    // SplitMix64. The seed is mixed as well: neighbouring ones would give the same keys, shifted.
    let mix = |z: u64| {
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut state = mix(seed);
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(state).to_le_bytes()
    };
    let one = |_| [next(), next(), next(), next()].concat();
    let hashes = (0..count).map(one);
    hashes
        .map(|hash: Vec<u8>| [hash.as_slice(), &[0; 4]].concat())
        .collect()
}

pub fn slices(keys: &[Vec<u8>]) -> Vec<&[u8]> {
    keys.iter().map(Vec::as_slice).collect()
}

pub fn query<'a>(request: &'a str, keys: &'a [&'a [u8]]) -> Query<'a> {
    Query {
        request,
        handoff: None,
        keys,
    }
}

pub fn finish(request: &str) -> ClientMessage {
    ClientMessage::Finish(RequestName {
        request: request.to_owned(),
    })
}

pub fn commit(refs: &[SlotRef], bytes: u64) -> ClientMessage {
    ClientMessage::Commit(Commit {
        refs: SlotRef::encode_all(refs.iter().copied()),
        bytes,
        micros: 1,
    })
}

/// Makes `keys` Ready (their bytes are nobody's concern), and waits until they are.
pub fn fill(worker: &mut Client, scheduler: &mut Client, keys: &[&[u8]]) {
    let granted = scheduler.store(query("fill", keys)).unwrap();
    assert!(granted.ok, "the arena is too small");
    let refs = SlotRef::decode_all(&granted.refs).unwrap();
    worker.send(&commit(&refs, 0)).unwrap();
    while scheduler
        .lookup(query("fill", keys))
        .unwrap()
        .states
        .contains(&2)
    {
        std::thread::yield_now();
    }
    scheduler.send(&finish("fill")).unwrap();
}

/// The arena as a worker writes it here: by file offset.
pub fn arena_of(worker: &Client) -> File {
    File::from(worker.arena().unwrap().try_clone().unwrap())
}
