//! The store under load, as percentiles: `cargo bench --bench store_load [-- SECONDS]`.
//!
//! - `lookup`: 1,000 lookups a second (open loop: a call that starts late because the one before it
//!   was slow counts from when it was due), alone and beside saves of 2 GB/s into the arena.
//! - `wake-up`: from the moment a hand-off settles on the board to the waiting router task running
//!   again, and from just before the last commit is sent; idle, and with lookups, saves of 1 GB/s and
//!   64 streaming tasks on the router's runtime.
//!
//! Prints one JSON object a line.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod rig;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use pegaflow::engine::client::{Client, Query};
use pegaflow::engine::protocol::{ClientMessage, HandoffName, Open, SessionKind, SlotRef};
use pegaflow::handoff::{HandoffId, HandoffOutcome};
use rig::{LIMIT, Node, Rig, WIDE_ROW, arena_of, commit, fill, finish, keys, query, slices};
use tokio::runtime::Runtime;

const SLOTS: u64 = 400;
/// Chunks that one save brings.
const BATCH: usize = 8;
const P: Node = Node {
    name: "p",
    row_bytes: WIDE_ROW,
};
const D: Node = Node {
    name: "d",
    row_bytes: WIDE_ROW,
};
const READY: HandoffOutcome = HandoffOutcome::Ready {
    chunks: 1,
    already_stored: false,
};

fn main() {
    // Cargo adds `--bench`.
    let seconds = std::env::args().find_map(|argument| argument.parse().ok());
    let span = Duration::from_secs_f64(seconds.unwrap_or(10.0));
    for chunks in [64, 256] {
        lookups(chunks, 0.0, span);
        lookups(chunks, 2e9, span);
    }
    wake_ups("idle", 0.0, span);
    wake_ups("under load", 1e9, span);
}

/// What else is going on; ended with [`Load::end`]. when the measurement is over.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
    saved: Arc<AtomicU64>,
    started: Instant,
}

impl Load {
    fn none() -> Self {
        Self {
            stop: Arc::default(),
            threads: Vec::new(),
            saved: Arc::default(),
            started: Instant::now(),
        }
    }

    /// New chunks at `rate` bytes a second, written in whole, by a node of their own.
    fn save(&mut self, rig: &Rig, rate: f64) {
        if rate == 0.0 {
            return;
        }
        let (mut worker, mut scheduler) = rig.join_both(Node { name: "s", ..P });
        // The first touch of memory is not what is measured.
        let row = vec![7; WIDE_ROW as usize];
        let mut arena = mapped(&worker);
        for slot in 0..worker.welcome().slots {
            let at = SlotRef {
                slot,
                generation: 0,
            };
            write(&mut arena, worker.offset(at), &row);
        }
        self.started = Instant::now();
        let (stop, saved) = (self.stop.clone(), self.saved.clone());
        self.threads.push(thread::spawn(move || {
            let pause = Duration::from_secs_f64((BATCH as u64 * WIDE_ROW) as f64 / rate);
            let mut due = Instant::now();
            for seed in 1000.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let new = keys(seed, BATCH);
                let granted = scheduler.store(query("save", &slices(&new))).unwrap();
                assert!(granted.ok, "saves found no room");
                let refs = SlotRef::decode_all(&granted.refs).unwrap();
                for at in &refs {
                    write(&mut arena, worker.offset(*at), &row);
                }
                let bytes = refs.len() as u64 * WIDE_ROW;
                worker.send(&commit(&refs, bytes)).unwrap();
                scheduler.send(&finish("save")).unwrap();
                saved.fetch_add(bytes, Ordering::Relaxed);
                due = (due + pause).max(Instant::now() - pause);
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        }));
    }

    /// 1,000 lookups a second by a node of their own.
    fn look_up(&mut self, rig: &Rig, prefix: Vec<Vec<u8>>) {
        let mut scheduler = rig.join(Node { name: "l", ..D }, SessionKind::Scheduler);
        let stop = self.stop.clone();
        self.threads.push(thread::spawn(move || {
            let prefix = slices(&prefix);
            while !stop.load(Ordering::Relaxed) {
                scheduler.lookup(query("l", &prefix)).unwrap();
                scheduler.send(&finish("l")).unwrap();
                thread::sleep(Duration::from_millis(1));
            }
        }));
    }

    /// GB/s of saves.
    fn end(self) -> f64 {
        let rate = self.saved.load(Ordering::Relaxed) as f64 / self.started.elapsed().as_secs_f64();
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
        rate / 1e9
    }
}

/// As a worker has it.
fn mapped(worker: &Client) -> MmapMut {
    #[expect(unsafe_code, reason = "the arena is shared with the engine")]
    // SAFETY: the engine writes only the generations, which nobody reads through this mapping, and
    // no other worker of the benchmark writes; the file is sealed against shrinking.
    unsafe {
        MmapMut::map_mut(&arena_of(worker)).unwrap()
    }
}

fn write(arena: &mut MmapMut, offset: u64, row: &[u8]) {
    let offset = usize::try_from(offset).unwrap();
    arena[offset..offset + row.len()].copy_from_slice(row);
}

