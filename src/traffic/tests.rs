use std::net::SocketAddr;

use super::*;
use crate::fleet::Role;

fn nodes(names: &[&str]) -> Vec<NodeView> {
    let addr = SocketAddr::from(([127, 0, 0, 1], 1));
    names
        .iter()
        .map(|name| NodeView::pending((*name).into(), Role::Unified, addr))
        .collect()
}

fn choose(traffic: &Traffic, nodes: &[NodeView]) -> (NodeId, Passage) {
    ask(traffic, nodes, &one())
}

fn one() -> Ask {
    Ask {
        tokens: 1,
        ..Ask::default()
    }
}

fn ask(traffic: &Traffic, nodes: &[NodeView], ask: &Ask) -> (NodeId, Passage) {
    let (node, passage) = traffic.choose(nodes.iter(), ask).unwrap();
    (node.id.clone(), passage)
}

#[test]
fn the_least_loaded_wins_and_ties_go_round() {
    let (traffic, nodes) = (Traffic::default(), nodes(&["a", "b"]));
    let (first, held) = choose(&traffic, &nodes);
    let (second, other) = choose(&traffic, &nodes);
    assert_ne!(first, second);
    drop(held);
    assert_eq!(choose(&traffic, &nodes).0, first);
    drop(other);
    assert!(traffic.in_flight().is_empty());
    assert_ne!(
        choose(&traffic, &nodes).0,
        choose(&traffic, &nodes).0,
        "idle nodes take turns"
    );
}

#[test]
fn the_turn_of_one_role_is_not_moved_by_another() {
    let (traffic, nodes) = (Traffic::default(), nodes(&["a", "b", "p"]));
    let picked: Vec<_> = (0..4)
        .map(|_| {
            choose(&traffic, &nodes[2..]);
            choose(&traffic, &nodes[..2]).0
        })
        .collect();
    assert_eq!(picked[..2], picked[2..]);
    assert_ne!(picked[0], picked[1]);
}

#[tokio::test]
async fn a_closed_node_gets_nothing_and_is_drained_when_its_last_request_ends() {
    let (traffic, nodes) = (Traffic::default(), nodes(&["a", "b"]));
    let a = nodes[0].id.clone();
    let (_, first) = choose(&traffic, &nodes[..1]);
    let (_, second) = choose(&traffic, &nodes[..1]);
    traffic.close(&a);
    for _ in 0..3 {
        assert_eq!(choose(&traffic, &nodes).0, nodes[1].id);
    }
    assert!(traffic.choose(nodes[..1].iter(), &one()).is_none());
    let waiting = tokio::spawn({
        let (traffic, a) = (traffic.clone(), a.clone());
        async move { traffic.drained(&a).await }
    });
    tokio::task::yield_now().await;
    drop(first);
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished(), "one request is left");
    drop(second);
    waiting.await.unwrap();
    traffic.open(&a);
    assert_eq!(choose(&traffic, &nodes[..1]).0, a);
}

#[tokio::test]
async fn a_suspicion_is_seen_once_by_the_node_s_own_watcher() {
    let (traffic, nodes) = (Traffic::default(), nodes(&["a", "b"]));
    let [a, b] = [&nodes[0].id, &nodes[1].id];
    traffic.suspect(a);
    let soon = std::time::Duration::from_secs(60);
    tokio::time::timeout(soon, traffic.suspected(a))
        .await
        .unwrap();
    for id in [a, b] {
        let again = futures_util::FutureExt::now_or_never(traffic.suspected(id));
        assert!(again.is_none());
    }
}

#[test]
fn a_request_between_two_glances_is_seen() {
    let (traffic, nodes) = (Traffic::default(), nodes(&["a"]));
    let a = nodes[0].id.clone();
    let idle = traffic.glance(&a);
    assert!(!idle.busy_until(traffic.glance(&a)));
    let (_, held) = choose(&traffic, &nodes);
    let during = traffic.glance(&a);
    drop(held);
    let after = traffic.glance(&a);
    assert!(idle.busy_until(during) && during.busy_until(after) && idle.busy_until(after));
    assert!(!after.busy_until(traffic.glance(&a)));
}

#[test]
fn no_candidates_no_choice() {
    assert!(
        Traffic::default()
            .choose(nodes(&[]).iter(), &one())
            .is_none()
    );
}

#[test]
fn tokens_count_and_not_requests() {
    let (traffic, nodes) = (Traffic::default(), nodes(&["a", "b"]));
    let large = Ask {
        tokens: 1_000,
        ..Ask::default()
    };
    let (first, large) = ask(&traffic, &nodes, &large);
    let held: Vec<_> = (0..10).map(|_| choose(&traffic, &nodes)).collect();
    assert!(held.iter().all(|(node, _)| *node != first));
    drop((large, held));
    let loads = traffic.loads().into_values();
    assert!(
        loads
            .into_iter()
            .all(|load| load.tokens == 0 && load.requests == 0)
    );
}

#[test]
fn a_warm_node_is_preferred_in_the_incarnation_that_is_warm() {
    let (traffic, mut nodes) = (Traffic::default(), nodes(&["a", "b"]));
    let warm = Ask {
        tokens: 10,
        session: None,
        warm: Some(Warm {
            node: "b".into(),
            incarnation: 0,
            tokens: 5,
        }),
    };
    for _ in 0..4 {
        assert_eq!(ask(&traffic, &nodes, &warm).0.as_str(), "b");
    }
    nodes[1].incarnation = 1;
    assert_eq!(ask(&traffic, &nodes, &warm).0.as_str(), "a", "its turn");
}

proptest::proptest! {
    /// Whatever is asked, however busy the nodes are: a closed node is not chosen, and every count goes back.
    #[test]
    fn a_closed_node_is_never_chosen(
        closed in proptest::collection::vec(proptest::bool::ANY, 5),
        asks in proptest::collection::vec((0u64..1 << 20, proptest::option::of(0u64..8), 0usize..6), 1..40),
    ) {
        let names = ["a", "b", "c", "d", "e"];
        let (traffic, nodes) = (Traffic::default(), nodes(&names));
        for (node, closed) in nodes.iter().zip(&closed) {
            if *closed {
                traffic.close(&node.id);
            }
        }
        let mut held = Vec::new();
        for (tokens, session, warm) in asks {
            let warm = names.get(warm).map(|name| Warm {
                node: (*name).into(),
                incarnation: 0,
                tokens: 1 << 30,
            });
            let ask = Ask { tokens, session, warm };
            match traffic.choose(nodes.iter(), &ask) {
                Some((node, passage)) => {
                    let index = names.iter().position(|name| *name == node.id.as_str()).unwrap();
                    assert!(!closed[index]);
                    held.push(passage);
                }
                None => assert!(closed.iter().all(|closed| *closed)),
            }
        }
        drop(held);
        assert!(traffic.loads().into_values().all(|load| load.tokens == 0 && load.requests == 0));
    }

    /// While load allows it, a session meets the same node again.
    #[test]
    fn a_session_meets_its_node_again(session in 0u64.., others in 0usize..20) {
        let (traffic, nodes) = (Traffic::default(), nodes(&["a", "b", "c"]));
        let asked = Ask { tokens: 100, session: Some(session), warm: None };
        let first = ask(&traffic, &nodes, &asked).0;
        let held: Vec<_> = (0..others).map(|_| choose(&traffic, &nodes)).collect();
        assert_eq!(ask(&traffic, &nodes, &asked).0, first);
        drop(held);
    }
}
