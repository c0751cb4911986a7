//! The status for people: at most as wide as the terminal. Pure.

use std::fmt::Write as _;

use bytesize::ByteSize;
use console::Style;

use crate::control::{NodeStatus, State, Status};
use crate::host::GpuFigures;
use crate::plan::ranges;

/// Where the table goes.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Columns; `None`: nobody counts them, nothing is cut or wrapped.
    pub width: Option<usize>,
    pub colour: bool,
}

const GAP: usize = 2;
const HEADER: [&str; 8] = [
    "NODE",
    "ROLE",
    "PHASE",
    "SINCE",
    "RESTARTS",
    "DEVICE",
    "PORT",
    "IN-FLIGHT",
];
const PHASE: usize = 2;
/// The names of nodes and devices may be cut to this, to fit.
const SHORTEST: usize = 8;
const REASON_INDENT: usize = 4;

pub fn render(status: &Status, layout: Layout) -> String {
    let mut text = head(status, layout);
    if status.nodes.is_empty() {
        return text;
    }
    let mut rows: Vec<[String; 8]> = status.nodes.iter().map(row).collect();
    rows.insert(0, HEADER.map(str::to_owned));
    let widths = fit(&mut rows, layout.width);
    let nodes = std::iter::once(None).chain(status.nodes.iter().map(Some));
    text.push('\n');
    for (row, node) in rows.iter().zip(nodes) {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            let padded = format!("{cell:width$}{:GAP$}", "");
            let styled = match node {
                Some(node) if column == PHASE => paint(&node.phase, layout).apply_to(padded),
                _ => Style::new().apply_to(padded),
            };
            let _ = write!(line, "{styled}");
        }
        let _ = writeln!(text, "{}", line.trim_end());
        if let Some(reason) = node.and_then(reason) {
            let width = layout
                .width
                .map(|width| width.saturating_sub(REASON_INDENT));
            for line in wrap(&reason, width) {
                let _ = writeln!(text, "{:REASON_INDENT$}{line}", "");
            }
        }
    }
    if !status.gpus.is_empty() {
        text.push('\n');
    }
    for gpu in &status.gpus {
        let _ = writeln!(text, "{}", self::gpu(gpu));
    }
    text
}

/// Of a node that serves it is an old story.
fn reason(node: &NodeStatus) -> Option<String> {
    let reason = node.reason.as_deref()?;
    Some(match node.phase.as_str() {
        "ready" | "draining" => format!("was started again because: {reason}"),
        _ => reason.to_owned(),
    })
}

/// What the driver does not tell is left out.
fn gpu(gpu: &GpuFigures) -> String {
    let mut parts = vec![format!("GPU {}", gpu.index)];
    match (gpu.memory_used, gpu.memory_total) {
        _ if !gpu.answers => parts.push("does not answer".to_owned()),
        (Some(used), Some(total)) => {
            parts.push(format!("{} of {}", ByteSize(used), ByteSize(total)));
        }
        _ => {}
    }
    parts.extend(
        gpu.utilization_percent
            .map(|percent| format!("{percent}% busy")),
    );
    parts.extend(
        gpu.temperature_celsius
            .map(|celsius| format!("{celsius} C")),
    );
    let faults = gpu.ecc_uncorrected.filter(|count| *count > 0);
    parts.extend(faults.map(|count| format!("{count} uncorrected memory errors")));
    parts.extend(gpu.last_xid.map(|xid| format!("last Xid {xid}")));
    parts.push(gpu.name.clone());
    parts.join("  ")
}

fn head(status: &Status, layout: Layout) -> String {
    let state = state_style(status.state, layout).apply_to(status.state.label());
    let up = duration(status.uptime_seconds);
    let mut text = format!(
        "{}  {state}  up {up}  pegaflow's pid {}\n",
        status.name, status.pid
    );
    if status.state == State::Preparing {
        text += "installs the runtime or fetches the model; no node runs yet\n";
    }
    if let (Some(url), Some(model)) = (&status.url, &status.model) {
        let _ = writeln!(text, "{url}/v1  model {model}");
    }
    if let Some(logs) = &status.logs {
        let _ = writeln!(text, "logs {}", logs.display());
    }
    text
}

