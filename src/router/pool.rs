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
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use http::Method;
use http_body::{Body, Frame};
use tokio::time::{Instant, sleep, timeout};

use super::wire::{self, Decoder, ReplyHead, WireError};
use crate::reach::TlsFailure;
use link::Link;

mod link;

pub(super) use link::Way;

/// vLLM closes idle connections after 5 s (uvicorn's default); we do it before.
const KEPT: Duration = Duration::from_secs(4);
/// Between two looks for connections that were kept too long.
const SWEEP: Duration = Duration::from_secs(1);

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
    Tls(TlsFailure),
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
    kept: Mutex<HashMap<Way, Vec<Kept>>>,
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
        node: &Way,
        request: Request,
    ) -> Result<(ReplyHead, NodeBody), Failure> {
        loop {
            let kept = self.take(node);
            let is_fresh = kept.is_none();
            let mut connection = match kept {
                Some(connection) => connection,
                None => self.connect(node).await?,
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

    fn take(&self, node: &Way) -> Option<Connection> {
        loop {
            let Kept {
                mut connection,
                since,
            } = self.lock().get_mut(node)?.pop()?;
            if since.elapsed() < KEPT && connection.link.is_idle() {
                return Some(connection);
            }
        }
    }

    fn keep(&self, connection: Connection) {
        let since = Instant::now();
        let mut all = self.lock();
        let kept = all.entry(connection.node.clone()).or_default();
        if kept.len() < self.shared.most {
            kept.push(Kept { connection, since });
        }
    }

    async fn connect(&self, node: &Way) -> Result<Connection, Failure> {
        let limit = self.shared.connect_timeout;
        let link = timeout(limit, Link::connect(node)).await;
        let link =
            link.unwrap_or_else(|_| Err(Failure::Connect(io::ErrorKind::TimedOut.into())))?;
        Ok(Connection {
            node: node.clone(),
            link,
            read: BytesMut::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Way, Vec<Kept>>> {
        // Every change is one step.
        let kept = self.shared.kept.lock();
        kept.unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Connection {
    node: Way,
    link: Link,
    /// Read, and not looked at yet.
    read: BytesMut,
}

impl Connection {
    /// Reads what is there; 0: the node has hung up. `expected`: bytes that will come in any case.
    fn poll_read(&mut self, expected: u64, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.link.poll_read(&mut self.read, expected, cx)
    }
}

/// One request on its way, until the head of its reply is there. Both ways at once: a node may answer, and hang up,
/// before it has read everything.
struct Exchange<'a> {
    request: &'a Request,
    sent: usize,
    /// Nothing of it waits here for being encrypted and written.
    flushed: bool,
    /// It does not listen any more; what it has said before still counts.
    deaf: Option<io::Error>,
}

impl<'a> Exchange<'a> {
    fn new(request: &'a Request) -> Self {
        Self {
            request,
            sent: 0,
            flushed: false,
            deaf: None,
        }
    }

    fn is_sent(&self) -> bool {
        self.flushed
    }

    /// Writes on: `None` once all is written.
    fn poll_write(
        &mut self,
        link: &mut Link,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Option<usize>>> {
        let (mut head, mut body) = (self.request.head.as_slice(), self.request.body.as_ref());
        if self.sent == head.len() + body.len() {
            return link.poll_flush(cx).map_ok(|()| None);
        }
        let of_head = self.sent.min(head.len());
        head.advance(of_head);
        body.advance(self.sent - of_head);
        let parts = [IoSlice::new(head), IoSlice::new(body)];
        link.poll_write_vectored(&parts, cx).map_ok(Some)
    }

    fn poll(
        &mut self,
        connection: &mut Connection,
        cx: &mut Context<'_>,
    ) -> Poll<Result<ReplyHead, Broken>> {
        while !self.is_sent() && self.deaf.is_none() {
            match self.poll_write(&mut connection.link, cx) {
                Poll::Ready(Ok(None)) => self.flushed = true,
                Poll::Ready(Ok(Some(0))) => self.deaf = Some(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(Some(sent))) => self.sent += sent,
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
