//! What is asked, made from a seed.

use std::sync::Arc;
use std::time::Duration;

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand_distr::{Distribution as _, Gamma};

use super::Lengths;
use super::trace::{Prompt, Trace};
use super::words::text;

/// No tokenizer has several of these words in one token; an endpoint that counts so does not count.
const LEAST_PER_WORD: f64 = 0.5;
/// Of a block of a Mooncake trace.
const BLOCK_TOKENS: f64 = 512.0;

/// When requests are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// So many a second at random times, whether or not earlier ones are done: see [`Load::burstiness`]. Infinite:
    /// all at once.
    Open { per_second: f64 },
    /// So many clients, each with one request at a time.
    Closed { clients: usize },
    /// When the trace says, so many times as fast.
    Recorded { speed: f64 },
}

/// What is asked of the endpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    pub requests: usize,
    pub pace: Pace,
    /// Of the whole prompt, with what it shares.
    pub input: Lengths,
    pub output: Lengths,
    /// Tokens at the beginning that prompts have in common.
    pub shared_prefix: u32,
    /// How many beginnings there are; prompts take turns.
    pub prefixes: usize,
    /// The shape of the gamma distribution that gaps have, as `vllm bench serve` has it: 1 is a Poisson process, more is
    /// more even, less comes in bursts.
    pub burstiness: f64,
    /// Requests of a conversation: each has all that was said before it in its prompt.
    pub turns: usize,
    /// From an answer to the next question.
    pub think: Duration,
    /// What is asked instead of random words.
    pub trace: Option<Arc<Trace>>,
    pub seed: u64,
}

/// One request, without what was said before it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Ask {
    pub(super) prompt: String,
    /// Tokens of the answer.
    pub(super) output: u32,
}

/// All requests of a load. Each is made when it is sent, from the seed and its number: together they may need more
/// memory than there is.
#[derive(Debug, Clone)]
pub(super) struct Asks {
    load: Load,
    scale: Scale,
    /// When each conversation begins, after the beginning of the load.
    due: Vec<Duration>,
}

/// How many tokens a prompt of words has: so many that every prompt has, and so many for each word.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scale {
    pub(super) fixed: f64,
    pub(super) per_word: f64,
}

impl Scale {
    /// From two prompts: their words and tokens. `None`: they say nothing.
    pub(super) fn from(short: (usize, u64), long: (usize, u64)) -> Option<Self> {
        let words = long.0.checked_sub(short.0).filter(|words| *words > 0)?;
        let per_word = long.1.checked_sub(short.1)? as f64 / words as f64;
        let per_word = per_word.max(LEAST_PER_WORD);
        let fixed = short.1 as f64 - per_word * short.0 as f64;
        (long.1 > short.1).then_some(Self {
            fixed: fixed.max(0.0),
            per_word,
        })
    }

    fn words(self, tokens: f64) -> usize {
        (tokens / self.per_word).round().max(1.0) as usize
    }
}

impl Asks {
    pub(super) fn new(load: &Load, scale: Scale) -> Self {
        let mut rng = load.rng(Stream::Times);
        let gaps = Gamma::new(load.burstiness, 1.0 / load.burstiness).ok();
        let mut at = 0.0;
        let due = (0..load.conversations()).map(|number| match load.pace {
            Pace::Closed { .. } => Duration::ZERO,
            Pace::Recorded { speed } => load.recorded(number).div_f64(speed),
            Pace::Open { per_second } => {
                let due = Duration::try_from_secs_f64(at).unwrap_or_default();
                // Of mean 1. A burstiness that is none is not let in.
                let gap = gaps.map_or(1.0, |gaps| gaps.sample(&mut rng));
                at += gap * load.turns as f64 / per_second;
                due
            }
        });
        Self {
            due: due.collect(),
            load: load.clone(),
            scale,
        }
    }

    pub(super) fn conversations(&self) -> usize {
        self.due.len()
    }

