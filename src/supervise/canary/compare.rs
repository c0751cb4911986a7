//! Two continuations of one prompt, and the counter that says what was loaded. Pure.

use serde_json::Value;

use super::super::probe::metric;

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

    /// `self` was generated after loading, `computed` without. With a tolerance, another token
    /// that is about as likely is a near tie of kernels that depend on the batch; what follows
    /// then are two texts, so nothing beyond is compared.
    pub fn compare(&self, computed: &Self, tolerance: f64) -> Result<(), Difference> {
        for (position, (loaded, computed)) in self.tokens.iter().zip(&computed.tokens).enumerate() {
            // NaN is close to nothing.
            let close = (loaded.1 - computed.1).abs() <= tolerance;
            if loaded.0 != computed.0 {
                if close && tolerance > 0.0 {
                    return Ok(());
                }
                return Err(Difference::Token {
                    position,
                    loaded: loaded.0.clone(),
                    computed: computed.0.clone(),
                });
            }
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
    HITS.iter().filter_map(|name| metric(metrics, name)).sum()
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
    fn lengths_count_whatever_the_tolerance() {
        let one = parse(&[("a", -1.0), ("b", -2.0)]);
        let short = parse(&[("a", -1.0)]);
        let result = one.compare(&short, 100.0);
        assert!(matches!(result, Err(Difference::Length { .. })));
    }

    #[test]
    fn another_token_is_a_near_tie_only_within_the_tolerance() {
        let one = parse(&[("a", -1.0), ("b", -2.0), ("c", -1.0)]);
        let tie = parse(&[("a", -1.0), ("x", -2.05), ("y", -9.0)]);
        assert_eq!(one.compare(&tie, 0.1), Ok(()));
        let mut nan = tie.clone();
        nan.tokens[1].1 = f64::NAN;
        for (other, tolerance) in [
            // Equal logprobs, but bit-exactness was asked for.
            (parse(&[("a", -1.0), ("x", -2.0), ("c", -1.0)]), 0.0),
            (tie, 0.01),
            (nan, 0.1),
        ] {
            let result = one.compare(&other, tolerance);
            assert!(matches!(result, Err(Difference::Token { position: 1, .. })));
        }
        let far_before = parse(&[("a", -2.0), ("x", -2.0), ("c", -1.0)]);
        let result = one.compare(&far_before, 0.1);
        assert!(matches!(
            result,
            Err(Difference::Logprob { position: 0, .. })
        ));
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
