//! What a request asks of a node, as far as its bytes tell: about how many tokens, and how its prompt begins. Pure.
//!
//! The router does not tokenize. A token of text is taken for [`BYTES_PER_TOKEN`] bytes of JSON, one of a prompt in token
//! ids for [`BYTES_PER_ID`]. Both are fixed. What replies say in `usage` could teach a better number, but hardly a
//! better choice: nodes are compared with each other, and an error that all requests share drops out of that. What
//! remains is the proportion of a prompt to an answer, and whether a prompt is short, for which an order of magnitude
//! does.

use std::hash::{BuildHasher, Hasher};
use std::sync::OnceLock;

use foldhash::fast::FixedState;
use http::HeaderMap;

use super::body::Fields;

const BYTES_PER_TOKEN: u64 = 4;
/// Four or five digits and a comma.
const BYTES_PER_ID: u64 = 6;
/// For what every request costs besides its text, so that empty ones count too.
const LEAST: u64 = 16;
/// More is no prompt but a picture in base64, of which few tokens are left.
const MOST: u64 = 256 * 1024;
/// Where the client names no limit; and a limit is seldom reached, so no more than [`MOST_OUTPUT`] are expected.
const OUTPUT: u64 = 256;
const MOST_OUTPUT: u64 = 1024;
/// Bytes after which the beginning of a prompt is remembered. Between two of them a match is taken for the shorter.
const LEVELS: [usize; 7] = [
    1 << 10,
    2 << 10,
    4 << 10,
    8 << 10,
    16 << 10,
    32 << 10,
    64 << 10,
];

/// Of a session's name; a longer one names none.
const MOST_SESSION: usize = 256;

/// About how many tokens.
#[derive(Debug)]
pub(super) struct Demand<'a> {
    pub(super) prompt: u64,
    pub(super) output: u64,
    /// A hash of its session's name.
    pub(super) session: Option<u64>,
    shape: Shape<'a>,
    prefix: OnceLock<Prefix>,
}

/// A hash of the session that the client names in this header.
pub(super) fn session(headers: &HeaderMap, name: Option<&str>) -> Option<u64> {
    let value = headers.get(name?)?.as_bytes();
    let usable = (1..=MOST_SESSION).contains(&value.len());
    usable.then(|| FixedState::default().hash_one(value))
}

/// The beginnings of a prompt, of 1 KiB, 2 KiB, ... as far as it goes: one hash each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Prefix {
    hashes: [u64; LEVELS.len()],
    known: usize,
}

impl Prefix {
    /// The longest first: its hash, and about how many tokens it has.
    pub(super) fn longest_first(&self) -> impl Iterator<Item = (u64, u64)> {
        let levels = self.hashes.iter().zip(LEVELS).take(self.known).rev();
        levels.map(|(hash, bytes)| (*hash, bytes as u64 / BYTES_PER_TOKEN))
    }

    /// Of the parts, in the order in which they stand in the prompt.
    fn of<'a>(parts: impl Iterator<Item = &'a [u8]>) -> Self {
        let mut prefix = Self::default();
        let mut hasher = FixedState::default().build_hasher();
        let mut seen = 0;
        for mut part in parts {
            while let Some(level) = LEVELS.get(prefix.known) {
                let wanted = level - seen;
                let Some((now, rest)) = part.split_at_checked(wanted) else {
                    break;
                };
                hasher.write(now);
                if let Some(hash) = prefix.hashes.get_mut(prefix.known) {
                    *hash = hasher.finish();
                }
                prefix.known += 1;
                (seen, part) = (*level, rest);
            }
            if prefix.known == LEVELS.len() {
                break;
            }
            hasher.write(part);
            // Where a part ends is a part of what it says.
            hasher.write_usize(part.len());
            seen += part.len();
        }
        prefix
    }
}

impl<'a> Demand<'a> {
    /// `body`: how many bytes it has.
    pub(super) fn of(fields: &'a Fields<'a>, body: usize, session: Option<u64>) -> Self {
        let mut shape = Shape::default();
        let mut limit = None;
        for (key, raw) in fields.iter() {
            match key {
                "model" => shape.model = raw,
                "tools" => shape.tools = raw,
                "system" | "instructions" => shape.system = raw,
                "messages" | "prompt" | "input" => shape.prompt = raw,
                "max_tokens" | "max_completion_tokens" | "max_output_tokens" => {
                    limit = raw.parse::<u64>().ok().or(limit);
                }
                _ => {}
            }
        }
        Self {
            prompt: shape.tokens(body),
            output: limit.unwrap_or(OUTPUT).clamp(1, MOST_OUTPUT),
            session,
            shape,
            prefix: OnceLock::new(),
        }
    }

    /// Only computed where there is something to choose.
    pub(super) fn prefix(&self) -> &Prefix {
        let parts = || self.shape.parts().into_iter().map(str::as_bytes);
        self.prefix.get_or_init(|| Prefix::of(parts()))
    }
}

/// What a prompt is made of, as JSON.
#[derive(Debug, Default)]
struct Shape<'a> {
    model: &'a str,
    tools: &'a str,
    system: &'a str,
    prompt: &'a str,
}

