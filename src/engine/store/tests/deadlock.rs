//! More is asked for than there is: everybody gets an end all the same.

use proptest::prelude::*;

use super::*;

const SLOTS: u64 = 100;

/// A prompt on its way into the store, and out again.
struct Prompt {
    keys: Vec<[u8; 8]>,
    offered: usize,
    sealed: bool,
}

struct Site {
    store: Store,
    now: Instant,
    workers: Vec<SessionId>,
    p: SessionId,
    d: SessionId,
    prompts: Vec<Prompt>,
    granted: Vec<SlotRef>,
}

impl Site {
    fn new(lengths: &[u8]) -> Self {
        let mut store = store_with(SLOTS);
        let mut join = |node, rank| store.admit(hello(node, 1, rank)).unwrap().session;
        let workers = (0..WORLD).map(|rank| join(0, Some(rank))).collect();
        let (p, d) = (join(0, None), join(1, None));
        let prompt = |(n, &len): (u8, &u8)| Prompt {
            keys: prompt(n, len),
            offered: 0,
            sealed: false,
        };
        let mut site = Self {
            store,
            now: Instant::now(),
            workers,
            p,
            d,
            prompts: (0..).zip(lengths).map(prompt).collect(),
            granted: Vec::new(),
        };
        for (n, &chunks) in lengths.iter().enumerate() {
            let open = ClientMessage::Open(Open {
                request: format!("r{n}"),
                handoff: format!("h{n}"),
                chunks: u32::from(chunks),
            });
            site.say(site.p, open);
        }
        site
    }

    fn say(&mut self, session: SessionId, message: ClientMessage) -> Option<ServerMessage> {
        let answer = self.store.handle(session, message, self.now).unwrap();
        let index = &self.store.index;
        assert!(index.available() >= self.store.handoffs.reserved());
        answer
    }

    /// The next `count` chunks of a prompt, or its seal.
    fn step(&mut self, n: usize, count: usize) {
        let prompt = &mut self.prompts[n];
        if prompt.offered == prompt.keys.len() {
            prompt.sealed = true;
            self.say(self.p, ClientMessage::Seal(seal_of(n)));
            return;
        }
        let from = prompt.offered;
        prompt.offered = (from + count).min(prompt.keys.len());
        let keys = prompt.keys[from..prompt.offered].to_vec();
        let (request, handoff) = (format!("r{n}"), format!("h{n}"));
        let message = ClientMessage::Store(query(&request, Some(&handoff), &keys));
        let Some(ServerMessage::Granted(granted)) = self.say(self.p, message) else {
            panic!("no answer");
        };
        self.granted.extend(placed(&granted).0);
    }

    fn commit(&mut self) {
        let refs = SlotRef::encode_all(self.granted.drain(..));
        for worker in self.workers.clone() {
            let commit = ClientMessage::Commit(Commit {
                refs: refs.clone(),
                bytes: 0,
                micros: 0,
            });
            self.say(worker, commit);
        }
    }

    /// Under another request each time, and never finished: pins pile up, but only hand-offs, which
    /// have their space, may bring them above the cap.
    fn look(&mut self, n: usize, turn: usize) {
        let keys = self.prompts[n].keys.clone();
        let before = self.store.index.leased();
        let message = ClientMessage::Lookup(query(&format!("d{turn}"), None, &keys));
        self.say(self.d, message);
        let cap = u32::try_from(SLOTS * LEASE_PERCENT / 100).unwrap();
        assert!(self.store.index.leased() <= before.max(cap));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_prompt_fires_or_fails_for_space(
        lengths in prop::collection::vec(40..70u8, 3..6),
        turns in prop::collection::vec((0..6usize, 1..25usize), 0..60),
    ) {
        let mut site = Site::new(&lengths);
        let count = lengths.len();
        for (turn, (pick, size)) in turns.into_iter().enumerate() {
            match size % 5 {
                0 => site.commit(),
                1 => site.look(pick % count, turn),
                _ => site.step(pick % count, size),
            }
        }
        for n in 0..count {
            while !site.prompts[n].sealed {
                site.step(n, 10);
            }
        }
        site.commit();
        let ended = outcomes(&mut site.store);
        prop_assert_eq!(ended.len(), count, "one waits for ever");
        for (id, outcome) in ended {
            let n: usize = id[1..].parse().unwrap();
            let whole = HandoffOutcome::Ready {
                chunks: u32::from(lengths[n]),
                already_stored: false,
            };
            let full = HandoffOutcome::Failed(HandoffFailure::NoSpace);
            prop_assert!(outcome == whole || outcome == full, "{:?}", outcome);
        }
        site.store.index.check();
    }
}
