//! The socket: accepts vLLM processes, and routers of other processes ([`watcher`]), and serves one task each.
//!
//! ```text
//! accept ── same user? ── hello within 5 s? ── admitted? ── welcome ──▶ ┌ read a frame    ┐
//!    no: close               no: close         no: refused, close       │ handle it       │ ─▶ disconnect
//!                                                                       └ write an answer ┘
//! ```
//!
//! A session's messages are handled in order. All sessions share the [`Pools`] under one mutex that
//! is never held across an await. A panic anywhere in here ends the engine, not the process.

mod watcher;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::arena::{Arena, Keeper};
use super::frames::{SessionError, read_message, write, write_welcome};
use super::pools::Pools;
use super::protocol::{
    ClientMessage, Hello, MAX_FRAME, MAX_HELLO, Refused, ServerMessage, SessionKind, Welcome,
};
use super::store::{Action, Lost, SessionId};
use crate::handoff::{HandoffBoard, HandoffFailure};
use crate::plan::ArenaPlan;

const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// How exact the deadlines of hand-offs are.
const TICK: Duration = Duration::from_millis(50);
/// The most connections at a time.
const MAX_CONNECTIONS: usize = 512;

/// What the engine's handle and its sessions share.
pub struct Shared {
    state: Mutex<State>,
    board: HandoffBoard,
    /// The engine serves.
    up: AtomicBool,
    /// Cancelled to end everything.
    pub stop: CancellationToken,
}

struct State {
    pools: Pools,
    /// One for each pool.
    arenas: Vec<Keeper>,
    /// Ends one session.
    closers: HashMap<SessionId, CancellationToken>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    pub fn new(pools: Pools, board: HandoffBoard, arena: &ArenaPlan) -> Self {
        let stop = CancellationToken::new();
        let keeper = |_| Keeper::new(arena.clone(), stop.clone());
        Self {
            state: Mutex::new(State {
                arenas: (0..pools.len()).map(keeper).collect(),
                pools,
                closers: HashMap::new(),
            }),
            board,
            up: AtomicBool::new(true),
            stop,
        }
    }

    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Nothing will ever be served again.
    pub fn set_down(&self) {
        self.up.store(false, Ordering::Release);
        self.stop.cancel();
        self.board.fail_all(HandoffFailure::EngineDown);
        // Its threads stop at `stop`; they are joined without the lock.
        let prefaults: Vec<_> = {
            let mut state = self.lock_anyway();
            let arenas = state.arenas.iter_mut();
            arenas.map(Keeper::take_prefault).collect()
        };
        drop(prefaults);
    }

    /// The state for what it is worth after a panic.
    fn lock_anyway(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the arenas whose pages are there.
    pub fn prefaulted(&self) -> u64 {
        let state = self.lock_anyway();
        state.arenas.iter().map(Keeper::prefaulted).sum()
    }

    /// Changes the store and carries out what follows, before anybody else can see the change.
    /// `None`: an earlier change panicked half way, and the store is not to be touched again.
    pub fn with<T>(&self, change: impl FnOnce(&mut Pools) -> T) -> Option<T> {
        let mut state = self.state.lock().ok()?;
        let result = change(&mut state.pools);
        state.carry_out(&self.board);
        Some(result)
    }

    /// Reads the store's figures, for what they are worth after a panic.
    pub fn read<T>(&self, read: impl FnOnce(&Pools) -> T) -> T {
        read(&self.lock_anyway().pools)
    }

    /// A session for this peer, what ends it, and the file that it is to map.
    fn admit(&self, hello: Hello) -> Result<Admission, Refused> {
        let kind = hello.kind;
        let mut state = self.state.lock().map_err(|_| Refused::down())?;
        let state = &mut *state;
        let admitted = state.pools.admit(hello);
        state.carry_out(&self.board);
        let welcome = admitted?;
        let pool = state.pools.of_session(welcome.session);
        let wanted = state.pools.arena(pool);
        let keeper = state.arenas.get_mut(pool).ok_or_else(Refused::down)?;
        let arena = match keeper.of(wanted) {
            Ok(arena) => arena,
            Err(error) => {
                let refused = state.pools.retract(welcome.session, &error.to_string());
                state.carry_out(&self.board);
                return Err(refused);
            }
        };
        let closer = self.stop.child_token();
        state.closers.insert(welcome.session, closer.clone());
        Ok(Admission {
            welcome,
            closer,
            arena: arena.filter(|_| kind == SessionKind::Worker),
        })
    }

    fn leave(&self, session: SessionId, why: Lost) {
        if let Ok(mut state) = self.state.lock() {
            state.closers.remove(&session);
            state.pools.disconnect(session, why);
            state.carry_out(&self.board);
        }
    }
}

impl State {
    fn carry_out(&mut self, board: &HandoffBoard) {
        for (pool, action) in self.pools.take_actions() {
            match action {
                Action::Generation(at) => {
                    if let Some(arena) = self.arenas.get(pool).and_then(Keeper::arena) {
                        arena.set_generation(at.slot, at.generation);
                    }
                }
                Action::Opened(id) => board.opened(&id),
                Action::Settled(id, outcome) => {
                    tracing::debug!(handoff = %id, ?outcome, "hand-off settled");
                    board.settle(&id, outcome);
                }
                Action::Close(session) => {
                    if let Some(closer) = self.closers.remove(&session) {
                        closer.cancel();
                    }
                }
            }
        }
    }
}

struct Admission {
    welcome: Welcome,
    closer: CancellationToken,
    arena: Option<Arc<Arena>>,
}

/// Ends a session in the store, however its task ends.
struct Presence<'a> {
    shared: &'a Shared,
    session: SessionId,
    ended: Lost,
}

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        self.shared.leave(self.session, self.ended);
    }
}

