//! The arena's memory, through the running engine.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use pegaflow::engine::client::Client;
use pegaflow::engine::protocol::{Hello, SessionKind, VERSION};
use pegaflow::engine::{Engine, EngineConfig};
use pegaflow::handoff::HandoffBoard;
use pegaflow::plan::{ArenaPlan, PoolPlan};
use prometheus_client::registry::Registry;

const LIMIT: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

struct Fixture {
    engine: Engine,
    registry: Registry,
    worker: Client,
    _dir: tempfile::TempDir,
}

/// An engine, and the first worker: its arena is made, and being pre-faulted.
fn fixture(capacity: u64, arena: ArenaPlan) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let config = EngineConfig {
        socket_path: dir.path().join("engine.sock"),
        token: "secret".into(),
        pools: vec![PoolPlan::only(capacity)],
        arena,
        handoff_deadline: LIMIT,
    };
    let hello = Hello {
        version: VERSION,
        token: "secret".into(),
        node: "p".into(),
        incarnation: 1,
        kind: SessionKind::Worker,
        rank: 0,
        world: 1,
        replicated: false,
        namespace: [("model".to_owned(), "tiny".to_owned())].into(),
        row_bytes: 3000,
        pid: std::process::id(),
    };
    let socket = config.socket_path.clone();
    let mut registry = Registry::default();
    let engine = Engine::start(config, HandoffBoard::default(), &mut registry).unwrap();
    let worker = Client::connect(&socket, hello, LIMIT).unwrap();
    Fixture {
        engine,
        registry,
        worker,
        _dir: dir,
    }
}

impl Fixture {
    fn gauge(&self, name: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("pegaflow_engine_{name} ")));
        value.unwrap().parse().unwrap()
    }

    fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !done(self) {
            assert!(started.elapsed() < LIMIT, "never: {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn file(&self) -> File {
        File::from(self.worker.arena().unwrap().try_clone().unwrap())
    }
}

fn resident(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

#[tokio::test]
async fn all_of_the_arena_gets_its_memory_without_being_used() {
    let plan = ArenaPlan {
        prefault_threads: 3,
        ..ArenaPlan::default()
    };
    let fixture = fixture(130 * MIB, plan);
    let bytes = fixture.worker.welcome().arena_bytes;
    assert_eq!(bytes % (2 * MIB), 0);
    assert_eq!(fixture.gauge("arena_bytes"), bytes);
    fixture.until("all is there", |f| {
        f.gauge("arena_prefaulted_bytes") == bytes
    });
    assert!(resident(&fixture.file()) >= bytes);
    fixture.engine.shutdown(LIMIT).await;
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_the_rest() {
    let fixture = fixture(4096 * MIB, ArenaPlan::default());
    let file = fixture.file();
    fixture.until("it has begun", |f| f.gauge("arena_prefaulted_bytes") > 0);
    let asked = Instant::now();
    fixture.engine.shutdown(LIMIT).await;
    println!(
        "stopped in {:?} with {} MiB",
        asked.elapsed(),
        resident(&file) / MIB
    );
    // Nobody goes on touching it.
    let then = resident(&file);
    assert!(then < 4096 * MIB);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(resident(&file), then);
}

#[tokio::test]
async fn an_arena_without_threads_is_filled_by_its_users() {
    let plan = ArenaPlan {
        prefault_threads: 0,
        ..ArenaPlan::default()
    };
    let fixture = fixture(16 * MIB, plan);
    assert_eq!(fixture.gauge("arena_prefaulted_bytes"), 0);
    // The generations are there.
    assert!(resident(&fixture.file()) < 4 * MIB);
    fixture.engine.shutdown(LIMIT).await;
}
