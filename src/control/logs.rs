//! Nodes' logs, as far as they go back and as they grow.

use std::io;
use std::path::Path;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use http::{HeaderValue, header};
use tokio_util::sync::CancellationToken;

use crate::observe::Tail;

/// The longest that a new line waits for being sent.
const INTERVAL: Duration = Duration::from_millis(100);

/// The logs of some nodes in one stream.
#[derive(Debug)]
pub struct LogFeed {
    nodes: Vec<Source>,
}

#[derive(Debug)]
struct Source {
    /// Before each line; empty where there is only one node.
    prefix: String,
    tail: Tail,
}

impl LogFeed {
    /// The last lines of each, and what follows them.
    pub fn open(dir: &Path, nodes: &[String], lines: usize) -> io::Result<(Self, Vec<u8>)> {
        let mut history = Vec::new();
        let mut sources = Vec::new();
        for node in nodes {
            let (tail, text) = Tail::open(&dir.join(format!("{node}.log")), lines)?;
            let prefix = match nodes {
                [_] => String::new(),
                _ => format!("[{node}] "),
            };
            let source = Source { prefix, tail };
            source.add(&text, &mut history);
            sources.push(source);
        }
        Ok((Self { nodes: sources }, history))
    }

    /// Whole lines that have come since.
    pub fn read(&mut self) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        for source in &mut self.nodes {
            let fresh = source.tail.read()?;
            source.add(&fresh, &mut text);
        }
        Ok(text)
    }
}

impl Source {
    fn add(&self, lines: &[u8], text: &mut Vec<u8>) {
        if self.prefix.is_empty() {
            text.extend_from_slice(lines);
            return;
        }
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            text.extend_from_slice(self.prefix.as_bytes());
            text.extend_from_slice(line);
        }
    }
}

/// The history, and with `follow` whatever comes until `end`. Nothing is read ahead of the client.
pub(super) fn reply(
    feed: LogFeed,
    history: Vec<u8>,
    follow: Option<CancellationToken>,
) -> axum::response::Response {
    let history = stream::iter([Ok::<_, io::Error>(Bytes::from(history))]);
    let body = match follow {
        None => Body::from_stream(history),
        Some(end) => {
            let rest = stream::unfold(Some((feed, end)), |state| async {
                let (feed, end) = state?;
                next(feed, end).await
            });
            Body::from_stream(history.chain(rest))
        }
    };
    let mut response = axum::response::Response::new(body);
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}

type Following = Option<(LogFeed, CancellationToken)>;

/// Waits for lines. After `end` come those that are there, and no more.
async fn next(mut feed: LogFeed, end: CancellationToken) -> Option<(io::Result<Bytes>, Following)> {
    loop {
        let last = end.is_cancelled();
        let read = tokio::task::spawn_blocking(move || {
            let text = feed.read();
            (feed, text)
        });
        let text;
        (feed, text) = match read.await {
            Ok(read) => read,
            Err(panic) => return Some((Err(io::Error::other(panic)), None)),
        };
        match text {
            Err(error) => return Some((Err(error), None)),
            Ok(text) if !text.is_empty() => return Some((Ok(text.into()), Some((feed, end)))),
            Ok(_) if last => return None,
            Ok(_) => {}
        }
        let _ = tokio::time::timeout(INTERVAL, end.cancelled()).await;
    }
}
