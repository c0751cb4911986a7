//! The HTTP surface.
//!
//! | path | |
//! |---|---|
//! | `POST /v1/completions`, `POST /v1/chat/completions` | see [`super`] |
//! | `GET /v1/models`, `GET /v1/models/{id}` | answered here, once for the fleet |
//! | `GET /health` | 200 when a request can be served now, else 503 with Retry-After |
//! | `GET /status` | the fleet and what is in flight, as JSON; elsewhere where there is a `metrics_listen` |
//! | `GET /metrics` | Prometheus text; likewise |
//! | `GET /metrics/all` | with the nodes' own; see [`super::node_metrics`] |
//! | `POST /kv_ready` | see [`super::kv_ready`] |
//! | others of vLLM | see [`super::proxy`] |

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use serde_json::json;

use super::access::Access;
use super::admission::{has_ready_node, retry_after};
use super::body::{self, Fields};
use super::demand::{Demand, session};
use super::dispatch::{Delivery, Task, deliver};
use super::error::RouterError;
use super::front::Front;
use super::handoff::{Stage, prefill};
use super::legs::{Caller, CompleteReply, Reply, Target, echo_id, head, request_id};
use super::models::{self, Wanted};
use super::observation::{Observation, Outcome};
use super::replay::{Recipe, Refusal, Transcript};
use super::reply::{Held, Origin, ReplyBody};
use super::split::{Endpoint, WholeReason, never_split};
use super::stream::Last;
use super::worth::{Limits, Pressure, not_worth_splitting};
use super::{Call, Context, cors, figures, keys, kv_ready, proxy};
use crate::fleet::Role;

const SERVER_TIMING: header::HeaderName = header::HeaderName::from_static("server-timing");

type Shared = State<Arc<Context>>;

pub(super) fn routes(cx: Arc<Context>) -> Front {
    let routes = Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route(kv_ready::PATH, post(kv_ready::announce))
        .route("/health", get(health));
    let routes = match cx.plan.metrics_listen {
        None => figures::add(routes, &cx),
        Some(_) => routes,
    };
    let routes = routes
        .fallback(proxy::pass_on)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(cx.clone(), keys::check));
    let routes = match cors::layer(&cx.plan.cors_origins) {
        Some(cors) => routes.layer(cors),
        None => routes,
    };
    // A browser's page is told in every answer what it may do.
    let at_once = cx.plan.cors_origins.is_empty().then(|| cx.clone());
    Front::new(at_once, routes.with_state(cx))
}

/// For who runs the fleet: on a listener of its own, or on the clients' one.
pub(super) fn own(cx: Arc<Context>) -> Front {
    let health = Router::new().route("/health", get(health));
    let nothing = async |uri: Uri, headers: HeaderMap| {
        let path = uri.path().to_owned();
        RouterError::NotFound { path }.response_for(&headers)
    };
    Front::new(
        None,
        figures::add(health, &cx).fallback(nothing).with_state(cx),
    )
}

async fn completions(State(cx): Shared, request: Request) -> Response {
    serve(cx, Endpoint::Completions, request).await
}

async fn chat(State(cx): Shared, request: Request) -> Response {
    serve(cx, Endpoint::Chat, request).await
}

pub(super) async fn serve(cx: Arc<Context>, endpoint: Endpoint, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let id = request_id(&parts.headers);
    let access = Access::begin(cx.plan.access_log, &id, &parts);
    let caller = Caller::new(id, parts.headers, endpoint, cx.keys.is_some());
    let caller = Arc::new(caller);
    let mut observation = Observation::start(&cx.metrics, &cx.live, &caller.id, endpoint, access);
    let (method, path) = (&parts.method, parts.uri.path_and_query());
    let arrival = Arrival {
        endpoint,
        target: Target {
            method,
            path: path.map_or("/", PathAndQuery::as_str),
            last: match endpoint {
                Endpoint::Completions | Endpoint::Chat => Last::Done,
                Endpoint::Other => Last::Body,
            },
        },
        caller: &caller,
        session: session(&caller.headers, cx.plan.session_header.as_deref()),
        body,
    };
    let last = arrival.target.last;
    let answer = answer(&cx, arrival, &mut observation).await;
    let status = answer
        .as_ref()
        .map_or_else(RouterError::status, Answer::status);
    let timing = observation.commit(status);
    let mut response = match answer {
        Ok(answer) => answer.commit(&cx, observation, last),
        Err(error) => {
            observation.finish(Outcome::of(status));
            error.response(&caller.id)
        }
    };
    let headers = response.headers_mut();
    echo_id(&caller.id, headers);
    if let Some(timing) = timing {
        headers.insert(SERVER_TIMING, timing);
    }
    response
}