    pub(super) fn due(&self, conversation: usize) -> Duration {
        self.due.get(conversation).copied().unwrap_or_default()
    }

    /// From an answer to the next question.
    pub(super) fn think(&self) -> Duration {
        self.load.think
    }

    /// `None`: nothing more is said.
    pub(super) fn get(&self, conversation: usize, turn: usize) -> Option<Ask> {
        match &self.load.trace {
            Some(trace) => self.recorded(trace, conversation, turn),
            None => self.random(conversation, turn),
        }
    }

    fn recorded(&self, trace: &Trace, conversation: usize, turn: usize) -> Option<Ask> {
        let recorded = trace.conversations.get(conversation)?.turns.get(turn)?;
        let prompt = match &recorded.prompt {
            Prompt::Text(said) => said.clone(),
            Prompt::Tokens { count, blocks } => self.blocks(conversation, *count, blocks),
        };
        Some(Ask {
            prompt,
            output: recorded.output,
        })
    }

    /// Blocks of the same number are the same words.
    fn blocks(&self, conversation: usize, tokens: u32, blocks: &[u64]) -> String {
        let Self { load, scale, .. } = self;
        let mut missing = scale.words(f64::from(tokens) - scale.fixed);
        let of_block = scale.words(BLOCK_TOKENS);
        let mut parts = Vec::new();
        for block in blocks {
            let words = missing.min(of_block);
            missing -= words;
            if words > 0 {
                parts.push(text(&mut load.rng(Stream::Block(*block)), words));
            }
        }
        if missing > 0 {
            parts.push(text(&mut load.rng(Stream::Request(conversation)), missing));
        }
        parts.join(" ")
    }

    fn random(&self, conversation: usize, turn: usize) -> Option<Ask> {
        let Self { load, scale, .. } = self;
        let number = conversation * load.turns + turn;
        if turn >= load.turns || number >= load.requests {
            return None;
        }
        let mut rng = load.rng(Stream::Request(number));
        let tokens = load.input.draw(&mut rng);
        let output = load.output.draw(&mut rng);
        let words = scale.words(f64::from(tokens) - scale.fixed);
        // Later turns begin with what was said before.
        if load.shared_prefix == 0 || turn > 0 {
            let prompt = text(&mut rng, words);
            return Some(Ask { prompt, output });
        }
        let shared_words = scale.words(f64::from(load.shared_prefix) - scale.fixed);
        let place = conversation % load.prefixes.max(1);
        let shared = text(&mut load.rng(Stream::Prefix(place)), shared_words);
        let own = text(&mut rng, words.saturating_sub(shared_words).max(1));
        let prompt = format!("{shared} {own}");
        Some(Ask { prompt, output })
    }
}

/// What random numbers are for: each has its own.
#[derive(Clone, Copy)]
enum Stream {
    Times,
    Probe,
    Prefix(usize),
    Request(usize),
    Block(u64),
}

impl Load {
    fn conversations(&self) -> usize {
        match &self.trace {
            Some(trace) => trace.conversations.len(),
            None => self.requests.div_ceil(self.turns.max(1)),
        }
    }

    fn recorded(&self, conversation: usize) -> Duration {
        let trace = self.trace.as_ref();
        let found = trace.and_then(|trace| trace.conversations.get(conversation));
        found.map_or(Duration::ZERO, |found| found.at)
    }

    fn rng(&self, stream: Stream) -> StdRng {
        let (kind, number) = match stream {
            Stream::Times => (0, 0),
            Stream::Probe => (1, 0),
            Stream::Prefix(number) => (2, number as u64),
            Stream::Request(number) => (3, number as u64),
            Stream::Block(number) => (4, number),
        };
        let mut seed = [0; 32];
        let parts = [self.seed, kind, number];
        for (place, byte) in seed
            .iter_mut()
            .zip(parts.iter().flat_map(|part| part.to_le_bytes()))
        {
            *place = byte;
        }
        StdRng::from_seed(seed)
    }

