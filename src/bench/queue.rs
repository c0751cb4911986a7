//! Whether a queue grew in the course of a run: then its figures say how long the run was, not how good the endpoint is.

use std::time::Duration;

use super::Report;
use super::client::Sample;

/// By how much the number of requests under way may vary by chance.
const GROWTH: f64 = 1.5;

impl Report {
    /// In the last quarter there were not many more under way than in the second, which is when the first ones
    /// have long been answered.
    pub fn is_steady(&self) -> bool {
        let [_, second, _, last] = self.under_way;
        last <= second * GROWTH + 1.0
    }
}

/// How many requests were under way, on average, in each quarter of the time in which they were sent.
pub(super) fn under_way(samples: &[Sample]) -> [f64; 4] {
    let sent = samples.iter().map(|sample| sample.sent);
    let quarter = sent.max().unwrap_or_default() / 4;
    [0, 1, 2, 3].map(|number: u32| {
        let (from, to) = (quarter * number, quarter * (number + 1));
        let within = |sample: &Sample| {
            let end = (sample.sent + sample.total).min(to);
            end.saturating_sub(sample.sent.max(from))
        };
        let all: Duration = samples.iter().map(within).sum();
        match quarter.is_zero() {
            true => 0.0,
            false => all.div_duration_f64(quarter),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(total: impl Fn(u64) -> u64) -> Vec<Sample> {
        let sample = |second: u64| Sample {
            sent: Duration::from_secs(second),
            total: Duration::from_secs(total(second)),
            ..Sample::default()
        };
        (0..=100).map(sample).collect()
    }

    #[test]
    fn a_queue_that_grows_is_told_from_one_that_does_not() {
        // One a second, each two seconds long; before the first there was nothing.
        let [first, second, third, last] = under_way(&samples(|_| 2));
        assert!((1.9..2.0).contains(&first), "{first}");
        assert_eq!((second, third, last), (2.0, 2.0, 2.0));
        // Each takes longer than the one before it.
        let [_, second, _, last] = under_way(&samples(|number| 1 + number / 2));
        assert!(last > second * GROWTH + 1.0, "{second} {last}");
        assert_eq!(under_way(&[]), [0.0; 4]);
    }
}
