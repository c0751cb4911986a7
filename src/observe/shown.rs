//! What is shown, and how text is made fit for it.

use serde::{Deserialize, Serialize};

/// A longer line is cut: one node must not fill the screen.
const LINE_BYTES: usize = 4096;

/// What a person sees.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Shown {
    /// Already formatted by tracing.
    Formatted(String),
    Text(String),
    NodeLine {
        node: String,
        line: String,
    },
    Started {
        job: u64,
        name: String,
    },
    Status {
        job: u64,
        text: String,
    },
    Note {
        job: u64,
        text: String,
    },
    Finished {
        job: u64,
        text: String,
    },
}

impl Shown {
    pub(super) fn text(&mut self) -> Option<&mut String> {
        match self {
            Self::Formatted(text)
            | Self::Text(text)
            | Self::NodeLine { line: text, .. }
            | Self::Status { text, .. }
            | Self::Note { text, .. }
            | Self::Finished { text, .. } => Some(text),
            Self::Started { .. } => None,
        }
    }
}

/// One line without what would move the cursor: escape sequences and control characters.
pub(super) fn printable(line: &str) -> String {
    let mut out = String::new();
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if out.len() >= LINE_BYTES {
            out.push('…');
            break;
        }
        match c {
            '\t' => out.push(c),
            '\u{1b}' => {
                if chars.next() == Some('[') {
                    chars.find(|c| ('@'..='~').contains(c));
                }
            }
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_the_cursor_is_removed() {
        assert_eq!(printable("a\u{1b}[2Kb\u{1b}[1;31mc\u{7}\td\n"), "abc\td");
        assert_eq!(printable("\u{1b}"), "");
        assert!(printable(&"x".repeat(10_000)).len() <= LINE_BYTES + '…'.len_utf8());
    }
}
