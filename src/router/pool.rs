//! Connections to the nodes: kept for the next request, and driven by the request that uses them.
//!
//! ```text
//! one kept, alive? ── no ─▶ connect ─┐
//!      └─ yes ───────────────────────┴─▶ send ─▶ head ─▶ body ─▶ its end ─▶ kept, for KEPT at most
//!                                         └───────┴───────┴─ broken, or dropped ─▶ closed
//! ```
//!
//! There is no task per connection: what a request waits for wakes the request itself, and not first a task that
//! hands it over. So nobody looks at a kept connection; whether the node has closed it is seen when it is taken.
//! A connection that is dropped in the middle is closed, which tells the node to stop. One that waits has no buffer.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use http::Method;
use http_body::{Body, Frame};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::AsyncWrite as _;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::io::poll_read_buf;

use super::wire::{self, Decoder, ReplyHead, WireError};

/// vLLM closes idle connections after 5 s (uvicorn's default); we do it before.
const KEPT: Duration = Duration::from_secs(4);
/// Between two looks for connections that were kept too long.
const SWEEP: Duration = Duration::from_secs(1);
/// A node's machine that is gone says nothing: its kernel is asked after this long, so often, this many times.
const KEEPALIVE: (u32, u32, u32) = (15, 15, 3);
/// How long a node's kernel may leave what was sent to it unacknowledged.
const UNACKNOWLEDGED: u32 = 30_000;
/// Bytes that are read at once, and where it is known that many more will come.
const READ: usize = 8 << 10;
const READ_MOST: usize = 128 << 10;

/// A request that can be sent as often as needed.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) method: Method,
    pub(super) head: Vec<u8>,
    pub(super) body: Bytes,
}

/// Why a connection gave no reply, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it hung up in the middle")]
    HungUp,
    #[error("{0}")]
    Wire(#[from] WireError),
}

/// Why there is no reply.
#[derive(Debug)]
pub(super) enum Failure {
    Connect(io::Error),
    /// Sent, or on the way.
    Broken(Broken),
}

/// Cheap to clone; clones share the connections.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    kept: Mutex<HashMap<SocketAddr, Vec<Kept>>>,
    /// For each node.
    most: usize,
    connect_timeout: Duration,
}

#[derive(Debug)]
struct Kept {
    connection: Connection,
    since: Instant,
}

