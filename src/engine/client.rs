//! A small blocking client of the store: for tests and for stand-ins of vLLM.

use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use serde_bytes::ByteBuf;

use super::protocol::{
    ClientMessage, Found, Granted, Hello, KeyQuery, MAX_FRAME, ProtocolError, Refused,
    ServerMessage, SlotRef, Welcome, body_len, decode, encode_frame,
};

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("the store's socket failed")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("the store refused the session ({:?}): {}", .0.code, .0.message)]
    Refused(Refused),
    #[error("the store answered with another message than was asked for")]
    Unexpected,
}

/// An admitted session.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    welcome: Welcome,
    arena: Option<OwnedFd>,
    seq: u64,
}

/// The keys of a `lookup` or `store`, all of the same length.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    pub request: &'a str,
    pub handoff: Option<&'a str>,
    pub keys: &'a [&'a [u8]],
}

impl Client {
    /// Connects and says hello. Every wait of this client ends after `limit`.
    pub fn connect(socket: &Path, hello: Hello, limit: Duration) -> Result<Self, ClientError> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        stream.write_all(&encode_frame(&ClientMessage::Hello(hello))?)?;
        let (prefix, arena) = receive_prefix(&stream)?;
        match read_body(&mut stream, prefix)? {
            ServerMessage::Welcome(welcome) => Ok(Self {
                stream,
                welcome,
                arena,
                seq: 0,
            }),
            ServerMessage::Refused(refused) => Err(ClientError::Refused(refused)),
            _ => Err(ClientError::Unexpected),
        }
    }

    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// The arena's file; only a worker gets it.
    pub fn arena(&self) -> Option<&OwnedFd> {
        self.arena.as_ref()
    }

    /// Where this rank's part of a slot begins in the arena's file, in bytes.
    pub fn offset(&self, at: SlotRef) -> u64 {
        let welcome = &self.welcome;
        welcome.header_bytes + u64::from(at.slot) * welcome.stride + welcome.rank_offset
    }

    /// Where this rank's checksum of a slot's row is in the arena's file; `None`: none are kept.
    pub fn checksum_offset(&self, at: SlotRef) -> Option<u64> {
        let first = self.welcome.checksum_offset;
        (first != 0).then(|| first + u64::from(at.slot) * 4)
    }

    pub fn lookup(&mut self, query: Query<'_>) -> Result<Found, ClientError> {
        let query = self.query(query);
        match self.ask(ClientMessage::Lookup(query))? {
            ServerMessage::Found(found) if found.seq == self.seq => Ok(found),
            _ => Err(ClientError::Unexpected),
        }
    }

    pub fn store(&mut self, query: Query<'_>) -> Result<Granted, ClientError> {
        let query = self.query(query);
        match self.ask(ClientMessage::Store(query))? {
            ServerMessage::Granted(granted) if granted.seq == self.seq => Ok(granted),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Sends a message that has no answer.
    pub fn send(&mut self, message: &ClientMessage) -> Result<(), ClientError> {
        Ok(self.stream.write_all(&encode_frame(message)?)?)
    }

    fn query(&mut self, query: Query<'_>) -> KeyQuery {
        self.seq += 1;
        let key_len = query.keys.first().map_or(8, |key| key.len());
        KeyQuery {
            seq: self.seq,
            request: query.request.to_owned(),
            handoff: query.handoff.map(str::to_owned),
            keys: ByteBuf::from(query.keys.concat()),
            key_len: u32::try_from(key_len).unwrap_or(u32::MAX),
        }
    }

    fn ask(&mut self, message: ClientMessage) -> Result<ServerMessage, ClientError> {
        self.send(&message)?;
        let mut prefix = [0; 4];
        self.stream.read_exact(&mut prefix)?;
        read_body(&mut self.stream, prefix)
    }
}

fn read_body(stream: &mut UnixStream, prefix: [u8; 4]) -> Result<ServerMessage, ClientError> {
    let mut body = vec![0; body_len(prefix, MAX_FRAME)?];
    stream.read_exact(&mut body)?;
    Ok(decode(&body)?)
}

/// The first four bytes of the first frame, and the file that may come with them.
fn receive_prefix(mut stream: &UnixStream) -> Result<([u8; 4], Option<OwnedFd>), ClientError> {
    let mut prefix = [0; 4];
    let mut file = None;
    let received = {
        let mut parts = [IoSliceMut::new(&mut prefix)];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)
            .map_err(io::Error::from)?;
        for control in message.cmsgs().map_err(io::Error::from)? {
            if let ControlMessageOwned::ScmRights(files) = control {
                for fd in files {
                    file = Some(own(fd));
                }
            }
        }
        message.bytes
    };
    if received == 0 {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    if let Some(rest) = prefix.get_mut(received..) {
        stream.read_exact(rest)?;
    }
    Ok((prefix, file))
}

fn own(fd: RawFd) -> OwnedFd {
    #[expect(unsafe_code, reason = "a received descriptor comes as a bare number")]
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    unsafe {
        OwnedFd::from_raw_fd(fd)
    }
}
