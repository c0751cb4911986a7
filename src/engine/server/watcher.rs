//! A router in another process: it is told what becomes of the hand-offs that it waits for.
//!
//! ```text
//! watch ── version, token? ── watching ─▶ ┌ await ID ─▶ a ticket of the board ── opened, settled ─▶ told ┐ ─▶ all
//!               no: refused, close        └ leave ID ─▶ the ticket is dropped: nobody waits any more     ┘   dropped
//! ```
//!
//! It waits with tickets like a router in this process, so that what follows from its leaving is the same. A prefill
//! node's word may come before the router's `await`: the board remembers it for a while.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::Shared;
use crate::engine::frames::{SessionError, read_message, write};
use crate::engine::handoffs::MAX_HANDOFFS;
use crate::engine::pools::Pools;
use crate::engine::protocol::{
    ClientMessage, HandoffName, MAX_HELLO, ProtocolError, Refused, ServerMessage, Settled, VERSION,
    Watch, Watching,
};
use crate::handoff::{HandoffId, HandoffOutcome, HandoffTicket};

/// Words that are on their way to a router; then what has more to say waits.
const MAX_WORDS: usize = 1024;
/// The longest id, in bytes.
const MAX_ID: usize = 1024;

type Awaited = HashMap<HandoffId, AbortOnDropHandle<()>>;

/// The whole connection of a router, from its first message on.
pub async fn connection(mut stream: UnixStream, shared: &Shared, watch: Watch) {
    let refused = match shared.read(|pools| pools.check_watcher(&watch)) {
        Ok(()) if shared.is_up() => None,
        Ok(()) => Some(Refused::down()),
        Err(refused) => Some(refused),
    };
    if let Some(refused) = refused {
        tracing::warn!(code = ?refused.code, "a router was refused: {}", refused.message);
        let _ = write(&mut stream, &ServerMessage::Refused(refused)).await;
        return;
    }
    tracing::info!("a router waits for hand-offs at the store");
    let served = tokio::select! {
        () = shared.stop.cancelled() => Ok(()),
        served = serve(&mut stream, shared) => served,
    };
    match served {
        Ok(()) => tracing::info!("the router has left the store"),
        Err(error) => {
            tracing::warn!(%error, "closing a router's connection to the store");
            shared.with(Pools::count_broken);
        }
    }
}

async fn serve(stream: &mut UnixStream, shared: &Shared) -> Result<(), SessionError> {
    let watching = ServerMessage::Watching(Watching { version: VERSION });
    write(stream, &watching).await?;
    let (mut reader, mut writer) = stream.split();
    let (words, told) = mpsc::channel(MAX_WORDS);
    tokio::select! {
        heard = hear(&mut reader, shared, words) => heard,
        told = tell(&mut writer, told) => told,
    }
}

/// Until the router leaves; its tickets are dropped then.
async fn hear(
    reader: &mut (impl AsyncRead + Unpin),
    shared: &Shared,
    words: mpsc::Sender<ServerMessage>,
) -> Result<(), SessionError> {
    let mut awaited = Awaited::new();
    while let Some(message) = read_message(reader, MAX_HELLO).await? {
        match message {
            ClientMessage::Await(name) => {
                let id = handoff_id(&name)?;
                if awaited.len() >= MAX_HANDOFFS {
                    return Err(ProtocolError::TooManyRequests(MAX_HANDOFFS).into());
                }
                if let Entry::Vacant(place) = awaited.entry(id) {
                    let ticket = shared.board.register(place.key().clone());
                    let following = tokio::spawn(follow(ticket, words.clone()));
                    place.insert(AbortOnDropHandle::new(following));
                }
            }
            ClientMessage::Leave(name) => drop(awaited.remove(&handoff_id(&name)?)),
            other => return Err(ProtocolError::Misplaced(other.op()).into()),
        }
    }
    Ok(())
}

async fn tell(
    writer: &mut (impl AsyncWrite + Unpin),
    mut told: mpsc::Receiver<ServerMessage>,
) -> Result<(), SessionError> {
    while let Some(word) = told.recv().await {
        write(writer, &word).await?;
    }
    Ok(())
}

fn handoff_id(name: &HandoffName) -> Result<HandoffId, ProtocolError> {
    match name.handoff.len() {
        1..=MAX_ID => Ok(name.handoff.as_str().into()),
        length => Err(ProtocolError::Name(length)),
    }
}

/// Tells what becomes of it, and holds the ticket until the router leaves.
async fn follow(mut ticket: HandoffTicket, words: mpsc::Sender<ServerMessage>) {
    let handoff = ticket.id().as_str().to_owned();
    if ticket.opened().await {
        let opened = ServerMessage::Opened(HandoffName {
            handoff: handoff.clone(),
        });
        if words.send(opened).await.is_err() {
            return;
        }
    }
    let settled = match ticket.settled().await {
        HandoffOutcome::Ready {
            chunks,
            already_stored,
        } => Settled {
            handoff,
            failure: None,
            chunks,
            already_stored,
        },
        HandoffOutcome::Failed(failure) => Settled {
            handoff,
            failure: Some(failure.label().to_owned()),
            chunks: 0,
            already_stored: false,
        },
    };
    // Nobody reads it any more when this fails, and the ticket goes in a moment.
    let _ = words.send(ServerMessage::Settled(settled)).await;
    std::future::pending().await
}
