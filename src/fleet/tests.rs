use super::*;

fn fleet() -> FleetPublisher {
    let addr = SocketAddr::from(([127, 0, 0, 1], 1));
    FleetPublisher::new([
        NodeView::pending("p".into(), Role::Prefill, addr),
        NodeView::pending("d".into(), Role::Decode, addr),
    ])
}

#[test]
fn splitting_needs_both_roles_ready_and_proven() {
    let fleet = fleet();
    for id in ["p", "d"] {
        fleet.update(&id.into(), |node| node.phase = Phase::Ready);
    }
    assert!(!fleet.snapshot().can_split());
    fleet.update(&"p".into(), |node| node.trust = KvTrust::Proven);
    assert!(!fleet.snapshot().can_split());
    fleet.update(&"d".into(), |node| node.trust = KvTrust::Proven);
    assert!(fleet.snapshot().can_split());
    fleet.update(&"d".into(), |node| node.phase = Phase::Unreachable);
    assert!(!fleet.snapshot().can_split());
    fleet.update(&"d".into(), |node| node.phase = Phase::Ready);
    assert!(fleet.snapshot().can_split());
    fleet.update(&"d".into(), |node| node.pool = "other".into());
    assert!(
        !fleet.snapshot().can_split(),
        "no KV goes from pool to pool"
    );
}

#[tokio::test]
async fn readers_are_woken_and_unknown_nodes_are_ignored() {
    let fleet = fleet();
    let mut watch = fleet.watch();
    fleet.update(&"nobody".into(), |node| node.phase = Phase::Ready);
    assert!(!watch.0.has_changed().unwrap());
    fleet.update(&"p".into(), |node| node.incarnation = 1);
    watch.changed().await.unwrap();
    assert_eq!(watch.now().node(&"p".into()).unwrap().incarnation, 1);
}

#[test]
fn an_absent_node_says_why_and_when_it_is_tried_again() {
    let mut node = fleet().snapshot().node(&"p".into()).unwrap().clone();
    assert_eq!(node.absence(node.since), "p: pending");
    node.reason = Some("killed by SIGSEGV".to_owned());
    let delay = Duration::from_secs(20);
    node.phase = Phase::Backoff { delay };
    let expected = "p: backoff (killed by SIGSEGV), next try in 20 s";
    assert_eq!(node.absence(node.since), expected);
    assert!(node.absence(node.since + delay * 2).ends_with("again now"));
}

#[test]
fn a_snapshot_serializes_flat() {
    let json = serde_json::to_value(&*fleet().snapshot()).unwrap();
    assert_eq!(json["nodes"]["p"]["phase"], "pending");
    assert_eq!(json["nodes"]["p"]["kv"], "unproven");
}

#[test]
fn every_phase_has_its_label_in_the_list() {
    let delay = Duration::ZERO;
    let all = [
        Phase::Pending,
        Phase::Starting,
        Phase::WarmingUp,
        Phase::Verifying,
        Phase::Ready,
        Phase::Unreachable,
        Phase::Down,
        Phase::Draining,
        Phase::Backoff { delay },
        Phase::CrashLoop,
        Phase::Failed,
        Phase::Stopping,
        Phase::Stopped,
    ];
    assert_eq!(all.map(|phase| phase.label()), Phase::LABELS);
}