fn lookups(chunks: usize, saves: f64, span: Duration) {
    let rig = Rig::start(SLOTS, WIDE_ROW);
    let (mut worker, mut p) = rig.join_both(P);
    let mut d = rig.join(D, SessionKind::Scheduler);
    let prefix = keys(1, chunks);
    let prefix = slices(&prefix);
    fill(&mut worker, &mut p, &prefix);
    let mut load = Load::none();
    load.save(&rig, saves);

    let period = Duration::from_millis(1);
    let mut took = Vec::new();
    let mut due = Instant::now();
    let end = due + span;
    while due < end {
        let late = Instant::now();
        let started = if late > due {
            due
        } else {
            thread::sleep(due - late);
            Instant::now()
        };
        let found = d.lookup(query("r", &prefix)).unwrap();
        took.push(started.elapsed());
        assert!(found.states.iter().all(|&state| state == 1));
        d.send(&finish("r")).unwrap();
        due += period;
    }
    let rate = took.len() as f64 / span.as_secs_f64();
    let name = format!("lookup of {chunks}, {rate:.0}/s");
    report(&name, load.end(), took);
}

/// Two ways to the same event: settled by hand on the board, and by the commit of the last chunk.
fn wake_ups(name: &str, saves: f64, span: Duration) {
    let rig = Rig::start(SLOTS, WIDE_ROW);
    let (mut worker, mut p) = rig.join_both(P);
    let mut d = rig.join(D, SessionKind::Scheduler);
    let router = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let mut load = Load::none();
    if saves > 0.0 {
        let prefix = keys(1, 64);
        fill(&mut worker, &mut p, &slices(&prefix));
        load.look_up(&rig, prefix);
        load.save(&rig, saves);
        for _ in 0..64 {
            router.spawn(streaming());
        }
    }
    let (mut by_board, mut by_commit) = (Vec::new(), Vec::new());
    let end = Instant::now() + span;
    for seed in 1 << 32.. {
        if Instant::now() > end {
            break;
        }
        let id = HandoffId::random();
        let woken = wait_for(&rig, &router, &id);
        let started = Instant::now();
        rig.board.settle(&id, READY);
        by_board.push(woken.recv_timeout(LIMIT).unwrap() - started);

        let id = HandoffId::random();
        let new = keys(seed, 1);
        let new = slices(&new);
        let refs = offer(&mut p, &id, &new);
        let woken = wait_for(&rig, &router, &id);
        let started = Instant::now();
        worker.send(&commit(&refs, WIDE_ROW)).unwrap();
        by_commit.push(woken.recv_timeout(LIMIT).unwrap() - started);
        p.send(&finish("r")).unwrap();
        d.lookup(of_handoff(&id, &new)).unwrap();
        d.send(&finish("r")).unwrap();
    }
    let rate = load.end();
    report(&format!("wake-up after settle, {name}"), rate, by_board);
    let name = format!("wake-up after the commit was sent, {name}");
    report(&name, rate, by_commit);
}

/// A router task that waits, and tells when it woke. It has had time to go to sleep.
fn wait_for(rig: &Rig, router: &Runtime, id: &HandoffId) -> mpsc::Receiver<Instant> {
    let mut ticket = rig.board.register(id.clone());
    let (woken, receiver) = mpsc::sync_channel(1);
    router.spawn(async move {
        ticket.settled().await;
        let _ = woken.send(Instant::now());
    });
    thread::sleep(Duration::from_millis(2));
    receiver
}

/// A sealed hand-off that lacks nothing but the commit of its one chunk.
fn offer(p: &mut Client, id: &HandoffId, new: &[&[u8]]) -> Vec<SlotRef> {
    let open = Open {
        request: "r".into(),
        handoff: id.as_str().into(),
        chunks: 1,
    };
    p.send(&ClientMessage::Open(open)).unwrap();
    let granted = p.store(of_handoff(id, new)).unwrap();
    assert!(granted.ok, "no room for a hand-off");
    let seal = HandoffName {
        handoff: id.as_str().into(),
    };
    p.send(&ClientMessage::Seal(seal)).unwrap();
    SlotRef::decode_all(&granted.refs).unwrap()
}

fn of_handoff<'a>(id: &'a HandoffId, keys: &'a [&'a [u8]]) -> Query<'a> {
    Query {
        handoff: Some(id.as_str()),
        ..query("r", keys)
    }
}

/// What a stream costs the router: a wake-up every 10 ms, and 20 us of work.
async fn streaming() {
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    loop {
        tick.tick().await;
        let until = Instant::now() + Duration::from_micros(20);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    }
}

fn report(name: &str, saves: f64, mut took: Vec<Duration>) {
    took.sort_unstable();
    let micros = |share: f64| {
        let at = (took.len() as f64 * share) as usize;
        took[at.min(took.len() - 1)].as_secs_f64() * 1e6
    };
    let line = serde_json::json!({
        "name": name,
        "saves_gb_s": (saves * 100.0).round() / 100.0,
        "samples": took.len(),
        "p50_us": micros(0.5).round(),
        "p99_us": micros(0.99).round(),
        "max_us": micros(1.0).round(),
    });
    println!("{line}");
}
