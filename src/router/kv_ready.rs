//! `POST /kv_ready`: a prefill node that others started says how a hand-off ended, where no engine of ours can.
//!
//! ```text
//! {"handoff": ID}                         every chunk of the prompt is where decode finds it
//! {"handoff": ID, "failed": "no_space"}   it will not be; decode computes the prompt
//! ```
//!
//! The id is the one in the prefill leg's `kv_transfer_params.pegaflow.handoff`, which nobody can guess. Only who knows
//! the admin key is listened to; where there is none, there is no such path. A hand-off that nobody waits for any more
//! is no error: its client may be gone.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;

use super::Context;
use super::error::RouterError;
use crate::handoff::{HandoffFailure, HandoffId, HandoffOutcome};

pub(super) const PATH: &str = "/kv_ready";
/// Bytes of such a message.
const MAX_BODY: usize = 4096;
/// For its body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Deserialize)]
struct Announcement {
    handoff: String,
    #[serde(default)]
    failed: Option<String>,
    /// How many the prompt has.
    #[serde(default)]
    chunks: u32,
}

impl Announcement {
    fn outcome(&self) -> HandoffOutcome {
        match &self.failed {
            None => HandoffOutcome::Ready {
                chunks: self.chunks,
                already_stored: false,
            },
            Some(why) => HandoffOutcome::Failed(failure(why)),
        }
    }
}

pub(super) async fn announce(State(cx): State<Arc<Context>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let taken = async {
        admitted(&cx, &parts.headers)?;
        let said = read(body).await?;
        let id = HandoffId::from(said.handoff.as_str());
        cx.board.settle(&id, said.outcome());
        Ok::<_, RouterError>(())
    };
    match taken.await {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => error.response_for(&parts.headers),
    }
}

fn admitted(cx: &Context, headers: &HeaderMap) -> Result<(), RouterError> {
    match &cx.admin {
        None => Err(RouterError::NotFound {
            path: PATH.to_owned(),
        }),
        Some(keys) if keys.admit(headers) => Ok(()),
        Some(_) => Err(RouterError::NotAdmin),
    }
}

async fn read(body: Body) -> Result<Announcement, RouterError> {
    let reading = to_bytes(body, MAX_BODY);
    let body = match tokio::time::timeout(BODY_TIMEOUT, reading).await {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => return Err(RouterError::Body(Box::new(error))),
        Err(_) => return Err(RouterError::BodyTimeout(BODY_TIMEOUT)),
    };
    serde_json::from_slice(&body).map_err(|error| RouterError::Body(Box::new(error)))
}

/// What the node calls it, as the metrics do; anything else is a save that failed.
fn failure(why: &str) -> HandoffFailure {
    HandoffFailure::from_label(why).unwrap_or(HandoffFailure::SaveFailed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(text: &str) -> HandoffOutcome {
        serde_json::from_str::<Announcement>(text)
            .unwrap()
            .outcome()
    }

    #[test]
    fn an_announcement_is_an_outcome() {
        let ready = |chunks| HandoffOutcome::Ready {
            chunks,
            already_stored: false,
        };
        assert_eq!(outcome(r#"{"handoff": "a"}"#), ready(0));
        assert_eq!(
            outcome(r#"{"handoff": "a", "failed": null, "chunks": 7, "more": []}"#),
            ready(7)
        );
        for (why, failure) in [
            ("no_space", HandoffFailure::NoSpace),
            ("producer_died", HandoffFailure::ProducerDied),
            ("whatever", HandoffFailure::SaveFailed),
        ] {
            let text = format!(r#"{{"handoff": "a", "failed": "{why}"}}"#);
            assert_eq!(outcome(&text), HandoffOutcome::Failed(failure));
        }
    }
}