    /// A prompt of so many words that no other is likely to begin like.
    pub(super) fn probe(&self, words: usize) -> String {
        text(&mut self.rng(Stream::Probe), words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Scale = Scale {
        fixed: 0.0,
        per_word: 1.0,
    };

    fn load() -> Load {
        Load {
            requests: 2_000,
            pace: Pace::Open { per_second: 10.0 },
            input: "50-150".parse().unwrap(),
            output: "8".parse().unwrap(),
            shared_prefix: 0,
            prefixes: 1,
            burstiness: 1.0,
            turns: 1,
            think: Duration::ZERO,
            trace: None,
            seed: 7,
        }
    }

    fn asks(load: &Load, scale: Scale) -> Vec<Ask> {
        let asks = Asks::new(load, scale);
        (0..asks.conversations())
            .map(|number| asks.get(number, 0).unwrap())
            .collect()
    }

    fn due(load: &Load) -> Vec<f64> {
        Asks::new(load, PLAIN)
            .due
            .iter()
            .map(Duration::as_secs_f64)
            .collect()
    }

    #[test]
    fn the_same_seed_asks_the_same_and_another_does_not() {
        assert_eq!(asks(&load(), PLAIN), asks(&load(), PLAIN));
        assert_eq!(due(&load()), due(&load()));
        let other = Load { seed: 8, ..load() };
        assert_ne!(
            asks(&load(), PLAIN)[0].prompt,
            asks(&other, PLAIN)[0].prompt
        );
        assert_ne!(due(&load()), due(&other));
    }

    #[test]
    fn gaps_are_those_of_a_poisson_process() {
        let due = due(&load());
        let gaps: Vec<f64> = due.windows(2).map(|two| two[1] - two[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let squares = gaps.iter().map(|gap| (gap - mean).powi(2));
        let deviation = (squares.sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((0.09..0.11).contains(&mean), "{mean}");
        // An exponential distribution's deviation is its mean.
        assert!((0.9..1.1).contains(&(deviation / mean)), "{deviation}");
        let even = Load {
            burstiness: 100.0,
            ..load()
        };
        let due = self::due(&even);
        let gaps: Vec<f64> = due.windows(2).map(|two| two[1] - two[0]).collect();
        let near = gaps.iter().filter(|gap| (0.07..0.13).contains(*gap));
        assert!(near.count() > gaps.len() * 99 / 100, "{gaps:?}");
        for pace in [
            Pace::Open {
                per_second: f64::INFINITY,
            },
            Pace::Closed { clients: 3 },
        ] {
            let at_once = Load { pace, ..load() };
            assert!(self::due(&at_once).iter().all(|due| *due == 0.0));
        }
    }

    #[test]
    fn prompts_have_as_many_words_as_the_tokens_need_and_share_what_they_should() {
        let words = |ask: &Ask| ask.prompt.split(' ').count();
        // A template of 10 tokens, and 2 for each word.
        let scale = Scale::from((10, 30), (100, 210)).unwrap();
        assert_eq!((scale.fixed, scale.per_word), (10.0, 2.0));
        for ask in asks(&load(), scale) {
            assert!((20..=70).contains(&words(&ask)), "{}", words(&ask));
        }
        assert_eq!(Scale::from((10, 5), (100, 5)), None);
        assert_eq!(Scale::from((10, 5), (10, 9)), None);
        let sharing = Load {
            shared_prefix: 40,
            prefixes: 2,
            ..load()
        };
        let asks = asks(&sharing, PLAIN);
        let start = |number: usize| asks[number].prompt.split(' ').take(40).collect::<Vec<_>>();
        assert_eq!(start(0), start(2));
        assert_eq!(start(1), start(3));
        assert_ne!(start(0), start(1));
        assert_ne!(asks[0].prompt, asks[2].prompt);
        assert!(asks.iter().all(|ask| (50..=150).contains(&words(ask))));
    }
}
