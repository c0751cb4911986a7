//! What a load felt like: one figure for many samples.
//!
//! | | of an answer |
//! |---|---|
//! | TTFT | from sending the request to the first piece |
//! | ITL | between two pieces, all of them together |
//! | TPOT | from the first piece to the last, by the number of tokens after the first |
//! | E2E | from sending the request to the last piece |
//!
//! Percentiles are interpolated between the two nearest, as NumPy and `vllm bench serve` do.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::ask::{Load, Pace};
use super::client::Sample;
use super::html;
use super::queue;
use super::slo::Slo;

/// In milliseconds. All 0 where nothing was measured.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Stats {
    pub count: usize,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Stats {
    fn of(times: impl IntoIterator<Item = Duration>) -> Self {
        let mut times: Vec<f64> = times
            .into_iter()
            .map(|time| time.as_secs_f64() * 1e3)
            .collect();
        times.sort_by(f64::total_cmp);
        let Some(max) = times.last().copied() else {
            return Self::default();
        };
        let at = |part: f64| {
            let place = part * (times.len() - 1) as f64;
            let below = times.get(place.floor() as usize).copied().unwrap_or(max);
            let above = times.get(place.ceil() as usize).copied().unwrap_or(max);
            below + (above - below) * place.fract()
        };
        Self {
            count: times.len(),
            mean: times.iter().sum::<f64>() / times.len() as f64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max,
        }
    }
}

impl Sample {
    pub(super) fn ttft(&self) -> Option<Duration> {
        self.pieces.first().copied()
    }

    pub(super) fn e2e(&self) -> Option<Duration> {
        self.pieces.last().copied()
    }

    pub(super) fn tpot(&self) -> Option<Duration> {
        let after_first = u32::try_from(self.output.checked_sub(1)?).ok()?;
        let time = self.e2e()?.checked_sub(self.ttft()?)?;
        time.checked_div(after_first)
    }

    fn gaps(&self) -> impl Iterator<Item = Duration> {
        let later = self.pieces.iter().skip(1);
        later
            .zip(&self.pieces)
            .map(|(later, earlier)| later.saturating_sub(*earlier))
    }
}

/// What a page shows besides figures; at most so many points that it stays small.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Plots {
    /// By name: times in ms, one for each of as many equal parts.
    pub(super) quantiles: Vec<(&'static str, Vec<f64>)>,
    /// TTFT in ms, by when the request was sent, in s.
    pub(super) ttft_at: Vec<(f64, f64)>,
}

/// Points of a curve.
const CURVE: usize = 201;
/// Dots of a plot.
const DOTS: usize = 2_000;

impl Plots {
    fn of(good: &[&Sample]) -> Self {
        let sent = |sample: &&Sample| {
            let ttft = sample.ttft()?.as_secs_f64() * 1e3;
            Some((sample.sent.as_secs_f64(), ttft))
        };
        let every = good.len().div_ceil(DOTS).max(1);
        Self {
            quantiles: vec![
                (
                    "TTFT",
                    curve(good.iter().filter_map(|sample| sample.ttft())),
                ),
                (
                    "TPOT",
                    curve(good.iter().filter_map(|sample| sample.tpot())),
                ),
                ("ITL", curve(good.iter().flat_map(|sample| sample.gaps()))),
                ("E2E", curve(good.iter().filter_map(|sample| sample.e2e()))),
            ],
            ttft_at: good.iter().step_by(every).filter_map(sent).collect(),
        }
    }
}

fn curve(times: impl Iterator<Item = Duration>) -> Vec<f64> {
    let mut times: Vec<f64> = times.map(|time| time.as_secs_f64() * 1e3).collect();
    times.sort_by(f64::total_cmp);
    let last = times.len().saturating_sub(1);
    let places = (0..CURVE).map(|point| point * last / (CURVE - 1));
    places
        .filter_map(|place| times.get(place).copied())
        .collect()
}

/// One run's figures; times are in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub endpoint: String,
    pub model: String,
    /// As it was asked for.
    pub load: String,
    pub seed: u64,
    pub seconds: f64,
    /// It was ended before its end.
    pub interrupted: bool,
    pub ok: usize,
    /// Why, and how often.
    pub failed: BTreeMap<String, usize>,
    /// As the endpoint counted them, of the answers that were complete.
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub requests_per_second: f64,
    pub output_tokens_per_second: f64,
    pub ttft: Stats,
    pub tpot: Stats,
    pub itl: Stats,
    pub e2e: Stats,
    /// How many requests were under way, on average, in each quarter of the time in which they were sent.
    pub under_way: [f64; 4],
    /// Answers that kept the limits, a second.
    pub goodput: Option<Goodput>,
    #[serde(skip)]
    pub(super) plots: Plots,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Goodput {
    pub slo: Slo,
    pub good: usize,
    pub per_second: f64,
}

