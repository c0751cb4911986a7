//! A report as one HTML page that needs nothing else: no script, no font, no other file.

use std::fmt::Write as _;

use super::plot::{self, Mark, escaped, plot};
use super::report::{Report, Stats};

pub(super) fn page(report: &Report) -> String {
    let mut out = plot::begin(&report.model);
    let _ = writeln!(
        out,
        "<h1>{} at {}</h1>\n<p>{} <span class=\"dim\">(seed {})</span></p>",
        escaped(&report.model),
        escaped(&report.endpoint),
        escaped(&report.load),
        report.seed
    );
    let _ = writeln!(
        out,
        "<p>{} answers in {:.1} s: {:.2} a second, {:.1} tokens a second; {} tokens in, {} out.</p>",
        report.ok,
        report.seconds,
        report.requests_per_second,
        report.output_tokens_per_second,
        report.input_tokens,
        report.output_tokens
    );
    if report.interrupted {
        out.push_str("<p><strong>It was interrupted: these figures are of a part.</strong></p>\n");
    }
    for (why, count) in &report.failed {
        let _ = writeln!(out, "<p>Failed: {count} × {}</p>", escaped(why));
    }
    if let Some(goodput) = &report.goodput {
        let (good, rate) = (goodput.good, goodput.per_second);
        let _ = writeln!(
            out,
            "<p>{good} of {} answers kept the limits: {rate:.2} a second.</p>",
            report.ok
        );
    }
    table(&mut out, report);
    out.push_str("<h2>How many took at most so long</h2>\n<div class=\"plots\">\n");
    for (name, times) in &report.plots.quantiles {
        plot(
            &mut out,
            name,
            ("ms", "%"),
            &[quantiles(times)],
            Mark::Curve,
        );
    }
    out.push_str("</div>\n<h2>In the course of the run</h2>\n<div class=\"plots\">\n");
    plot(
        &mut out,
        "TTFT by when it was sent",
        ("s", "ms"),
        std::slice::from_ref(&report.plots.ttft_at),
        Mark::Dots,
    );
    out.push_str("</div>\n");
    out.push_str(plot::END);
    out
}

/// Times, one for each of as many equal parts, as points of ms and %.
pub(super) fn quantiles(times: &[f64]) -> Vec<(f64, f64)> {
    let last = times.len().saturating_sub(1).max(1) as f64;
    let points = times.iter().enumerate();
    points
        .map(|(place, time)| (*time, 100.0 * place as f64 / last))
        .collect()
}

fn table(out: &mut String, report: &Report) {
    out.push_str("<div class=\"wide\"><table><thead><tr><th>ms");
    for column in ["mean", "p50", "p90", "p99", "max"] {
        let _ = write!(out, "<th scope=\"col\">{column}");
    }
    out.push_str("</thead><tbody>\n");
    for (name, stats) in report.rows() {
        let Stats {
            mean,
            p50,
            p90,
            p99,
            max,
            ..
        } = stats;
        let _ = write!(out, "<tr><th scope=\"row\">{name}");
        for value in [mean, p50, p90, p99, max] {
            let _ = write!(out, "<td>{value:.2}");
        }
        out.push('\n');
    }
    out.push_str("</tbody></table></div>\n");
}
