//! PegaEngine: the shared-memory KV store between the nodes.
//!
//! ```text
//! vLLM scheduler ──lookup, store, open, seal──▶ ┌────────┐ ──▶ Store (index, hand-offs, sessions)
//! vLLM worker ─────commit, discard────────────▶ │ server │        │ actions
//!      │                                        └────────┘        ├─▶ arena: generations
//!      └───── copies KV ──▶ arena (memfd) ◀── copies KV ── D      └─▶ HandoffBoard ─▶ router
//! ```
//!
//! The engine hands out places and keeps the index; the bytes are copied by the vLLM workers. It
//! runs on a thread and a runtime of its own, so load at the router cannot slow it; a panic in it
//! turns the store off (nodes recompute) and harms nothing else.
//!
//! - [`protocol`]: the messages of `docs/protocol.md`; [`client`]: the other end, for tests.
//! - `server`: the socket; [`remote`]: its other end in a router of another process. `pools`: which nodes share
//!   a `store`. `store`: all decisions, pure, over `index` (which chunk is in which slot) and `handoffs` (which prompt is complete).
//! - `arena`: the shared memory. `stats`, `latency`, `metrics`: what is counted. `inspect`: what an
//!   operator sees.

mod arena;
pub mod client;
mod frames;
mod handoffs;
mod index;
mod inspect;
mod latency;
mod metrics;
mod pools;
pub mod protocol;
pub mod remote;
mod server;
mod stats;
mod store;

use std::future::Future;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use futures_util::FutureExt;
use prometheus_client::registry::Registry;
use tokio::sync::oneshot;

use self::frames::listen_at;
pub use self::handoffs::Stage;
pub use self::inspect::{Flushed, HandoffInfo, Inspection, LeaseInfo, NamespaceInfo};
pub use self::latency::Latencies;
use self::metrics::EngineCollector;
use self::pools::{Pools, PoolsConfig};
use self::server::{Shared, serve};
pub use self::stats::{
    Counters, EngineStats, NodeCounters, PoolStats, RefusedSession, SessionStats,
};
use crate::fleet::NodeId;
use crate::handoff::HandoffBoard;
use crate::plan::{ArenaPlan, PoolPlan};

/// What the engine needs to know.
#[derive(Clone)]
pub struct EngineConfig {
    /// Where the nodes connect. The directory exists and is private.
    pub socket_path: PathBuf,
    /// What a node must say to be let in.
    pub token: String,
    /// Which nodes share a pool, and how large it may be.
    pub pools: Vec<PoolPlan>,
    /// What each pool's arena is made of, and where it lies.
    pub arena: ArenaPlan,
    /// How long a hand-off may take, and then be held for the decode node.
    pub handoff_deadline: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("{} is in use by another process; stop it, or choose another run directory", .0.display())]
    InUse(PathBuf),
    #[error("{} is not a socket; remove it, or choose another run directory", .0.display())]
    NotASocket(PathBuf),
    #[error("cannot listen at {}", path.display())]
    Listen { path: PathBuf, source: io::Error },
    #[error("cannot start the engine's thread")]
    Start(#[source] io::Error),
}

/// The running store. Dropping it asks it to stop; [`Engine::shutdown`] waits for that.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    socket_path: PathBuf,
    thread: Option<thread::JoinHandle<()>>,
    /// Resolves when the thread is about to end.
    ended: Option<oneshot::Receiver<()>>,
}

impl Engine {
    /// Listens and serves, from before this returns.
    pub fn start(
        config: EngineConfig,
        board: HandoffBoard,
        registry: &mut Registry,
    ) -> Result<Self, EngineError> {
        let path = config.socket_path;
        remove_stale(&path)?;
        let listener = listen_at(&path).map_err(|source| EngineError::Listen {
            path: path.clone(),
            source,
        })?;
        let common = PoolsConfig {
            token: config.token,
            verify: config.arena.verify,
            handoff_deadline: config.handoff_deadline,
            first_epoch: epoch_now(),
        };
        let pools = Pools::new(&common, &config.pools);
        // From here on the board keeps a list for this engine.
        board.take_abandoned();
        let shared = Arc::new(Shared::new(pools, board, &config.arena));
        registry.register_collector(Box::new(EngineCollector(shared.clone())));

        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(EngineError::Start)?;
        let (ending, ended) = oneshot::channel();
        let inner = shared.clone();
        let thread = thread::Builder::new()
            .name("engine".into())
            .spawn(move || {
                let served = async {
                    let listener =
                        tokio::net::UnixListener::from_std(listener).map_err(Fault::Listener)?;
                    serve(listener, inner.clone()).await.map_err(Fault::Session)
                };
                runtime.block_on(guarded(served, &inner));
                drop(ending);
            })
            .map_err(EngineError::Start)?;
        Ok(Self {
            shared,
            socket_path: path,
            thread: Some(thread),
            ended: Some(ended),
        })
    }

    /// Every process of this incarnation, and of all before it, has been reaped: what they may
    /// still have been reading or writing is free.
    pub fn incarnation_gone(&self, node: &NodeId, incarnation: u64) {
        let reaped = index::Owner {
            node: node.clone(),
            incarnation,
        };
        self.guarded(|pools| pools.incarnation_gone(&reaped));
    }

    /// Whether a process of this incarnation, or of one before it, is connected.
    pub fn is_connected(&self, node: &NodeId, incarnation: u64) -> bool {
        let sessions = self.stats().sessions;
        sessions
            .iter()
            .any(|session| session.node == *node && session.incarnation <= incarnation)
    }

