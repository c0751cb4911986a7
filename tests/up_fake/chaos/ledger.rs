//! What became of every request.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::Value;

use crate::support::client::{Answer, Ending};
use crate::support::load::Expected;

/// The words of `docs/router.md` and `LegError::label` for what may be met here.
const REASONS: [&str; 11] = [
    "queue_full",
    "queue_timeout",
    "no_ready_node",
    "connect",
    "transport",
    "first_byte_timeout",
    "chunk_timeout",
    "status",
    "node_lost",
    "truncated",
    "in_stream",
];
/// Violations that are kept word by word.
const KEPT: usize = 20;

/// What one answer is.
#[derive(Debug, Clone, PartialEq)]
enum Verdict {
    /// All of it, and right.
    Right,
    /// An HTTP error that says why: status and code.
    Refused(u16, String),
    /// A right beginning and an error event that says why.
    BrokenOff(String),
    /// What must not be.
    Violation(&'static str),
}

fn judge(expected: &str, answer: &Answer) -> Verdict {
    match &answer.ending {
        Ending::Hung => Verdict::Violation("hung"),
        Ending::Torn => Verdict::Violation("torn: it ended without [DONE] or an error"),
        Ending::Complete if answer.text == expected => {
            match answer.tokens == expected.split_whitespace().count() {
                true => Verdict::Right,
                false => Verdict::Violation("another number of tokens than there are"),
            }
        }
        Ending::Complete if expected.starts_with(&answer.text) => {
            Verdict::Violation("truncated, with a clean-looking end")
        }
        Ending::Complete if answer.text.starts_with(expected) => {
            Verdict::Violation("more than the answer: duplicated")
        }
        Ending::Complete => Verdict::Violation("wrong text"),
        Ending::Refused(why) => refused(why).unwrap_or(Verdict::Violation("an unexplained error")),
        Ending::ErrorEvent(error) => {
            let error = serde_json::from_str(error).ok();
            let reason = error.and_then(|error| explained(&error));
            match reason {
                None => Verdict::Violation("an unexplained error event"),
                Some(_) if answer.text.is_empty() || !expected.starts_with(&answer.text) => {
                    Verdict::Violation("an error event after a wrong beginning")
                }
                Some(reason) => Verdict::BrokenOff(reason),
            }
        }
    }
}

fn refused(why: &str) -> Option<Verdict> {
    let (status, body) = why.split_once(": ")?;
    let status = status.split_whitespace().next()?.parse().ok()?;
    let body: Value = serde_json::from_str(body).ok()?;
    let known = [429, 502, 503, 504].contains(&status) && body["request_id"].is_string();
    known.then_some(Verdict::Refused(status, explained(&body["error"])?))
}

/// The reason that an error in OpenAI's shape names.
fn explained(error: &Value) -> Option<String> {
    let said = |name: &str| error[name].as_str().filter(|text| !text.is_empty());
    said("message").and(said("type"))?;
    said("code")
        .filter(|code| REASONS.contains(code))
        .map(str::to_owned)
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Requests that the rate asked for.
    pub(super) due: u64,
    /// Of these, those for which no place was free here.
    pub(super) unsent: u64,
    right: u64,
    refused: BTreeMap<(u16, String), u64>,
    broken_off: BTreeMap<String, u64>,
    violations: u64,
    kept: Vec<String>,
    /// Of right answers.
    totals: Vec<Duration>,
    /// Of right streams.
    firsts: Vec<Duration>,
}

impl Ledger {
    pub(super) fn enter(&mut self, (expected, answer): &(Expected, Answer)) {
        match judge(&expected.text, answer) {
            Verdict::Right => {
                self.right += 1;
                self.totals.push(answer.total);
                if expected.body["stream"] == true {
                    self.firsts.push(answer.first_byte);
                }
            }
            Verdict::Refused(status, code) => {
                *self.refused.entry((status, code)).or_default() += 1;
            }
            Verdict::BrokenOff(code) => *self.broken_off.entry(code).or_default() += 1,
            Verdict::Violation(what) => {
                self.violations += 1;
                if self.kept.len() < KEPT {
                    let (body, text) = (&expected.body, &expected.text);
                    let line = format!("{what}: expected {text:?} for {body}, got {answer:?}");
                    self.kept.push(line);
                }
            }
        }
    }

    fn sent(&self) -> u64 {
        self.due - self.unsent
    }

    pub(super) fn table(&mut self, time: Duration) -> String {
        let mut text = String::new();
        let rate = self.sent() as f64 / time.as_secs_f64();
        let mut row = |name: &str, count: u64| {
            let _ = writeln!(text, "{name:<44} {count:>8}");
        };
        row("due", self.due);
        row("not sent: too many at a time", self.unsent);
        row("sent", self.sent());
        row("right", self.right);
        for ((status, code), count) in &self.refused {
            row(&format!("refused: {status} {code}"), *count);
        }
        for (code, count) in &self.broken_off {
            row(&format!("broken off: {code}"), *count);
        }
        row("violations", self.violations);
        let _ = writeln!(text, "{:<44} {rate:>8.1}", "sent a second");
        for (name, values) in [
            ("right answers, all of it", &mut self.totals),
            ("right streams, first piece", &mut self.firsts),
        ] {
            values.sort_unstable();
            let at = |share: f64| {
                let last = values.len().saturating_sub(1);
                let value = values.get((last as f64 * share) as usize);
                value.copied().unwrap_or_default().as_millis()
            };
            let _ = writeln!(
                text,
                "{name:<28} ms: p50 {}, p90 {}, p99 {}, p99.9 {}, most {}",
                at(0.5),
                at(0.9),
                at(0.99),
                at(0.999),
                at(1.0)
            );
        }
        text
    }

