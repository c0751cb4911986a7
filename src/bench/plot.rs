//! Plots as SVG, and the page around them: no script, no font, no other file.

use std::fmt::Write as _;

pub(super) const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2330;--dim:#5c6470;--line:#d5d9e0;--back:#fff;--a:#1f6feb;--b:#b35900}\
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--dim:#9aa3b2;--line:#3a4150;--back:#14171d;--a:#6ea8fe;--b:#f0a35e}}\
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:60rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}.wide{overflow-x:auto}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
th,td{padding:.3rem .8rem;text-align:right;border-bottom:1px solid var(--line)}\
th:first-child,td:first-child{text-align:left}\
.dim{color:var(--dim)}.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1.5rem}\
figure{margin:0;min-width:0}figcaption{font-weight:600}svg{width:100%;height:auto}\
svg text{fill:var(--dim);font-size:11px}svg .grid{stroke:var(--line)}\
svg .curve{stroke:var(--a);fill:none;stroke-width:2}svg .s1{stroke:var(--b);stroke-dasharray:6 3}svg .dot.s1{fill:var(--b);stroke:none}.key{display:inline-block;width:1.6rem;border-top:3px solid var(--a);margin:0 .4rem .25rem 1rem}.key.s1{border-top:3px dashed var(--b)}svg .dot{fill:var(--a);fill-opacity:.5}";

/// A plot's size, in its own units, and the room for the figures beside it.
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 46.0;
const BELOW: f64 = 34.0;
const ABOVE: f64 = 10.0;
/// Lines of a grid, about.
const LINES: f64 = 4.0;

/// A page's beginning, up to its body.
pub(super) fn begin(title: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n<title>pegaflow bench: {}</title>\n<style>{STYLE}</style></head><body>\n",
        escaped(title)
    )
}

pub(super) const END: &str = "</body></html>\n";

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    Curve,
    Dots,
}

/// One or two series, in the colours of [`STYLE`]. Both axes begin at 0.
pub(super) fn plot(
    out: &mut String,
    title: &str,
    units: (&str, &str),
    series: &[Vec<(f64, f64)>],
    mark: Mark,
) {
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let (x_step, x_end) = axis(most(&mut series.iter().flatten().map(|point| point.0)));
    let (y_step, y_end) = axis(most(&mut series.iter().flatten().map(|point| point.1)));
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
    for (number, points) in series.iter().enumerate() {
        match mark {
            Mark::Curve => {
                let _ = write!(out, "<polyline class=\"curve s{number}\" points=\"");
                for (at, value) in points {
                    let _ = write!(out, "{:.1},{:.1} ", x(*at), y(*value));
                }
                out.push_str("\"/>");
            }
            Mark::Dots => {
                for (at, value) in points {
                    let _ = write!(
                        out,
                        "<circle class=\"dot s{number}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\"/>",
                        x(*at),
                        y(*value)
                    );
                }
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

pub(super) fn escaped(text: &str) -> String {
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
