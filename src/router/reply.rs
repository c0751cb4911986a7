//! A stream's way to the client, over as many nodes as it takes.
//!
//! ```text
//!  events ─▶ transcript ─▶ client
//!    │ breaks, falls silent, says that the engine failed
//!    ├─ may go on elsewhere ──▶ resuming: another node is asked for the rest ─▶ its events, spliced
//!    │                              └ no node takes it ─┐
//!    ├─ the last token was out ─▶ the end, from here    │
//!    └─ may not ────────────────────────────────────────┴▶ error event
//! ```
//!
//! Nothing is read ahead: the next chunk is asked for when the client took the last one. Dropped
//! early, it aborts what runs.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Waker, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use http_body::{Body, Frame};
use tokio::time::{Instant, Sleep, sleep, timeout, timeout_at};

use super::balance::{Breaking, Pick, Purpose, pick};
use super::demand::Demand;
use super::dispatch::{Delivery, Failed, Task, deliver};
use super::error::error_event;
use super::handoff::{Background, Prefilled};
use super::legs::{Caller, Leg, LegError, Reply, Target};
use super::observation::{Observation, Outcome};
use super::pace::Pace;
use super::replay::{Continuation, Next, Refusal, Transcript};
use super::split::WholeReason;
use super::stream::{EventStream, Last};
use super::timeline::Timeline;
use super::{Call, Context, body::Fields};
use crate::fleet::NodeView;
use crate::handoff::HandoffId;

/// What a streamed request holds until its end.
pub(super) struct Held {
    pub(super) permit: super::admission::Permit,
    pub(super) pick: Pick,
    pub(super) prefill: Option<Background>,
    pub(super) observation: Observation,
    pub(super) origin: Origin,
    /// Without one it ends where its node ends.
    pub(super) transcript: Option<Result<Transcript, Refusal>>,
}

/// How the request was served at first.
#[derive(Clone)]
pub(super) struct Origin {
    pub(super) caller: Arc<Caller>,
    /// `None`: split.
    pub(super) whole: Option<WholeReason>,
    /// Where its KV is.
    pub(super) pool: Option<Arc<str>>,
    /// As the nodes call it.
    pub(super) model: Option<Arc<str>>,
}

/// A timer that ends so late was not looked at.
const OVERSLEPT: Duration = Duration::from_secs(1);

type Resuming = Pin<Box<dyn Future<Output = Option<(EventStream, Bytes, Pick)>> + Send>>;

enum Source {
    Node(EventStream, Pick),
    /// With the error for the client, should nobody go on.
    Resuming(Resuming, Bytes),
}

/// The client's end of a stream.
pub(super) struct ReplyBody {
    cx: Arc<Context>,
    first: Option<Bytes>,
    running: Option<Running>,
    last: Last,
    /// May go off too early: it is moved when it goes off, not at every token.
    alarm: Pin<Box<Sleep>>,
    /// When the node has been silent for too long, while we wait for a chunk. It runs since we asked for
    /// one, not since the last one: a slow client is not a silent node.
    patience: Option<Instant>,
    pace: Pace,
}

struct Running {
    source: Source,
    origin: Origin,
    transcript: Option<Result<Transcript, Refusal>>,
    prefill: Option<Background>,
    observation: Observation,
    _permit: super::admission::Permit,
}

impl ReplyBody {
    pub(super) fn new(
        cx: Arc<Context>,
        first: Bytes,
        rest: EventStream,
        last: Last,
        held: Held,
    ) -> Self {
        let mut transcript = held.transcript;
        let first = match &mut transcript {
            Some(Ok(transcript)) => transcript.take(first),
            None | Some(Err(_)) => first,
        };
        Self {
            first: Some(first),
            running: Some(Running {
                source: Source::Node(rest, held.pick),
                origin: held.origin,
                transcript,
                prefill: held.prefill,
                observation: held.observation,
                _permit: held.permit,
            }),
            last,
            alarm: Box::pin(sleep(cx.plan.chunk_timeout)),
            patience: None,
            pace: Pace::new(Instant::now()),
            cx,
        }
    }

    fn end(&mut self, outcome: Outcome) {
        if let Some(running) = self.running.take() {
            if let (Some(prefill), Outcome::Ok) = (running.prefill, outcome) {
                prefill.detach();
            }
            running.observation.finish(outcome);
        }
    }

