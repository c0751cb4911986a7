//! What pages are told, as server-sent events whose data are JSON.
//!
//! | event | |
//! |---|---|
//! | `begin` | all that is known: the status, the last ten minutes, the last requests, what happened to nodes. First, and again to a page that was too slow for what follows |
//! | `tick` | a second: its figures, the status, the requests that ended, what happened to nodes |
//! | `status` | at once, when a node has changed |
//! | `end` | pegaflow stops; nothing follows |
//!
//! A tick is made into text once, however many pages there are. What is kept is bounded, and nothing waits for a page.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast};

use super::happening::{Changes, Happening};
use super::tick::Tick;
use crate::control::Status;
use crate::fleet::FleetSnapshot;
use crate::live::{Request, unix_ms};

const TICKS: usize = 600;
const REQUESTS: usize = 200;
const HAPPENINGS: usize = 200;
/// Of one second, as many requests are shown one by one.
const REQUESTS_AT_ONCE: usize = 50;
/// Events that a page may be behind.
const BEHIND: usize = 16;

pub(super) struct Feed {
    known: Mutex<Known>,
    pages: Arc<Semaphore>,
}

struct Known {
    status: Status,
    ticks: VecDeque<Tick>,
    requests: VecDeque<Request>,
    happenings: VecDeque<Happening>,
    /// That no tick has told yet.
    fresh: Vec<Happening>,
    changes: Changes,
    /// `None` after the end.
    pages: Option<broadcast::Sender<Bytes>>,
}

#[derive(Serialize)]
struct Begin<'a> {
    now: u64,
    status: &'a Status,
    ticks: &'a VecDeque<Tick>,
    requests: &'a VecDeque<Request>,
    happenings: &'a VecDeque<Happening>,
}

#[derive(Serialize)]
struct TickEvent<'a> {
    tick: &'a Tick,
    status: &'a Status,
    requests: &'a [Request],
    happenings: &'a [Happening],
}

impl Feed {
    pub(super) fn new(status: Status) -> Self {
        Self {
            known: Mutex::new(Known {
                status,
                ticks: VecDeque::with_capacity(TICKS),
                requests: VecDeque::with_capacity(REQUESTS),
                happenings: VecDeque::new(),
                fresh: Vec::new(),
                changes: Changes::default(),
                pages: Some(broadcast::Sender::new(BEHIND)),
            }),
            pages: Arc::new(Semaphore::new(super::MOST_PAGES)),
        }
    }

    /// Some node has changed.
    pub(super) fn nodes(&self, fleet: &FleetSnapshot, status: Status) {
        let mut known = self.lock();
        let found = known.changes.look(fleet);
        for happening in &found {
            keep(&mut known.happenings, happening.clone(), HAPPENINGS);
        }
        known.fresh.extend(found);
        // A tick comes each second; before it these cannot be many.
        let surplus = known.fresh.len().saturating_sub(HAPPENINGS);
        known.fresh.drain(..surplus);
        known.status = status;
        known.send("status", &known.status);
    }

    /// A second is over.
    pub(super) fn tick(&self, tick: Tick, requests: Vec<Request>, status: Status) {
        let mut known = self.lock();
        known.status = status;
        let happenings = std::mem::take(&mut known.fresh);
        let surplus = requests.len().saturating_sub(REQUESTS_AT_ONCE);
        let event = TickEvent {
            tick: &tick,
            status: &known.status,
            requests: requests.get(surplus..).unwrap_or_default(),
            happenings: &happenings,
        };
        known.send("tick", &event);
        keep(&mut known.ticks, tick, TICKS);
        for request in requests {
            keep(&mut known.requests, request, REQUESTS);
        }
    }

    pub(super) fn end(&self) {
        let mut known = self.lock();
        known.send("end", &json!({}));
        known.pages = None;
    }

    /// `None`: it is over.
    fn join(&self) -> Option<(Bytes, broadcast::Receiver<Bytes>)> {
        let known = self.lock();
        let events = known.pages.as_ref()?.subscribe();
        Some((known.begin(), events))
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // What a panic leaves behind is a second's figures too few.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn begin(&self) -> Bytes {
        let begin = Begin {
            now: unix_ms(SystemTime::now()),
            status: &self.status,
            ticks: &self.ticks,
            requests: &self.requests,
            happenings: &self.happenings,
        };
        event("begin", &begin)
    }

    fn send(&self, name: &str, data: &impl Serialize) {
        if let Some(pages) = self.pages.as_ref().filter(|it| it.receiver_count() > 0) {
            // They may have gone meanwhile.
            let _ = pages.send(event(name, data));
        }
    }
}

fn keep<T>(all: &mut VecDeque<T>, one: T, most: usize) {
    if all.len() >= most {
        all.pop_front();
    }
    all.push_back(one);
}

/// JSON has no line ends of its own.
fn event(name: &str, data: &impl Serialize) -> Bytes {
    match serde_json::to_string(data) {
        Ok(data) => format!("event: {name}\ndata: {data}\n\n").into(),
        Err(error) => {
            tracing::error!(%error, "an event of the dashboard cannot be written");
            Bytes::from_static(b": \n\n")
        }
    }
}

/// `GET /dashboard/api/events`
pub(super) async fn events(State(feed): State<Arc<Feed>>) -> Response {
    let refuse = |error: &str| {
        let body = Json(json!({ "error": error }));
        (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
    };
    let Ok(permit) = feed.pages.clone().try_acquire_owned() else {
        return refuse("too many dashboards are open; close one");
    };
    let Some((begin, events)) = feed.join() else {
        return refuse("pegaflow is stopping");
    };
    let page = Page {
        feed,
        begin: Some(begin),
        events,
        _permit: permit,
    };
    let body = stream::unfold(page, async |mut page| {
        let event = page.next().await?;
        Some((Ok::<_, Infallible>(event), page))
    });
    let mut response = Response::new(Body::from_stream(body));
    let kind = HeaderValue::from_static("text/event-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    let no_store = HeaderValue::from_static("no-store");
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, no_store);
    response
}

struct Page {
    feed: Arc<Feed>,
    begin: Option<Bytes>,
    events: broadcast::Receiver<Bytes>,
    _permit: OwnedSemaphorePermit,
}

impl Page {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(begin) = self.begin.take() {
            return Some(begin);
        }
        match self.events.recv().await {
            Ok(event) => Some(event),
            Err(RecvError::Closed) => None,
            Err(RecvError::Lagged(_)) => {
                let (begin, events) = self.feed.join()?;
                self.events = events;
                Some(begin)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded() {
        let mut all = VecDeque::new();
        for number in 0..10 {
            keep(&mut all, number, 3);
        }
        assert_eq!(all, [7, 8, 9]);
    }

    #[test]
    fn an_event_is_one_line_of_data() {
        let text = event("tick", &json!({"reason": "line\nend"}));
        assert_eq!(
            &text[..],
            b"event: tick\ndata: {\"reason\":\"line\\nend\"}\n\n"
        );
    }
}