fn row(node: &NodeStatus) -> [String; 8] {
    let phase = match node.kv.as_str() {
        // It serves, but takes no part in hand-offs.
        "unproven" if node.phase == "ready" => "ready, no KV".to_owned(),
        _ => node.phase.clone(),
    };
    [
        node.name.clone(),
        node.role.to_string(),
        phase,
        duration(node.seconds_in_phase),
        node.restarts.to_string(),
        device(node),
        node.address.port().to_string(),
        node.in_flight.to_string(),
    ]
}

fn device(node: &NodeStatus) -> String {
    let (kind, numbers) = match node.gpus.is_empty() {
        true => ("CPU", ranges(&node.cpus)),
        false => ("GPU", ranges(&node.gpus)),
    };
    format!("{kind} {numbers}").trim_end().to_owned()
}

/// Cuts names and devices where the line would be too long, and returns the columns' widths.
fn fit(rows: &mut [[String; 8]], limit: Option<usize>) -> [usize; 8] {
    let mut widths = measure(rows);
    let Some(limit) = limit else { return widths };
    for column in [5, 0] {
        let total = widths.iter().sum::<usize>() + GAP * (widths.len() - 1);
        let surplus = total.saturating_sub(limit);
        let width = widths.get(column).copied().unwrap_or(0);
        let target = width.saturating_sub(surplus).max(SHORTEST);
        if surplus == 0 || target >= width {
            continue;
        }
        for cell in rows.iter_mut().filter_map(|row| row.get_mut(column)) {
            *cell = cut(cell, target);
        }
        widths = measure(rows);
    }
    widths
}

fn measure(rows: &[[String; 8]]) -> [usize; 8] {
    let mut widths = [0; 8];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    widths
}

fn cut(cell: &str, width: usize) -> String {
    if cell.chars().count() <= width {
        return cell.to_owned();
    }
    let kept: String = cell.chars().take(width.saturating_sub(1)).collect();
    kept + "…"
}

/// At spaces; a word that is longer than a line is cut in pieces.
fn wrap(text: &str, width: Option<usize>) -> Vec<String> {
    let Some(width) = width.map(|width| width.max(SHORTEST)) else {
        return vec![text.to_owned()];
    };
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        while let Some(line) = lines.last_mut() {
            let used = line.chars().count();
            let space = usize::from(used > 0);
            if used + space + word.len() <= width {
                line.extend(std::iter::repeat_n(' ', space).chain(word));
                break;
            }
            if used == 0 {
                line.extend(word.drain(..width));
            }
            lines.push(String::new());
        }
    }
    lines
}

fn paint(phase: &str, layout: Layout) -> Style {
    let style = Style::new().force_styling(layout.colour);
    match phase {
        "ready" => style.green(),
        "crash_loop" | "failed" => style.red().bold(),
        "pending" | "starting" | "warming_up" | "verifying" | "draining" => style.cyan(),
        _ => style.yellow(),
    }
}

fn state_style(state: State, layout: Layout) -> Style {
    let style = Style::new().bold().force_styling(layout.colour);
    match state {
        State::Ready => style.green(),
        State::Preparing | State::Starting => style.cyan(),
        State::Degraded | State::Stopping => style.yellow(),
        State::Down => style.red(),
    }
}

