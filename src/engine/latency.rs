//! How long something took, counted by size: what a Prometheus histogram shows.

use std::time::Duration;

use serde::{Serialize, Serializer, ser::SerializeStruct};

/// Upper bounds in seconds; one more bucket takes what is longer.
const BOUNDS: [f64; 17] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0,
];

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Latencies {
    counts: [u64; BOUNDS.len()],
    longer: u64,
    sum: Duration,
}

impl Latencies {
    pub fn record(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        let mut buckets = self.counts.iter_mut().zip(BOUNDS);
        match buckets.find(|(_, bound)| seconds <= *bound) {
            Some((count, _)) => *count += 1,
            None => self.longer += 1,
        }
        self.sum = self.sum.saturating_add(took);
    }

    /// Counts what another has counted, too.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count += more;
        }
        self.longer += other.longer;
        self.sum = self.sum.saturating_add(other.sum);
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().sum::<u64>() + self.longer
    }

    /// In seconds.
    pub fn sum(&self) -> f64 {
        self.sum.as_secs_f64()
    }

    /// Upper bound in seconds and count of each bucket, not cumulated; the last has no bound.
    pub fn buckets(&self) -> Vec<(f64, u64)> {
        let bounded = BOUNDS.into_iter().zip(self.counts);
        bounded.chain([(f64::MAX, self.longer)]).collect()
    }
}

/// The status page shows count and sum; the buckets are for `/metrics`.
impl Serialize for Latencies {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Latencies", 2)?;
        fields.serialize_field("count", &self.count())?;
        fields.serialize_field("sum", &self.sum())?;
        fields.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_is_in_the_first_bucket_that_takes_it() {
        let mut latencies = Latencies::default();
        let micros = [0, 100, 101, 30_000_000, 30_000_001, u64::MAX];
        for micros in micros {
            latencies.record(Duration::from_micros(micros));
        }
        let buckets = latencies.buckets();
        let filled: Vec<_> = buckets
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .collect();
        assert_eq!(
            filled,
            [(0.0001, 2), (0.00025, 1), (30.0, 1), (f64::MAX, 2)]
        );
        assert_eq!(latencies.count(), 6);
        latencies.record(Duration::MAX);
        assert!(latencies.sum() > 1e19);
    }
}
