//! A chunk that a reader found to be damaged.

use super::*;

struct Site {
    store: Store,
    now: Instant,
    workers: Vec<SessionId>,
    /// The prefill node's scheduler, and the decode node's with its first worker.
    p: SessionId,
    d: SessionId,
    reader: SessionId,
}

impl Site {
    fn new(verify: bool) -> Self {
        let mut store = store_with(10);
        store.config.verify = verify;
        let mut join = |node, rank| store.admit(hello(node, 1, rank)).unwrap().session;
        Self {
            workers: (0..WORLD).map(|rank| join(0, Some(rank))).collect(),
            p: join(0, None),
            reader: join(1, Some(0)),
            d: join(1, None),
            store,
            now: Instant::now(),
        }
    }

    fn say(&mut self, session: SessionId, message: ClientMessage) -> Option<ServerMessage> {
        let answer = self.store.handle(session, message, self.now).unwrap();
        self.store.index.check();
        answer
    }

    /// Saved by the prefill node.
    fn save(&mut self, request: &str, handoff: Option<&str>, keys: &[[u8; 8]]) -> Vec<SlotRef> {
        let message = ClientMessage::Store(query(request, handoff, keys));
        let Some(ServerMessage::Granted(granted)) = self.say(self.p, message) else {
            panic!("no answer");
        };
        assert!(granted.ok);
        for worker in self.workers.clone() {
            let commit = Commit {
                refs: granted.refs.clone(),
                bytes: 0,
                micros: 0,
            };
            self.say(worker, ClientMessage::Commit(commit));
        }
        placed(&granted).0
    }

    /// What the decode node finds, and leases.
    fn look(&mut self, request: &str, handoff: Option<&str>, keys: &[[u8; 8]]) -> Vec<u8> {
        let message = ClientMessage::Lookup(query(request, handoff, keys));
        match self.say(self.d, message) {
            Some(ServerMessage::Found(found)) => found.states.into_vec(),
            other => panic!("{other:?}"),
        }
    }

    fn report(&mut self, session: SessionId, refs: &[SlotRef]) {
        let refs = SlotRef::encode_all(refs.iter().copied());
        self.say(session, ClientMessage::Damaged(Damaged { refs }));
    }

    /// Chunks that were believed to be damaged, and words that were not believed.
    fn counted(&self) -> (u64, u64) {
        let counters = &self.store.counters;
        (counters.damaged_chunks, counters.stale_refs)
    }
}

#[test]
fn nobody_finds_a_damaged_chunk_and_whoever_reads_it_may_go_on() {
    let mut site = Site::new(true);
    let keys = prompt(1, 4);
    let places = site.save("r", None, &keys);
    assert_eq!(site.look("d", None, &keys), [1; 4]);
    site.report(site.reader, &[places[1]]);
    assert_eq!(site.counted(), (1, 0));
    // Another rank has seen it as well.
    site.report(site.reader, &[places[1]]);
    assert_eq!(site.counted(), (1, 0));

    // The others of the prompt are whole; the lease of the first request still holds.
    assert_eq!(site.look("e", None, &keys), [1, 0, 1, 1]);
    let stats = site.store.stats(site.now);
    assert_eq!((stats.ready, stats.damaged, stats.used), (3, 1, 4));
    assert!(site.store.index.is_leased(places[1]));

    // It can be saved anew, elsewhere.
    let again = site.save("s", None, &keys[1..2]);
    assert_eq!(again.len(), 1);
    assert_ne!(again[0].slot, places[1].slot);
    assert_eq!(site.look("f", None, &keys), [1; 4]);

    // When nobody reads it any more it goes like any other, and its slot is of use again.
    assert_eq!(site.store.flush().evicted, 0);
    for request in ["d", "e", "f"] {
        let request = request.to_owned();
        site.say(site.d, ClientMessage::Finish(RequestName { request }));
    }
    assert_eq!(site.store.index.available(), 10);
    site.save("t", None, &prompt(2, 10));
    let stats = site.store.stats(site.now);
    assert_eq!((stats.ready, stats.damaged, stats.evictions), (10, 0, 5));
}

