//! What the test and the processes that it starts and kills agree on: what a process is to do, what it
//! reports, and which bytes belong into a chunk's row.

#![allow(dead_code, reason = "each side uses its half")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use pegaflow::engine::protocol::{Hello, SessionKind, SlotRef, VERSION};
use serde::{Deserialize, Serialize};

pub const TOKEN: &str = "secret";
/// Bytes and words that one rank writes per chunk.
pub const ROW_BYTES: u64 = 4096;
pub const ROW_WORDS: usize = 512;
/// Prompts that share the arena, in families that begin with the same chunks.
pub const PROMPTS: u64 = 32;
const FAMILY: u64 = 4;
const SHARED_CHUNKS: u64 = 2;
pub const MAX_CHUNKS: u64 = 6;

/// What one process is to do: the only argument of the program, as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    pub role: Role,
    pub socket: PathBuf,
    /// Where events are appended; what was written is there even after a kill.
    pub report: PathBuf,
    pub node: String,
    pub incarnation: u64,
    pub world: u32,
    pub seed: u64,
    /// Kills itself there.
    pub stop: Option<Stop>,
    /// Of a producer: those that it opens, in this order. Of a consumer: those that it consumes.
    pub handoffs: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Schedulers; standard input and output are the links to the workers of ranks 0 and 1.
    Producer,
    Consumer,
    /// Standard input is the link to the scheduler.
    Worker {
        rank: u32,
    },
    /// Becomes another user and tries to get in.
    Stranger {
        uid: u32,
    },
}

/// Where a process can kill itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Point {
    /// Scheduler: slots were granted, no worker knows.
    Granted,
    /// Scheduler: chunks are leased, no worker knows.
    Found,
    /// Scheduler: the workers know, and go on without it.
    Dispatched,
    /// Worker: before the first byte.
    BeforeWrite,
    MidWrite,
    /// Worker: every byte is there, nothing is committed.
    Written,
    MidLoad,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Stop {
    pub point: Point,
    /// Passes this often first.
    pub passes: u32,
}

/// A line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    Committed {
        chunks: u64,
    },
    /// Loaded and found to be what the producer that got this very chunk granted has written.
    Verified {
        chunks: u64,
    },
    /// Loaded, and the sum in the arena is that of the row.
    Summed {
        chunks: u64,
    },
    /// The sum is another one, although the generation never changed.
    Damaged {
        node: String,
        chunk: Chunk,
    },
    /// The generation had changed before or during a load. `leased`: it was not allowed to.
    Overtaken {
        node: String,
        leased: bool,
    },
    /// Bytes passed both looks at the generation and are not what a producer committed.
    Corrupt {
        node: String,
        what: String,
    },
    /// Goes on writing although its scheduler is dead.
    Orphaned,
    Reconnected,
    Stopped(Point),
    /// What became of a [`Role::Stranger`].
    Stranger {
        admitted: bool,
    },
}

pub struct Report(File);

/// Beside the report, if there is one: who was not admitted by the store, and why.
pub fn refusals(report: &Path) -> PathBuf {
    report.with_extension("refused")
}

impl Report {
    pub fn open(spec: &Spec) -> Self {
        Self::append(&spec.report)
    }

    pub fn append(path: &Path) -> Self {
        let file = File::options().append(true).create(true).open(path);
        Self(file.unwrap())
    }

    pub fn say(&mut self, event: &impl Serialize) {
        let mut line = serde_json::to_vec(event).unwrap();
        line.push(b'\n');
        // One write: lines of several processes do not mix.
        self.0.write_all(&line).unwrap();
    }
}

