//! The page itself. It holds nothing that anybody may not see, and asks no other host for anything.

use axum::Router;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{any, get};
use http::{HeaderName, HeaderValue, StatusCode, header};

/// Built from `web/` by `npm ci && npm run build`; `tests/browser.sh` builds it again and compares.
const FILES: [(&str, &str, &[u8]); 4] = [
    (
        "/dashboard/",
        "text/html; charset=utf-8",
        include_bytes!("dist/index.html"),
    ),
    (
        "/dashboard/app.js",
        "text/javascript; charset=utf-8",
        include_bytes!("dist/app.js"),
    ),
    (
        "/dashboard/app.css",
        "text/css; charset=utf-8",
        include_bytes!("dist/app.css"),
    ),
    (
        "/dashboard/icon.svg",
        "image/svg+xml",
        include_bytes!("dist/icon.svg"),
    ),
];

const HEADERS: [(HeaderName, &str); 5] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    // The next pegaflow has another page.
    (header::CACHE_CONTROL, "no-cache"),
];

pub(super) fn routes() -> Router {
    let mut routes = Router::new()
        .route("/dashboard", get(async || Redirect::to("dashboard/")))
        .route("/dashboard/{*other}", any(async || StatusCode::NOT_FOUND));
    for (path, kind, bytes) in FILES {
        routes = routes.route(path, get(async move || file(kind, bytes)));
    }
    routes
}

fn file(kind: &'static str, bytes: &'static [u8]) -> Response {
    let kind = HeaderValue::from_static(kind);
    let mut response = ([(header::CONTENT_TYPE, kind)], bytes).into_response();
    for (name, value) in HEADERS {
        let value = HeaderValue::from_static(value);
        response.headers_mut().insert(name, value);
    }
    response
}
