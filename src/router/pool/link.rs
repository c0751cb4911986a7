//! The bytes between the router and a node: over TCP, with TLS where the node speaks it.

use std::hash::{Hash, Hasher};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::BytesMut;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncBufRead as _, AsyncWrite as _};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_util::io::poll_read_buf;

use super::Failure;
use crate::reach::{NodeTls, Reach};

/// A node's machine that is gone says nothing: its kernel is asked after this long, so often, this many times.
const KEEPALIVE: (u32, u32, u32) = (15, 15, 3);
/// How long a node's kernel may leave what was sent to it unacknowledged.
const UNACKNOWLEDGED: u32 = 30_000;
/// Bytes that are read at once, and where it is known that many more will come.
const READ: usize = 8 << 10;
const READ_MOST: usize = 128 << 10;

/// Where to, and how. Connections are kept for one of these: behind one address there may be nodes of several names.
#[derive(Debug, Clone)]
pub(in super::super) struct Way {
    addr: SocketAddr,
    tls: Option<Arc<NodeTls>>,
}

impl Way {
    pub(in super::super) fn new(addr: SocketAddr, reach: &Reach) -> Self {
        Self {
            addr,
            tls: reach.tls().cloned(),
        }
    }

    /// There is one for each node.
    fn identity(&self) -> (SocketAddr, Option<*const NodeTls>) {
        (self.addr, self.tls.as_ref().map(Arc::as_ptr))
    }
}

impl PartialEq for Way {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for Way {}

impl Hash for Way {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.identity().hash(state);
    }
}

#[derive(Debug)]
pub(super) enum Link {
    Plain(TcpStream),
    /// Elsewhere: it is much larger.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Link {
    pub(super) async fn connect(way: &Way) -> Result<Self, Failure> {
        let stream = TcpStream::connect(way.addr).await;
        let stream = stream.map_err(Failure::Connect)?;
        prepare(&stream).map_err(Failure::Connect)?;
        match &way.tls {
            None => Ok(Self::Plain(stream)),
            // Boxed, so that requests to plain nodes do not grow by it.
            Some(tls) => match Box::pin(tls.connect(stream)).await {
                Ok(stream) => Ok(Self::Tls(stream)),
                Err(failure) => Err(Failure::Tls(failure)),
            },
        }
    }

    /// The node has not closed it, as far as is known, and says nothing that it was not asked.
    pub(super) fn is_idle(&mut self) -> bool {
        let waits = |said: io::Result<usize>| matches!(said, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        match self {
            Self::Plain(stream) => waits(stream.try_read(&mut [0])),
            Self::Tls(stream) => {
                let (stream, session) = stream.get_mut();
                let decrypted = io::Read::read(&mut session.reader(), &mut [0]);
                // What comes now is no answer: the end, or an alert.
                waits(decrypted) && waits(stream.try_read(&mut [0]))
            }
        }
    }

    /// Reads what is there; 0: the node has hung up. `expected`: bytes that will come in any case.
    pub(super) fn poll_read(
        &mut self,
        read: &mut BytesMut,
        expected: u64,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let polled = match self {
            Self::Plain(stream) => match stream.poll_read_ready(cx)? {
                Poll::Pending => Poll::Pending,
                Poll::Ready(()) => {
                    let expected = usize::try_from(expected).unwrap_or(READ_MOST);
                    read.reserve(expected.clamp(READ, READ_MOST));
                    return poll_read_buf(Pin::new(stream), cx, read);
                }
            },
            Self::Tls(stream) => {
                let mut stream = Pin::new(&mut **stream);
                match stream.as_mut().poll_fill_buf(cx)? {
                    Poll::Pending => Poll::Pending,
                    Poll::Ready(decrypted) => {
                        read.extend_from_slice(decrypted);
                        let length = decrypted.len();
                        stream.consume(length);
                        Poll::Ready(Ok(length))
                    }
                }
            }
        };
        if polled.is_pending() && read.is_empty() {
            // It may be long: without a buffer meanwhile.
            *read = BytesMut::new();
        }
        polled
    }

    pub(super) fn poll_write_vectored(
        &mut self,
        parts: &[IoSlice<'_>],
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
        }
    }

    /// What was written is on its way.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            // Nothing is kept back.
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    let (idle, interval, count) = KEEPALIVE;
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &idle)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &interval)?;
    setsockopt(stream, sockopt::TcpKeepCount, &count)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &UNACKNOWLEDGED)?;
    Ok(())
}