/// Serves until `shared.stop`. A session's panic is an error: the store cannot be trusted then.
pub async fn serve(listener: UnixListener, shared: Arc<Shared>) -> Result<(), JoinError> {
    let mut sessions = JoinSet::new();
    let mut tick = tokio::time::interval(TICK);
    let ended = loop {
        tokio::select! {
            () = shared.stop.cancelled() => break Ok(()),
            _ = tick.tick() => {
                let abandoned = shared.board.take_abandoned();
                let kept = shared.with(|pools| {
                    abandoned.iter().for_each(|id| pools.abandon(id));
                    pools.expire(Instant::now());
                });
                if kept.is_none() {
                    tracing::error!("a change of the store panicked half way");
                    break Ok(());
                }
            }
            Some(ended) = sessions.join_next() => {
                if let Err(panic) = ended {
                    break Err(panic);
                }
            }
            accepted = listener.accept(), if sessions.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    let shared = shared.clone();
                    sessions.spawn(async move { connection(stream, &shared).await });
                }
                Err(error) => {
                    // Most likely out of file descriptors; try again when others have ended.
                    tracing::warn!(%error, "cannot accept a vLLM process at the store");
                    tokio::time::sleep(TICK).await;
                }
            },
        }
    };
    shared.stop.cancel();
    // Sessions end on `stop`, at the latest when a write deadline passes.
    while let Some(ended) = sessions.join_next().await {
        ended?;
    }
    ended
}

async fn connection(mut stream: UnixStream, shared: &Shared) {
    let uid = stream.peer_cred().map(|peer| peer.uid());
    if !uid.is_ok_and(|uid| uid == nix::unistd::geteuid().as_raw()) {
        tracing::warn!("a process of another user came to the store");
        return;
    }
    let stop = shared.stop.clone();
    let hello = tokio::select! {
        () = stop.cancelled() => return,
        hello = timeout(HELLO_WITHIN, read_message(&mut stream, MAX_HELLO)) => hello,
    };
    let hello = match hello.unwrap_or(Err(SessionError::Slow)) {
        Ok(Some(ClientMessage::Hello(hello))) => hello,
        Ok(Some(ClientMessage::Watch(watch))) => {
            return watcher::connection(stream, shared, watch).await;
        }
        Ok(None) => return,
        other => {
            let error = other.err();
            tracing::warn!(?error, "a connection to the store did not begin with hello");
            shared.with(Pools::count_broken);
            return;
        }
    };
    let name = format!("{}#{}", hello.node, hello.incarnation);
    let admission = match shared.admit(hello) {
        Ok(admission) => admission,
        Err(refused) => {
            tracing::warn!(node = name, code = ?refused.code, "refused: {}", refused.message);
            let _ = write(&mut stream, &ServerMessage::Refused(refused)).await;
            return;
        }
    };
    let mut presence = Presence {
        shared,
        session: admission.welcome.session,
        ended: Lost::Closed,
    };
    let closer = admission.closer.clone();
    let served = tokio::select! {
        () = closer.cancelled() => Ok(()),
        served = session(&mut stream, shared, admission) => served,
    };
    if let Err(error) = served {
        tracing::warn!(node = name, %error, "closing a session");
        shared.with(Pools::count_broken);
        presence.ended = match error {
            SessionError::Protocol(_) => Lost::Broken,
            SessionError::Slow => Lost::Slow,
            SessionError::Io(_) | SessionError::Down => Lost::Closed,
        };
    }
}

async fn session(
    stream: &mut UnixStream,
    shared: &Shared,
    admission: Admission,
) -> Result<(), SessionError> {
    let id = admission.welcome.session;
    write_welcome(stream, admission.welcome, admission.arena.as_deref()).await?;
    while let Some(message) = read_message(stream, MAX_FRAME).await? {
        let handled = shared.with(|pools| pools.handle(id, message, Instant::now()));
        let answer = handled.ok_or(SessionError::Down)??;
        if let Some(answer) = answer {
            write(stream, &answer).await?;
        }
    }
    Ok(())
}
