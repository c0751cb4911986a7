//! Two topologies under the same loads, side by side: the median of several rounds of each figure.

use std::fmt;
use std::fmt::Write as _;

use serde::Serialize;

use super::html::quantiles;
use super::plot::{self, Mark, escaped, plot};
use super::report::{Report, Stats};

/// What was found, load by load in the order in which they were tried.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The topologies' names. The second is what the first is measured by.
    pub names: [String; 2],
    pub rounds: usize,
    /// How the loads were chosen, where they were not given.
    pub capacity: Option<Capacity>,
    pub loads: Vec<Compared>,
    /// It was ended before its end.
    pub interrupted: bool,
}

/// What the second topology can do at most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Capacity {
    pub requests_per_second: f64,
    /// How many were asked at a time to find out.
    pub clients: usize,
}

/// One load on both.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Compared {
    /// Requests a second, on average.
    pub rate: f64,
    /// Of each round, the reports of both.
    pub rounds: Vec<[Report; 2]>,
}

/// One figure of both, each the median of the rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    pub name: &'static str,
    pub figures: [f64; 2],
}

impl Row {
    /// How many times as long the second one took.
    fn ratio(&self) -> f64 {
        let [first, second] = self.figures;
        if first > 0.0 { second / first } else { 0.0 }
    }

    /// `3.20x better`: how the first one does beside the second.
    fn verdict(&self) -> String {
        match self.ratio() {
            0.0 => "-".to_owned(),
            ratio if ratio >= 1.0 => format!("{ratio:.2}x better"),
            ratio => format!("{:.2}x worse", 1.0 / ratio),
        }
    }
}

