//! What a session, a rank or a worker that goes away leaves behind.

use super::*;

#[test]
fn what_every_rank_gave_up_is_free_at_once() {
    let mut store = store_with(2);
    let now = Instant::now();
    let workers: Vec<_> = (0..WORLD)
        .map(|rank| store.admit(hello(0, 1, Some(rank))).unwrap().session)
        .collect();
    let scheduler = store.admit(hello(0, 1, None)).unwrap().session;
    let grant = |store: &mut Store, keys: &[[u8; 8]]| {
        let message = ClientMessage::Store(query("r", None, keys));
        let Some(ServerMessage::Granted(granted)) = store.handle(scheduler, message, now).unwrap()
        else {
            panic!("not granted");
        };
        assert!(granted.ok, "the arena shrank");
        granted.refs
    };
    let commit = |refs| {
        let (bytes, micros) = (0, 0);
        ClientMessage::Commit(Commit {
            refs,
            bytes,
            micros,
        })
    };
    let discard = |refs| ClientMessage::Discard(Discard { refs });
    let quarantined = |store: &Store| store.index.census().quarantined;
    for turn in 0..20 {
        let refs = grant(&mut store, &prompt(turn, 2));
        let (first, second) = match turn % 4 {
            0 => (commit(refs.clone()), discard(refs.clone())),
            1 => (discard(refs.clone()), commit(refs.clone())),
            _ => (discard(refs.clone()), discard(refs.clone())),
        };
        store.handle(workers[0], first, now).unwrap();
        let wanted = if turn % 4 == 0 { 0 } else { 2 };
        assert_eq!(quarantined(&store), wanted, "rank 1 may still be writing");
        store.handle(workers[1], second.clone(), now).unwrap();
        assert_eq!(quarantined(&store), 0);
        assert_eq!(store.counters.stale_refs, u64::from(turn) * 2);
        store.handle(workers[1], second, now).unwrap();
        assert!(
            prompt(turn, 2)
                .iter()
                .all(|k| store.index.find(k).is_none())
        );
        store.index.check();
    }
}

#[test]
fn a_worker_that_says_hello_again_has_ended_its_copies() {
    let mut store = store_with(2);
    let now = Instant::now();
    let join = |store: &mut Store, rank| store.admit(hello(0, 1, rank)).unwrap().session;
    let sessions = [Some(0), Some(1), None].map(|rank| join(&mut store, rank));
    let message = ClientMessage::Store(query("r", None, &prompt(1, 2)));
    store.handle(sessions[2], message, now).unwrap();
    store.disconnect(sessions[0], Lost::Closed);
    assert!(store.sessions.is_empty());
    let quarantined = |store: &Store| store.index.census().quarantined;
    assert_eq!(quarantined(&store), 2);
    join(&mut store, None);
    join(&mut store, Some(1));
    assert_eq!(quarantined(&store), 2, "rank 0 may still be writing");
    join(&mut store, Some(0));
    assert_eq!((quarantined(&store), store.index.available()), (0, 2));
}

#[test]
fn a_lost_session_takes_its_siblings_along() {
    let mut store = store_with(10);
    let now = Instant::now();
    let join = |store: &mut Store, node, rank| store.admit(hello(node, 1, rank)).unwrap().session;
    let all = [Some(0), Some(1), None];
    let p = all.map(|rank| join(&mut store, 0, rank));
    let d = join(&mut store, 1, None);
    let open = ClientMessage::Open(Open {
        request: "r".into(),
        handoff: "h0".into(),
        chunks: 3,
    });
    store.handle(p[2], open, now).unwrap();
    let message = ClientMessage::Store(query("r", Some("h0"), &prompt(1, 3)));
    store.handle(p[2], message, now).unwrap();
    store.take_actions();

    store.disconnect(p[1], Lost::Slow);
    assert_eq!(store.sessions.keys().copied().collect::<Vec<_>>(), [d]);
    let actions = store.take_actions();
    for session in [p[0], p[2]] {
        assert!(actions.contains(&Action::Close(session)));
    }
    let died = HandoffOutcome::Failed(HandoffFailure::ProducerDied);
    assert!(actions.contains(&Action::Settled("h0".into(), died)));
    assert_eq!(store.index.census().quarantined, 3);
    assert!(
        store
            .handle(p[2], ClientMessage::Seal(seal_of(0)), now)
            .is_err()
    );

    // They come back; then a hello finds its earlier session still there.
    let again = all.map(|rank| join(&mut store, 0, rank));
    assert_eq!(store.index.census().quarantined, 0);
    let third = join(&mut store, 0, None);
    assert_eq!(
        store.sessions.keys().copied().collect::<Vec<_>>(),
        [d, third]
    );
    assert!(store.take_actions().contains(&Action::Close(again[2])));
    let lost = [("replaced", 1), ("sibling", 4), ("slow", 1)];
    assert_eq!(store.counters.sessions_lost, lost.into());
}

#[test]
fn leases_of_a_lost_scheduler_last_until_every_worker_is_back() {
    let mut store = store_with(10);
    let now = Instant::now();
    let join = |store: &mut Store, rank| store.admit(hello(0, 1, rank)).unwrap().session;
    let [first, second, scheduler] = [Some(0), Some(1), None].map(|rank| join(&mut store, rank));
    let message = ClientMessage::Store(query("r", None, &prompt(1, 3)));
    let Some(ServerMessage::Granted(granted)) = store.handle(scheduler, message, now).unwrap()
    else {
        panic!("not granted");
    };
    for worker in [first, second] {
        let commit = ClientMessage::Commit(Commit {
            refs: granted.refs.clone(),
            bytes: 0,
            micros: 0,
        });
        store.handle(worker, commit, now).unwrap();
    }
    let look = ClientMessage::Lookup(query("r", None, &prompt(1, 3)));
    store.handle(scheduler, look, now).unwrap();
    store.disconnect(scheduler, Lost::Closed);
    assert_eq!(store.index.leases(), 3);
    join(&mut store, None);
    join(&mut store, Some(1));
    assert_eq!(store.index.leases(), 3, "rank 0 may still be reading");
    join(&mut store, Some(0));
    assert_eq!(store.index.leases(), 0);
    assert!(store.departed.is_empty());
}
