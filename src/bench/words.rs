//! What prompts are made of.

use std::fmt::Write as _;

use rand::RngExt as _;
use rand::rngs::StdRng;

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

/// So many random words.
pub(super) fn text(rng: &mut StdRng, words: usize) -> String {
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
