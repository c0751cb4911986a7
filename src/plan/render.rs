//! The plan for people: no token, no environment.

use std::fmt::Write;

use super::{ExternalNode, NodePlan, Plan};
use crate::plan::problem::list;

pub(super) fn table(plan: &Plan) -> String {
    let header = ["NODE", "ROLE", "ON", "ADDRESS"].map(str::to_owned);
    let rows = std::iter::once(header)
        .chain(plan.nodes.iter().map(row))
        .chain(plan.others.iter().map(other));
    columns(&rows.collect::<Vec<_>>())
}

/// `0-3,8` for numbers in ascending order.
pub fn ranges<T: Copy + TryInto<u64>>(numbers: &[T]) -> String {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for number in numbers
        .iter()
        .filter_map(|number| (*number).try_into().ok())
    {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let texts = runs.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    texts.collect::<Vec<_>>().join(",")
}

/// Cells one below the other.
pub(super) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

fn other(node: &ExternalNode) -> [String; 4] {
    let (id, role) = (node.id.to_string(), node.role.to_string());
    [id, role, "others".to_owned(), node.url.to_string()]
}

fn row(node: &NodePlan) -> [String; 4] {
    let place = if node.gpus.is_empty() {
        format!("cpu {}", list(&node.cpus))
    } else {
        format!("gpu {}", list(&node.gpus))
    };
    [
        node.id.to_string(),
        node.role.to_string(),
        place,
        node.addr.to_string(),
    ]
}
