//! Histories of the store that are worth naming; `model` makes up the others.

mod damage;
mod deadlock;
mod model;
mod ops;
mod sessions;

use super::*;
use crate::engine::inspect::Inspection;
use crate::engine::protocol::{Granted, HandoffName, Hello, RequestName, VERSION};

const WORLD: u32 = 2;
const PATIENCE: Duration = Duration::from_secs(60);

fn store_with(slots: u64) -> Store {
    Store::new(StoreConfig {
        token: "t".into(),
        capacity: 4096 + slots * 64,
        verify: true,
        handoff_deadline: PATIENCE,
        first_epoch: 1,
        sessions: (1, 1),
    })
}

fn hello(node: usize, incarnation: u64, rank: Option<u32>) -> Hello {
    Hello {
        version: VERSION,
        token: "t".into(),
        node: format!("n{node}"),
        incarnation,
        kind: rank.map_or(SessionKind::Scheduler, |_| SessionKind::Worker),
        rank: rank.unwrap_or(0),
        world: WORLD,
        replicated: false,
        namespace: Namespace::new(),
        row_bytes: if rank.is_some() { 32 } else { 0 },
        pid: 1,
    }
}

/// Key `position` of prompt `chain`; prompts share their first two keys.
fn key(chain: u8, position: u8) -> [u8; 8] {
    let chain = if position < 2 { 0 } else { chain };
    [chain, position, 0, 0, 0, 0, 0, position % 2]
}

fn query(request: &str, handoff: Option<&str>, keys: &[[u8; 8]]) -> KeyQuery {
    KeyQuery {
        seq: 9,
        request: request.into(),
        handoff: handoff.map(str::to_owned),
        keys: ByteBuf::from(keys.as_flattened()),
        key_len: 8,
    }
}

fn placed(granted: &Granted) -> (Vec<SlotRef>, Vec<usize>) {
    let indices = granted.new.as_chunks::<4>().0.iter();
    let new = indices.map(|&i| u32::from_le_bytes(i) as usize).collect();
    (SlotRef::decode_all(&granted.refs).unwrap(), new)
}

fn prompt(chain: u8, len: u8) -> Vec<[u8; 8]> {
    (0..len).map(|p| [chain, p, 1, 0, 0, 0, 0, 0]).collect()
}

fn outcomes(store: &mut Store) -> Vec<(String, HandoffOutcome)> {
    let settled = |action| match action {
        Action::Settled(id, outcome) => Some((id.to_string(), outcome)),
        _ => None,
    };
    store
        .take_actions()
        .into_iter()
        .filter_map(settled)
        .collect()
}

fn seal_of(handoff: usize) -> HandoffName {
    HandoffName {
        handoff: format!("h{handoff}"),
    }
}

#[test]
fn three_prompts_of_60_chunks_in_100_slots_all_end() {
    let mut store = store_with(100);
    let now = Instant::now();
    let workers: Vec<_> = (0..WORLD)
        .map(|rank| store.admit(hello(0, 1, Some(rank))).unwrap().session)
        .collect();
    let scheduler = store.admit(hello(0, 1, None)).unwrap().session;
    assert_eq!(store.stats(now).slots, 100);
    for n in 0..3u8 {
        let open = ClientMessage::Open(Open {
            request: format!("r{n}"),
            handoff: format!("h{n}"),
            chunks: 60,
        });
        store.handle(scheduler, open, now).unwrap();
    }
    // The chunks of all three come in turns, as a scheduler batches them.
    let mut granted = Vec::new();
    for step in 0..6 {
        for n in 0..3u8 {
            let keys = &prompt(n, 60)[step * 10..(step + 1) * 10];
            let (request, handoff) = (format!("r{n}"), format!("h{n}"));
            let message = ClientMessage::Store(query(&request, Some(&handoff), keys));
            let answer = store.handle(scheduler, message, now).unwrap();
            let Some(ServerMessage::Granted(answer)) = answer else {
                panic!("not granted");
            };
            granted.extend(placed(&answer).0);
        }
    }
    for n in 0..3 {
        let seal = ClientMessage::Seal(seal_of(n));
        store.handle(scheduler, seal, now).unwrap();
    }
    for worker in workers {
        let commit = ClientMessage::Commit(Commit {
            refs: SlotRef::encode_all(granted.iter().copied()),
            bytes: 0,
            micros: 0,
        });
        store.handle(worker, commit, now).unwrap();
    }
    let ready = HandoffOutcome::Ready {
        chunks: 60,
        already_stored: false,
    };
    let full = HandoffOutcome::Failed(HandoffFailure::NoSpace);
    let mut ended = outcomes(&mut store);
    ended.sort_by(|a, b| a.0.cmp(&b.0));
    let wanted = [("h0", ready), ("h1", full), ("h2", full)];
    assert_eq!(ended, wanted.map(|(id, outcome)| (id.to_owned(), outcome)));
    store.index.check();
}