    fn poll_silence(&mut self, waker: &mut Waker<'_>) -> Poll<()> {
        let timeout = self.cx.plan.chunk_timeout;
        let mut until = *self
            .patience
            .get_or_insert_with(|| Instant::now() + timeout);
        loop {
            ready!(self.alarm.as_mut().poll(waker));
            let now = Instant::now();
            if now >= until + OVERSLEPT {
                // pegaflow itself stood still (SIGSTOP, a frozen container), and what the node said is still unread.
                until = now + timeout;
                self.patience = Some(until);
            } else if now >= until {
                return Poll::Ready(());
            }
            self.alarm.as_mut().reset(until);
        }
    }

    /// The next events for the client; `None` at the end.
    fn poll_next(&mut self, waker: &mut Waker<'_>) -> Poll<Option<Bytes>> {
        loop {
            let Some(running) = &mut self.running else {
                return Poll::Ready(None);
            };
            let stream = match &mut running.source {
                Source::Node(stream, _) => {
                    if let Some(until) = self.pace.pause(Instant::now()) {
                        self.alarm.as_mut().reset(until);
                        ready!(self.alarm.as_mut().poll(waker));
                    }
                    stream
                }
                Source::Resuming(resuming, error) => {
                    let Some((rest, events, pick)) = ready!(resuming.as_mut().poll(waker)) else {
                        self.cx.metrics.replay("failed", "no_node");
                        let error = std::mem::take(error);
                        self.end(Outcome::BrokenOff);
                        return Poll::Ready(Some(error));
                    };
                    self.cx.metrics.replay("ok", "");
                    running.source = Source::Node(rest, pick);
                    if let Some(events) = running.passed_on(events) {
                        return Poll::Ready(Some(events));
                    }
                    continue;
                }
            };
            let error = match stream.poll_events(waker) {
                Poll::Ready(Some(Ok(events))) => {
                    self.patience = None;
                    match running.passed_on(events) {
                        Some(events) => return Poll::Ready(Some(events)),
                        None => continue,
                    }
                }
                Poll::Ready(None) => {
                    self.end(Outcome::Ok);
                    return Poll::Ready(None);
                }
                Poll::Ready(Some(Err(error))) => error,
                Poll::Pending => {
                    ready!(self.poll_silence(waker));
                    LegError::ChunkTimeout(self.cx.plan.chunk_timeout)
                }
            };
            self.patience = None;
            if let Some(events) = self.failed(error) {
                return Poll::Ready(Some(events));
            }
        }
    }

    /// The node is done for. Returns the last events for the client, unless it goes on.
    fn failed(&mut self, error: LegError) -> Option<Bytes> {
        let running = self.running.as_mut()?;
        let Source::Node(_, pick) = &mut running.source else {
            return None;
        };
        pick.failed(&error);
        let id = &running.origin.caller.id;
        tracing::warn!(node = %pick.node(), %id, %error, "a stream broke off");
        let event = error_event(&error, self.last, id);
        let next = running.transcript.as_mut().map(|kept| match kept {
            Ok(transcript) => transcript.next(),
            Err(refusal) => Next::Refused(*refusal),
        });
        match next {
            Some(Next::Asks(continuation)) => {
                let failed = Failed {
                    node: pick.node().clone(),
                    incarnation: pick.incarnation,
                    error,
                    begun: true,
                };
                let origin = running.origin.clone();
                let resuming = resume(self.cx.clone(), origin, continuation, failed);
                // The dead node's stream and count are given back here.
                running.source = Source::Resuming(Box::pin(resuming), event);
                return None;
            }
            Some(Next::Ends(events)) => {
                self.cx.metrics.replay("ok", "ended");
                self.end(Outcome::Ok);
                return Some(events);
            }
            Some(Next::Refused(refusal)) => {
                tracing::debug!(%id, reason = refusal.label(), "it cannot go on elsewhere");
                self.cx.metrics.replay("refused", refusal.label());
            }
            None => {}
        }
        self.end(Outcome::BrokenOff);
        Some(event)
    }
}

impl Running {
    /// What the client gets of these events, if anything.
    fn passed_on(&mut self, events: Bytes) -> Option<Bytes> {
        let events = match &mut self.transcript {
            Some(Ok(transcript)) => transcript.take(events),
            None | Some(Err(_)) => events,
        };
        if events.is_empty() {
            return None;
        }
        self.observation.piece(&events);
        Some(events)
    }
}