struct Arrival<'a> {
    endpoint: Endpoint,
    target: Target<'a>,
    caller: &'a Arc<Caller>,
    session: Option<u64>,
    body: Body,
}

/// Everything that is known when the first piece of an answer is there.
enum Answer {
    Rejected(CompleteReply),
    Delivered(Box<Delivered>),
}

struct Delivered {
    delivery: Delivery,
    prefill: Option<super::handoff::Background>,
    permit: super::admission::Permit,
    origin: Origin,
    transcript: Option<Result<Transcript, Refusal>>,
}

async fn answer(
    cx: &Context,
    arrival: Arrival<'_>,
    observation: &mut Observation,
) -> Result<Answer, RouterError> {
    let permit = cx.admission.enter(&cx.fleet).await?;
    observation.timeline.admitted();
    cx.retries.request();
    let original = body::read(arrival.body, &cx.plan).await?;
    observation.timeline.body_read();
    let parsed = Fields::parse(&original);
    // It need not be JSON; then it names no model.
    let is_opaque = arrival.endpoint == Endpoint::Other && parsed.is_err();
    let mut fields = if is_opaque {
        Fields::default()
    } else {
        parsed?
    };
    let wanted = match is_opaque {
        true => Wanted::default(),
        false => models::resolve(&cx.fleet.now(), &cx.plan.aliases, fields.present("model"))?,
    };
    if let Some(model) = &wanted.renamed {
        fields.replace("model", model);
    }
    let demand = Demand::of(&fields, original.len(), arrival.session);
    let whole = never_split(arrival.endpoint, &fields).or_else(|| {
        let model = wanted.model.as_deref();
        match cx.fleet.now().can_split_for(model) {
            true => cx.not_worth_splitting(&demand, model),
            false => Some(WholeReason::NoPair),
        }
    });
    observation.takes_path(whole);
    let transcript = transcript(cx, arrival.endpoint, &fields);
    let call = Call {
        target: arrival.target,
        caller: arrival.caller,
        model: wanted.model.as_deref(),
        fields: &fields,
        original: &original,
        demand: &demand,
        timeline: &observation.timeline,
        asks_ids: matches!(transcript, Some(Ok(_))),
    };
    let (delivery, prefill, pool) = match whole {
        Some(reason) => {
            let delivery = deliver(cx, &call, Task::Whole(reason), None).await?;
            (delivery, None, None)
        }
        None => match prefill(cx, &call).await {
            Stage::Rejected(reply) => {
                call.timeline.first_piece();
                return Ok(Answer::Rejected(reply));
            }
            Stage::Decode(prefilled) => {
                let delivery = deliver(cx, &call, Task::Decode(&prefilled), None).await?;
                (delivery, prefilled.background, prefilled.pool)
            }
        },
    };
    Ok(Answer::Delivered(Box::new(Delivered {
        delivery,
        prefill,
        permit,
        origin: Origin {
            caller: arrival.caller.clone(),
            whole,
            pool,
            model: wanted.model.as_deref().map(Arc::from),
        },
        transcript,
    })))
}

/// Of an answer that may go on elsewhere. `None`: it is no stream, or it is not wanted.
fn transcript(
    cx: &Context,
    endpoint: Endpoint,
    fields: &Fields<'_>,
) -> Option<Result<Transcript, Refusal>> {
    let recipe = Recipe::of(endpoint, fields).filter(|_| cx.plan.replay)?;
    Some(recipe.map(Transcript::new))
}