#[test]
fn a_prefix_outlives_what_follows_it() {
    let mut store = store_with(10);
    let now = Instant::now();
    let workers: Vec<_> = (0..WORLD)
        .map(|rank| store.admit(hello(0, 1, Some(rank))).unwrap().session)
        .collect();
    let scheduler = store.admit(hello(0, 1, None)).unwrap().session;
    let save = |store: &mut Store, keys: &[[u8; 8]]| {
        let message = ClientMessage::Store(query("r", None, keys));
        let answer = store.handle(scheduler, message, now).unwrap();
        let Some(ServerMessage::Granted(answer)) = answer else {
            panic!("not granted");
        };
        assert!(answer.ok);
        for &worker in &workers {
            let (refs, bytes, micros) = (answer.refs.clone(), 0, 0);
            let commit = ClientMessage::Commit(Commit {
                refs,
                bytes,
                micros,
            });
            store.handle(worker, commit, now).unwrap();
        }
        let request = "r".to_owned();
        let finish = ClientMessage::Finish(RequestName { request });
        store.handle(scheduler, finish, now).unwrap();
    };
    save(&mut store, &prompt(1, 10));
    // Needs four slots: the last four of the first prompt go, though its first were used longest ago.
    save(&mut store, &prompt(2, 4));
    let there = |key: &[u8; 8]| store.index.find(key).is_some();
    let left: Vec<_> = prompt(1, 10).iter().map(there).collect();
    assert_eq!(left, [[true; 6].as_slice(), &[false; 4]].concat());
    assert_eq!(store.index.evictions(), 4);
}

#[test]
fn what_a_decode_node_looked_up_is_not_held_by_the_handoff_any_more() {
    let mut store = store_with(10);
    let now = Instant::now();
    let workers: Vec<_> = (0..WORLD)
        .map(|rank| store.admit(hello(0, 1, Some(rank))).unwrap().session)
        .collect();
    let p = store.admit(hello(0, 1, None)).unwrap().session;
    let d = store.admit(hello(1, 1, None)).unwrap().session;
    let keys = prompt(1, 3);
    let open = ClientMessage::Open(Open {
        request: "r".into(),
        handoff: "h0".into(),
        chunks: 3,
    });
    store.handle(p, open, now).unwrap();
    let message = ClientMessage::Store(query("r", Some("h0"), &keys));
    let Some(ServerMessage::Granted(granted)) = store.handle(p, message, now).unwrap() else {
        panic!("not granted");
    };
    for worker in workers {
        let (refs, bytes, micros) = (granted.refs.clone(), 0, 0);
        let commit = ClientMessage::Commit(Commit {
            refs,
            bytes,
            micros,
        });
        store.handle(worker, commit, now).unwrap();
    }
    let seal = ClientMessage::Seal(seal_of(0));
    store.handle(p, seal, now).unwrap();
    assert_eq!(outcomes(&mut store).len(), 1);
    assert_eq!((store.index.leases(), store.handoffs.len()), (3, 1));

    let look = |handoff| ClientMessage::Lookup(query("d", handoff, &keys));
    store.handle(d, look(None), now).unwrap();
    assert_eq!(
        store.index.leases(),
        6,
        "another lookup does not consume it"
    );
    store.handle(d, look(Some("h0")), now).unwrap();
    assert_eq!((store.index.leases(), store.handoffs.len()), (3, 0));
    // A lease of a living incarnation does not end by time, nor with its session.
    store.expire(now + PATIENCE * 100);
    store.disconnect(d, Lost::Closed);
    assert_eq!(store.index.leases(), 3);
    store.incarnation_gone(&Owner {
        node: "n1".into(),
        incarnation: 1,
    });
    assert_eq!(store.index.leases(), 0);
}

