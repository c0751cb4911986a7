//! Hit rates on made-up traces, beside plain LRU: `--nocapture` prints them.
//!
//! A trace is a list of prompts, each a list of chunks of which the later need the earlier. Both
//! sides get a hit for every chunk of the longest prefix that they hold, then save the rest.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::Strategy;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::*;

const SLOTS: usize = 1_000;

type Prompt = Vec<u64>;

/// Plain LRU: every use moves a chunk to the end, and the first one goes. As kind to itself as can
/// be: a prompt's last chunk counts as used before its first.
#[derive(Default)]
struct Plain {
    used: HashMap<u64, u64>,
    order: BTreeMap<u64, u64>,
    tick: u64,
}

impl Plain {
    fn run(&mut self, prompt: &[u64]) -> usize {
        let hits = prompt
            .iter()
            .take_while(|c| self.used.contains_key(c))
            .count();
        for &chunk in prompt.iter().rev() {
            self.tick += 1;
            if let Some(old) = self.used.insert(chunk, self.tick) {
                self.order.remove(&old);
            }
            self.order.insert(self.tick, chunk);
        }
        while self.used.len() > SLOTS {
            let (_, chunk) = self.order.pop_first().unwrap();
            self.used.remove(&chunk);
        }
        hits
    }
}

struct Ours {
    index: Index,
    writer: Writer,
}

impl Ours {
    fn new() -> Self {
        let owner = Owner {
            node: "p".into(),
            incarnation: 1,
        };
        Self {
            index: Index::new(u32::try_from(SLOTS).unwrap(), 1),
            writer: Writer { owner, rank: 0 },
        }
    }

    fn run(&mut self, prompt: &[u64]) -> usize {
        let mut leases: Vec<SlotRef> = Vec::new();
        for chunk in prompt {
            let Some(found) = self.index.find(&chunk.to_le_bytes()) else {
                break;
            };
            self.index.lease(found.at);
            self.index.reuse(found.at);
            leases.push(found.at);
        }
        let hits = leases.len();
        for chunk in &prompt[hits..] {
            let new = NewChunk {
                key: &chunk.to_le_bytes(),
                parent: leases.last().copied(),
                owner: &self.writer.owner,
                since: std::time::Instant::now(),
            };
            let Some(at) = self.index.insert(new) else {
                break;
            };
            self.index.commit(at, &self.writer);
            self.index.lease(at);
            leases.push(at);
        }
        // The decode node looks the same chunks up, which is no other request.
        leases.iter().for_each(|&at| assert!(self.index.lease(at)));
        for &at in leases.iter().rev().chain(leases.iter().rev()) {
            self.index.unlease(at);
        }
        hits
    }
}

/// A random number below `n`, the same in every run.
struct Dice(TestRunner);

impl Dice {
    fn new() -> Self {
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        Self(TestRunner::new_with_rng(Config::default(), rng))
    }

    fn below(&mut self, n: u64) -> u64 {
        (0..n).new_tree(&mut self.0).unwrap().current()
    }
}

fn chunks(name: u64, len: u64) -> impl Iterator<Item = u64> {
    (0..len).map(move |at| (name << 16) + at)
}

/// Few system prompts, each followed by something that comes once.
fn shared_prefixes(dice: &mut Dice) -> Vec<Prompt> {
    let prompt = |n: u64| {
        let system = dice.below(12);
        chunks(system, 40).chain(chunks(100 + n, 20)).collect()
    };
    (0..2_000).map(prompt).collect()
}

/// Conversations of up to eight turns, forty of them at a time.
fn chats(dice: &mut Dice) -> Vec<Prompt> {
    let mut open: Vec<(u64, u64)> = (0..40).map(|n| (n, 0)).collect();
    let mut next = 40;
    let turn = |_| {
        let chosen = usize::try_from(dice.below(40)).unwrap();
        let (name, turn) = &mut open[chosen];
        *turn += 1;
        let prompt = chunks(*name, *turn * 8).collect();
        if *turn == 8 {
            open[chosen] = (next, 0);
            next += 1;
        }
        prompt
    };
    (0..3_000).map(turn).collect()
}

/// Long documents that nobody asks for twice.
fn scan() -> Vec<Prompt> {
    (0..300)
        .map(|n| chunks(1_000_000 + n, 150).collect())
        .collect()
}

/// Bursts of documents between the others' prompts.
fn with_scans(others: Vec<Prompt>) -> Vec<Prompt> {
    let mut scans = scan().into_iter().cycle();
    let mut mixed = Vec::new();
    let mut fresh = 2_000_000;
    for (n, prompt) in others.into_iter().enumerate() {
        mixed.push(prompt);
        if n % 40 == 0 {
            for _ in 0..8 {
                let len = scans.next().map_or(0, |document| document.len());
                mixed.push(chunks(fresh, len as u64).collect());
                fresh += 1;
            }
        }
    }
    mixed
}

/// The share of all chunks that were hits, in percent: ours, plain LRU's.
fn rates(name: &str, trace: &[Prompt]) -> (f64, f64) {
    let (mut ours, mut plain) = (Ours::new(), Plain::default());
    let total: usize = trace.iter().map(Vec::len).sum();
    let hits = trace.iter().fold((0, 0), |hits, prompt| {
        (hits.0 + ours.run(prompt), hits.1 + plain.run(prompt))
    });
    ours.index.check();
    let percent = |hits: usize| hits as f64 * 100.0 / total as f64;
    let rates = (percent(hits.0), percent(hits.1));
    println!("{name:<28} ours {:5.1} %  LRU {:5.1} %", rates.0, rates.1);
    rates
}

#[test]
fn no_trace_fares_worse_than_with_plain_lru_and_those_with_scans_better() {
    let mut dice = Dice::new();
    let prefixes = shared_prefixes(&mut dice);
    let chats = chats(&mut dice);
    let worse = |(ours, plain): (f64, f64)| ours < plain - 1.5;
    let alone = rates("shared prefixes", &prefixes);
    let disturbed = rates("shared prefixes and scans", &with_scans(prefixes));
    let chat = rates("chat", &chats);
    let both = rates("chat and scans", &with_scans(chats));
    let nothing = rates("scan", &scan());
    for rates in [alone, disturbed, chat, both, nothing] {
        assert!(!worse(rates), "{rates:?}");
    }
    assert_eq!(nothing, (0.0, 0.0));
    for rates in [disturbed, both] {
        assert!(
            rates.0 > rates.1 + 2.0,
            "a scan flushed what is shared: {rates:?}"
        );
    }
}
