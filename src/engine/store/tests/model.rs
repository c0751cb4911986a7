//! The store against a simple model, under random histories.
//!
//! Three nodes open, save, look up, commit, discard, lose sessions and die in any order. After
//! every step: no slot is granted that somebody may still read or write, no ref names two chunks,
//! what is leased is there, a hand-off settles once and fires only when all its keys are Ready,
//! and every count equals what follows from the slots.

mod workers;

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::ops::{Op, ops};
use super::*;

/// What the model knows of a chunk that was granted.
#[derive(Debug)]
struct Written {
    key: [u8; 8],
    owner: Owner,
    committed: BTreeSet<u32>,
    /// The ranks that may still write.
    writing: BTreeSet<u32>,
}

#[derive(Debug, Default)]
struct Wanted {
    node: usize,
    keys: BTreeSet<[u8; 8]>,
    outcomes: usize,
}

struct World {
    store: Store,
    now: Instant,
    /// Per node: its incarnation, and its scheduler's and workers' sessions.
    nodes: Vec<(u64, [Option<SessionId>; 3])>,
    written: BTreeMap<SlotRef, Written>,
    /// By node and request.
    leases: BTreeMap<(usize, String), Vec<SlotRef>>,
    /// By node: what was leased when sessions were lost, and the ranks that may still be reading.
    departed: Vec<(Vec<SlotRef>, BTreeSet<u32>)>,
    handoffs: Vec<Wanted>,
    /// Never found again.
    damaged: BTreeSet<SlotRef>,
}

const SLOTS: u64 = 12;

impl World {
    fn new() -> Self {
        let mut world = Self {
            store: store_with(SLOTS),
            now: Instant::now(),
            nodes: vec![(1, [None; 3]); 3],
            written: BTreeMap::new(),
            leases: BTreeMap::new(),
            departed: vec![Default::default(); 3],
            handoffs: Vec::new(),
            damaged: BTreeSet::new(),
        };
        (0..3).for_each(|node| world.join(node));
        world
    }

    fn join(&mut self, node: usize) {
        for who in 0..3 {
            if self.nodes[node].1[who].is_none() {
                self.say_hello(node, who);
            }
        }
    }

    fn say_hello(&mut self, node: usize, who: usize) {
        if self.nodes[node].1[who].is_some() {
            self.lost(node);
        }
        let rank = u32::try_from(who).unwrap().checked_sub(1);
        let hello = hello(node, self.nodes[node].0, rank);
        let welcome = self.store.admit(hello).unwrap();
        self.nodes[node].1[who] = Some(welcome.session);
        if let Some(rank) = rank {
            self.returned(node, rank);
        }
    }

    /// One session of a node ended, and the others with it.
    fn lost(&mut self, node: usize) {
        self.nodes[node].1 = [None; 3];
        let requests: Vec<_> = self
            .leases
            .keys()
            .filter(|(n, _)| *n == node)
            .cloned()
            .collect();
        let leases: Vec<_> = requests
            .iter()
            .flat_map(|request| self.leases.remove(request).unwrap())
            .collect();
        if !leases.is_empty() {
            let (departed, reading) = &mut self.departed[node];
            departed.extend(leases);
            *reading = (0..WORLD).collect();
        }
    }

    /// A worker that says hello has ended its earlier copies.
    fn returned(&mut self, node: usize, rank: u32) {
        let owner = self.owner(node);
        let (leases, reading) = &mut self.departed[node];
        reading.remove(&rank);
        if reading.is_empty() {
            leases.clear();
        }
        for (at, written) in &mut self.written {
            let found = self.store.index.find(&written.key);
            let pending = found.is_some_and(|found| found.at == *at && !found.ready);
            if written.owner == owner && !pending {
                written.writing.remove(&rank);
            }
        }
    }

    fn owner(&self, node: usize) -> Owner {
        Owner {
            node: format!("n{node}").as_str().into(),
            incarnation: self.nodes[node].0,
        }
    }

    fn send(&mut self, node: usize, who: usize, message: ClientMessage) -> Option<ServerMessage> {
        let session = self.nodes[node].1[who]?;
        self.store.handle(session, message, self.now).unwrap()
    }