/// What was asked, and where.
pub(super) struct Run<'a> {
    pub(super) endpoint: &'a str,
    pub(super) model: &'a str,
    pub(super) load: &'a Load,
    pub(super) slo: Option<&'a Slo>,
}

impl Report {
    /// As one HTML page that needs nothing else.
    pub fn html(&self) -> String {
        html::page(self)
    }

    pub(super) fn rows(&self) -> [(&'static str, &Stats); 4] {
        [
            ("TTFT", &self.ttft),
            ("TPOT", &self.tpot),
            ("ITL", &self.itl),
            ("E2E", &self.e2e),
        ]
    }

    pub(super) fn new(
        run: &Run<'_>,
        samples: &[Sample],
        took: Duration,
        interrupted: bool,
    ) -> Self {
        let Run { load, slo, .. } = run;
        let good: Vec<_> = samples
            .iter()
            .filter(|sample| sample.failure.is_none())
            .collect();
        let mut failed = BTreeMap::new();
        for why in samples.iter().filter_map(|sample| sample.failure) {
            *failed.entry(why.to_string()).or_default() += 1;
        }
        let lost = load.requests.saturating_sub(samples.len());
        if lost > 0 {
            failed.insert("not finished".to_owned(), lost);
        }
        let seconds = took.as_secs_f64();
        let rate = |count: f64| if seconds > 0.0 { count / seconds } else { 0.0 };
        let output_tokens = good.iter().map(|sample| sample.output).sum();
        let kept = |slo: &Slo| good.iter().filter(|sample| slo.is_kept(sample)).count();
        Self {
            endpoint: run.endpoint.to_owned(),
            model: run.model.to_owned(),
            plots: Plots::of(&good),
            load: load.to_string(),
            seed: load.seed,
            seconds,
            interrupted,
            ok: good.len(),
            failed,
            input_tokens: good.iter().map(|sample| sample.input).sum(),
            output_tokens,
            requests_per_second: rate(good.len() as f64),
            output_tokens_per_second: rate(output_tokens as f64),
            ttft: Stats::of(good.iter().filter_map(|sample| sample.ttft())),
            tpot: Stats::of(good.iter().filter_map(|sample| sample.tpot())),
            itl: Stats::of(good.iter().flat_map(|sample| sample.gaps())),
            e2e: Stats::of(good.iter().filter_map(|sample| sample.e2e())),
            under_way: queue::under_way(samples),
            goodput: slo.map(|slo| Goodput {
                slo: *slo,
                good: kept(slo),
                per_second: rate(kept(slo) as f64),
            }),
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.trace {
            Some(trace) => {
                let (requests, name) = (self.requests, &trace.name);
                write!(f, "{requests} requests of {name}, ")?;
            }
            None => {
                let Self {
                    requests,
                    input,
                    output,
                    ..
                } = self;
                write!(f, "{requests} requests, {input} tokens in, {output} out, ")?;
            }
        }
        match self.pace {
            Pace::Open { per_second } if per_second.is_infinite() => f.write_str("all at once")?,
            Pace::Open { per_second } if self.burstiness == 1.0 => {
                write!(f, "Poisson arrivals at {per_second}/s")?;
            }
            Pace::Open { per_second } => {
                let burstiness = self.burstiness;
                write!(f, "arrivals at {per_second}/s with burstiness {burstiness}")?;
            }
            Pace::Closed { clients } => write!(f, "{clients} at a time")?,
            Pace::Recorded { speed: 1.0 } => f.write_str("as recorded")?,
            Pace::Recorded { speed } => write!(f, "as recorded, {speed} times as fast")?,
        }
        if self.shared_prefix > 0 {
            let (tokens, prefixes) = (self.shared_prefix, self.prefixes);
            write!(f, ", {tokens} tokens shared ({prefixes} beginnings)")?;
        }
        if self.turns > 1 {
            write!(f, ", {} turns a conversation", self.turns)?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failed: usize = self.failed.values().sum();
        writeln!(f, "{} (seed {})", self.load, self.seed)?;
        writeln!(
            f,
            "{} answers in {:.1} s: {:.2}/s, {:.1} tokens/s; {} tokens in, {} out; {failed} failed",
            self.ok,
            self.seconds,
            self.requests_per_second,
            self.output_tokens_per_second,
            self.input_tokens,
            self.output_tokens,
        )?;
        for (why, count) in &self.failed {
            writeln!(f, "  failed: {count} x {why}")?;
        }
        writeln!(f)?;
        let mut table = String::new();
        let _ = writeln!(
            table,
            "{:8}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "ms", "mean", "p50", "p90", "p99", "max"
        );
        for (name, stats) in self.rows() {
            let Stats {
                mean,
                p50,
                p90,
                p99,
                max,
                ..
            } = stats;
            let _ = writeln!(
                table,
                "{name:8}{mean:>10.2}{p50:>10.2}{p90:>10.2}{p99:>10.2}{max:>10.2}"
            );
        }
        f.write_str(&table)?;
        if let Some(goodput) = &self.goodput {
            let (good, rate) = (goodput.good, goodput.per_second);
            writeln!(
                f,
                "\n{good} of {} answers kept the limits: {rate:.2}/s",
                self.ok
            )?;
        }
        if self.interrupted {
            writeln!(f, "\nIt was interrupted: these figures are of a part.")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::Failure;
    use super::*;

    fn millis(times: &[u64]) -> Vec<Duration> {
        times
            .iter()
            .map(|time| Duration::from_millis(*time))
            .collect()
    }

    #[test]
    fn percentiles_are_numpy_s() {
        // numpy.percentile([10, 20, 30, 40], [50, 90, 99])
        let stats = Stats::of(millis(&[40, 10, 30, 20]));
        let close = |left: f64, right: f64| (left - right).abs() < 1e-9;
        assert_eq!((stats.count, stats.mean, stats.max), (4, 25.0, 40.0));
        assert!(
            close(stats.p50, 25.0) && close(stats.p90, 37.0) && close(stats.p99, 39.7),
            "{stats:?}"
        );
        assert_eq!(Stats::of([]), Stats::default());
        assert_eq!(Stats::of(millis(&[7])).p99, 7.0);
    }

    #[test]
    fn what_failed_is_counted_and_not_measured() {
        let good = Sample {
            sent: Duration::ZERO,
            pieces: millis(&[100, 110, 130]),
            total: Duration::from_millis(140),
            input: 20,
            output: 3,
            failure: None,
        };
        let bad = Sample {
            failure: Some(Failure::Status(503)),
            ..good.clone()
        };
        let load = Load {
            requests: 4,
            pace: Pace::Closed { clients: 2 },
            input: "20".parse().unwrap(),
            output: "3".parse().unwrap(),
            shared_prefix: 0,
            prefixes: 1,
            burstiness: 1.0,
            turns: 1,
            think: Duration::ZERO,
            trace: None,
            seed: 1,
        };
        let slo = "ttft=1s".parse().unwrap();
        let samples = [good.clone(), bad.clone(), bad];
        let run = Run {
            endpoint: "http://127.0.0.1:1",
            model: "<b>",
            load: &load,
            slo: Some(&slo),
        };
        let report = Report::new(&run, &samples, Duration::from_secs(2), true);
        let page = report.html();
        assert!(
            page.contains("&lt;b&gt;") && !page.contains("<b>"),
            "{page}"
        );
        assert_eq!(page.matches("<svg").count(), 5);
        assert!(!page.contains("NaN") && !page.contains("src="), "{page}");
        let empty = Report::new(&run, &[], Duration::ZERO, true).html();
        assert!(!empty.contains("NaN") && !empty.contains("inf"), "{empty}");
        assert_eq!(report.ok, 1);
        assert_eq!(
            report.failed,
            BTreeMap::from([("status 503".to_owned(), 2), ("not finished".to_owned(), 1)])
        );
        assert_eq!((report.input_tokens, report.output_tokens), (20, 3));
        assert_eq!(
            (
                report.ttft.mean,
                report.tpot.mean,
                report.itl.mean,
                report.e2e.max
            ),
            (100.0, 15.0, 15.0, 130.0)
        );
        assert_eq!((report.itl.count, report.requests_per_second), (2, 0.5));
        assert_eq!(report.goodput.as_ref().unwrap().good, 1);
        let text = report.to_string();
        assert!(
            text.contains("4 requests, 20 tokens in, 3 out, 2 at a time"),
            "{text}"
        );
        assert!(
            text.contains("3 failed") && text.contains("interrupted"),
            "{text}"
        );
    }
}