/// From a scheduler to a worker of its incarnation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    pub kind: JobKind,
    pub epoch: u64,
    pub chunks: Vec<Chunk>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobKind {
    Write,
    Load {
        /// False: the lease was given back already, and only the generation protects the load.
        leased: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    pub id: u64,
    pub slot: u32,
    pub generation: u32,
}

impl Chunk {
    pub fn new(id: u64, at: SlotRef) -> Self {
        Self {
            id,
            slot: at.slot,
            generation: at.generation,
        }
    }

    pub fn at(&self) -> SlotRef {
        SlotRef {
            slot: self.slot,
            generation: self.generation,
        }
    }
}

pub fn hello(spec: &Spec, kind: SessionKind) -> Hello {
    let rank = match spec.role {
        Role::Worker { rank } => rank,
        _ => 0,
    };
    Hello {
        version: VERSION,
        token: TOKEN.into(),
        node: spec.node.clone(),
        incarnation: spec.incarnation,
        kind,
        rank,
        world: spec.world,
        replicated: false,
        namespace: BTreeMap::from([("model".to_owned(), "crash".to_owned())]),
        row_bytes: match kind {
            SessionKind::Scheduler => 0,
            SessionKind::Worker => ROW_BYTES,
        },
        pid: std::process::id(),
    }
}

/// The chunks of a prompt, by number; prompts of a family begin alike.
pub fn prompt(number: u64, chunks: u64) -> Vec<u64> {
    let own = |at| ((1000 + number) << 8) | at;
    let shared = |at| ((number / FAMILY) << 8) | at;
    let pick = |at| {
        if at < SHARED_CHUNKS {
            shared(at)
        } else {
            own(at)
        }
    };
    (0..chunks).map(pick).collect()
}

/// A block hash and the KV group.
pub fn key(id: u64) -> Vec<u8> {
    let mut rng = Rng::new(id);
    let mut key: Vec<u8> = (0..4).flat_map(|_| rng.next().to_le_bytes()).collect();
    key.extend_from_slice(&[0; 4]);
    key
}

pub const SEAL: u64 = 0x5ea1_ed00_c0de;
/// The word that is written last, just before the commit.
pub const SEAL_WORD: usize = 4;
const CHECKSUM_WORD: usize = 5;
const HEAD_WORDS: usize = 6;

/// What `rank` writes for a chunk that it was granted, but for the seal. `writer` makes the rows of two
/// writers of the same chunk differ.
pub fn row(chunk: &Chunk, rank: u32, writer: u64) -> Vec<u64> {
    let place = (u64::from(chunk.slot) << 32) | u64::from(chunk.generation);
    let mut words = vec![chunk.id, u64::from(rank), place, writer, 0, 0];
    let mut rng = Rng::new(chunk.id ^ place.rotate_left(17) ^ writer ^ u64::from(rank));
    words.resize_with(ROW_WORDS, || rng.next());
    words[CHECKSUM_WORD] = checksum(&words[HEAD_WORDS..]);
    words
}

/// Whether `found` is what some producer's `rank` wrote and committed for exactly this chunk.
pub fn verify(chunk: &Chunk, rank: u32, found: &[u64]) -> Result<(), String> {
    let mut expected = row(chunk, rank, found[3]);
    expected[SEAL_WORD] = SEAL;
    if found == expected {
        return Ok(());
    }
    let differing = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
    let sum = checksum(&found[HEAD_WORDS..]) == found[CHECKSUM_WORD];
    Err(format!(
        "{chunk:?} rank {rank}: {differing} of {ROW_WORDS} words differ, checksum of its own: {sum}, \
         begins with {:x?}",
        &found[..HEAD_WORDS]
    ))
}

/// What a worker keeps in the arena beside a row, where the store has room for it. Any sum will do: the
/// store never looks at it.
pub fn sum(words: &[u64]) -> u32 {
    let sum = checksum(words);
    (sum ^ sum >> 32) as u32
}

fn checksum(words: &[u64]) -> u64 {
    let mix = |sum: u64, word: &u64| {
        (sum ^ word)
            .rotate_left(9)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
    };
    words.iter().fold(1, mix)
}

/// SplitMix64: the same numbers for the same seed, everywhere.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
