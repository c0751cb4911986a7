//! A report as one HTML page that needs nothing else: no script, no font, no other file.

use std::fmt::Write as _;

use super::report::{Report, Stats};

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2330;--dim:#5c6470;--line:#d5d9e0;--back:#fff;--a:#1f6feb}\
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--dim:#9aa3b2;--line:#3a4150;--back:#14171d;--a:#6ea8fe}}\
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:60rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}.wide{overflow-x:auto}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
th,td{padding:.3rem .8rem;text-align:right;border-bottom:1px solid var(--line)}\
th:first-child,td:first-child{text-align:left}\
.dim{color:var(--dim)}.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1.5rem}\
figure{margin:0;min-width:0}figcaption{font-weight:600}svg{width:100%;height:auto}\
svg text{fill:var(--dim);font-size:11px}svg .grid{stroke:var(--line)}\
svg .curve{stroke:var(--a);fill:none;stroke-width:2}svg .dot{fill:var(--a);fill-opacity:.5}";

/// A plot's size, in its own units, and the room for the figures beside it.
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 46.0;
const BELOW: f64 = 34.0;
const ABOVE: f64 = 10.0;
/// Lines of a grid, about.
const LINES: f64 = 4.0;

pub(super) fn page(report: &Report) -> String {
    let mut out =
        String::from("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n");
    let _ = writeln!(
        out,
        "<meta name=\"viewport\" content=\"width=device-width\">\n<title>pegaflow bench: {}</title>\n<style>{STYLE}</style></head><body>",
        escaped(&report.model)
    );
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
        let last = times.len().saturating_sub(1).max(1) as f64;
        let points = times.iter().enumerate();
        let points: Vec<_> = points
            .map(|(place, time)| (*time, 100.0 * place as f64 / last))
            .collect();
        plot(&mut out, name, ("ms", "%"), &points, Mark::Curve);
    }
    out.push_str("</div>\n<h2>In the course of the run</h2>\n<div class=\"plots\">\n");
    plot(
        &mut out,
        "TTFT by when it was sent",
        ("s", "ms"),
        &report.plots.ttft_at,
        Mark::Dots,
    );
    out.push_str("</div>\n</body></html>\n");
    out
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Curve,
    Dots,
}

/// Both axes begin at 0.
fn plot(out: &mut String, title: &str, units: (&str, &str), points: &[(f64, f64)], mark: Mark) {
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let (x_step, x_end) = axis(most(&mut points.iter().map(|point| point.0)));
    let (y_step, y_end) = axis(most(&mut points.iter().map(|point| point.1)));
    let x = |value: f64| LEFT + value / x_end * (WIDTH - LEFT - 8.0);
    let y = |value: f64| HEIGHT - BELOW - value / y_end * (HEIGHT - BELOW - ABOVE);
    let _ = writeln!(
        out,
        "<figure><figcaption>{title}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">"
    );
    let mut at = 0.0;
    while at <= x_end * 1.001 {
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{ABOVE}\" y2=\"{1:.1}\"/><text x=\"{0:.1}\" y=\"{2:.1}\" text-anchor=\"middle\">{3}</text>",
            x(at),
            y(0.0),
            HEIGHT - BELOW + 15.0,
            tick(at, x_step)
        );
        at += x_step;
    }
    let mut at = 0.0;
    while at <= y_end * 1.001 {
        let _ = write!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{1:.1}\" y1=\"{0:.1}\" y2=\"{0:.1}\"/><text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{4}</text>",
            y(at),
            x(x_end),
            LEFT - 6.0,
            y(at) + 4.0,
            tick(at, y_step)
        );
        at += y_step;
    }
    let (of_x, of_y) = units;
    let _ = write!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{of_x}</text><text x=\"2\" y=\"{}\">{of_y}</text>",
        WIDTH - 8.0,
        HEIGHT - 4.0,
        ABOVE + 2.0
    );
    match mark {
        Mark::Curve => {
            out.push_str("<polyline class=\"curve\" points=\"");
            for (at, value) in points {
                let _ = write!(out, "{:.1},{:.1} ", x(*at), y(*value));
            }
            out.push_str("\"/>");
        }
        Mark::Dots => {
            for (at, value) in points {
                let _ = write!(
                    out,
                    "<circle class=\"dot\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\"/>",
                    x(*at),
                    y(*value)
                );
            }
        }
    }
    out.push_str("</svg></figure>\n");
}

/// A round step between lines, and the axis' end, a multiple of it that is not below `most`.
fn axis(most: f64) -> (f64, f64) {
    if !(most.is_finite() && most > 0.0) {
        return (1.0, 1.0);
    }
    let rough = most / LINES;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|round| round * power)
        .into_iter()
        .find(|step| *step >= rough * 0.999);
    let step = step.unwrap_or(10.0 * power);
    (step, step * (most / step - 1e-9).ceil().max(1.0))
}

fn tick(value: f64, step: f64) -> String {
    let digits = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{value:.digits$}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_round_and_reach_everything() {
        for (most, step, end) in [
            (100.0, 50.0, 100.0),
            (97.0, 50.0, 100.0),
            (1_234.0, 500.0, 1_500.0),
            (0.37, 0.1, 0.4),
            (8.0, 2.0, 8.0),
            (0.0, 1.0, 1.0),
            (f64::NAN, 1.0, 1.0),
        ] {
            let (found, reached) = axis(most);
            assert!(
                (found - step).abs() < 1e-9 && (reached - end).abs() < 1e-9,
                "{most}: {found} {reached}"
            );
        }
        assert_eq!(
            (tick(0.2, 0.1), tick(50.0, 50.0)),
            ("0.2".to_owned(), "50".to_owned())
        );
    }
}