/// Two units at most: `42s`, `3m 05s`, `2h 10m`, `4d 1h`.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {:02}s", seconds % 60),
        (0, ..) => format!("{hours}h {:02}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::Role;

    fn node(name: &str, phase: &str, reason: Option<&str>) -> NodeStatus {
        NodeStatus {
            name: name.into(),
            role: Role::Decode,
            phase: phase.into(),
            kv: "proven".into(),
            since: "2026-01-01T00:00:00Z".into(),
            seconds_in_phase: 7512,
            restarts: 3,
            incarnation: 4,
            pid: Some(7),
            address: ([127, 0, 0, 1], 40123).into(),
            pool: "default".into(),
            gpus: vec![],
            cpus: vec![0, 1, 2, 3, 8, 10, 11],
            in_flight: 12,
            reason: reason.map(str::to_owned),
            external: false,
        }
    }

    fn status(nodes: Vec<NodeStatus>) -> Status {
        Status {
            name: "llama".into(),
            version: "0.1.0".into(),
            pid: 4711,
            state: State::Degraded,
            url: Some("http://127.0.0.1:8000".into()),
            model: Some("tiny".into()),
            topology: "/t.toml".into(),
            logs: Some("/logs".into()),
            started: "2026-01-01T00:00:00Z".into(),
            uptime_seconds: 90,
            nodes,
            gpus: Vec::new(),
        }
    }

    const PLAIN: Layout = Layout {
        width: None,
        colour: false,
    };

    #[test]
    fn a_table_lines_up_and_has_no_colour_where_none_is_wanted() {
        let nodes = vec![node("d", "crash_loop", Some("killed by SIGKILL"))];
        let text = render(&status(nodes), PLAIN);
        let expected = "\
llama  degraded  up 1m 30s  pegaflow's pid 4711
http://127.0.0.1:8000/v1  model tiny
logs /logs

NODE  ROLE    PHASE       SINCE   RESTARTS  DEVICE           PORT   IN-FLIGHT
d     decode  crash_loop  2h 05m  3         CPU 0-3,8,10-11  40123  12
    killed by SIGKILL
";
        assert_eq!(text, expected);
        let back = node("d", "ready", Some("killed by SIGKILL"));
        let text = render(&status(vec![back]), PLAIN);
        let told = "\n    was started again because: killed by SIGKILL\n";
        assert!(text.ends_with(told), "{text}");
        let colour = Layout {
            colour: true,
            ..PLAIN
        };
        let coloured = render(&status(vec![node("d", "ready", None)]), colour);
        assert!(coloured.contains("\u{1b}["), "{coloured:?}");
    }

    #[test]
    fn eighty_columns_are_enough_and_no_word_of_a_reason_is_lost() {
        let reason = "exited with code 1: RuntimeError: CUDA out of memory. Tried to allocate 2.00 \
                      GiB; GPU 0 has a total capacity of 79.15 GiB of which 1.2 GiB is free";
        let mut long = node(
            "a-decode-node-with-a-long-name-11",
            "warming_up",
            Some(reason),
        );
        long.cpus = (0..200).step_by(2).collect();
        let layout = Layout {
            width: Some(80),
            colour: false,
        };
        let text = render(&status(vec![long, node("d", "ready", None)]), layout);
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
        let words = |text: &str| {
            text.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert!(
            words(&text).join(" ").contains(&words(reason).join(" ")),
            "{text}"
        );
        let names_are_cut_last = "
a-decode-node…";
        assert!(text.contains(names_are_cut_last), "{text}");
    }

    #[test]
    fn a_word_that_fits_no_line_is_cut_in_pieces() {
        assert_eq!(
            wrap("ab 0123456789012345 cd", Some(8)),
            ["ab", "01234567", "89012345", "cd"]
        );
        assert_eq!(wrap("", Some(8)), [""]);
    }

    #[test]
    fn durations_have_two_units_at_most() {
        let texts = [0, 59, 61, 3600, 86399, 90000].map(duration);
        assert_eq!(texts, ["0s", "59s", "1m 01s", "1h 00m", "23h 59m", "1d 1h"]);
    }

    #[test]
    fn gpus_are_listed_with_what_is_known_of_them() {
        let mut figures = GpuFigures {
            index: 3,
            name: "H100".to_owned(),
            answers: true,
            memory_used: Some(40 << 30),
            memory_total: Some(80 << 30),
            utilization_percent: Some(9),
            ..GpuFigures::default()
        };
        assert_eq!(gpu(&figures), "GPU 3  40.0 GiB of 80.0 GiB  9% busy  H100");
        figures.ecc_uncorrected = Some(2);
        figures.last_xid = Some(48);
        assert!(gpu(&figures).contains("2 uncorrected memory errors  last Xid 48"));
        figures.answers = false;
        assert!(gpu(&figures).starts_with("GPU 3  does not answer"));
    }
}
