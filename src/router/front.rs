//! What clients ask most gets to its handler at once, without the table of routes and its layers: each of those puts
//! the request, and what is done about it, into another box.
//!
//! ```text
//! POST of a completion or a chat, from whoever may ─▶ its handler
//! all the rest, and whoever is to be refused ──────▶ the table
//! ```

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use futures_util::FutureExt as _;
use http::{HeaderMap, Method, Request};
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;

use super::Context;
use super::routes::serve;
use super::split::Endpoint;

/// The way in. Cheap to clone; clones share everything.
#[derive(Clone)]
pub(super) struct Front {
    at_once: Option<Arc<Context>>,
    table: TowerToHyperService<Router>,
}

impl Front {
    /// `at_once`: for what does not have to go by the table.
    pub(super) fn new(at_once: Option<Arc<Context>>, table: Router) -> Self {
        Self {
            at_once,
            table: TowerToHyperService::new(table),
        }
    }
}

impl Service<Request<Incoming>> for Front {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let endpoint = match request.uri().path() {
            "/v1/completions" => Some(Endpoint::Completions),
            "/v1/chat/completions" => Some(Endpoint::Chat),
            _ => None,
        };
        match (endpoint, &self.at_once) {
            (Some(endpoint), Some(cx))
                if request.method() == Method::POST && admits(cx, request.headers()) =>
            {
                let answer = serve(cx.clone(), endpoint, request.map(Body::new));
                Box::pin(answer.map(Ok))
            }
            _ => Box::pin(self.table.call(request)),
        }
    }
}

fn admits(cx: &Context, headers: &HeaderMap) -> bool {
    cx.keys.as_ref().is_none_or(|keys| keys.admit(headers))
}
