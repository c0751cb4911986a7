//! Connections: accepted until the end begins, drained under a deadline, then dropped.

use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::error::RouterError;
use super::front::Front;
use super::tls::Tls;
use crate::notify::Beat;
use crate::plan::RouterPlan;
use crate::shutdown::Shutdown;

/// Connections at a time; more wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 16_384;
/// Bytes of a request's head; a longer one is answered 431, as is one with more than 100 headers.
const MAX_HEAD: usize = 64 << 10;
/// After an accept error (out of file descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where clients come in, and what they speak there.
pub(super) struct Door {
    pub(super) listener: TcpListener,
    /// `None`: plain HTTP.
    pub(super) tls: Option<Tls>,
}

pub(super) async fn run(
    door: Door,
    front: Front,
    plan: &RouterPlan,
    shutdown: &Shutdown,
    beat: &mut Beat,
) -> Result<(), RouterError> {
    let Door { listener, tls } = door;
    listener.local_addr().map_err(RouterError::Listener)?;
    let drain_timeout = plan.drain_timeout;
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(plan.head_timeout)
        .max_header_size(MAX_HEAD);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = shutdown.graceful().cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    prepare(&stream, plan.chunk_timeout);
                    let reception = Reception {
                        http: http.clone(),
                        front: front.clone(),
                        draining: shutdown.graceful().clone(),
                    };
                    connections.spawn(greet(stream, tls.clone(), reception));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            () = beat.tick() => {}
        }
        beat.mark();
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    tokio::select! {
        biased;
        () = shutdown.forced().cancelled() => {}
        result = beat.during(timeout(drain_timeout, drained)) => if result.is_err() {
            tracing::warn!(?drain_timeout, "requests were still running; dropping them");
        },
    }
    connections.shutdown().await;
    Ok(())
}

/// A client that takes nothing for as long as a node may say nothing is gone: without that it would
/// hold its place for ever. The kernel watches it, also while its window is closed.
fn prepare(stream: &TcpStream, patience: Duration) {
    let millis = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    if let Err(error) = setsockopt(stream, sockopt::TcpUserTimeout, &millis) {
        tracing::debug!(%error, "cannot set TCP_USER_TIMEOUT");
    }
}

/// What a connection is served with.
struct Reception {
    http: http1::Builder,
    front: Front,
    draining: CancellationToken,
}

async fn greet(stream: TcpStream, tls: Option<Tls>, reception: Reception) {
    let Some(tls) = tls else {
        return connection(stream, reception).await;
    };
    // Whoever has not asked for anything yet is not waited for.
    let handshake = reception
        .draining
        .clone()
        .run_until_cancelled_owned(tls.accept(stream));
    match handshake.await {
        // Boxed: a connection without TLS need not have room for one.
        Some(Ok(stream)) => Box::pin(connection(stream, reception)).await,
        Some(Err(error)) => tracing::debug!(%error, "a client's TLS handshake failed"),
        None => {}
    }
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    reception: Reception,
) {
    let Reception {
        http,
        front,
        draining,
    } = reception;
    let served = http.serve_connection(TokioIo::new(stream), front);
    let mut served = std::pin::pin!(served);
    let result = tokio::select! {
        result = served.as_mut() => result,
        () = draining.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a client's connection ended");
    }
}