type Figure = (&'static str, fn(&Report) -> f64);

const FIGURES: [Figure; 11] = [
    ("TTFT mean", |report| report.ttft.mean),
    ("TTFT p50", |report| report.ttft.p50),
    ("TTFT p99", |report| report.ttft.p99),
    ("TPOT mean", |report| report.tpot.mean),
    ("TPOT p50", |report| report.tpot.p50),
    ("TPOT p99", |report| report.tpot.p99),
    ("ITL mean", |report| report.itl.mean),
    ("ITL p50", |report| report.itl.p50),
    ("ITL p99", |report| report.itl.p99),
    ("ITL max", |report| report.itl.max),
    ("E2E mean", |report| report.e2e.mean),
];

impl Compared {
    pub fn rows(&self) -> Vec<Row> {
        let side =
            |figure: fn(&Report) -> f64, side: usize| median(self.side(side).map(figure).collect());
        FIGURES
            .into_iter()
            .map(|(name, figure)| Row {
                name,
                figures: [side(figure, 0), side(figure, 1)],
            })
            .collect()
    }

    fn side(&self, side: usize) -> impl Iterator<Item = &Report> {
        self.rounds.iter().filter_map(move |round| round.get(side))
    }

    /// Whether a queue grew while requests came.
    fn queue(&self, side: usize) -> String {
        let rounds: Vec<String> = self
            .side(side)
            .map(|report| {
                let quarters = report.under_way.map(|mean| format!("{mean:.1}"));
                let word = if report.is_steady() {
                    "steady"
                } else {
                    "grows"
                };
                format!("{} ({word})", quarters.join(" "))
            })
            .collect();
        rounds.join("; ")
    }

    fn failed(&self, side: usize) -> usize {
        self.side(side)
            .map(|report| report.failed.values().sum::<usize>())
            .sum()
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let at = |place: usize| values.get(place).copied().unwrap_or_default();
    match values.len() % 2 {
        0 => (at(middle.saturating_sub(1)) + at(middle)) / 2.0,
        _ => at(middle),
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, second] = &self.names;
        writeln!(f, "{}", self.title())?;
        if let Some(capacity) = &self.capacity {
            let Capacity {
                requests_per_second,
                clients,
            } = capacity;
            writeln!(
                f,
                "{second} alone does {requests_per_second:.2} requests/s with {clients} at a time"
            )?;
        }
        for load in &self.loads {
            let said = load
                .rounds
                .first()
                .map_or("", |[report, _]| report.load.as_str());
            writeln!(f, "\n{said}\n")?;
            let width = first.len().max(second.len()).max(10) + 2;
            writeln!(f, "{:12}{first:>width$}{second:>width$}", "ms")?;
            for row in load.rows() {
                let ([a, b], name) = (row.figures, row.name);
                let verdict = row.verdict();
                writeln!(f, "{name:12}{a:>width$.2}{b:>width$.2}   {verdict}")?;
            }
            for (side, name) in self.names.iter().enumerate() {
                let (queue, failed) = (load.queue(side), load.failed(side));
                writeln!(
                    f,
                    "{name}: under way in each quarter {queue}; {failed} failed"
                )?;
            }
        }
        if self.interrupted {
            writeln!(f, "\nIt was interrupted: rounds are missing.")?;
        }
        Ok(())
    }
}

impl Comparison {
    fn title(&self) -> String {
        let [first, second] = &self.names;
        let rounds = self.rounds;
        format!("{first} beside {second}: {rounds} rounds in turn, medians")
    }

    /// As one HTML page that needs nothing else.
    pub fn html(&self) -> String {
        let title = self.title();
        let [first, second] = self.names.each_ref().map(|name| escaped(name));
        let mut out = plot::begin(&title);
        let _ = writeln!(out, "<h1>{}</h1>", escaped(&title));
        if let Some(capacity) = &self.capacity {
            let _ = writeln!(
                out,
                "<p>{second} alone does {:.2} requests a second with {} at a time.</p>",
                capacity.requests_per_second, capacity.clients
            );
        }
        let _ = writeln!(
            out,
            "<p><span class=\"key\"></span>{first}<span class=\"key s1\"></span>{second}</p>"
        );
        if self.interrupted {
            out.push_str("<p><strong>It was interrupted: rounds are missing.</strong></p>\n");
        }
        if self.loads.len() > 1 {
            self.by_load(&mut out);
        }
        for load in &self.loads {
            self.one_load(&mut out, load);
        }
        out.push_str(plot::END);
        out
    }

    /// How the figures go with the load.
    fn by_load(&self, out: &mut String) {
        out.push_str("<h2>By load</h2>\n<div class=\"plots\">\n");
        for name in ["TTFT mean", "TPOT p99", "ITL p99", "E2E mean"] {
            let mut loads: Vec<&Compared> = self.loads.iter().collect();
            loads.sort_by(|left, right| left.rate.total_cmp(&right.rate));
            let series = [0, 1].map(|side| {
                let points = loads.iter().filter_map(|load| {
                    let rows = load.rows();
                    let row = rows.iter().find(|row| row.name == name)?;
                    Some((load.rate, row.figures.get(side).copied()?))
                });
                points.collect::<Vec<_>>()
            });
            plot(out, name, ("requests/s", "ms"), &series, Mark::Curve);
        }
        out.push_str("</div>\n");
    }

    fn one_load(&self, out: &mut String, load: &Compared) {
        let [first, second] = self.names.each_ref().map(|name| escaped(name));
        let said = load.rounds.first().map_or("", |[report, _]| &report.load);
        let _ = writeln!(out, "<h2>{}</h2>", escaped(said));
        let _ = writeln!(
            out,
            "<div class=\"wide\"><table><thead><tr><th>ms<th scope=\"col\">{first}<th scope=\"col\">{second}<th scope=\"col\">{first} is</thead><tbody>"
        );
        for row in load.rows() {
            let [a, b] = row.figures;
            let _ = writeln!(
                out,
                "<tr><th scope=\"row\">{}<td>{a:.2}<td>{b:.2}<td>{}",
                row.name,
                row.verdict()
            );
        }
        out.push_str("</tbody></table></div>\n");
        for (side, name) in [first, second].iter().enumerate() {
            let (queue, failed) = (load.queue(side), load.failed(side));
            let _ = writeln!(
                out,
                "<p class=\"dim\">{name}: requests under way in each quarter {queue}; {failed} failed.</p>"
            );
        }
        self.all_rounds(out, load);
        out.push_str(
            "<h3>How many took at most so long, in the last round</h3><div class=\"plots\">\n",
        );
        if let Some([first, second]) = load.rounds.last() {
            let both = first.plots.quantiles.iter().zip(&second.plots.quantiles);
            for ((name, times), (_, others)) in both {
                let series = [quantiles(times), quantiles(others)];
                plot(out, name, ("ms", "%"), &series, Mark::Curve);
            }
        }
        out.push_str("</div>\n");
    }

    /// Nothing is hidden behind a median.
    fn all_rounds(&self, out: &mut String, load: &Compared) {
        out.push_str("<details><summary>Every round</summary><div class=\"wide\"><table><thead><tr><th>round<th>answers<th>failed");
        for column in ["TTFT", "TPOT", "ITL"] {
            let _ = write!(out, "<th>{column} mean<th>p50<th>p99<th>max");
        }
        out.push_str("</thead><tbody>\n");
        for (number, round) in load.rounds.iter().enumerate() {
            for (report, name) in round.iter().zip(&self.names) {
                let failed: usize = report.failed.values().sum();
                let _ = write!(
                    out,
                    "<tr><th scope=\"row\">{}, {}<td>{}<td>{failed}",
                    number + 1,
                    escaped(name),
                    report.ok
                );
                for stats in [&report.ttft, &report.tpot, &report.itl] {
                    let Stats {
                        mean,
                        p50,
                        p99,
                        max,
                        ..
                    } = stats;
                    let _ = write!(out, "<td>{mean:.2}<td>{p50:.2}<td>{p99:.2}<td>{max:.2}");
                }
                out.push('\n');
            }
        }
        out.push_str("</tbody></table></div></details>\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios_are_of_the_figures() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
        assert_eq!(median(vec![]), 0.0);
        let row = |figures| Row {
            name: "ITL p99",
            figures,
        };
        assert_eq!(row([10.0, 66.0]).verdict(), "6.60x better");
        assert_eq!(row([131.0, 100.0]).verdict(), "1.31x worse");
        assert_eq!(row([0.0, 1.0]).verdict(), "-");
    }
}
