//! A storm: two prefill and two decode nodes, each a scheduler and its workers, live and are killed on
//! one small arena, as the supervisor would start and reap them.
//!
//! ```text
//! start ─▶ work ─▶ one process dies (kill -9 from outside, or at a stop point inside)
//!            ▲       └─▶ the others linger ─▶ kill -9 ─▶ all reaped ─▶ incarnation_gone ─┐
//!            └───────────────────────── next incarnation ────────────────────────────────┘
//! ```
//!
//! After each round nobody is left, and everything must be free again.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use pegaflow::engine::client::{Client, Query};
use pegaflow::engine::protocol::{ClientMessage as M, Commit, RequestName, SessionKind, SlotRef};
use pegaflow::engine::{Engine, EngineConfig};
use pegaflow::handoff::{HandoffBoard, HandoffFailure, HandoffOutcome, HandoffState};
use pegaflow::plan::{ArenaPlan, PoolPlan};
use prometheus_client::registry::Registry;

use crate::node::Node;
use crate::spec::{self, Event, Point, ROW_BYTES, Rng, Role, Spec};

pub const LIMIT: Duration = Duration::from_secs(60);
/// Few, so that nearly every store evicts.
pub const SLOTS: u32 = 24;
/// A fired hand-off is held for so long.
const HANDOFF_DEADLINE: Duration = Duration::from_millis(200);

/// When the engine is told that an incarnation is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// When every process of it has been reaped, as the supervisor does.
    Reaped,
    /// As soon as one of them has died: the fault that the harness must see.
    TooEarly,
}

#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub seed: u64,
    pub world: u32,
    pub gone: Gone,
    /// Checksums are kept, and compared at every load.
    pub verify: bool,
    /// Per node and round.
    pub lives: u32,
    /// What the engine wants to hear; the processes say [`spec::TOKEN`].
    pub token: &'static str,
}

pub struct Storm {
    pub engine: Engine,
    pub board: HandoffBoard,
    pub plan: Plan,
    /// A life of each node after the other, over all rounds.
    incarnations: Mutex<BTreeMap<String, u64>>,
    rounds: u64,
    socket: PathBuf,
    dir: tempfile::TempDir,
}

/// What came of the storm so far.
#[derive(Debug, Default)]
pub struct Tally {
    pub committed: u64,
    pub verified: u64,
    /// Chunks whose checksum was compared, too.
    pub summed: u64,
    pub overtaken: u64,
    pub orphans: u64,
    pub reconnects: u64,
    pub stopped: BTreeMap<Point, u64>,
    /// Bytes and sums that nobody committed, and leases that did not hold.
    pub wrong: Vec<Event>,
}

