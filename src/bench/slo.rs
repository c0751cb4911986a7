//! When an answer is good.

use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

use super::client::Sample;

/// What an answer has to keep to be good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Slo {
    #[serde(serialize_with = "as_millis")]
    pub ttft: Option<Duration>,
    #[serde(serialize_with = "as_millis")]
    pub tpot: Option<Duration>,
    #[serde(serialize_with = "as_millis")]
    pub e2e: Option<Duration>,
}

fn as_millis<S: serde::Serializer>(limit: &Option<Duration>, s: S) -> Result<S::Ok, S::Error> {
    limit.map(|limit| limit.as_secs_f64() * 1e3).serialize(s)
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no limit: write ttft=500ms, tpot=50ms or e2e=10s, several with commas")]
pub struct SloError(String);

impl FromStr for Slo {
    type Err = SloError;

    fn from_str(text: &str) -> Result<Self, SloError> {
        let mut slo = Self::default();
        for part in text.split(',') {
            let wrong = || SloError(part.to_owned());
            let (name, limit) = part.split_once('=').ok_or_else(wrong)?;
            let limit = humantime::parse_duration(limit.trim()).map_err(|_| wrong())?;
            let place = match name.trim() {
                "ttft" => &mut slo.ttft,
                "tpot" => &mut slo.tpot,
                "e2e" => &mut slo.e2e,
                _ => return Err(wrong()),
            };
            *place = Some(limit);
        }
        Ok(slo)
    }
}

impl Slo {
    pub(super) fn is_kept(&self, sample: &Sample) -> bool {
        let keeps = |limit: Option<Duration>, time: Option<Duration>| match (limit, time) {
            (Some(limit), Some(time)) => time <= limit,
            (Some(_), None) => false,
            (None, _) => true,
        };
        // One token has no time between tokens.
        let tpot = sample
            .tpot()
            .or((sample.output == 1).then_some(Duration::ZERO));
        keeps(self.ttft, sample.ttft()) && keeps(self.tpot, tpot) && keeps(self.e2e, sample.e2e())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(times: &[u64]) -> Vec<Duration> {
        times.iter().copied().map(Duration::from_millis).collect()
    }

    #[test]
    fn limits_are_read_and_kept() {
        let slo: Slo = "ttft=500ms, tpot=10ms".parse().unwrap();
        let sample = |pieces: &[u64], output| Sample {
            pieces: millis(pieces),
            output,
            ..Sample::default()
        };
        assert!(slo.is_kept(&sample(&[500, 510, 520], 3)));
        assert!(!slo.is_kept(&sample(&[501, 510, 520], 3)));
        assert!(!slo.is_kept(&sample(&[400, 410, 421], 3)));
        // Several tokens came in one piece.
        assert!(slo.is_kept(&sample(&[400, 430], 4)));
        assert!(slo.is_kept(&sample(&[400], 1)));
        assert!(!slo.is_kept(&sample(&[], 0)));
        for text in ["", "ttft", "ttft=", "itl=3ms", "ttft=3", "ttft=1s,"] {
            assert!(text.parse::<Slo>().is_err(), "{text}");
        }
    }
}
