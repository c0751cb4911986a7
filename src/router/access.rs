//! One line for each request, when somebody wants to read it: at level debug, or at info with `[router] access_log`.
//!
//! It says who, where, how long and how it ended; never what was asked or answered, and no key.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Method, StatusCode, Uri};

use super::timeline::Marks;

const TRACE: &str = "traceparent";
/// Of a path: what follows is the client's own invention.
const LONGEST_PATH: usize = 128;

/// What is known when the request arrives.
#[derive(Debug)]
pub(super) struct Access {
    level: tracing::Level,
    id: Arc<str>,
    method: Method,
    /// Without the query.
    path: String,
    trace: Option<String>,
}

/// What is known when it is over.
pub(super) struct End {
    pub(super) status: Option<StatusCode>,
    pub(super) outcome: &'static str,
    pub(super) way: &'static str,
    pub(super) reason: &'static str,
    /// Of a stream, after the first piece.
    pub(super) events: Option<u64>,
    pub(super) total: Duration,
}

impl Access {
    /// `None`: nobody reads it, so nothing is kept for it.
    pub(super) fn begin(
        always: bool,
        id: &Arc<str>,
        parts: &http::request::Parts,
    ) -> Option<Box<Self>> {
        let level = if always && tracing::enabled!(tracing::Level::INFO) {
            tracing::Level::INFO
        } else if tracing::enabled!(tracing::Level::DEBUG) {
            tracing::Level::DEBUG
        } else {
            return None;
        };
        Some(Box::new(Self {
            level,
            id: id.clone(),
            method: parts.method.clone(),
            path: path(&parts.uri),
            trace: trace(&parts.headers),
        }))
    }

    pub(super) fn write(&self, marks: &Marks, end: &End) {
        // The level of a line is fixed where it is written.
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    id = %self.id,
                    trace = self.trace.as_deref(),
                    method = %self.method,
                    path = self.path,
                    // As other servers log a client that went away.
                    status = end.status.map_or(499, |status| status.as_u16()),
                    outcome = end.outcome,
                    way = end.way,
                    reason = (!end.reason.is_empty()).then_some(end.reason),
                    prefill = marks.prefill.as_ref().map(display),
                    answer = marks.answer.as_ref().map(|(_, node)| display(node)),
                    retries = marks.retries,
                    queue_ms = marks.queued().map(millis),
                    prefill_ms = marks.prefilled().map(millis),
                    answer_ms = marks.answered().map(millis),
                    ttft_ms = marks.first_piece.map(millis),
                    total_ms = millis(end.total),
                    events = end.events,
                    "request"
                )
            };
        }
        if self.level == tracing::Level::INFO {
            line!(info);
        } else {
            line!(debug);
        }
    }
}

fn path(uri: &Uri) -> String {
    uri.path().chars().take(LONGEST_PATH).collect()
}

/// A client's `traceparent`, if it looks like one: what it means is for those who made it.
fn trace(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(TRACE)?.to_str().ok()?;
    let plain = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-';
    ((1..=64).contains(&text.len()) && text.bytes().all(plain)).then(|| text.to_owned())
}

/// To the tenth.
fn millis(took: Duration) -> f64 {
    (took.as_secs_f64() * 1e4).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_looks_like_a_trace_is_logged() {
        let given = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(TRACE, text.parse().unwrap());
            trace(&headers)
        };
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(given(parent).as_deref(), Some(parent));
        let wrong = ["", "my secret", &"a".repeat(65)];
        assert!(wrong.iter().all(|text| given(text).is_none()));
        assert_eq!(trace(&HeaderMap::new()), None);
    }

    #[test]
    fn a_path_has_no_query_and_an_end() {
        let uri: Uri = format!("http://x/v1/{}?key=secret", "a".repeat(500))
            .parse()
            .unwrap();
        let path = path(&uri);
        assert_eq!(path.len(), LONGEST_PATH);
        assert!(path.starts_with("/v1/aaa"));
        assert_eq!(super::path(&"/v1/x?key=secret".parse().unwrap()), "/v1/x");
    }

    #[test]
    fn milliseconds_have_one_digit_after_the_point() {
        assert_eq!(millis(Duration::from_micros(1_250)), 1.3);
        assert_eq!(millis(Duration::ZERO), 0.0);
    }
}