    pub(super) fn assert_no_violation(&self) {
        let (count, kept) = (self.violations, self.kept.join("\n"));
        assert_eq!(count, 0, "answers that must not be:\n{kept}");
        let refused: u64 = self.refused.values().sum();
        let broken_off: u64 = self.broken_off.values().sum();
        assert_eq!(self.right + refused + broken_off, self.sent());
    }

    /// Most of what the rate asks for was sent, and most of that was answered: a router that refuses
    /// everything would have no violation either.
    pub(super) fn assert_load(&self, time: Duration, rate: u32) {
        let (planned, sent) = (time.as_secs() * u64::from(rate), self.sent());
        assert!(
            sent * 10 > planned * 8,
            "{sent} of {planned} sent: this machine is too slow"
        );
        assert!(self.right * 2 > sent, "{} of {sent} right", self.right);
    }

    /// The router's counters say the same, with `more` requests that were answered afterwards.
    pub(super) fn assert_router_agrees(&self, metrics: &str, more: usize) {
        let refused = |wanted: fn(u16) -> bool| {
            let counts = self.refused.iter();
            counts
                .filter(|((status, _), _)| wanted(*status))
                .map(|(_, count)| count)
                .sum()
        };
        let here: [(&str, u64); 6] = [
            ("ok", self.right + more as u64),
            ("refused", refused(|status| matches!(status, 429 | 503))),
            ("failed", refused(|status| !matches!(status, 429 | 503))),
            ("broken_off", self.broken_off.values().sum()),
            ("cancelled", 0),
            ("client_error", 0),
        ];
        for (outcome, count) in here {
            let label = format!("outcome=\"{outcome}\"");
            let counted: f64 = samples(metrics, "pegaflow_router_requests_total")
                .filter(|(name, _)| name.contains(&label))
                .map(|(_, value)| value)
                .sum();
            assert_eq!(counted as u64, count, "{outcome}, as the router counted");
        }
    }
}

/// Samples of one counter: name with labels, and value.
fn samples<'a>(metrics: &'a str, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
    let lines = metrics.lines().filter(move |line| line.starts_with(name));
    lines.filter_map(|line| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name, value.parse().ok()?))
    })
}

/// What the router did about failures.
pub(super) fn router_counters(metrics: &str) -> String {
    let kinds = [
        "retries",
        "retries_denied",
        "breakers_opened",
        "fallbacks",
        "replays",
        "requests",
    ];
    let names = kinds.map(|kind| format!("pegaflow_router_{kind}_total"));
    let all = names.iter().flat_map(|name| samples(metrics, name));
    all.filter(|(_, value)| *value > 0.0)
        .map(|(name, value)| format!("{name} {value}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(ending: Ending, text: &str) -> Answer {
        Answer {
            ending,
            text: text.to_owned(),
            tokens: text.split_whitespace().count(),
            first_byte: Duration::ZERO,
            total: Duration::ZERO,
        }
    }

    #[test]
    fn only_right_or_explained_answers_pass() {
        let judged = |ending, text| judge("t1 t2 ", &answer(ending, text));
        assert_eq!(judged(Ending::Complete, "t1 t2 "), Verdict::Right);
        for text in ["", "t1 ", "t1 t2 t2 ", "t1 t3 "] {
            let verdict = judged(Ending::Complete, text);
            assert!(matches!(verdict, Verdict::Violation(_)), "{text:?}");
        }
        for ending in [Ending::Hung, Ending::Torn] {
            assert!(matches!(judged(ending, "t1 t2 "), Verdict::Violation(_)));
        }
        let error = r#"{"message": "m", "type": "server_error", "code": "node_lost"}"#;
        let event = |text| judged(Ending::ErrorEvent(error.to_owned()), text);
        assert_eq!(event("t1 "), Verdict::BrokenOff("node_lost".to_owned()));
        assert!(matches!(event("t2 "), Verdict::Violation(_)));
        assert!(matches!(event(""), Verdict::Violation(_)));
        let refusal = format!(r#"502 Bad Gateway: {{"error": {error}, "request_id": "1"}}"#);
        assert_eq!(
            judged(Ending::Refused(refusal.clone()), ""),
            Verdict::Refused(502, "node_lost".to_owned())
        );
        for unexplained in [
            refusal.replace("node_lost", "who_knows"),
            refusal.replace("\"m\"", "\"\""),
            refusal.replace("502", "200"),
            "502 Bad Gateway: oops".to_owned(),
            "connection closed before message completed".to_owned(),
        ] {
            let verdict = judged(Ending::Refused(unexplained.clone()), "");
            assert!(matches!(verdict, Verdict::Violation(_)), "{unexplained}");
        }
    }
}
