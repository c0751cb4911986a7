//! The seam between whoever asks for a hand-off (router, canary) and the engine that completes it.
//!
//! A hand-off is one prompt's KV on its way from a prefill node to a decode node. Its states, as
//! the waiting side sees them:
//!
//! ```text
//!  register()            engine: opened            engine: fired
//!  ─────────▶ Expected ────────────▶ Open ────────────────▶ Settled(Ready)
//!                │                     │   engine: failed
//!                │                     └──────────────────▶ Settled(Failed)
//!                └── ticket dropped: the entry is gone, later engine events are ignored,
//!                    and the engine is told that nobody waits any more
//! ```
//!
//! The engine and the router do not know each other; both hold a clone of the [`HandoffBoard`].
//! The number of entries is bounded by the requests in flight: a [`HandoffTicket`] removes its
//! own entry when it is dropped. It is kept until the decode node has answered, so whatever the engine
//! still holds for the hand-off after that is held for nobody: the engine takes the ids of dropped
//! tickets at its next tick ([`HandoffBoard::take_abandoned`]). Of an engine in another process, the board's
//! follower carries the word both ways ([`HandoffBoard::follow`]).

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};

/// Names one hand-off. Travels in the request body as `kv_transfer_params.pegaflow.handoff`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HandoffId(Arc<str>);

impl HandoffId {
    /// A fresh id that nobody can guess: 128 random bits in hex.
    pub fn random() -> Self {
        Self(format!("{:032x}", rand::random::<u128>()).into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for HandoffId {
    fn from(id: &str) -> Self {
        Self(id.into())
    }
}

impl fmt::Display for HandoffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a hand-off will never fire. The decode node recomputes the prompt, unless the router
/// prefers to retry the prefill ([`HandoffFailure::ProducerDied`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum HandoffFailure {
    #[error("the store has no space for the prompt's chunks")]
    NoSpace,
    #[error("the prefill node's session ended")]
    ProducerDied,
    #[error("the prefill request was aborted")]
    Aborted,
    #[error("a chunk could not be copied into the store")]
    SaveFailed,
    #[error("a chunk in the store is not what was saved")]
    Damaged,
    #[error("the prefill node did not finish before the deadline")]
    Deadline,
    #[error("nobody waits for the prompt any more")]
    Abandoned,
    #[error("the store is turned off")]
    EngineDown,
}

impl HandoffFailure {
    pub const ALL: [Self; 8] = [
        Self::NoSpace,
        Self::ProducerDied,
        Self::Aborted,
        Self::SaveFailed,
        Self::Damaged,
        Self::Deadline,
        Self::Abandoned,
        Self::EngineDown,
    ];

    /// The one with this label.
    pub fn from_label(label: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|failure| failure.label() == label)
    }

    /// A stable label for metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::NoSpace => "no_space",
            Self::ProducerDied => "producer_died",
            Self::Aborted => "aborted",
            Self::SaveFailed => "save_failed",
            Self::Damaged => "damaged",
            Self::Deadline => "deadline",
            Self::Abandoned => "abandoned",
            Self::EngineDown => "engine_down",
        }
    }
}

/// How a hand-off ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandoffOutcome {
    /// Every chunk of the prompt is in the store.
    Ready {
        /// Chunks that the decode node will find (0 for a prompt shorter than one chunk).
        chunks: u32,
        /// The store held them all before prefill computed anything, so the prefill request can
        /// be cancelled.
        already_stored: bool,
    },
    Failed(HandoffFailure),
}

/// What the waiting side can observe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandoffState {
    /// No prefill node has seen the request yet.
    Expected,
    /// A prefill node's scheduler has seen it.
    Open,
    Settled(HandoffOutcome),
}

#[derive(Debug, Default)]
struct Board {
    entries: HashMap<HandoffId, watch::Sender<HandoffState>>,
    /// Whose tickets were dropped since the engine last asked; the oldest are forgotten (and end by
    /// their deadline) when it asks too seldom. `None`: there is no engine in this process.
    abandoned: Option<VecDeque<HandoffId>>,
    /// The store is off: nothing will ever fire again.
    off: Option<HandoffFailure>,
    /// Carries changes to an engine in another process.
    follower: Option<mpsc::Sender<Change>>,
    early: Early,
}

/// What the engine said of hand-offs that nobody waited for, the last of it: the word of a router in another process
/// may come after the prefill node's.
#[derive(Debug, Default)]
struct Early {
    states: HashMap<HandoffId, HandoffState>,
    /// The last one first.
    order: VecDeque<HandoffId>,
}

impl Early {
    fn advance(&mut self, id: &HandoffId, next: HandoffState) {
        match self.states.get_mut(id) {
            Some(HandoffState::Settled(_)) => {}
            Some(state) => *state = next,
            None => {
                self.states.insert(id.clone(), next);
                self.order.push_front(id.clone());
            }
        }
        if self.order.len() > MAX_EARLY
            && let Some(oldest) = self.order.pop_back()
        {
            self.states.remove(&oldest);
        }
    }
}

/// The most hand-offs in [`Early`].
const MAX_EARLY: usize = 1024;

/// What an engine in another process has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Somebody waits for it from now on.
    Awaited(HandoffId),
    /// Nobody does any more.
    Left(HandoffId),
}

impl Board {
    /// One who does not keep up has missed something: the board is off until it follows anew.
    fn tell(&mut self, change: Change) {
        if let Some(follower) = &self.follower
            && follower.try_send(change).is_err()
        {
            self.follower = None;
            self.off = Some(HandoffFailure::EngineDown);
        }
    }
}

