//! A prefill and a decode node of a few lines, to be examined over real sockets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::fleet::{FleetPublisher, NodeView};
use crate::handoff::{HandoffFailure, HandoffOutcome};

use super::super::*;

const BLOCK: u32 = 32;
const LIMIT: Duration = Duration::from_secs(20);
/// Some examinations wait for seconds, and are repeated.
const HANG: Duration = Duration::from_secs(90);
const QUICK: Pace = Pace {
    first: Duration::from_millis(1),
    max: Duration::from_millis(5),
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Logprob,
    /// Far off, as wrong KV is.
    Far,
    /// Only the first loaded answer is wrong.
    OneLogprob,
    NothingLoaded,
    NothingLoadedOnce,
    /// The prefill node's connector says nothing.
    NeverOpened,
    Handoff(HandoffFailure),
    /// The first prefill request is answered with 503.
    OneBreak,
}

struct Node {
    fault: Fault,
    board: HandoffBoard,
    hits: AtomicU32,
    calls: AtomicU32,
}

async fn complete(
    State(node): State<Arc<Node>>,
    Json(body): Json<Value>,
) -> Result<Json<Value>, StatusCode> {
    let leg = body.pointer("/kv_transfer_params/pegaflow/leg");
    let leg = leg.and_then(Value::as_str).unwrap_or("");
    let prompt: Vec<u64> = serde_json::from_value(body["prompt"].clone()).unwrap();
    assert_eq!(prompt.len(), 3 * 32 + 7);
    assert!(body["cache_salt"].is_string());
    let call = node.calls.fetch_add(1, Ordering::Relaxed);
    if leg == "prefill" {
        assert_eq!(body["max_tokens"], 1);
        if node.fault == Fault::OneBreak && call == 0 {
            return Err(StatusCode::SERVICE_UNAVAILABLE);
        }
        let id = body.pointer("/kv_transfer_params/pegaflow/handoff");
        let outcome = match node.fault {
            Fault::NeverOpened => return Ok(Json(json!({}))),
            Fault::Handoff(failure) => HandoffOutcome::Failed(failure),
            _ => HandoffOutcome::Ready {
                chunks: 3,
                already_stored: false,
            },
        };
        node.board
            .settle(&id.unwrap().as_str().unwrap().into(), outcome);
    }
    let lost =
        node.fault == Fault::NothingLoaded || (node.fault == Fault::NothingLoadedOnce && call == 0);
    if leg == "decode" && !lost {
        node.hits.fetch_add(3 * BLOCK, Ordering::Relaxed);
    }
    let differs = node.fault == Fault::Logprob || (node.fault == Fault::OneLogprob && call == 0);
    let off = match node.fault {
        _ if leg != "decode" => 0.0,
        Fault::Far => 0.2,
        _ if differs => 1e-6,
        _ => 0.0,
    };
    let logprob = |id: &u64| -(*id as f64) / 1000.0 - off;
    let ids = prompt.iter().take(16);
    let tokens: Vec<_> = ids.clone().map(|id| format!("t{id}")).collect();
    let logprobs: Vec<_> = ids.map(logprob).collect();
    Ok(Json(json!({"choices": [{
        "logprobs": {"tokens": tokens, "token_logprobs": logprobs}
    }]})))
}

async fn metrics(State(node): State<Arc<Node>>) -> String {
    let hits = node.hits.load(Ordering::Relaxed);
    format!("vllm:external_prefix_cache_hits_total{{engine=\"0\"}} {hits}.0\n")
}

struct Pair {
    fleet: FleetPublisher,
    /// Servers, the canary, and a stand-in for the actors.
    tasks: JoinSet<()>,
}

impl Pair {
    /// `fault` is the decode node's, or the prefill node's where it is about the hand-off.
    async fn examine(fault: Fault, prefill_trust: KvTrust) -> Self {
        Self::examine_beside(Traffic::default(), fault, prefill_trust).await
    }

    async fn examine_beside(traffic: Traffic, fault: Fault, prefill_trust: KvTrust) -> Self {
        let board = HandoffBoard::default();
        let mut tasks = JoinSet::new();
        let mut views = Vec::new();
        for (name, role) in [("p", Role::Prefill), ("d", Role::Decode)] {
            let node = Arc::new(Node {
                fault,
                board: board.clone(),
                hits: AtomicU32::new(0),
                calls: AtomicU32::new(0),
            });
            let app = Router::new()
                .route("/v1/completions", post(complete))
                .route("/metrics", get(metrics))
                .with_state(node);
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut view = NodeView::pending(name.into(), role, listener.local_addr().unwrap());
            view.incarnation = 1;
            view.phase = Phase::Verifying;
            views.push(view);
            tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
        }
        let fleet = FleetPublisher::new(views);
        fleet.update(&"p".into(), |node| {
            if prefill_trust == KvTrust::Proven {
                node.phase = Phase::Ready;
            }
            node.trust = prefill_trust;
        });
        let mut verdicts = BTreeMap::new();
        for id in ["p", "d"] {
            let (sender, mut receiver) = mpsc::channel::<Verdict>(8);
            verdicts.insert(id.into(), sender);
            let fleet = fleet.clone();
            tasks.spawn(async move {
                while let Some(verdict) = receiver.recv().await {
                    fleet.update(&id.into(), |node| match verdict.finding {
                        Finding::Proven => {
                            (node.phase, node.trust) = (Phase::Ready, KvTrust::Proven);
                        }
                        Finding::Vouched => {
                            (node.phase, node.trust) = (Phase::Ready, KvTrust::Assumed);
                        }
                        Finding::Unpaired => node.phase = Phase::Ready,
                        Finding::Refused(why) => {
                            (node.phase, node.trust) = (Phase::Failed, KvTrust::Refused(why));
                        }
                    });
                }
            });
        }
        let canary = Canary {
            plan: CanaryPlan {
                connector: crate::topology::Connector::Pegaflow,
                block_size: BLOCK,
                tolerance: 0.0,
                deadline: LIMIT,
                partner_grace: LIMIT,
            },
            client: NodeClient::new(None).unwrap(),
            board,
            traffic,
            watch: fleet.watch(),
            verdicts,
            pace: QUICK,
            passed: BTreeSet::new(),
            store_off: false,
        };
        tasks.spawn(canary.run());
        Self { fleet, tasks }
    }

