//! Two continuations of one prompt, and the counter that says what was loaded. Pure.

use serde_json::Value;

/// vLLM's counter of prompt tokens found in the store; the suffix depends on the exporter.
const HITS: [&str; 2] = [
    "vllm:external_prefix_cache_hits_total",
    "vllm:external_prefix_cache_hits",
];

/// Where two continuations part.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Difference {
    #[error("{loaded} tokens after loading, {computed} computed")]
    Length { loaded: usize, computed: usize },
    #[error("token {position} is {loaded:?} after loading, {computed:?} computed")]
    Token {
        position: usize,
        loaded: String,
        computed: String,
    },
    #[error(
        "token {position} has logprob {loaded} after loading, {computed} computed (tolerance {tolerance})"
    )]
    Logprob {
        position: usize,
        loaded: f64,
        computed: f64,
        tolerance: f64,
    },
}

/// The generated tokens and their logprobs.
#[derive(Debug, Clone, PartialEq)]
pub struct Continuation {
    tokens: Vec<(String, f64)>,
}

impl Continuation {
    /// Reads `choices[0].logprobs` of a completion.
    pub fn parse(reply: &Value) -> Result<Self, &'static str> {
        let array = |name: &str| {
            reply
                .pointer(&format!("/choices/0/logprobs/{name}"))?
                .as_array()
        };
        let tokens = array("tokens").ok_or("tokens are missing")?;
        let logprobs = array("token_logprobs").ok_or("token_logprobs are missing")?;
        if tokens.is_empty() || tokens.len() != logprobs.len() {
            return Err("tokens and token_logprobs do not belong together");
        }
        let pair = |(token, logprob): (&Value, &Value)| {
            Some((token.as_str()?.to_owned(), logprob.as_f64()?))
        };
        let pairs: Option<Vec<_>> = tokens.iter().zip(logprobs).map(pair).collect();
        let tokens = pairs.ok_or("a token or its logprob has the wrong type")?;
        Ok(Self { tokens })
    }

    /// `self` was generated after loading, `computed` without.
    pub fn compare(&self, computed: &Self, tolerance: f64) -> Result<(), Difference> {
        for (position, (loaded, computed)) in self.tokens.iter().zip(&computed.tokens).enumerate() {
            if loaded.0 != computed.0 {
                return Err(Difference::Token {
                    position,
                    loaded: loaded.0.clone(),
                    computed: computed.0.clone(),
                });
            }
            let close = (loaded.1 - computed.1).abs() <= tolerance;
            // NaN is close to nothing.
            if !close {
                return Err(Difference::Logprob {
                    position,
                    loaded: loaded.1,
                    computed: computed.1,
                    tolerance,
                });
            }
        }
        if self.tokens.len() != computed.tokens.len() {
            return Err(Difference::Length {
                loaded: self.tokens.len(),
                computed: computed.tokens.len(),
            });
        }
        Ok(())
    }
}

/// The counter's sum over its labels; 0 if it is not there.
pub fn external_hits(metrics: &str) -> f64 {
    metrics.lines().filter_map(sample).sum()
}

fn sample(line: &str) -> Option<f64> {
    let name_end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at_checked(name_end)?;
    if !HITS.contains(&name) {
        return None;
    }
    let rest = match rest.rfind('}') {
        Some(end) => rest.get(end + 1..)?,
        None => rest,
    };
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn reply(tokens: &[(&str, f64)]) -> Value {
        let names: Vec<_> = tokens.iter().map(|token| token.0).collect();
        let logprobs: Vec<_> = tokens.iter().map(|token| token.1).collect();
        json!({"choices": [{"logprobs": {"tokens": names, "token_logprobs": logprobs}}]})
    }

    fn parse(tokens: &[(&str, f64)]) -> Continuation {
        Continuation::parse(&reply(tokens)).unwrap()
    }

    #[test]
    fn equal_is_equal_and_near_needs_tolerance() {
        let one = parse(&[("a", -1.0), ("b", -2.0)]);
        assert_eq!(one.compare(&one.clone(), 0.0), Ok(()));
        let near = parse(&[("a", -1.0), ("b", -2.01)]);
        assert_eq!(one.compare(&near, 0.1), Ok(()));
        let result = one.compare(&near, 0.0);
        assert!(matches!(
            result,
            Err(Difference::Logprob { position: 1, .. })
        ));
    }

    #[test]
    fn tokens_and_lengths_count_whatever_the_tolerance() {
        let one = parse(&[("a", -1.0), ("b", -2.0)]);
        let other = parse(&[("a", -1.0), ("c", -2.0)]);
        let result = one.compare(&other, 100.0);
        assert!(matches!(result, Err(Difference::Token { position: 1, .. })));
        let short = parse(&[("a", -1.0)]);
        let result = one.compare(&short, 100.0);
        assert!(matches!(result, Err(Difference::Length { .. })));
    }

    #[test]
    fn replies_without_logprobs_are_refused() {
        for reply in [
            json!({}),
            json!({"choices": [{"logprobs": null}]}),
            reply(&[]),
            json!({"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [null]}}]}),
        ] {
            assert!(Continuation::parse(&reply).is_err(), "{reply}");
        }
    }

    #[test]
    fn the_counter_is_summed_over_labels_and_its_neighbours_are_ignored() {
        let metrics = "# HELP vllm:external_prefix_cache_hits_total x\n\
            vllm:external_prefix_cache_hits_total{engine=\"0\",m=\"a } b\"} 96.0\n\
            vllm:external_prefix_cache_hits_total{engine=\"1\"} 4\n\
            vllm:external_prefix_cache_hits_created{engine=\"0\"} 1.7e9\n\
            vllm:external_prefix_cache_queries_total{engine=\"0\"} 500\n";
        assert_eq!(external_hits(metrics), 100.0);
        assert_eq!(external_hits("vllm:external_prefix_cache_hits 7"), 7.0);
        assert_eq!(external_hits(""), 0.0);
    }
}
