//! Which web pages may use the endpoint from a browser (`[router] cors_origins`): none, unless they are named.
//!
//! A browser asks first, with `OPTIONS` and without a key; that is answered here, and gets nowhere else.

use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, header};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

/// How long a browser need not ask again.
const MAX_AGE: Duration = Duration::from_secs(600);
/// What a page's own program may read of an answer.
const SHOWN: [HeaderName; 3] = [
    header::RETRY_AFTER,
    HeaderName::from_static("server-timing"),
    HeaderName::from_static("x-request-id"),
];

/// `None`: no page may. Every page may where one of the origins is `*`.
pub(super) fn layer(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        let named = origins
            .iter()
            .filter_map(|origin| HeaderValue::from_str(origin).ok());
        AllowOrigin::list(named)
    };
    let cors = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // Whatever a client library adds; keys are checked afterwards.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(SHOWN)
        .max_age(MAX_AGE);
    Some(cors)
}