/// A worker that neither writes nor discards must not make every later prompt wait for its chunk.
#[test]
fn a_chunk_that_is_never_written_is_given_up_with_the_handoff_that_waited_for_it() {
    let mut store = store_with(10);
    let start = Instant::now();
    let workers: Vec<_> = (0..WORLD)
        .map(|rank| store.admit(hello(0, 1, Some(rank))).unwrap().session)
        .collect();
    let p = store.admit(hello(0, 1, None)).unwrap().session;
    let keys = prompt(1, 2);
    let hand_off = |store: &mut Store, n: usize, now| {
        let open = Open {
            request: format!("r{n}"),
            handoff: format!("h{n}"),
            chunks: 2,
        };
        store.handle(p, ClientMessage::Open(open), now).unwrap();
        let save = query(&format!("r{n}"), Some(&format!("h{n}")), &keys);
        let granted = store.handle(p, ClientMessage::Store(save), now).unwrap();
        store
            .handle(p, ClientMessage::Seal(seal_of(n)), now)
            .unwrap();
        let Some(ServerMessage::Granted(granted)) = granted else {
            panic!("not granted");
        };
        granted
    };
    let first = hand_off(&mut store, 0, start);
    let later = start + PATIENCE / 2 + Duration::from_secs(1);
    assert!(
        hand_off(&mut store, 1, later).refs.is_empty(),
        "it waits for the first's chunks"
    );
    assert_eq!(store.stats(later).oldest_pending_seconds, 31.0);
    // One rank has written; the other never says anything.
    let commit = ClientMessage::Commit(Commit {
        refs: first.refs.clone(),
        bytes: 0,
        micros: 0,
    });
    store.handle(workers[0], commit.clone(), later).unwrap();

    store.expire(start + PATIENCE);
    let failed = |id: &str, why| (id.to_owned(), HandoffOutcome::Failed(why));
    assert_eq!(
        outcomes(&mut store),
        [
            failed("h0", HandoffFailure::Deadline),
            failed("h1", HandoffFailure::SaveFailed)
        ]
    );
    let census = store.index.census();
    assert_eq!((census.pending, census.quarantined), (0, 2));
    assert_eq!(store.counters.stuck_chunks, 2);

    // The next prompt gets other slots, and a commit that comes after all frees the first ones.
    let again = hand_off(&mut store, 2, start + PATIENCE);
    assert!(!again.refs.is_empty() && again.refs != first.refs);
    store.handle(workers[1], commit, start + PATIENCE).unwrap();
    assert_eq!(store.index.census().quarantined, 0);
    // A young chunk is not given up with its hand-off: it may still be written.
    let opened = start + PATIENCE + PATIENCE / 2;
    let open = |n: usize, chunks| {
        ClientMessage::Open(Open {
            request: format!("r{n}"),
            handoff: format!("h{n}"),
            chunks,
        })
    };
    store.handle(p, open(3, 1), opened).unwrap();
    let late = opened + PATIENCE - Duration::from_secs(1);
    let save = ClientMessage::Store(query("r3", Some("h3"), &prompt(2, 1)));
    store.handle(p, save, late).unwrap();
    store.expire(opened + PATIENCE);
    assert_eq!(store.index.census().pending, 1);
    store.index.check();
}

