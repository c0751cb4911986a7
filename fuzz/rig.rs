//! A real engine with one well-behaved node, and somebody who feeds it bytes. Shared by the fuzz target
//! (`fuzz_targets/frames.rs`) and by `tests/engine_hostile.rs`, which replays the corpus.

#![allow(dead_code, reason = "each user takes its part")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pegaflow::engine::client::{Client, Query};
use pegaflow::engine::protocol::{
    ClientMessage as M, Commit, Damaged, Discard, HandoffName, Hello, KeyQuery, Loaded, Open,
    RequestName, ServerMessage, SessionKind, SlotRef, VERSION, decode, encode_frame,
};
use pegaflow::engine::{Engine, EngineConfig};
use pegaflow::handoff::HandoffBoard;
use pegaflow::plan::{ArenaPlan, PoolPlan};
use prometheus_client::registry::Registry;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_bytes::ByteBuf;

pub const LIMIT: Duration = Duration::from_secs(30);
const ROW: usize = 512;
const SLOTS: u64 = 16;
/// Chunks of the well-behaved node, which holds a lease on them all the time.
const KEPT: u8 = 4;
/// What others can have.
pub const FREE_SLOTS: usize = SLOTS as usize - KEPT as usize;
const KEY_LEN: u32 = 12;

pub struct Rig {
    pub engine: Engine,
    pub socket: PathBuf,
    scheduler: Client,
    worker: Client,
    kept: Vec<SlotRef>,
    /// The incarnation under which bytes are fed.
    life: u64,
    _dir: tempfile::TempDir,
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
        namespace: [("model".to_owned(), "tiny".to_owned())].into(),
        row_bytes: match kind {
            SessionKind::Scheduler => 0,
            SessionKind::Worker => ROW as u64,
        },
        pid: std::process::id(),
    }
}

/// With the right token: the rest is up to the caller.
pub fn hostile_hello(kind: SessionKind) -> Hello {
    hello("hostile", kind)
}

pub fn key(n: u8) -> Vec<u8> {
    [[n; 8].as_slice(), &[0; 4]].concat()
}

impl Rig {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("engine.sock");
        let config = EngineConfig {
            socket_path: socket.clone(),
            token: "secret".into(),
            pools: vec![PoolPlan::only(4096 + SLOTS * ROW as u64)],
            arena: ArenaPlan {
                verify: true,
                ..ArenaPlan::default()
            },
            handoff_deadline: Duration::from_millis(200),
        };
        let board = HandoffBoard::default();
        let engine = Engine::start(config, board, &mut Registry::default()).unwrap();
        let mut worker =
            Client::connect(&socket, hello("good", SessionKind::Worker), LIMIT).unwrap();
        let mut scheduler =
            Client::connect(&socket, hello("good", SessionKind::Scheduler), LIMIT).unwrap();

        let keys: Vec<_> = (0..KEPT).map(key).collect();
        let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
        let query = Query {
            request: "keep",
            handoff: None,
            keys: &keys,
        };
        let granted = scheduler.store(query).unwrap();
        let kept = SlotRef::decode_all(&granted.refs).unwrap();
        assert_eq!(kept.len(), usize::from(KEPT));
        let arena = File::from(worker.arena().unwrap().try_clone().unwrap());
        for (at, fill) in kept.iter().zip(1..) {
            arena
                .write_all_at(&[fill; ROW], worker.offset(*at))
                .unwrap();
        }
        let commit = Commit {
            refs: granted.refs,
            bytes: 0,
            micros: 0,
        };
        worker.send(&M::Commit(commit)).unwrap();
        let mut rig = Self {
            engine,
            socket,
            scheduler,
            worker,
            kept,
            life: 1,
            _dir: dir,
        };
        rig.until("committed", |rig| {
            rig.engine.stats().ready == u32::from(KEPT)
        });
        // The lease that lasts.
        let found = rig.scheduler.lookup(query).unwrap();
        assert_eq!(found.states.as_slice(), [1; KEPT as usize]);
        rig
    }

    /// The good node's chunks are found, in their places, with their bytes; a new one can be stored.
    pub fn assert_alive(&mut self) {
        assert!(self.engine.is_running());
        let keys: Vec<_> = (0..KEPT).map(key).collect();
        let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
        let query = Query {
            request: "keep",
            handoff: None,
            keys: &keys,
        };
        let found = self.scheduler.lookup(query).unwrap();
        assert_eq!(SlotRef::decode_all(&found.refs).unwrap(), self.kept);
        let arena = File::from(self.worker.arena().unwrap().try_clone().unwrap());
        for (at, fill) in self.kept.iter().zip(1..) {
            let mut bytes = [0; ROW];
            arena
                .read_exact_at(&mut bytes, self.worker.offset(*at))
                .unwrap();
            assert_eq!(bytes, [fill; ROW]);
        }
    }

    /// [`Rig::assert_alive`], and no session is left but the good ones.
    pub fn assert_unharmed(&mut self) {
        self.assert_alive();
        self.until("hostile sessions end", |rig| {
            rig.engine.stats().sessions.len() == 2
        });
    }

    /// Once the hostile processes are reaped, all is as it was before they came.
    pub fn assert_nothing_is_left_of_the_hostile(&mut self) {
        self.engine.incarnation_gone(&"hostile".into(), u64::MAX);
        self.until("hand-offs end", |rig| rig.engine.stats().handoffs_open == 0);
        let stats = self.engine.stats();
        let held = (
            stats.pending,
            stats.quarantined,
            stats.reserved,
            stats.leased,
        );
        assert_eq!(held, (0, 0, 0, u32::from(KEPT)), "{stats:#?}");
    }

    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let started = Instant::now();
        while !done(self) {
            assert!(
                started.elapsed() < LIMIT,
                "never: {what}: {:#?}",
                self.engine.stats()
            );
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// One connection that sends what `input` says, reads all answers and is closed.
    pub fn feed(&mut self, input: &[u8]) {
        let Some((&mode, rest)) = input.split_first() else {
            return;
        };
        let kind = match mode & 1 {
            0 => SessionKind::Scheduler,
            _ => SessionKind::Worker,
        };
        let mut bytes = Vec::new();
        if mode & 2 == 0 {
            let mut hello = hostile_hello(kind);
            hello.incarnation = self.life;
            bytes = encode_frame(&M::Hello(hello)).unwrap();
        }
        if mode & 4 == 0 {
            bytes.extend_from_slice(rest);
        } else {
            for message in messages(kind, rest) {
                bytes.extend(encode_frame(&message).unwrap());
            }
        }
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        // Fails when the engine has closed already.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
        if mode & 8 != 0 {
            // Its processes are reaped, the next one is another incarnation.
            self.engine.incarnation_gone(&"hostile".into(), self.life);
            self.life += 1;
        }
    }
}