#[test]
fn what_counts_on_a_damaged_chunk_fails_unless_it_has_fired() {
    let mut site = Site::new(true);
    let (keys, longer) = (prompt(1, 2), prompt(1, 3));
    let open = |id: &str| {
        ClientMessage::Open(Open {
            request: id.into(),
            handoff: id.into(),
            chunks: 3,
        })
    };
    site.say(site.p, open("h0"));
    let places = site.save("h0", Some("h0"), &keys);
    site.say(site.p, ClientMessage::Seal(seal_of(0)));
    let fired = HandoffOutcome::Ready {
        chunks: 2,
        already_stored: false,
    };
    assert_eq!(outcomes(&mut site.store), [("h0".to_owned(), fired)]);
    // This one is still waiting for its last chunk; the third has nothing to do with the first prompt.
    site.say(site.p, open("h1"));
    site.save("h1", Some("h1"), &longer);
    site.say(site.p, open("h2"));
    site.save("h2", Some("h2"), &prompt(2, 2));

    assert_eq!(site.look("d", None, &keys), [1, 1]);
    site.report(site.reader, &places[..1]);
    let failed = HandoffOutcome::Failed(HandoffFailure::Damaged);
    assert_eq!(outcomes(&mut site.store), [("h1".to_owned(), failed)]);
    assert_eq!(site.store.counters.handoffs_failed, [("damaged", 1)].into());
    // Its decode node finds out by itself.
    assert_eq!(site.store.handoffs.len(), 2);
    assert_eq!(site.look("d0", Some("h0"), &keys), [0, 1]);
    assert_eq!(site.store.handoffs.len(), 1);
}

#[test]
fn only_who_has_leased_a_chunk_is_believed() {
    let mut site = Site::new(true);
    let keys = prompt(1, 2);
    let places = site.save("r", None, &keys);
    let pending = ClientMessage::Store(query("u", None, &prompt(2, 1)));
    let Some(ServerMessage::Granted(granted)) = site.say(site.p, pending) else {
        panic!("not granted");
    };
    let pending = placed(&granted).0[0];
    site.look("d", None, &keys[..1]);

    let other = site.workers[0];
    let old = SlotRef {
        generation: places[0].generation + 1,
        ..places[0]
    };
    let nowhere = SlotRef {
        slot: u32::MAX,
        generation: 1,
    };
    site.report(other, &places);
    site.report(site.reader, &[places[1], pending, old, nowhere]);
    assert_eq!(site.counted(), (0, 6));
    assert_eq!(site.look("e", None, &keys), [1, 1]);

    // Of a lease that has ended, neither.
    let release = |request: &str| {
        let request = request.to_owned();
        ClientMessage::Release(RequestName { request })
    };
    site.say(site.d, release("d"));
    site.say(site.d, release("e"));
    site.report(site.reader, &places);
    assert_eq!(site.counted(), (0, 8));

    let refs = SlotRef::encode_all(places);
    let damaged = ClientMessage::Damaged(Damaged { refs });
    let misplaced = site.store.handle(site.d, damaged, site.now);
    assert!(matches!(
        misplaced,
        Err(ProtocolError::Misplaced("damaged"))
    ));
    let refs = ByteBuf::from([0; 7]);
    let cut = ClientMessage::Damaged(Damaged { refs });
    let refused = site.store.handle(site.reader, cut, site.now);
    assert!(matches!(refused, Err(ProtocolError::Refs(7))));
}

#[test]
fn without_checksums_nobody_can_have_seen_damage() {
    let mut site = Site::new(false);
    let keys = prompt(1, 2);
    let places = site.save("r", None, &keys);
    site.look("d", None, &keys);
    site.report(site.reader, &places);
    assert_eq!(site.counted(), (0, 2));
    assert_eq!(site.look("d", None, &keys), [1, 1]);
}
