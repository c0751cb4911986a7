//! What is asked of nodes beside clients' requests.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};

use super::super::pool::{Request, Way};
use super::super::wire::request_head;
use super::{Client, LegError, excerpt, read_whole};
use crate::fleet::NodeView;

/// Bytes of what a node says of itself.
const MAX_FIGURES: usize = 8 << 20;

impl Client {
    /// What a node says of itself at `path`, to nobody in particular. The caller sets the time limit.
    pub(in crate::router) async fn read(
        &self,
        node: &NodeView,
        path: &str,
    ) -> Result<Bytes, LegError> {
        let (status, body) = self.ask(node, Method::GET, path, Bytes::new()).await?;
        if status != StatusCode::OK {
            return Err(LegError::Status {
                status,
                excerpt: excerpt(&body),
            });
        }
        Ok(body)
    }

    /// Says something to a node whose answer, as long as there is one, does not matter. The caller sets the time limit.
    pub(in crate::router) async fn tell(
        &self,
        node: &NodeView,
        path: &str,
        body: Bytes,
    ) -> Result<(), LegError> {
        self.ask(node, Method::POST, path, body).await.map(|_| ())
    }

    async fn ask(
        &self,
        node: &NodeView,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), LegError> {
        let reach = self.reaches.of(&node.id);
        let mut headers = HeaderMap::new();
        if let Some(host) = reach.host(node.addr) {
            headers.insert(header::HOST, host);
        }
        if !body.is_empty() {
            let json = HeaderValue::from_static("application/json");
            headers.insert(header::CONTENT_TYPE, json);
        }
        let key = match node.external {
            true => reach.authorization(),
            false => self.node_key.as_ref(),
        };
        if let Some(key) = key {
            headers.insert(header::AUTHORIZATION, key.clone());
        }
        let request = Request {
            head: request_head(&method, path, &headers, body.len()),
            method,
            body,
        };
        let way = Way::new(node.addr, reach);
        let (head, body) = self.pool.send(&way, request).await?;
        let body = read_whole(body, MAX_FIGURES).await?;
        Ok((head.status, body))
    }
}