impl Answer {
    fn status(&self) -> StatusCode {
        match self {
            Self::Rejected(reply) => reply.status,
            Self::Delivered(delivered) => match &delivered.delivery.reply {
                Reply::Complete(reply) => reply.status,
                Reply::Streamed(reply) => reply.status,
            },
        }
    }

    fn commit(self, cx: &Arc<Context>, mut observation: Observation, last: Last) -> Response {
        let Delivered {
            delivery,
            prefill,
            permit,
            origin,
            transcript,
        } = match self {
            Self::Rejected(reply) => return complete(reply, observation),
            Self::Delivered(delivered) => *delivered,
        };
        match delivery.reply {
            Reply::Complete(reply) => {
                if let Some(prefill) = prefill {
                    prefill.detach();
                }
                complete(reply, observation)
            }
            Reply::Streamed(reply) => {
                observation.streams(&reply.first);
                let held = Held {
                    permit,
                    pick: delivery.pick,
                    prefill,
                    observation,
                    origin,
                    transcript,
                };
                let body = ReplyBody::new(cx.clone(), reply.first, reply.rest, last, held);
                head(reply.status, reply.content_type, Body::new(body))
            }
        }
    }
}

fn complete(reply: CompleteReply, observation: Observation) -> Response {
    observation.finish(Outcome::of(reply.status));
    reply.into_response()
}

async fn models(State(cx): Shared) -> Response {
    let known = models::known(&cx.fleet.now(), &cx.plan.aliases);
    let models: Vec<_> = known.iter().map(|(id, root)| cx.model(id, root)).collect();
    Json(json!({"object": "list", "data": models})).into_response()
}

async fn model(State(cx): Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    let known = models::known(&cx.fleet.now(), &cx.plan.aliases);
    if let Some(root) = known.get(&id) {
        return Json(cx.model(&id, root)).into_response();
    }
    let known = known.into_keys().collect();
    RouterError::NoModel { id, known }.response_for(&headers)
}

impl Context {
    fn not_worth_splitting(&self, demand: &Demand<'_>, model: Option<&str>) -> Option<WholeReason> {
        let limits = Limits {
            min_tokens: self.plan.split_min_tokens,
            max_backlog: self.plan.split_max_backlog,
        };
        let pressure = || Pressure::of(&self.fleet.now(), &self.traffic, model);
        not_worth_splitting(demand.prompt, limits, pressure)
    }

    /// `root`: the model that an alias stands for, else the same.
    fn model(&self, id: &str, root: &str) -> serde_json::Value {
        json!({
            "id": id,
            "root": root,
            "object": "model",
            "created": self.started,
            "owned_by": "pegaflow",
        })
    }
}

async fn health(State(cx): Shared) -> Response {
    let fleet = cx.fleet.now();
    let nodes: BTreeMap<_, _> = fleet
        .nodes()
        .map(|node| {
            let view = json!({
                "role": node.role,
                "phase": node.phase.label(),
                "reason": node.reason,
            });
            (node.id.as_str(), view)
        })
        .collect();
    let pairs = fleet.nodes().any(|node| node.role != Role::Unified);
    let draining = cx.draining.is_cancelled();
    let serves = has_ready_node(&fleet) && !draining;
    let degraded = fleet.nodes().any(|node| !node.is_ready()) || (pairs && !fleet.can_split());
    let word = match (draining, serves, degraded) {
        (true, ..) => "draining",
        (_, false, _) => "unavailable",
        (_, _, true) => "degraded",
        _ => "ok",
    };
    let body = Json(json!({
        "status": word,
        "splits": fleet.can_split(),
        "nodes": nodes,
    }));
    if serves {
        return body.into_response();
    }
    let hint = [(header::RETRY_AFTER, HeaderValue::from(retry_after(&fleet)))];
    (StatusCode::SERVICE_UNAVAILABLE, hint, body).into_response()
}

async fn method_not_allowed(method: Method, uri: Uri, headers: HeaderMap) -> Response {
    let error = RouterError::MethodNotAllowed {
        method,
        path: uri.path().to_owned(),
    };
    error.response_for(&headers)
}