/// Messages that are well-formed, over few names and keys, so that they meet: two bytes each.
fn messages(kind: SessionKind, input: &[u8]) -> Vec<M> {
    let (pairs, _) = input.as_chunks::<2>();
    pairs
        .iter()
        .take(64)
        .map(|&[op, what]| message(kind, op, what))
        .collect()
}

fn message(kind: SessionKind, op: u8, what: u8) -> M {
    let request = format!("r{}", what & 3);
    let handoff = format!("h{}", (what >> 2) & 3);
    let many = 1 + ((what >> 4) & 7);
    if kind == SessionKind::Worker {
        let refs = (0..u32::from(many)).map(|at| SlotRef {
            slot: u32::from(what & 15) + at,
            generation: u32::from(op >> 2) + 1,
        });
        let refs = SlotRef::encode_all(refs);
        return match op & 3 {
            0 if what & 128 == 0 => M::Damaged(Damaged { refs }),
            0 => M::Loaded(Loaded {
                chunks: u32::from(what),
                bytes: u64::MAX,
                micros: u64::MAX,
                failed: 1,
            }),
            1 => M::Discard(Discard { refs }),
            _ => M::Commit(Commit {
                refs,
                bytes: u64::MAX,
                micros: 0,
            }),
        };
    }
    let query = || KeyQuery {
        seq: u64::from(what),
        request: request.clone(),
        handoff: (op & 8 != 0).then(|| handoff.clone()),
        // The good node's keys among them.
        keys: ByteBuf::from(
            (0..many)
                .flat_map(|at| key(at + (op >> 4)))
                .collect::<Vec<u8>>(),
        ),
        key_len: KEY_LEN,
    };
    match op & 7 {
        0 | 1 => M::Lookup(query()),
        2 | 3 => M::Store(query()),
        4 => M::Open(Open {
            request,
            handoff,
            chunks: u32::from(many),
        }),
        5 => M::Seal(HandoffName { handoff }),
        6 if op & 8 != 0 => M::Abort(HandoffName { handoff }),
        6 => M::Release(RequestName { request }),
        _ => M::Finish(RequestName { request }),
    }
}

/// What can be decoded can be encoded again, and is the same then.
pub fn check_decoding(input: &[u8]) {
    let bodies = [
        input,
        input.get(1..).unwrap_or_default(),
        input.get(5..).unwrap_or_default(),
    ];
    for body in bodies {
        round_trip::<M>(body);
        round_trip::<ServerMessage>(body);
        let _ = SlotRef::decode_all(body).map(|refs| {
            assert_eq!(SlotRef::encode_all(refs).as_slice(), body);
        });
        if let Ok(M::Lookup(query) | M::Store(query)) = decode::<M>(body)
            && let Ok(keys) = query.keys()
        {
            assert_eq!(keys.concat(), query.keys.as_slice());
        }
    }
}

fn round_trip<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(body: &[u8]) {
    if let Ok(message) = decode::<T>(body) {
        let frame = encode_frame(&message).unwrap();
        assert_eq!(decode::<T>(&frame[4..]).unwrap(), message);
    }
}