/// The most ids that wait for the engine's next tick.
const MAX_ABANDONED: usize = 65_536;

/// Where hand-offs are announced and awaited. Cheap to clone; all clones share one table.
#[derive(Debug, Clone, Default)]
pub struct HandoffBoard {
    shared: Arc<Mutex<Board>>,
}

impl HandoffBoard {
    /// Announces that somebody waits for `id`. Must precede the prefill request. After
    /// [`HandoffBoard::fail_all`] the ticket is settled from the start.
    pub fn register(&self, id: HandoffId) -> HandoffTicket {
        let mut board = self.lock();
        board.tell(Change::Awaited(id.clone()));
        let early = board.early.states.remove(&id);
        let state = board
            .off
            .map_or(early.unwrap_or(HandoffState::Expected), |failure| {
                HandoffState::Settled(HandoffOutcome::Failed(failure))
            });
        let (sender, receiver) = watch::channel(state);
        board.entries.insert(id.clone(), sender);
        drop(board);
        HandoffTicket {
            id,
            receiver,
            board: self.clone(),
        }
    }

    /// Engine: a prefill node's scheduler has seen the request.
    pub fn opened(&self, id: &HandoffId) {
        self.advance(id, HandoffState::Open);
    }

    /// Engine: the hand-off ended. Only the first outcome counts.
    pub fn settle(&self, id: &HandoffId, outcome: HandoffOutcome) {
        self.advance(id, HandoffState::Settled(outcome));
    }

    /// Engine: nothing will ever fire again (the store was turned off).
    pub fn fail_all(&self, failure: HandoffFailure) {
        let ids: Vec<_> = {
            let mut board = self.lock();
            board.off = Some(failure);
            board.follower = None;
            board.entries.keys().cloned().collect()
        };
        for id in ids {
            self.settle(&id, HandoffOutcome::Failed(failure));
        }
    }

    /// For an engine in another process: turns the board on (again), and gives what is to be told from now on.
    /// The channel ends when the one who reads it falls `most` changes behind, and when the board is turned off; the
    /// board is off from then on.
    pub fn follow(&self, most: usize) -> mpsc::Receiver<Change> {
        let (follower, changes) = mpsc::channel(most);
        let mut board = self.lock();
        board.off = None;
        board.follower = Some(follower);
        changes
    }

    /// Engine: the hand-offs that nobody waits for any more, since the last call; the first one begins
    /// the list. Those that have failed are not among them: nothing is held for them.
    pub fn take_abandoned(&self) -> Vec<HandoffId> {
        let mut board = self.lock();
        board.abandoned.get_or_insert_default().drain(..).collect()
    }

    /// Hand-offs that somebody waits for at this moment.
    pub fn waiting(&self) -> usize {
        self.lock().entries.len()
    }

    fn advance(&self, id: &HandoffId, next: HandoffState) {
        let mut board = self.lock();
        let Some(sender) = board.entries.get(id) else {
            board.early.advance(id, next);
            return;
        };
        sender.send_if_modified(|state| match state {
            HandoffState::Settled(_) => false,
            _ => {
                *state = next;
                true
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        // A panic elsewhere cannot leave the table half-changed: every critical section is one
        // map operation.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to wait for one hand-off. Dropping it withdraws the interest.
#[derive(Debug)]
pub struct HandoffTicket {
    id: HandoffId,
    receiver: watch::Receiver<HandoffState>,
    board: HandoffBoard,
}

impl HandoffTicket {
    pub fn id(&self) -> &HandoffId {
        &self.id
    }

    pub fn state(&self) -> HandoffState {
        *self.receiver.borrow()
    }

    /// Waits until a prefill node has seen the request. False: it ended before that was seen.
    pub async fn opened(&mut self) -> bool {
        let state = self
            .receiver
            .wait_for(|state| *state != HandoffState::Expected);
        state.await.is_ok_and(|state| *state == HandoffState::Open)
    }

    /// Waits until the engine settles the hand-off. Cancel-safe. Never resolves by itself if no
    /// prefill node opens it: callers bound it, or use [`HandoffTicket::settled_within`].
    pub async fn settled(&mut self) -> HandoffOutcome {
        loop {
            if let HandoffState::Settled(outcome) = *self.receiver.borrow_and_update() {
                return outcome;
            }
            if self.receiver.changed().await.is_err() {
                return HandoffOutcome::Failed(HandoffFailure::EngineDown);
            }
        }
    }

    /// [`HandoffTicket::settled`] under a deadline; the deadline is reported as
    /// [`HandoffFailure::Deadline`].
    pub async fn settled_within(&mut self, limit: Duration) -> HandoffOutcome {
        tokio::time::timeout(limit, self.settled())
            .await
            .unwrap_or(HandoffOutcome::Failed(HandoffFailure::Deadline))
    }
}

impl Drop for HandoffTicket {
    fn drop(&mut self) {
        let failed = matches!(
            *self.receiver.borrow(),
            HandoffState::Settled(HandoffOutcome::Failed(_))
        );
        let mut board = self.board.lock();
        board.entries.remove(&self.id);
        if board.follower.is_some() {
            board.tell(Change::Left(self.id.clone()));
        } else if !failed && let Some(abandoned) = &mut board.abandoned {
            abandoned.truncate(MAX_ABANDONED - 1);
            abandoned.push_front(self.id.clone());
        }
    }
}

#[cfg(test)]
mod tests;
