//! A store in another process, from a router's side: what it says of hand-offs reaches this process's board.
//!
//! ```text
//!                        refused, no answer
//!               ┌──────────── pause ◀──────────────┐
//!               ▼                                  │
//! (board off) connect ── watch ── watching ─▶ (board on) ── ended, fell behind ─▶ (board off)
//!                                              │   ▲
//!                  await, leave ◀── the board ─┘   └─ opened, settled ─▶ the board
//! ```
//!
//! While there is no connection every hand-off fails at once as `engine_down`, and decode nodes compute prompts
//! themselves: nothing ever waits for a store that cannot answer.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::frames::{SessionError, read_message, write};
use super::protocol::{
    ClientMessage, HandoffName, MAX_HELLO, ProtocolError, Refused, ServerMessage, Settled, VERSION,
    Watch, encode_frame,
};
use crate::handoff::{Change, HandoffBoard, HandoffFailure, HandoffId, HandoffOutcome};

/// For a connection, and for the answer to its first message.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// For the store to take what is told.
const TAKEN_WITHIN: Duration = Duration::from_secs(5);
/// The first pause before another try; it doubles up to the last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// A connection that lasted so long was a good one: after it the pauses begin anew.
const STEADY: Duration = Duration::from_secs(5);
/// Changes that may be untold.
const MOST_UNTOLD: usize = 65_536;
/// Changes in one write.
const AT_ONCE: usize = 256;

/// Which store.
#[derive(Clone)]
pub struct RemoteEngine {
    pub socket_path: PathBuf,
    /// What it lets in who says so.
    pub token: String,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("cannot connect to the store at {}: {source}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("the store at {} does not answer", .0.display())]
    Silent(PathBuf),
    #[error("the store refused the router ({:?}): {}", .0.code, .0.message)]
    Refused(Refused),
    #[error("the connection to the store broke: {0}")]
    Session(#[from] SessionError),
    #[error("the store closed the connection")]
    Closed,
    #[error("the store does not keep up with the router's hand-offs")]
    Behind,
}

/// Keeps the board connected to the store for as long as it is polled; `connected` is 1 while it is. The board is off
/// from the first poll on until there is a connection.
pub async fn follow(engine: RemoteEngine, board: HandoffBoard, connected: Gauge) {
    board.fail_all(HandoffFailure::EngineDown);
    let (first, last) = PAUSES;
    let mut pause = first;
    let mut told = String::new();
    loop {
        let error = match connect(&engine).await {
            Ok(stream) => {
                tracing::info!("connected to the store at {}", engine.socket_path.display());
                told.clear();
                let since = Instant::now();
                let changes = board.follow(MOST_UNTOLD);
                connected.set(1);
                let ended = converse(stream, &board, changes).await;
                board.fail_all(HandoffFailure::EngineDown);
                connected.set(0);
                if since.elapsed() >= STEADY {
                    pause = first;
                }
                ended
            }
            Err(error) => error,
        };
        // Once, not with every try.
        let why = error.to_string();
        if why != told {
            tracing::warn!("{why}; decode nodes compute prompts meanwhile, and it is tried again");
            told = why;
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.8..1.2))).await;
        pause = (pause * 2).min(last);
    }
}

async fn connect(engine: &RemoteEngine) -> Result<UnixStream, LinkError> {
    let path: &Path = &engine.socket_path;
    let answer = timeout(CONNECT_WITHIN, async {
        let connecting = UnixStream::connect(path).await;
        let mut stream = connecting.map_err(|source| LinkError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let watch = ClientMessage::Watch(Watch {
            version: VERSION,
            token: engine.token.clone(),
        });
        write(&mut stream, &watch).await?;
        match read_message(&mut stream, MAX_HELLO).await? {
            Some(ServerMessage::Watching(_)) => Ok(stream),
            Some(ServerMessage::Refused(refused)) => Err(LinkError::Refused(refused)),
            Some(_) => Err(SessionError::from(ProtocolError::Misplaced("answer")).into()),
            None => Err(LinkError::Closed),
        }
    });
    let silent = |_| LinkError::Silent(path.to_owned());
    answer.await.map_err(silent)?
}

/// Until the connection ends, for whatever reason.
async fn converse(
    mut stream: UnixStream,
    board: &HandoffBoard,
    changes: mpsc::Receiver<Change>,
) -> LinkError {
    let (mut reader, writer) = stream.split();
    tokio::select! {
        ended = hear(&mut reader, board) => ended.err().unwrap_or(LinkError::Closed),
        ended = tell(writer, changes) => ended.err().unwrap_or(LinkError::Behind),
    }
}

async fn hear(
    reader: &mut (impl AsyncRead + Unpin),
    board: &HandoffBoard,
) -> Result<(), LinkError> {
    while let Some(message) = read_message(reader, MAX_HELLO).await? {
        match message {
            ServerMessage::Opened(name) => board.opened(&name.handoff.as_str().into()),
            ServerMessage::Settled(settled) => {
                let id = HandoffId::from(settled.handoff.as_str());
                board.settle(&id, outcome(&settled));
            }
            ServerMessage::Refused(refused) => return Err(LinkError::Refused(refused)),
            _ => return Err(SessionError::from(ProtocolError::Misplaced("answer")).into()),
        }
    }
    Ok(())
}

/// A failure with a name that is not known here is one of saving.
fn outcome(settled: &Settled) -> HandoffOutcome {
    match &settled.failure {
        None => HandoffOutcome::Ready {
            chunks: settled.chunks,
            already_stored: settled.already_stored,
        },
        Some(label) => HandoffOutcome::Failed(
            HandoffFailure::from_label(label).unwrap_or(HandoffFailure::SaveFailed),
        ),
    }
}

async fn tell(
    mut writer: impl AsyncWriteExt + Unpin,
    mut changes: mpsc::Receiver<Change>,
) -> Result<(), LinkError> {
    let mut batch = Vec::with_capacity(AT_ONCE);
    while changes.recv_many(&mut batch, AT_ONCE).await > 0 {
        let mut frames = Vec::new();
        for change in batch.drain(..) {
            let name = |id: HandoffId| HandoffName {
                handoff: id.as_str().to_owned(),
            };
            let message = match change {
                Change::Awaited(id) => ClientMessage::Await(name(id)),
                Change::Left(id) => ClientMessage::Leave(name(id)),
            };
            frames.extend(encode_frame(&message).map_err(SessionError::from)?);
        }
        let taken = timeout(TAKEN_WITHIN, writer.write_all(&frames)).await;
        taken
            .map_err(|_| SessionError::Slow)?
            .map_err(SessionError::from)?;
    }
    Ok(())
}
