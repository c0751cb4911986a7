//! Frames on a tokio socket: every read and write has a limit in size and in time.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen,
    sendmsg, socket,
};
use nix::sys::stat::{Mode, fchmod};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::arena::Arena;
use super::protocol::{ProtocolError, ServerMessage, Welcome, body_len, decode, encode_frame};

/// Bytes of a message that room is made for before they have come: a lookup of 3,600 keys.
const AT_ONCE: usize = 128 << 10;

/// For the rest of a frame that has begun, and for an answer to be taken.
const FRAME_WITHIN: Duration = Duration::from_secs(5);

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("connection failed")]
    Io(#[from] io::Error),
    #[error("nothing came, or nothing was read, in time")]
    Slow,
    #[error("the store is turned off")]
    Down,
}

/// A listening socket that only this user can reach, from its first moment on.
pub fn listen_at(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // On Linux the file takes its mode from the socket at bind.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(128)?)?;
    Ok(fd.into())
}

/// Sends `welcome`, to a worker together with the arena's file.
pub async fn write_welcome(
    stream: &mut UnixStream,
    welcome: Welcome,
    arena: Option<&Arena>,
) -> Result<(), SessionError> {
    let frame = encode_frame(&ServerMessage::Welcome(welcome))?;
    let sent = match arena {
        Some(arena) => {
            let sending = send_with_file(stream, &frame, arena.file().as_raw_fd());
            timeout(FRAME_WITHIN, sending)
                .await
                .map_err(|_| SessionError::Slow)??
        }
        None => 0,
    };
    write_bytes(stream, frame.get(sent..).unwrap_or_default()).await
}

/// Sends the beginning of a frame, together with a file descriptor.
async fn send_with_file(stream: &UnixStream, frame: &[u8], file: RawFd) -> io::Result<usize> {
    let socket = stream.as_raw_fd();
    stream
        .async_io(Interest::WRITABLE, || {
            let files = [file];
            let message = [ControlMessage::ScmRights(&files)];
            let parts = [IoSlice::new(frame)];
            Ok(sendmsg::<()>(
                socket,
                &parts,
                &message,
                MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
                None,
            )?)
        })
        .await
}

/// The next message; `None` at the end of the stream between two frames. Waits for as long as the
/// peer is silent, but not in the middle of a frame.
pub async fn read_message<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
    limit: usize,
) -> Result<Option<T>, SessionError> {
    let mut prefix = [0; 4];
    let begun = stream.read(&mut prefix).await;
    let begun = match begun {
        Ok(0) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
        other => other?,
    };
    let body = timeout(FRAME_WITHIN, async {
        if let Some(rest) = prefix.get_mut(begun..) {
            stream.read_exact(rest).await?;
        }
        let len = body_len(prefix, limit)?;
        // One read for most messages; above that it grows with what arrives, not with what is
        // announced.
        let mut body = Vec::with_capacity(len.min(AT_ONCE));
        stream.take(len as u64).read_to_end(&mut body).await?;
        if body.len() < len {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok::<_, SessionError>(body)
    });
    let body = body.await.map_err(|_| SessionError::Slow)??;
    Ok(Some(decode(&body)?))
}

pub async fn write<T: Serialize>(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &T,
) -> Result<(), SessionError> {
    write_bytes(stream, &encode_frame(message)?).await
}

async fn write_bytes(
    stream: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
) -> Result<(), SessionError> {
    match timeout(FRAME_WITHIN, stream.write_all(bytes)).await {
        Ok(written) => Ok(written?),
        Err(_) => Err(SessionError::Slow),
    }
}
