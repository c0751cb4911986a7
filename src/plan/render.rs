//! The plan for people: no token, no environment.

use std::fmt::Write;

use super::{NodePlan, Plan};
use crate::plan::problem::list;

pub(super) fn table(plan: &Plan) -> String {
    let header = ["NODE", "ROLE", "ON", "ADDRESS"].map(str::to_owned);
    let rows = std::iter::once(header).chain(plan.nodes.iter().map(row));
    columns(&rows.collect::<Vec<_>>())
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