    /// Changes the store for a caller of another part: a fault in here must not reach it.
    fn guarded<T>(&self, change: impl FnOnce(&mut Pools) -> T) -> Option<T> {
        let shared = AssertUnwindSafe(&self.shared);
        let changed = std::panic::catch_unwind(AssertUnwindSafe(|| shared.with(change)));
        changed.unwrap_or_else(|_| {
            tracing::error!("the store is turned off: it panicked");
            self.shared.set_down();
            None
        })
    }

    pub fn stats(&self) -> EngineStats {
        self.shared.read(|pools| pools.stats(Instant::now()))
    }

    /// Whose KV is stored, and how much of the arena it has.
    pub fn namespaces(&self) -> Vec<NamespaceInfo> {
        self.shared.read(Pools::namespaces)
    }

    /// Sessions, the oldest leases and hand-offs, occupancy.
    pub fn inspect(&self) -> Inspection {
        self.shared.read(|pools| pools.inspect(Instant::now()))
    }

    /// Evicts every chunk that nobody writes, reads or waits for. `None`: the store is off.
    pub fn flush(&self) -> Option<Flushed> {
        self.guarded(Pools::flush)
    }

    /// False once the engine has stopped or has been turned off by a fault.
    pub fn is_running(&self) -> bool {
        self.shared.is_up()
    }

    /// Closes all sessions, ends the thread (waiting for `limit` at most), removes the socket.
    pub async fn shutdown(mut self, limit: Duration) {
        self.shared.stop.cancel();
        if let Some(ended) = self.ended.take()
            && tokio::time::timeout(limit, ended).await.is_err()
        {
            tracing::warn!("the engine did not stop within {limit:?}; leaving it behind");
            return;
        }
        if let Some(thread) = self.thread.take() {
            // It has nothing left to do but to return.
            let _ = thread.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        // Already gone when the run directory was swept first.
        let _ = std::fs::remove_file(&self.socket_path);
    }
}

/// What turns the engine off.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("its socket cannot be served: {0}")]
    Listener(io::Error),
    #[error("a session's task ended badly: {0}")]
    Session(tokio::task::JoinError),
}

/// Runs the engine's future to its end; whatever that end is, nobody is left waiting.
async fn guarded(engine: impl Future<Output = Result<(), Fault>>, shared: &Shared) {
    match AssertUnwindSafe(engine).catch_unwind().await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!("the store is turned off: {error}"),
        Err(_) => tracing::error!("the store is turned off: it panicked"),
    }
    shared.set_down();
}

/// Removes what a killed engine left behind, but not what somebody listens at.
fn remove_stale(path: &Path) -> Result<(), EngineError> {
    let failed = |source| EngineError::Listen {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            Err(EngineError::NotASocket(path.to_owned()))
        }
        Ok(_) if UnixStream::connect(path).is_ok() => Err(EngineError::InUse(path.to_owned())),
        Ok(_) => std::fs::remove_file(path).map_err(failed),
    }
}

/// A number that no engine before has used as an epoch: milliseconds since 1970.
fn epoch_now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(1, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handoff::{HandoffFailure, HandoffId, HandoffOutcome};

    const LIMIT: Duration = Duration::from_secs(10);
    const DOWN: HandoffOutcome = HandoffOutcome::Failed(HandoffFailure::EngineDown);

    fn engine(dir: &Path, board: HandoffBoard) -> Engine {
        let config = EngineConfig {
            socket_path: dir.join("engine.sock"),
            token: "t".into(),
            pools: vec![PoolPlan::only(1 << 20)],
            arena: ArenaPlan::default(),
            handoff_deadline: LIMIT,
        };
        Engine::start(config, board, &mut Registry::default()).unwrap()
    }

    #[tokio::test]
    async fn a_panic_in_the_store_turns_it_off_and_wakes_everybody() {
        let dir = tempfile::tempdir().unwrap();
        let board = HandoffBoard::default();
        let engine = engine(dir.path(), board.clone());
        let mut ticket = board.register(HandoffId::random());
        let mut peer = UnixStream::connect(&engine.socket_path).unwrap();
        peer.set_read_timeout(Some(LIMIT)).unwrap();
        assert!(engine.is_running());

        let broken = std::panic::catch_unwind(AssertUnwindSafe(|| {
            engine.shared.with(|_| panic!("on purpose"))
        }));
        assert!(broken.is_err());
        let outcome = tokio::time::timeout(LIMIT, ticket.settled()).await.unwrap();
        assert_eq!(outcome, DOWN);
        assert!(!engine.is_running());
        // A peer that was not accepted yet is reset instead.
        let end = io::Read::read(&mut peer, &mut [0; 1]);
        let end = end.map_err(|error| error.kind());
        assert!(
            matches!(end, Ok(0) | Err(io::ErrorKind::ConnectionReset)),
            "the peer is not closed: {end:?}"
        );
        engine.incarnation_gone(&"p".into(), 1);
        assert_eq!(engine.stats().slots, 0);
        engine.shutdown(LIMIT).await;
    }

    #[tokio::test]
    async fn a_panic_of_the_engine_itself_is_caught() {
        let dir = tempfile::tempdir().unwrap();
        let board = HandoffBoard::default();
        let engine = engine(dir.path(), board.clone());
        let mut ticket = board.register(HandoffId::random());
        guarded(async { panic!("on purpose") }, &engine.shared).await;
        assert_eq!(ticket.settled_within(LIMIT).await, DOWN);
        assert!(!engine.is_running());
    }

    #[tokio::test]
    async fn an_orderly_end_fails_what_still_waits() {
        let dir = tempfile::tempdir().unwrap();
        let board = HandoffBoard::default();
        let engine = engine(dir.path(), board.clone());
        let mut ticket = board.register(HandoffId::random());
        engine.shutdown(LIMIT).await;
        assert_eq!(ticket.settled_within(LIMIT).await, DOWN);
    }
}