    fn apply(&mut self, op: Op) {
        let pick = |n: usize, len: usize| (len > 0).then(|| n % len);
        // Mostly one of the last hand-offs, and mostly by its own node.
        let recent = |n: usize, len: usize| (len > 0).then(|| len - 1 - n % len.min(3));
        match op {
            Op::Open { node, chunks } => {
                let handoff = self.handoffs.len();
                self.handoffs.push(Wanted {
                    node,
                    ..Wanted::default()
                });
                let open = ClientMessage::Open(Open {
                    request: format!("r{}", handoff % 4),
                    handoff: format!("h{handoff}"),
                    chunks,
                });
                self.send(node, 0, open);
            }
            Op::Store {
                node,
                handoff,
                chain,
                from,
                to,
            } => {
                let chosen = recent(handoff, self.handoffs.len());
                let own = chosen
                    .filter(|_| handoff % 4 > 0)
                    .map(|h| self.handoffs[h].node);
                self.save(own.unwrap_or(node), chosen, chain, from..to);
            }
            Op::Lookup {
                node,
                handoff,
                chain,
                to,
            } => self.lookup(node, recent(handoff, self.handoffs.len()), chain, to),
            Op::Seal { handoff } | Op::Abort { handoff } if self.handoffs.is_empty() => {
                let _ = handoff;
            }
            Op::Seal { handoff } => {
                let handoff = recent(handoff, self.handoffs.len()).unwrap();
                let node = self.handoffs[handoff].node;
                self.send(node, 0, ClientMessage::Seal(seal_of(handoff)));
            }
            Op::Abort { handoff } => {
                let handoff = recent(handoff, self.handoffs.len()).unwrap();
                let node = self.handoffs[handoff].node;
                self.send(node, 0, ClientMessage::Abort(seal_of(handoff)));
            }
            Op::Release { node, request } | Op::Finish { node, request } => {
                let request = format!("r{}", request % 4);
                if self.nodes[node].1[0].is_some() {
                    self.leases.remove(&(node, request.clone()));
                }
                let name = RequestName { request };
                let message = match op {
                    Op::Release { .. } => ClientMessage::Release(name),
                    _ => ClientMessage::Finish(name),
                };
                self.send(node, 0, message);
            }
            Op::Commit { pick: n, rank } => {
                if let Some(n) = pick(n, self.written.len()) {
                    self.commit(n, rank);
                }
            }
            Op::CommitAll => {
                for n in 0..self.written.len() {
                    (0..WORLD).for_each(|rank| self.commit(n, rank));
                }
            }
            Op::Discard { pick: n, rank } => {
                if let Some(n) = pick(n, self.written.len()) {
                    let (&at, _) = self.written.iter().nth(n).unwrap();
                    let refs = SlotRef::encode_all([at]);
                    self.done(at, rank, ClientMessage::Discard(Discard { refs }));
                }
            }
            Op::Damage {
                node,
                rank,
                pick: n,
                leased,
            } => self.damage(node, rank, n, leased),
            Op::Disconnect { node, who } => {
                if let Some(session) = self.nodes[node].1[who] {
                    self.store.disconnect(session, Lost::Closed);
                    self.lost(node);
                }
            }
            Op::Gone { node } => {
                let owner = self.owner(node);
                self.store.incarnation_gone(&owner);
                self.nodes[node] = (owner.incarnation + 1, [None; 3]);
                for written in self.written.values_mut() {
                    if written.owner == owner {
                        written.writing.clear();
                    }
                }
                self.leases.retain(|(n, _), _| *n != node);
                self.departed[node] = Default::default();
            }
            Op::Join { node } => self.join(node),
            Op::Replace { node, who } => self.say_hello(node, who),
            Op::Abandon { handoff } => {
                // Also one that is not opened yet.
                let recent = self.handoffs.len() - handoff % self.handoffs.len().clamp(1, 3);
                self.store.abandon(&format!("h{recent}").as_str().into());
            }
            Op::Flush => {
                self.store.flush();
                let free = u64::from(self.store.index.census().free);
                assert_eq!(self.store.index.available(), free);
            }
            Op::Wait { seconds } => {
                self.now += Duration::from_secs(seconds);
                self.store.expire(self.now);
            }
        }
        self.check();
    }

    fn node_of(&self, owner: &Owner) -> usize {
        (0..3)
            .find(|node| owner.node.as_str() == format!("n{node}"))
            .unwrap()
    }

    fn save(&mut self, node: usize, handoff: Option<usize>, chain: u8, range: std::ops::Range<u8>) {
        let keys: Vec<_> = range.map(|position| key(chain, position)).collect();
        let name = handoff.map(|h| format!("h{h}"));
        let known: Vec<_> = keys.iter().map(|k| self.store.index.find(k)).collect();
        let takes = handoff.is_some_and(|h| {
            let number = self
                .store
                .handoffs
                .number(&HandoffId::from(name.as_deref().unwrap()));
            let session = self.nodes[node].1[0];
            let (Some(number), Some(session)) = (number, session) else {
                return false;
            };
            self.handoffs[h].node == node && self.store.produces(session, number)
        });
        let request = format!("r{}", chain % 4);
        let message = ClientMessage::Store(query(&request, name.as_deref(), &keys));
        let Some(ServerMessage::Granted(granted)) = self.send(node, 0, message) else {
            return;
        };
        let (places, new) = placed(&granted);
        if !granted.ok {
            assert!(new.is_empty());
            return;
        }
        if let (Some(h), true) = (handoff, takes) {
            self.handoffs[h].keys.extend(&keys);
        }
        let missing = (0..keys.len()).filter(|&i| known[i].is_none());
        assert_eq!(new, missing.collect::<Vec<_>>(), "exactly the unknown keys");
        let owner = self.owner(node);
        for (at, i) in places.into_iter().zip(new) {
            for (old, written) in &self.written {
                let reused = old.slot == at.slot && !written.writing.is_empty();
                assert!(!reused, "{at:?} is still being written: {written:?}");
            }
            let leased = self.leased();
            assert!(
                leased.iter().all(|l| l.slot != at.slot),
                "leased slot reused"
            );
            let written = Written {
                key: keys[i],
                owner: owner.clone(),
                committed: BTreeSet::new(),
                writing: (0..WORLD).collect(),
            };
            let old = self.written.insert(at, written);
            assert!(old.is_none(), "{at:?} named a chunk before");
        }
    }