impl Storm {
    pub fn new(plan: Plan) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("engine.sock");
        let board = HandoffBoard::default();
        let config = EngineConfig {
            socket_path: socket.clone(),
            token: plan.token.into(),
            pools: vec![PoolPlan::only(
                4096 + u64::from(SLOTS) * ROW_BYTES * u64::from(plan.world),
            )],
            arena: ArenaPlan {
                verify: plan.verify,
                ..ArenaPlan::default()
            },
            handoff_deadline: HANDOFF_DEADLINE,
        };
        let engine = Engine::start(config, board.clone(), &mut Registry::default()).unwrap();
        Self {
            engine,
            board,
            plan,
            incarnations: Mutex::default(),
            rounds: 0,
            socket,
            dir,
        }
    }

    /// Every node lives and dies `plan.lives` times, all nodes at once. The deaths.
    pub fn round(&mut self) -> u64 {
        self.rounds += 1;
        let mut rng = Rng::new(self.plan.seed ^ self.rounds << 32);
        let storm = &*self;
        thread::scope(|scope| {
            let nodes = [
                ("p0", Role::Producer),
                ("p1", Role::Producer),
                ("d0", Role::Consumer),
                ("d1", Role::Consumer),
            ];
            let running = nodes.map(|(name, role)| {
                let mut node = Node::new(storm, name, role, rng.next());
                scope.spawn(move || (0..storm.plan.lives).map(|_| node.live()).count() as u64)
            });
            let join = |node: thread::ScopedJoinHandle<'_, u64>| {
                node.join().unwrap_or_else(|panic| resume_unwind(panic))
            };
            running.into_iter().map(join).sum()
        })
    }

    /// The next life of a node.
    pub fn next_incarnation(&self, node: &str) -> u64 {
        let mut known = self.incarnations.lock().unwrap();
        let incarnation = known.entry(node.to_owned()).or_default();
        *incarnation += 1;
        *incarnation
    }

    pub fn incarnation(&self, node: &str) -> u64 {
        self.incarnations
            .lock()
            .unwrap()
            .get(node)
            .copied()
            .unwrap_or(0)
    }

    pub fn spec(&self, node: &str, role: Role) -> Spec {
        Spec {
            role,
            socket: self.socket.clone(),
            report: self.dir.path().join("report"),
            node: node.to_owned(),
            incarnation: self.incarnation(node),
            world: self.plan.world,
            seed: 0,
            stop: None,
            handoffs: Vec::new(),
        }
    }

    pub fn tally(&self) -> Tally {
        let report = std::fs::read_to_string(self.dir.path().join("report")).unwrap_or_default();
        let mut tally = Tally::default();
        for line in report.lines() {
            match serde_json::from_str(line).unwrap() {
                Event::Committed { chunks } => tally.committed += chunks,
                Event::Verified { chunks } => tally.verified += chunks,
                Event::Summed { chunks } => tally.summed += chunks,
                Event::Overtaken { leased: false, .. } => tally.overtaken += 1,
                Event::Orphaned => tally.orphans += 1,
                Event::Reconnected => tally.reconnects += 1,
                Event::Stopped(point) => *tally.stopped.entry(point).or_default() += 1,
                wrong => tally.wrong.push(wrong),
            }
        }
        tally
    }

    /// Fails with the reason if the store has refused a process of the storm: such a process does
    /// nothing, so whatever is waited for would not come.
    pub fn assert_all_were_admitted(&self) {
        let report = self.dir.path().join("report");
        let refused = std::fs::read_to_string(spec::refusals(&report)).unwrap_or_default();
        assert!(refused.is_empty(), "not admitted: {refused}");
    }

    /// Everybody is gone: nothing may be left of them.
    pub fn assert_nothing_is_left(&self) {
        assert!(self.engine.is_running());
        let stats = self.engine.stats();
        assert_eq!(stats.sessions, []);
        assert_eq!((stats.pending, stats.quarantined), (0, 0), "{stats:#?}");
        assert_eq!(self.board.waiting(), 0);
        self.until("hand-offs hold chunks beyond their deadline", || {
            let stats = self.engine.stats();
            (stats.leased, stats.reserved, stats.handoffs_open) == (0, 0, 0)
        });
    }

    /// Every slot can be granted, written and found again, all of them at once.
    pub fn fill_the_arena(&self) {
        let incarnation = self.next_incarnation("filler");
        let connect = |role, kind| {
            let spec = self.spec("filler", role);
            Client::connect(&self.socket, spec::hello(&spec, kind), LIMIT).unwrap()
        };
        let mut workers: Vec<_> = (0..self.plan.world)
            .map(|rank| connect(Role::Worker { rank }, SessionKind::Worker))
            .collect();
        let mut scheduler = connect(Role::Producer, SessionKind::Scheduler);
        let slots = scheduler.welcome().slots;
        assert_eq!(slots, SLOTS);

        let keys: Vec<_> = (0..u64::from(slots))
            .map(|at| spec::key(incarnation << 40 | at))
            .collect();
        let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
        let query = Query {
            request: "fill",
            handoff: None,
            keys: &keys,
        };
        let granted = scheduler.store(query).unwrap();
        assert!(granted.ok, "{:#?}", self.engine.stats());
        let refs = SlotRef::decode_all(&granted.refs).unwrap();
        let distinct: BTreeSet<u32> = refs.iter().map(|at| at.slot).collect();
        assert_eq!(distinct, (0..slots).collect());
        for worker in &mut workers {
            let commit = Commit {
                refs: granted.refs.clone(),
                bytes: 0,
                micros: 0,
            };
            worker.send(&M::Commit(commit)).unwrap();
        }
        self.until("the whole arena is ready", || {
            self.engine.stats().ready == slots
        });
        let found = scheduler.lookup(query).unwrap();
        assert!(found.states.contains(&1));
        let request = "fill".to_owned();
        scheduler.send(&M::Finish(RequestName { request })).unwrap();
        drop((scheduler, workers));
        self.engine.incarnation_gone(&"filler".into(), incarnation);
        self.assert_nothing_is_left();
        assert_eq!(self.engine.stats().ready, slots);
    }

    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let started = Instant::now();
        while !done() {
            let stats = self.engine.stats();
            assert!(started.elapsed() < LIMIT, "never: {what}: {stats:#?}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// An incarnation is gone: its hand-offs are settled, one way or the other, without their deadline.
pub fn assert_settled(state: HandoffState) {
    match state {
        HandoffState::Expected | HandoffState::Settled(HandoffOutcome::Ready { .. }) => {}
        HandoffState::Open => panic!("a dead producer's hand-off is still open"),
        HandoffState::Settled(HandoffOutcome::Failed(why)) => {
            assert_ne!(why, HandoffFailure::EngineDown);
        }
    }
}