    /// Waits for both to leave `Verifying`; returns their trust, prefill first.
    async fn trusts(mut self) -> (KvTrust, KvTrust) {
        let mut watch = self.fleet.watch();
        let settled =
            watch.wait_for(|fleet| fleet.nodes().all(|node| node.phase != Phase::Verifying));
        drop(
            tokio::time::timeout(HANG, settled)
                .await
                .expect("no verdict"),
        );
        let snapshot = self.fleet.snapshot();
        let trust = |id: &str| snapshot.node(&id.into()).unwrap().trust.clone();
        self.tasks.shutdown().await;
        (trust("p"), trust("d"))
    }
}

#[tokio::test]
async fn a_pair_that_agrees_is_proven() {
    let pair = Pair::examine(Fault::None, KvTrust::Unproven).await;
    assert_eq!(pair.trusts().await, (KvTrust::Proven, KvTrust::Proven));
}

#[tokio::test]
async fn a_wrong_logprob_refuses_both() {
    let pair = Pair::examine(Fault::Logprob, KvTrust::Unproven).await;
    let trusts = pair.trusts().await;
    let (KvTrust::Refused(why), KvTrust::Refused(_)) = trusts else {
        panic!("{trusts:?}");
    };
    assert!(why.contains("give different answers"), "{why}");
}

/// Other requests in the batch change how sums are rounded; wrong KV is another matter.
#[tokio::test]
async fn busy_nodes_may_round_differently_and_are_not_trusted_with_wrong_kv() {
    for busy in ["p", "d"] {
        let traffic = Traffic::default();
        let addr = SocketAddr::from(([127, 0, 0, 1], 1));
        let node = NodeView::pending(busy.into(), Role::Unified, addr);
        let (_, _passage) = traffic
            .choose([&node].into_iter(), &crate::traffic::Ask::default())
            .unwrap();
        let beside = |fault| Pair::examine_beside(traffic.clone(), fault, KvTrust::Unproven);
        let trusts = beside(Fault::Logprob).await.trusts().await;
        assert_eq!(trusts, (KvTrust::Proven, KvTrust::Proven), "{busy}");
        let trusts = beside(Fault::Far).await.trusts().await;
        assert!(
            matches!(trusts, (KvTrust::Refused(_), KvTrust::Refused(_))),
            "{busy}"
        );
    }
}

#[tokio::test]
async fn one_bad_examination_is_repeated() {
    for fault in [Fault::OneLogprob, Fault::NothingLoadedOnce] {
        let pair = Pair::examine(fault, KvTrust::Proven).await;
        assert_eq!(pair.trusts().await, (KvTrust::Proven, KvTrust::Proven));
    }
}

#[tokio::test]
async fn a_full_store_does_not_refuse_a_node_whose_partner_is_proven() {
    for failure in [
        HandoffFailure::NoSpace,
        HandoffFailure::Aborted,
        HandoffFailure::Deadline,
    ] {
        let pair = Pair::examine(Fault::Handoff(failure), KvTrust::Proven).await;
        assert_eq!(pair.trusts().await, (KvTrust::Proven, KvTrust::Unproven));
    }
}

#[tokio::test]
async fn a_prefill_node_that_never_opens_is_found_out_long_before_the_deadline() {
    let started = Instant::now();
    let pair = Pair::examine(Fault::NeverOpened, KvTrust::Unproven).await;
    let trusts = pair.trusts().await;
    assert!(matches!(trusts, (KvTrust::Refused(_), KvTrust::Refused(_))));
    assert!(started.elapsed() < LIMIT);
}

#[tokio::test]
async fn only_the_unproven_one_is_blamed() {
    let pair = Pair::examine(Fault::Logprob, KvTrust::Proven).await;
    let trusts = pair.trusts().await;
    assert!(matches!(trusts, (KvTrust::Proven, KvTrust::Refused(_))));
}

#[tokio::test]
async fn a_decode_node_that_loads_nothing_is_refused() {
    let pair = Pair::examine(Fault::NothingLoaded, KvTrust::Proven).await;
    let trusts = pair.trusts().await;
    assert!(matches!(trusts, (KvTrust::Proven, KvTrust::Refused(_))));
}

#[tokio::test]
async fn a_hand_off_that_keeps_failing_refuses_and_a_store_that_is_off_does_not() {
    let fault = Fault::Handoff(HandoffFailure::NoSpace);
    let trusts = Pair::examine(fault, KvTrust::Unproven).await.trusts().await;
    assert!(matches!(trusts, (KvTrust::Refused(_), KvTrust::Refused(_))));
    let fault = Fault::Handoff(HandoffFailure::EngineDown);
    let trusts = Pair::examine(fault, KvTrust::Unproven).await.trusts().await;
    assert_eq!(trusts, (KvTrust::Unproven, KvTrust::Unproven));
}

#[tokio::test]
async fn a_lost_connection_is_tried_again() {
    let pair = Pair::examine(Fault::OneBreak, KvTrust::Unproven).await;
    assert_eq!(pair.trusts().await, (KvTrust::Proven, KvTrust::Proven));
}