    fn lookup(&mut self, node: usize, handoff: Option<usize>, chain: u8, to: u8) {
        let keys: Vec<_> = (0..to).map(|position| key(chain, position)).collect();
        let name = handoff.map(|h| format!("h{h}"));
        let request = format!("r{}", chain % 4);
        let message = ClientMessage::Lookup(query(&request, name.as_deref(), &keys));
        let Some(ServerMessage::Found(found)) = self.send(node, 0, message) else {
            return;
        };
        let refs = SlotRef::decode_all(&found.refs).unwrap();
        assert_eq!((found.states.len(), refs.len()), (keys.len(), keys.len()));
        let mut leases = Vec::new();
        for ((key, &state), at) in keys.iter().zip(found.states.iter()).zip(refs) {
            match state {
                1 => {
                    let written = &self.written[&at];
                    assert_eq!(written.key, *key);
                    assert!(!self.damaged.contains(&at), "damaged, and found");
                    assert_eq!(written.committed.len(), WORLD as usize, "visible too early");
                    leases.push(at);
                    if let Some(wanted) = handoff.map(|h| &mut self.handoffs[h]) {
                        // A prefill node's find counts for its hand-off.
                        let _ = wanted.node == node && wanted.keys.insert(*key);
                    }
                }
                _ => assert_eq!(at, SlotRef::NONE),
            }
        }
        self.leases.insert((node, request), leases);
    }

    fn check(&mut self) {
        let actions = self.store.take_actions();
        for action in actions {
            let Action::Settled(id, outcome) = action else {
                continue;
            };
            let wanted = &mut self.handoffs[id.as_str()[1..].parse::<usize>().unwrap()];
            wanted.outcomes += 1;
            assert_eq!(wanted.outcomes, 1, "{id} settled twice");
            if let HandoffOutcome::Ready { chunks, .. } = outcome {
                assert_eq!(chunks as usize, wanted.keys.len());
                for key in &wanted.keys {
                    let found = self.store.index.find(key);
                    assert!(found.is_some_and(|f| f.ready), "{id} fired too early");
                }
            }
        }
        for lease in &self.leased() {
            let key = self.written[lease].key;
            let found = self.store.index.find(&key);
            let is_found = found.is_some_and(|f| f.at == *lease && f.ready && f.leased);
            assert_eq!(is_found, !self.damaged.contains(lease), "{lease:?}");
            assert!(self.store.index.is_leased(*lease), "a leased chunk is gone");
        }
        self.store.index.check();
        // Out of use is exactly what may still be written, and is not wanted any more.
        let unwanted = |(at, written): &(&SlotRef, &Written)| {
            let found = self.store.index.find(&written.key);
            !written.writing.is_empty() && found.is_none_or(|found| found.at != **at)
        };
        assert_eq!(
            self.store.index.census().quarantined as usize,
            self.written.iter().filter(unwanted).count()
        );
        assert!(self.store.index.available() >= self.store.handoffs.reserved());
        let all = self.store.handoffs.all().into_iter();
        let reserved: u64 = all
            .filter_map(|n| self.store.handoffs.get(n))
            .map(|h| u64::from(h.reserved()))
            .sum();
        assert_eq!(reserved, self.store.handoffs.reserved());
    }

    /// What nobody may take from whoever reads it.
    fn leased(&self) -> Vec<SlotRef> {
        let departed = self.departed.iter().flat_map(|(leases, _)| leases);
        self.leases
            .values()
            .flatten()
            .chain(departed)
            .copied()
            .collect()
    }

    /// Everybody leaves: nothing may stay behind.
    fn end(mut self) {
        for node in 0..3 {
            self.apply(Op::Gone { node });
        }
        self.apply(Op::Wait { seconds: 1000 });
        let stats = self.store.stats(self.now);
        assert_eq!(
            (stats.pending, stats.quarantined, stats.reserved),
            (0, 0, 0)
        );
        assert_eq!((stats.leased, self.store.index.leases()), (0, 0));
        assert_eq!(stats.used, stats.ready + stats.damaged);
        assert!(self.store.sessions.is_empty() && self.store.departed.is_empty());
        assert_eq!(self.store.index.available(), u64::from(stats.slots));
        for wanted in &self.handoffs {
            assert!(wanted.outcomes <= 1);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn no_history_breaks_a_promise(ops in ops()) {
        let mut world = World::new();
        for op in ops {
            world.apply(op);
        }
        world.end();
    }
}
