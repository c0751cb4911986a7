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
//! tickets at its next tick ([`HandoffBoard::take_abandoned`]).

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

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
    /// their deadline) when nobody asks.
    abandoned: VecDeque<HandoffId>,
    /// The store is off: nothing will ever fire again.
    off: Option<HandoffFailure>,
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
        let state = board.off.map_or(HandoffState::Expected, |failure| {
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

    /// Engine: a prefill node's scheduler has seen the request. Unknown ids are ignored.
    pub fn opened(&self, id: &HandoffId) {
        self.advance(id, HandoffState::Open);
    }

    /// Engine: the hand-off ended. Only the first outcome counts. Unknown ids are ignored.
    pub fn settle(&self, id: &HandoffId, outcome: HandoffOutcome) {
        self.advance(id, HandoffState::Settled(outcome));
    }

    /// Engine: nothing will ever fire again (the store was turned off).
    pub fn fail_all(&self, failure: HandoffFailure) {
        let ids: Vec<_> = {
            let mut board = self.lock();
            board.off = Some(failure);
            board.entries.keys().cloned().collect()
        };
        for id in ids {
            self.settle(&id, HandoffOutcome::Failed(failure));
        }
    }

    /// Engine: the hand-offs that nobody waits for any more, since the last call. Those that have
    /// failed are not among them: nothing is held for them.
    pub fn take_abandoned(&self) -> Vec<HandoffId> {
        self.lock().abandoned.drain(..).collect()
    }

    /// Hand-offs that somebody waits for at this moment.
    pub fn waiting(&self) -> usize {
        self.lock().entries.len()
    }

    fn advance(&self, id: &HandoffId, next: HandoffState) {
        if let Some(sender) = self.lock().entries.get(id) {
            sender.send_if_modified(|state| match state {
                HandoffState::Settled(_) => false,
                _ => {
                    *state = next;
                    true
                }
            });
        }
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
        if !failed {
            board.abandoned.truncate(MAX_ABANDONED - 1);
            board.abandoned.push_front(self.id.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READY: HandoffOutcome = HandoffOutcome::Ready {
        chunks: 3,
        already_stored: false,
    };

    #[tokio::test]
    async fn a_ticket_sees_open_then_the_first_outcome_only() {
        let board = HandoffBoard::default();
        let mut ticket = board.register(HandoffId::from("a"));
        assert_eq!(ticket.state(), HandoffState::Expected);
        board.opened(&"a".into());
        assert_eq!(ticket.state(), HandoffState::Open);
        board.settle(&"a".into(), READY);
        board.settle(&"a".into(), HandoffOutcome::Failed(HandoffFailure::Aborted));
        board.opened(&"a".into());
        assert_eq!(ticket.settled().await, READY);
        assert_eq!(ticket.state(), HandoffState::Settled(READY));
    }

    #[tokio::test]
    async fn an_outcome_before_the_wait_is_not_lost() {
        let board = HandoffBoard::default();
        let mut ticket = board.register(HandoffId::from("a"));
        board.settle(&"a".into(), READY);
        assert_eq!(ticket.settled().await, READY);
        assert_eq!(ticket.settled().await, READY);
    }

    #[tokio::test]
    async fn dropping_the_ticket_removes_the_entry() {
        let board = HandoffBoard::default();
        let ticket = board.register(HandoffId::random());
        assert_eq!(board.waiting(), 1);
        drop(ticket);
        assert_eq!(board.waiting(), 0);
        board.settle(&"unknown".into(), READY);
        assert_eq!(board.waiting(), 0);
    }

    #[test]
    fn the_engine_learns_who_left_unless_nothing_is_held_for_them() {
        let board = HandoffBoard::default();
        let [waiting, ready, failed] = ["waiting", "ready", "failed"].map(HandoffId::from);
        let tickets = [&waiting, &ready, &failed].map(|id| board.register(id.clone()));
        board.settle(&ready, READY);
        board.settle(
            &failed,
            HandoffOutcome::Failed(HandoffFailure::ProducerDied),
        );
        assert!(board.take_abandoned().is_empty());
        drop(tickets);
        let mut left = board.take_abandoned();
        left.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        assert_eq!(left, [ready, waiting]);
        assert!(board.take_abandoned().is_empty());
        for n in 0..MAX_ABANDONED + 1 {
            drop(board.register(HandoffId::from(format!("{n}").as_str())));
        }
        assert_eq!(board.take_abandoned().len(), MAX_ABANDONED);
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_is_a_typed_failure() {
        let board = HandoffBoard::default();
        let mut ticket = board.register(HandoffId::random());
        let outcome = ticket.settled_within(Duration::from_secs(30)).await;
        assert_eq!(outcome, HandoffOutcome::Failed(HandoffFailure::Deadline));
    }

    #[tokio::test]
    async fn turning_the_store_off_wakes_everybody() {
        let board = HandoffBoard::default();
        let mut one = board.register(HandoffId::random());
        let mut two = board.register(HandoffId::random());
        board.fail_all(HandoffFailure::EngineDown);
        let down = HandoffOutcome::Failed(HandoffFailure::EngineDown);
        assert_eq!((one.settled().await, two.settled().await), (down, down));
        let late = board.register(HandoffId::random());
        assert_eq!(late.state(), HandoffState::Settled(down));
    }
}
