//! What is asked, made from a seed.

use std::fmt::Write as _;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::Lengths;

/// Short words that most tokenizers have as one token each.
const WORDS: [&str; 64] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
];

/// When requests are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// As a Poisson process of so many a second, whether or not earlier ones are done. Infinite: all at once.
    Open { per_second: f64 },
    /// So many clients, each with one request at a time.
    Closed { clients: usize },
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
    pub seed: u64,
}

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Ask {
    pub(super) prompt: String,
    /// Tokens of the answer.
    pub(super) output: u32,
    /// After the beginning of the load.
    pub(super) due: Duration,
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
        let fixed = short.1 as f64 - per_word * short.0 as f64;
        (per_word > 0.0).then_some(Self {
            fixed: fixed.max(0.0),
            per_word,
        })
    }

    fn words(self, tokens: f64) -> usize {
        (tokens / self.per_word).round().max(1.0) as usize
    }
}

impl Load {
    pub(super) fn asks(&self, scale: Scale) -> Vec<Ask> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let prefixes = self.prefixes.max(1);
        let shared_words = match self.shared_prefix {
            0 => 0,
            tokens => scale.words(f64::from(tokens) - scale.fixed),
        };
        let shared: Vec<_> = (0..prefixes)
            .filter(|_| shared_words > 0)
            .map(|_| text(&mut rng, shared_words))
            .collect();
        let mut due = 0.0;
        (0..self.requests)
            .map(|number| {
                let tokens = self.input.draw(&mut rng);
                let words = scale.words(f64::from(tokens) - scale.fixed);
                let own = text(&mut rng, words.saturating_sub(shared_words).max(1));
                let prompt = match shared.get(number % prefixes) {
                    Some(shared) => format!("{shared} {own}"),
                    None => own,
                };
                let ask = Ask {
                    prompt,
                    output: self.output.draw(&mut rng),
                    due: Duration::try_from_secs_f64(due).unwrap_or_default(),
                };
                if let Pace::Open { per_second } = self.pace {
                    // 1 - x is never 0.
                    let gap = -(1.0 - rng.random_range(0.0..1.0_f64)).ln();
                    due += gap / per_second;
                }
                ask
            })
            .collect()
    }

    /// A prompt of so many words that no other is likely to begin like.
    pub(super) fn probe(&self, words: usize) -> String {
        text(&mut StdRng::seed_from_u64(!self.seed), words)
    }
}

fn text(rng: &mut StdRng, words: usize) -> String {
    let mut text = String::with_capacity(words * 6);
    for number in 0..words {
        let word = WORDS
            .get(rng.random_range(0..WORDS.len()))
            .unwrap_or(&"time");
        let space = if number == 0 { "" } else { " " };
        let _ = write!(text, "{space}{word}");
    }
    text
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
            seed: 7,
        }
    }

    #[test]
    fn the_same_seed_asks_the_same_and_another_does_not() {
        assert_eq!(load().asks(PLAIN), load().asks(PLAIN));
        let other = Load { seed: 8, ..load() };
        assert_ne!(load().asks(PLAIN)[0].prompt, other.asks(PLAIN)[0].prompt);
    }

    #[test]
    fn gaps_are_those_of_a_poisson_process() {
        let asks = load().asks(PLAIN);
        let gaps: Vec<f64> = asks
            .windows(2)
            .map(|two| (two[1].due - two[0].due).as_secs_f64())
            .collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((0.09..0.11).contains(&mean), "{mean}");
        // An exponential distribution's deviation is its mean.
        assert!(
            (0.9..1.1).contains(&(variance.sqrt() / mean)),
            "{}",
            variance.sqrt()
        );
        let at_once = Load {
            pace: Pace::Open {
                per_second: f64::INFINITY,
            },
            ..load()
        };
        assert!(at_once.asks(PLAIN).iter().all(|ask| ask.due.is_zero()));
        let closed = Load {
            pace: Pace::Closed { clients: 3 },
            ..load()
        };
        assert!(closed.asks(PLAIN).iter().all(|ask| ask.due.is_zero()));
    }

    #[test]
    fn prompts_have_as_many_words_as_the_tokens_need_and_share_what_they_should() {
        let words = |ask: &Ask| ask.prompt.split(' ').count();
        // A template of 10 tokens, and 2 for each word.
        let scale = Scale::from((10, 30), (100, 210)).unwrap();
        assert_eq!((scale.fixed, scale.per_word), (10.0, 2.0));
        for ask in load().asks(scale) {
            assert!((20..=70).contains(&words(&ask)), "{}", words(&ask));
        }
        assert_eq!(Scale::from((10, 5), (100, 5)), None);
        assert_eq!(Scale::from((10, 5), (10, 9)), None);
        let asks = Load {
            shared_prefix: 40,
            prefixes: 2,
            ..load()
        }
        .asks(PLAIN);
        let start = |number: usize| asks[number].prompt.split(' ').take(40).collect::<Vec<_>>();
        assert_eq!(start(0), start(2));
        assert_eq!(start(1), start(3));
        assert_ne!(start(0), start(1));
        assert_ne!(asks[0].prompt, asks[2].prompt);
        assert!(asks.iter().all(|ask| (50..=150).contains(&words(ask))));
    }
}