impl<'a> Shape<'a> {
    /// As chat templates put them together; the model is there so that two models share nothing.
    fn parts(&self) -> [&'a str; 4] {
        [self.model, self.tools, self.system, self.prompt]
    }

    /// `body`: its bytes, for what has no such parts.
    fn tokens(&self, body: usize) -> u64 {
        let text = self.tools.len() + self.system.len();
        let prompt = match self.prompt.as_bytes() {
            [] if text == 0 => body as u64 / BYTES_PER_TOKEN,
            [b'[', b' ' | b'0'..=b'9', ..] => self.prompt.len() as u64 / BYTES_PER_ID,
            _ => self.prompt.len() as u64 / BYTES_PER_TOKEN,
        };
        (prompt + text as u64 / BYTES_PER_TOKEN).clamp(LEAST, MOST)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// Tokens of prompt and output, and the prefix.
    fn demand(body: &Value) -> (u64, u64, Prefix) {
        let text = body.to_string();
        let fields = Fields::parse(text.as_bytes()).unwrap();
        let demand = Demand::of(&fields, text.len(), None);
        (demand.prompt, demand.output, *demand.prefix())
    }

    fn shared(a: &Value, b: &Value) -> u64 {
        let (a, b) = (demand(a).2, demand(b).2);
        let mut known = a.longest_first();
        let same = known.find(|(hash, _)| b.longest_first().any(|(other, _)| other == *hash));
        same.map_or(0, |(_, tokens)| tokens)
    }

    #[test]
    fn tokens_are_estimated_from_bytes() {
        let ids: Vec<u32> = (10_000..11_000).collect();
        for (body, prompt, output) in [
            (json!({"prompt": "x".repeat(3_998)}), 1_000, OUTPUT),
            (json!({"prompt": ids, "max_tokens": 8}), 1_000, 8),
            (
                json!({"prompt": "hi", "max_tokens": 1_000_000}),
                LEAST,
                MOST_OUTPUT,
            ),
            (
                json!({"prompt": "hi", "max_completion_tokens": 0}),
                LEAST,
                1,
            ),
            (json!({"prompt": "hi", "max_tokens": "many"}), LEAST, OUTPUT),
            (
                json!({"messages": [{"content": "x".repeat(4 << 20)}]}),
                MOST,
                OUTPUT,
            ),
            (
                json!({"tools": "t".repeat(398), "messages": "m".repeat(398)}),
                200,
                OUTPUT,
            ),
            (json!({"file": "x".repeat(3_989)}), 1_000, OUTPUT),
        ] {
            let (found_prompt, found_output, _) = demand(&body);
            assert_eq!((found_prompt, found_output), (prompt, output));
        }
        assert_eq!(Demand::of(&Fields::default(), 8_000, None).prompt, 2_000);
    }

    #[test]
    fn a_session_is_what_the_header_says_if_it_is_no_book() {
        let named = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("x-session-id", value.parse().unwrap());
            session(&headers, Some("x-session-id"))
        };
        assert!(named("a").is_some());
        assert_eq!(named("a"), named("a"));
        assert_ne!(named("a"), named("b"));
        assert_eq!((named(""), named(&"a".repeat(257))), (None, None));
        assert_eq!(session(&HeaderMap::new(), Some("x-session-id")), None);
        assert_eq!(session(&HeaderMap::new(), None), None);
    }

    #[test]
    fn what_begins_alike_shares_its_beginning() {
        let text = "x".repeat(5_000);
        let a = json!({"model": "m", "prompt": format!("{text}a"), "temperature": 0});
        let b = json!({"prompt": format!("{text}b"), "model": "m", "stream": true});
        assert_eq!(shared(&a, &b), 4_096 / BYTES_PER_TOKEN);
        // A conversation and its next turn.
        let turn = |count: usize| {
            let messages = vec![json!({"role": "user", "content": "x".repeat(1_000)}); count];
            json!({"model": "m", "messages": messages})
        };
        assert_eq!(shared(&turn(3), &turn(9)), 2_048 / BYTES_PER_TOKEN);
        let other = json!({"model": "n", "prompt": format!("{text}a")});
        assert_eq!(shared(&a, &other), 0);
        let tools = json!({"model": "m", "tools": [1], "prompt": format!("{text}a")});
        assert_eq!(shared(&a, &tools), 0);
        let short = json!({"model": "m", "prompt": "x".repeat(500)});
        assert_eq!(shared(&short, &short), 0, "too short to be worth it");
    }

    proptest! {
        #[test]
        fn the_longest_common_level_is_found(
            common in 0usize..70_000, tails in (1usize..3_000, 1usize..3_000),
        ) {
            let body = |tail: &str, count: usize| {
                json!({"prompt": "c".repeat(common) + &tail.repeat(count)})
            };
            let (a, b) = (body("a", tails.0), body("b", tails.1));
            // The quote before the text is common too.
            let expected = LEVELS.iter().rfind(|level| **level <= common + 1).unwrap_or(&0);
            prop_assert_eq!(shared(&a, &b), *expected as u64 / BYTES_PER_TOKEN);
        }
    }
}
