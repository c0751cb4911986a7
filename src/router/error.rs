//! Everything that can go wrong, and what the client is told: the one place where errors become
//! HTTP, in OpenAI's shape `{"error":{"message","type","param","code"}}`.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};

use super::body::BodyError;
use super::legs::{LegError, echo_id, request_id};
use super::stream::Last;
use crate::fleet::NodeId;

/// Why the router could not run, or could not answer a request.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    #[error("cannot use the listening socket")]
    Listener(#[source] io::Error),
    #[error("there is no {path} here; try /v1/chat/completions, /v1/completions or /v1/models")]
    NotFound { path: String },
    #[error("there is no model `{id}` here, but {}", listed(known))]
    NoModel { id: String, known: BTreeSet<String> },
    #[error(
        "a request must say which `model` it means: there is {}",
        listed(known)
    )]
    ModelMissing { known: BTreeSet<String> },
    #[error(
        "websockets and /v1/realtime are not served here; use an endpoint that streams events, such as /v1/responses"
    )]
    Websocket,
    #[error("a known API key is needed, as `Authorization: Bearer KEY`")]
    Unauthorized,
    #[error(
        "the admin key is needed here, as `Authorization: Bearer KEY`; it is PEGAFLOW_ADMIN_KEY of the router"
    )]
    NotAdmin,
    #[error("{path} does not take {method}")]
    MethodNotAllowed { method: Method, path: String },
    #[error("{0}")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the body has more than {limit} bytes; raise the router's max_body")]
    BodyTooLarge { limit: usize },
    #[error("the body did not arrive within {0:?}")]
    BodyTimeout(Duration),
    #[error("{limit} requests are waiting already; try again later")]
    QueueFull { limit: usize, retry_after: u64 },
    #[error("no place became free within {waited:?}; try again later")]
    QueueTimeout { waited: Duration, retry_after: u64 },
    #[error("no node became ready within {waited:?}: {nodes}")]
    NoNode {
        waited: Duration,
        /// Which nodes there are, why they do not serve, and when they are tried again.
        nodes: String,
        retry_after: u64,
    },
    #[error("the nodes could not answer; the last, {node}: {source}{}", source.quote())]
    Nodes {
        node: NodeId,
        #[source]
        source: LegError,
    },
}

impl From<BodyError> for RouterError {
    fn from(error: BodyError) -> Self {
        Self::Body(Box::new(error))
    }
}

impl RouterError {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Listener(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::NotFound { .. } | Self::NoModel { .. } => StatusCode::NOT_FOUND,
            Self::Unauthorized | Self::NotAdmin => StatusCode::UNAUTHORIZED,
            Self::Websocket => StatusCode::NOT_IMPLEMENTED,
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Body(_) | Self::ModelMissing { .. } => StatusCode::BAD_REQUEST,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTimeout(_) => StatusCode::REQUEST_TIMEOUT,
            Self::QueueFull { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::QueueTimeout { .. } | Self::NoNode { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::Nodes { source, .. } if source.is_timeout() => StatusCode::GATEWAY_TIMEOUT,
            Self::Nodes { .. } => StatusCode::BAD_GATEWAY,
        }
    }

    /// A stable word for clients and metrics.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::Listener(_) => "listener",
            Self::NotFound { .. } => "not_found",
            Self::NoModel { .. } => "model_not_found",
            Self::ModelMissing { .. } => "model_required",
            Self::Unauthorized => "invalid_api_key",
            Self::NotAdmin => "invalid_admin_key",
            Self::Websocket => "websocket",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::Body(_) => "invalid_body",
            Self::BodyTooLarge { .. } => "body_too_large",
            Self::BodyTimeout(_) => "body_timeout",
            Self::QueueFull { .. } => "queue_full",
            Self::QueueTimeout { .. } => "queue_timeout",
            Self::NoNode { .. } => "no_ready_node",
            Self::Nodes { source, .. } => source.label(),
        }
    }

    fn retry_after(&self) -> Option<u64> {
        match self {
            Self::QueueFull { retry_after, .. }
            | Self::QueueTimeout { retry_after, .. }
            | Self::NoNode { retry_after, .. } => Some(*retry_after),
            Self::Nodes { .. } => Some(1),
            _ => None,
        }
    }

    /// To a request that was refused before it had become one: with its id, as any other answer.
    pub(super) fn response_for(self, request: &HeaderMap) -> Response {
        let id = request_id(request);
        let mut response = self.response(&id);
        echo_id(&id, response.headers_mut());
        response
    }

    /// The body names the request too, for those who see no headers.
    pub(super) fn response(self, id: &str) -> Response {
        let status = self.status();
        let body = error_json(&self.to_string(), status, self.code(), id);
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            headers.insert(header::WWW_AUTHENTICATE, scheme);
        }
        if let Some(seconds) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// The event that ends a stream which cannot go on. There is no `[DONE]` after it.
pub(super) fn error_event(error: &LegError, last: Last, id: &str) -> Bytes {
    let message = format!("the stream broke off: {error}{}", error.quote());
    let json = error_json(&message, StatusCode::BAD_GATEWAY, error.label(), id);
    match last {
        Last::Done => format!("data: {json}\n\n"),
        // Streams of named events: Anthropic's clients look for the name, OpenAI's for the type.
        Last::Body => format!("event: error\ndata: {json}\n\n"),
    }
    .into()
}

fn listed(models: &BTreeSet<String>) -> String {
    let quoted: Vec<_> = models.iter().map(|id| format!("`{id}`")).collect();
    match quoted.as_slice() {
        [] => "none is known yet".to_owned(),
        models => models.join(", "),
    }
}

fn error_json(message: &str, status: StatusCode, code: &str, id: &str) -> String {
    let kind = match status.as_u16() {
        429 => "rate_limit_error",
        404 => "not_found_error",
        401 => "authentication_error",
        400..500 => "invalid_request_error",
        503 => "service_unavailable_error",
        _ => "server_error",
    };
    serde_json::json!({
        // Where Anthropic's clients, and those of OpenAI's responses, look.
        "type": "error", "code": code, "message": message, "request_id": id,
        "error": {"message": message, "type": kind, "param": null, "code": code}
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_when_to_come_back() {
        let error = RouterError::QueueFull {
            limit: 3,
            retry_after: 7,
        };
        let response = error.response("mine");
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "7");
    }

    #[test]
    fn the_error_event_is_one_event_in_openai_shape() {
        let event = error_event(&LegError::Truncated, Last::Done, "mine");
        let json = event.strip_prefix(b"data: ").unwrap();
        let json: serde_json::Value = serde_json::from_slice(json).unwrap();
        assert_eq!(json["error"]["code"], "truncated");
        assert_eq!(json["request_id"], "mine");
        assert!(event.ends_with(b"\n\n"));
    }
}
