//! What else vLLM answers, passed on to one node as it is: responses, Anthropic messages, embeddings, scores,
//! tokens, and what comes after this was written.
//!
//! ```text
//! websocket, /v1/realtime ───────────────▶ 501
//! unclean path, or not one for clients ──▶ 404
//! else ──────────────────────────────────▶ one node, whole: retried until its answer begins, as any other request
//! ```
//!
//! Everything below `/v1/` is for clients, but for what changes the node itself; of vLLM's other paths only those named
//! here are. A path must say plainly where it leads: one that could be read in two ways is refused.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use http::{HeaderMap, header};

use super::Context;
use super::error::RouterError;
use super::routes::serve;
use super::split::Endpoint;

const VERSIONED: &str = "/v1/";
const UNVERSIONED: [&str; 9] = [
    "/classify",
    "/detokenize",
    "/pooling",
    "/rerank",
    "/score",
    "/tokenize",
    "/v2/embed",
    "/v2/rerank",
    "/version",
];
/// They load and unload what a node serves: the operator's, not a client's.
const OPERATORS: [&str; 2] = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"];
const REALTIME: &str = "/v1/realtime";

pub(super) async fn pass_on(State(cx): State<Arc<Context>>, request: Request) -> Response {
    let path = request.uri().path();
    let error = if wants_websocket(request.headers()) || path == REALTIME {
        RouterError::Websocket
    } else if is_for_clients(path) {
        return serve(cx, Endpoint::Other, request).await;
    } else {
        RouterError::NotFound {
            path: path.to_owned(),
        }
    };
    error.response_for(request.headers())
}

fn wants_websocket(headers: &HeaderMap) -> bool {
    let upgrade = headers.get(header::UPGRADE);
    upgrade.is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

fn is_for_clients(path: &str) -> bool {
    let known = path.starts_with(VERSIONED) || UNVERSIONED.contains(&path);
    known && is_plain(path) && !OPERATORS.contains(&path.trim_end_matches('/'))
}

/// No step up, and nothing that means another character.
fn is_plain(path: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:@/".contains(&byte);
    path.bytes().all(plain)
        && path
            .split('/')
            .skip(1)
            .all(|step| !matches!(step, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_for_clients() {
        for path in [
            "/v1/responses",
            "/v1/responses/resp_1-a",
            "/v1/messages",
            "/v1/embeddings",
            "/v1/audio/transcriptions",
            "/tokenize",
            "/v2/rerank",
        ] {
            assert!(is_for_clients(path), "{path}");
        }
        for path in [
            "/",
            "/sleep",
            "/reset_prefix_cache",
            "/collective_rpc",
            "/tokenize/x",
            "/v1",
            "/v1/",
            "/v1//sleep",
            "/v1/../sleep",
            "/v1/./x",
            "/v1/%2e%2e/sleep",
            "/v1/a%2Fb",
            "/v1/a\\..\\b",
            "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter",
            "/v2/unknown",
        ] {
            assert!(!is_for_clients(path), "{path}");
        }
    }
}
