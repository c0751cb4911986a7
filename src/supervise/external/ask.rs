//! One question to a node of others, on a connection of its own: one of before says nothing about whether the node takes
//! new ones.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::reach::Reach;

/// What the node said.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    /// `None`: it was not wanted, or is longer than that.
    pub(super) body: Option<Bytes>,
}

/// Why it said nothing.
#[derive(Debug)]
pub(super) enum Silence {
    /// There is no connection, and this is why.
    Unreached(String),
    Broken,
}

impl From<hyper::Error> for Silence {
    fn from(_: hyper::Error) -> Self {
        Self::Broken
    }
}

/// `GET path`; of the body up to `wanted` bytes are read. The caller sets the time limit.
pub(super) async fn ask(
    addr: SocketAddr,
    reach: &Reach,
    path: &str,
    wanted: Option<usize>,
) -> Result<Reply, Silence> {
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = path.parse().map_err(|_| Silence::Broken)?;
    let headers = request.headers_mut();
    if let Some(host) = reach.host(addr) {
        headers.insert(header::HOST, host);
    }
    if let Some(key) = reach.authorization() {
        headers.insert(header::AUTHORIZATION, key.clone());
    }
    let stream = TcpStream::connect(addr).await;
    let stream = stream.map_err(|error| Silence::Unreached(error.to_string()))?;
    match reach.tls() {
        None => exchange(stream, request, wanted).await,
        Some(tls) => {
            let stream = tls.connect(stream).await;
            let stream = stream.map_err(|error| Silence::Unreached(error.to_string()))?;
            exchange(stream, request, wanted).await
        }
    }
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Empty<Bytes>>,
    wanted: Option<usize>,
) -> Result<Reply, Silence> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let answer = async move {
        let reply = sender.send_request(request).await?;
        let status = reply.status();
        let body = match wanted {
            None => None,
            Some(most) => match Limited::new(reply.into_body(), most).collect().await {
                Ok(body) => Some(body.to_bytes()),
                Err(error) if error.is::<LengthLimitError>() => None,
                Err(_) => return Err(Silence::Broken),
            },
        };
        Ok(Reply { status, body })
    };
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        reply = &mut answer => reply,
        // The node hung up; what it had said before is there.
        _ = connection => answer.await,
    }
}