#[test]
fn an_abandoned_handoff_holds_nothing() {
    let mut store = store_with(10);
    let now = Instant::now();
    let scheduler = store.admit(hello(0, 1, None)).unwrap().session;
    store.admit(hello(0, 1, Some(0))).unwrap();
    let open = |n: usize| {
        ClientMessage::Open(Open {
            request: format!("r{n}"),
            handoff: format!("h{n}"),
            chunks: 4,
        })
    };
    let abandoned = HandoffOutcome::Failed(HandoffFailure::Abandoned);
    store.handle(scheduler, open(0), now).unwrap();
    assert_eq!(store.handoffs.reserved(), 4);
    store.abandon(&"h0".into());
    assert_eq!((store.handoffs.reserved(), store.handoffs.len()), (0, 0));
    assert_eq!(outcomes(&mut store), [("h0".into(), abandoned)]);
    // Its client left before the prefill node saw it.
    store.abandon(&"h1".into());
    store.handle(scheduler, open(1), now).unwrap();
    assert_eq!(store.handoffs.len(), 0);
    assert_eq!(outcomes(&mut store), [("h1".into(), abandoned)]);
    assert_eq!(store.counters.handoffs_failed, [("abandoned", 2)].into());
}

#[test]
fn an_operator_sees_what_is_held_and_flushes_what_is_not() {
    let mut store = store_with(10);
    let now = Instant::now();
    assert_eq!(store.namespace(), None);
    let inspect = |store: &Store, now| {
        let mut seen = Inspection::default();
        store.inspect(now, &mut seen);
        seen
    };
    let workers: Vec<_> = (0..WORLD)
        .map(|rank| store.admit(hello(0, 1, Some(rank))).unwrap().session)
        .collect();
    let scheduler = store.admit(hello(0, 1, None)).unwrap().session;
    for chain in [1, 2] {
        let message = ClientMessage::Store(query("r", None, &prompt(chain, 3)));
        let Some(ServerMessage::Granted(granted)) = store.handle(scheduler, message, now).unwrap()
        else {
            panic!("not granted");
        };
        for &worker in &workers {
            let commit = ClientMessage::Commit(Commit {
                refs: granted.refs.clone(),
                bytes: 0,
                micros: 0,
            });
            store.handle(worker, commit, now).unwrap();
        }
    }
    let look = ClientMessage::Lookup(query("reads", None, &prompt(1, 2)));
    store.handle(scheduler, look, now).unwrap();
    let open = ClientMessage::Open(Open {
        request: "opens".into(),
        handoff: "h0".into(),
        chunks: 2,
    });
    store.handle(scheduler, open, now).unwrap();
    let message = ClientMessage::Store(query("opens", Some("h0"), &prompt(3, 1)));
    store.handle(scheduler, message, now).unwrap();

    let seen = inspect(&store, now + Duration::from_secs(3));
    assert_eq!(seen.sessions.len(), 3);
    let namespace = store.namespace().unwrap();
    assert_eq!(
        (namespace.ready, namespace.pending, namespace.free),
        (6, 1, 3)
    );
    assert_eq!(
        (namespace.leased, namespace.reserved, namespace.sessions),
        (3, 1, 3)
    );
    let [lease] = seen.leases.as_slice() else {
        panic!("not one lease: {:?}", seen.leases);
    };
    assert_eq!((lease.request.as_deref(), lease.chunks), (Some("reads"), 2));
    assert_eq!(lease.age_seconds, 3.0);
    let [handoff] = seen.handoffs.as_slice() else {
        panic!("not one hand-off");
    };
    assert_eq!(
        (handoff.stage, handoff.missing, handoff.reserved),
        (Stage::Open, 1, 1)
    );
    assert_eq!(store.stats(now + PATIENCE).oldest_lease_seconds, 60.0);
    store.disconnect(scheduler, Lost::Closed);
    let lease = inspect(&store, now).leases.remove(0);
    assert_eq!((lease.request, lease.chunks), (None, 2));

    let flushed = store.flush();
    assert_eq!((flushed.evicted, flushed.held), (4, 2));
    assert!(store.index.find(&prompt(1, 2)[1]).is_some());
    assert!(store.index.find(&prompt(1, 3)[2]).is_none());
    let risen = store.take_actions();
    let risen = risen.iter().filter(|a| matches!(a, Action::Generation(_)));
    assert!(
        risen.count() >= 4,
        "loaders must see that the chunks are gone"
    );
    assert_eq!(store.flush().evicted, 0);
    store.index.check();
}
