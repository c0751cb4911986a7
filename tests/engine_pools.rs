//! Groups of nodes whose KV has another size each have their own part of the store.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_engine;

use pegaflow::engine::protocol::{Hello, KeyState, RefusalCode, SessionKind, SlotRef};
use pegaflow::fleet::NodeId;
use pegaflow::handoff::{HandoffFailure, HandoffOutcome};
use pegaflow::plan::PoolPlan;
use support_engine::{
    Fixture, ROW, commit, hello, key, metrics, open, outcome, query, ready, refs, seal,
};

/// Eight chunks of one row each.
const CAPACITY: u64 = 4096 + 8 * ROW.next_multiple_of(64);

fn two_pools() -> Fixture {
    let pool = |name: &str, nodes: &[&str]| PoolPlan {
        name: name.to_owned(),
        nodes: nodes.iter().map(|node| NodeId::from(*node)).collect(),
        capacity: CAPACITY,
    };
    Fixture::with(|config| config.pools = vec![pool("a", &["p", "d"]), pool("b", &["q"])])
}

/// Of the node `q`, with another dtype and rows of half the size.
fn other(kind: SessionKind) -> Hello {
    let mut hello = hello("q", kind);
    hello.namespace.insert("dtype".into(), "fp8".into());
    hello.row_bytes /= 2;
    hello
}

#[tokio::test]
async fn each_pool_has_its_namespace_its_arena_and_its_chunks() {
    let fixture = two_pools();
    let mut p_worker = fixture.join("p", SessionKind::Worker);
    let mut p = fixture.join("p", SessionKind::Scheduler);
    let mut d = fixture.join("d", SessionKind::Scheduler);
    let mut q_worker = fixture.connect(other(SessionKind::Worker)).unwrap();
    let mut q = fixture.connect(other(SessionKind::Scheduler)).unwrap();
    assert_eq!(p_worker.welcome().slots, 8);
    assert_eq!(q_worker.welcome().slots, 16);

    let key = key(1);
    let keys: [&[u8]; 1] = [&key];
    let mut ticket = fixture.expect("h");
    p.send(&open("h", 1)).unwrap();
    let granted = p.store(query(&keys, Some("h"))).unwrap();
    let saved = refs(&granted);
    p.send(&seal("h")).unwrap();
    // The same slot of the other pool is another chunk: its worker can complete nothing here.
    q_worker.send(&commit(&saved)).unwrap();
    fixture.until("the stranger's commit was ignored", |fixture| {
        fixture.engine.stats().counters.stale_refs == 1
    });
    assert_eq!(
        q.lookup(query(&keys, None)).unwrap().states[0],
        KeyState::Miss as u8
    );
    p_worker.send(&commit(&saved)).unwrap();
    assert_eq!(outcome(&mut ticket).await, ready(1, false));
    assert_eq!(
        d.lookup(query(&keys, Some("h"))).unwrap().states[0],
        KeyState::Hit as u8
    );
    assert_eq!(
        q.lookup(query(&keys, Some("h"))).unwrap().states[0],
        KeyState::Miss as u8
    );

    // One pool fills up; the other loses nothing.
    let many: Vec<_> = (10..26).map(support_engine::key).collect();
    let many: Vec<&[u8]> = many.iter().map(Vec::as_slice).collect();
    let granted = q.store(query(&many, None)).unwrap();
    assert!(granted.ok);
    assert_eq!(SlotRef::decode_all(&granted.refs).unwrap().len(), 16);
    let stats = fixture.engine.stats();
    assert_eq!((stats.slots, stats.used, stats.sessions.len()), (24, 17, 5));
    assert_eq!((stats.pools["a"].used, stats.pools["b"].used), (1, 16));
    assert_eq!(stats.pools["a"].capacity_bytes, CAPACITY);
    let namespaces = fixture.engine.namespaces();
    let shown: Vec<_> = namespaces
        .iter()
        .map(|n| (n.pool.as_str(), n.fields["dtype"].as_str()))
        .collect();
    assert_eq!(shown, [("a", "bfloat16"), ("b", "fp8")]);
    let text = metrics(&fixture);
    assert!(
        text.contains("pegaflow_engine_pool_slots_used{pool=\"b\"} 16"),
        "{text}"
    );
    assert!(text.contains("pegaflow_engine_slots 24"), "{text}");
}

#[tokio::test]
async fn a_node_that_differs_from_its_own_pool_is_refused_and_its_death_touches_no_other() {
    let fixture = two_pools();
    let _p_worker = fixture.join("p", SessionKind::Worker);
    let mut wrong = hello("d", SessionKind::Scheduler);
    wrong.namespace.insert("dtype".into(), "fp8".into());
    let refused = fixture.connect(wrong).unwrap_err();
    let pegaflow::engine::client::ClientError::Refused(refused) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(refused.code, RefusalCode::Namespace);
    // Nodes that the plan does not name belong to the first pool.
    fixture.join("stranger", SessionKind::Scheduler);

    let mut p = fixture.join("p", SessionKind::Scheduler);
    let q_worker = fixture.connect(other(SessionKind::Worker)).unwrap();
    let mut q = fixture.connect(other(SessionKind::Scheduler)).unwrap();
    let (mut of_p, mut of_q) = (fixture.expect("of-p"), fixture.expect("of-q"));
    p.send(&open("of-p", 1)).unwrap();
    q.send(&open("of-q", 1)).unwrap();
    drop(q_worker);
    let died = HandoffOutcome::Failed(HandoffFailure::ProducerDied);
    assert_eq!(outcome(&mut of_q).await, died);
    fixture.engine.incarnation_gone(&"q".into(), 1);
    p.send(&seal("of-p")).unwrap();
    assert_eq!(outcome(&mut of_p).await, ready(0, true));
    assert!(
        fixture.connect(other(SessionKind::Worker)).is_err(),
        "incarnation 1 was reaped"
    );
}