/// Asks another node for the rest.
async fn resume(
    cx: Arc<Context>,
    origin: Origin,
    continuation: Continuation,
    failed: Failed,
) -> Option<(EventStream, Bytes, Pick)> {
    let caller = &origin.caller;
    let model_len = match continuation.needs_model_len() {
        true => model_len(&cx, &origin, &failed).await,
        false => None,
    };
    let body = continuation.body(model_len)?;
    let fields = Fields::parse(&body).ok()?;
    // The client's answer has begun long ago.
    let timeline = Timeline::start();
    let demand = Demand::of(&fields, body.len(), None);
    let call = Call {
        model: origin.model.as_deref(),
        target: Target {
            method: &Method::POST,
            path: "/v1/completions",
            last: Last::Done,
        },
        caller,
        fields: &fields,
        original: &body,
        demand: &demand,
        timeline: &timeline,
        asks_ids: true,
    };
    // Nobody saves for it: decode looks for what is there.
    let prefilled = Prefilled {
        ticket: Some(cx.board.register(HandoffId::random())),
        pool: origin.pool.clone(),
        ..Prefilled::default()
    };
    let task = match origin.whole {
        None => Task::Decode(&prefilled),
        Some(reason) => Task::Whole(reason),
    };
    match deliver(&cx, &call, task, Some(failed)).await {
        Ok(Delivery { reply, pick }) => match reply {
            Reply::Streamed(reply) => Some((reply.rest, reply.first, pick)),
            Reply::Complete(reply) => {
                let said = reply.excerpt();
                tracing::warn!(node = %pick.node(), id = %caller.id, status = %reply.status, said, "a node refused to go on with a stream");
                None
            }
        },
        Err(error) => {
            tracing::warn!(id = %caller.id, %error, "nobody goes on with a stream");
            None
        }
    }
}

/// For a node's list of models.
const MODEL_LEN: Duration = Duration::from_secs(5);

/// Tokens of prompt and answer together that the model has room for: what the first node says that
/// answers. The failed one is asked last.
async fn model_len(cx: &Context, origin: &Origin, failed: &Failed) -> Option<u64> {
    let deadline = Instant::now() + cx.plan.queue_timeout;
    let no_fields = Fields::default();
    let nothing = Demand::of(&no_fields, 0, None);
    let mut fleet = cx.fleet.clone();
    loop {
        let snapshot = fleet.latest();
        let serves = |node: &&NodeView| node.is_ready() && node.serves(origin.model.as_deref());
        let mut ready: Vec<_> = snapshot.nodes().filter(serves).collect();
        ready.sort_by_key(|node| node.id == failed.node);
        let mut answered = false;
        for node in ready {
            let errand = (Purpose::Whole, Breaking::Ignored);
            let Some(pick) = pick(cx, &nothing, errand, std::iter::once(node)) else {
                continue;
            };
            let asked = ask_model_len(cx, origin, &pick);
            match timeout(MODEL_LEN, asked).await.ok().flatten() {
                Some(Some(len)) => return Some(len),
                Some(None) => answered = true,
                None => {}
            }
        }
        if answered {
            return None;
        }
        timeout_at(deadline, fleet.changed()).await.ok()?.ok()?;
    }
}

/// `None`: no answer. `Some(None)`: it does not say.
async fn ask_model_len(cx: &Context, origin: &Origin, pick: &Pick) -> Option<Option<u64>> {
    #[derive(serde::Deserialize)]
    struct Models {
        data: Vec<Model>,
    }
    #[derive(serde::Deserialize)]
    struct Model {
        id: String,
        max_model_len: Option<u64>,
    }
    let target = Target {
        method: &Method::GET,
        path: "/v1/models",
        last: Last::Body,
    };
    let leg = Leg {
        caller: &origin.caller,
        target,
        suffix: "-m",
        body: Bytes::new(),
    };
    let Ok(Reply::Complete(reply)) = cx.client.fetch(pick, leg).await else {
        return None;
    };
    let models: Option<Models> = serde_json::from_slice(reply.body()).ok();
    let is_it = |model: &&Model| origin.model.as_deref().is_none_or(|id| id == model.id);
    Some(models.and_then(|models| models.data.iter().find(is_it)?.max_model_len))
}

impl Drop for ReplyBody {
    fn drop(&mut self) {
        // Some clients hang up on [DONE], without waiting for the end of the body.
        let is_done = self.running.as_ref().is_some_and(
            |running| matches!(&running.source, Source::Node(stream, _) if stream.is_done()),
        );
        if is_done && self.first.is_none() {
            self.end(Outcome::Ok);
        }
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        waker: &mut Waker<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        if let Some(first) = this.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        let events = ready!(this.poll_next(waker));
        this.pace.piece(Instant::now());
        Poll::Ready(events.map(|events| Ok(Frame::data(events))))
    }
}