impl Pool {
    /// Keeps up to `most` connections to each node.
    pub(super) fn new(connect_timeout: Duration, most: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                kept: Mutex::default(),
                most,
                connect_timeout,
            }),
        }
    }

    /// Sends the request, over a kept connection if there is one, and waits for the head of the reply.
    pub(super) async fn send(
        &self,
        node: SocketAddr,
        request: Request,
    ) -> Result<(ReplyHead, NodeBody), Failure> {
        loop {
            let kept = self.take(node);
            let is_fresh = kept.is_none();
            let mut connection = match kept {
                Some(connection) => connection,
                None => self.connect(node).await.map_err(Failure::Connect)?,
            };
            let mut exchange = Exchange::new(&request);
            let head = std::future::poll_fn(|cx| exchange.poll(&mut connection, cx)).await;
            match head {
                Ok(mut head) => {
                    let decoder = std::mem::take(&mut head.body);
                    let mut body = NodeBody {
                        decoder,
                        stays: head.stays && exchange.is_sent(),
                        connection: Some(connection),
                        pool: self.clone(),
                    };
                    body.give_back();
                    return Ok((head, body));
                }
                // The node closed it while it was kept, and got nothing of this request.
                Err(_) if !is_fresh && exchange.sent == 0 => {}
                Err(error) => return Err(Failure::Broken(error)),
            }
        }
    }

    /// Closes connections that nobody has used for too long, for ever.
    pub(super) async fn sweep(self) {
        loop {
            sleep(SWEEP).await;
            let mut old = Vec::new();
            let now = Instant::now();
            self.lock().retain(|_, kept| {
                // Ordered by age: the youngest is used first.
                let young = kept.partition_point(|kept| now - kept.since >= KEPT);
                old.extend(kept.drain(..young));
                !kept.is_empty()
            });
            // Closed here, without the lock.
            drop(old);
        }
    }

    fn take(&self, node: SocketAddr) -> Option<Connection> {
        loop {
            let Kept { connection, since } = self.lock().get_mut(&node)?.pop()?;
            if since.elapsed() < KEPT && connection.is_idle() {
                return Some(connection);
            }
        }
    }

    fn keep(&self, connection: Connection) {
        let since = Instant::now();
        let mut all = self.lock();
        let kept = all.entry(connection.node).or_default();
        if kept.len() < self.shared.most {
            kept.push(Kept { connection, since });
        }
    }

    async fn connect(&self, node: SocketAddr) -> io::Result<Connection> {
        let limit = self.shared.connect_timeout;
        let stream = timeout(limit, TcpStream::connect(node)).await;
        let stream = stream.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        prepare(&stream)?;
        Ok(Connection {
            node,
            stream,
            read: BytesMut::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Vec<Kept>>> {
        // Every change is one step.
        let kept = self.shared.kept.lock();
        kept.unwrap_or_else(PoisonError::into_inner)
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

#[derive(Debug)]
struct Connection {
    node: SocketAddr,
    stream: TcpStream,
    /// Read, and not looked at yet.
    read: BytesMut,
}

impl Connection {
    /// The node has not closed it, as far as is known, and says nothing that it was not asked.
    fn is_idle(&self) -> bool {
        let said = self.stream.try_read(&mut [0]);
        matches!(said, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Reads what is there; 0: the node has hung up. `expected`: bytes that will come in any case.
    fn poll_read(&mut self, expected: u64, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.stream.poll_read_ready(cx)?.is_pending() {
            if self.read.is_empty() {
                // It may be long: without a buffer meanwhile.
                self.read = BytesMut::new();
            }
            return Poll::Pending;
        }
        let expected = usize::try_from(expected).unwrap_or(READ_MOST);
        self.read.reserve(expected.clamp(READ, READ_MOST));
        poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.read)
    }
}

/// One request on its way, until the head of its reply is there. Both ways at once: a node may answer, and hang up,
/// before it has read everything.
struct Exchange<'a> {
    request: &'a Request,
    sent: usize,
    /// It does not listen any more; what it has said before still counts.
    deaf: Option<io::Error>,
}

impl<'a> Exchange<'a> {
    fn new(request: &'a Request) -> Self {
        Self {
            request,
            sent: 0,
            deaf: None,
        }
    }

    fn is_sent(&self) -> bool {
        self.sent == self.request.head.len() + self.request.body.len()
    }

    fn poll(
        &mut self,
        connection: &mut Connection,
        cx: &mut Context<'_>,
    ) -> Poll<Result<ReplyHead, Broken>> {
        while !self.is_sent() && self.deaf.is_none() {
            let (mut head, mut body) = (self.request.head.as_slice(), self.request.body.as_ref());
            let of_head = self.sent.min(head.len());
            head.advance(of_head);
            body.advance(self.sent - of_head);
            let parts = [IoSlice::new(head), IoSlice::new(body)];
            match Pin::new(&mut connection.stream).poll_write_vectored(cx, &parts) {
                Poll::Ready(Ok(0)) => self.deaf = Some(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(sent)) => self.sent += sent,
                Poll::Ready(Err(error)) => self.deaf = Some(error),
                Poll::Pending => break,
            }
        }
        loop {
            let read = match (connection.poll_read(0, cx), self.deaf.take()) {
                (Poll::Ready(Ok(read @ 1..)), deaf) => {
                    self.deaf = deaf;
                    read
                }
                (_, Some(deaf)) => return Poll::Ready(Err(deaf.into())),
                (read, None) => ready!(read)?,
            };
            if read == 0 {
                return Poll::Ready(Err(Broken::HungUp));
            }
            let head = wire::reply_head(&mut connection.read, &self.request.method)?;
            if let Some(head) = head {
                return Poll::Ready(Ok(head));
            }
        }
    }
}

/// A reply's body. At its end the connection is kept.
#[derive(Debug)]
pub(super) struct NodeBody {
    decoder: Decoder,
    /// The connection can be used again after the end.
    stays: bool,
    /// `None` after the end.
    connection: Option<Connection>,
    pool: Pool,
}

impl NodeBody {
    /// As soon as there is nothing more to come.
    fn give_back(&mut self) {
        if !self.decoder.is_end() {
            return;
        }
        if let Some(mut connection) = self.connection.take()
            && self.stays
            && connection.read.is_empty()
        {
            connection.read = BytesMut::new();
            self.pool.keep(connection);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Broken>>> {
        loop {
            let Some(connection) = &mut self.connection else {
                return Poll::Ready(None);
            };
            let data = self.decoder.take(&mut connection.read)?;
            let expected = self.decoder.expected();
            if data.is_empty() && !self.decoder.is_end() {
                if ready!(connection.poll_read(expected, cx))? == 0 && !self.decoder.hung_up() {
                    return Poll::Ready(Some(Err(Broken::HungUp)));
                }
                continue;
            }
            self.give_back();
            if !data.is_empty() {
                return Poll::Ready(Some(Ok(data)));
            }
        }
    }
}

impl Body for NodeBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let this = self.get_mut();
        let data = ready!(this.poll(cx));
        if matches!(data, Some(Err(_))) {
            // Closed, and the end.
            this.connection = None;
        }
        Poll::Ready(data.map(|data| data.map(Frame::data)))
    }
}
