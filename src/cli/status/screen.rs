//! A terminal that is drawn over from its upper left corner. Nothing is cleared before something else
//! is there, so nothing flickers. Between two frames the cursor is visible and below the text: whatever
//! ends the command then, the terminal is as it was.

use console::{Term, measure_text_width, truncate_str};

const HOME: &str = "\x1b[H";
const CLEAR: &str = "\x1b[2J";
const TO_END_OF_LINE: &str = "\x1b[K";
const TO_END_OF_SCREEN: &str = "\x1b[J";
const HIDE_CURSOR: &str = "\x1b[?25l";
const SHOW_CURSOR: &str = "\x1b[?25h";

pub struct Screen {
    term: Term,
    /// Rows and columns of the last frame.
    drawn: Option<(u16, u16)>,
}

impl Screen {
    /// `None`: stdout is no terminal, or one that cannot move its cursor.
    pub fn of_stdout() -> Option<Self> {
        let term = Term::stdout();
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        (term.is_term() && !dumb).then_some(Self { term, drawn: None })
    }

    /// What shows `text`, to be written in one piece.
    pub fn frame(&mut self, text: &str) -> String {
        let size = self.term.size();
        let is_fresh = self.drawn.replace(size) != Some(size);
        frame(text, (size.0.into(), size.1.into()), is_fresh)
    }
}

/// `size` is rows and columns. On a fresh screen stands what is not ours.
fn frame(text: &str, (rows, columns): (usize, usize), is_fresh: bool) -> String {
    let mut lines: Vec<&str> = text.lines().collect();
    // The last row is the cursor's.
    let room = rows.saturating_sub(1);
    let more = lines.len().saturating_sub(room);
    let note = format!("… {} more lines", more + 1);
    if more > 0 {
        lines.truncate(room.saturating_sub(1));
        lines.push(&note);
    }
    let mut frame = HIDE_CURSOR.to_owned();
    if is_fresh {
        frame += CLEAR;
    }
    frame += HOME;
    for line in lines {
        let line = truncate_str(line, columns, "…");
        frame += &line;
        // Behind a full line it would erase the last character.
        if measure_text_width(&line) < columns {
            frame += TO_END_OF_LINE;
        }
        frame += "\r\n";
    }
    frame + TO_END_OF_SCREEN + SHOW_CURSOR
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(frame: &str) -> Vec<String> {
        let body = frame.split_once(HOME).unwrap().1;
        let lines = body.split("\r\n");
        lines.map(|line| line.replace(TO_END_OF_LINE, "")).collect()
    }

    #[test]
    fn a_frame_is_as_large_as_the_screen_at_most() {
        let text = "1\n23456\n7890123\n";
        let end = format!("{TO_END_OF_SCREEN}{SHOW_CURSOR}");
        let whole = frame(text, (5, 9), false);
        assert_eq!(lines(&whole), ["1", "23456", "7890123", &end]);
        let small = frame(text, (3, 5), false);
        assert_eq!(lines(&small), ["1", "… 2 …", &end]);
        for (rows, columns) in [(1, 1), (0, 0), (2, 1)] {
            assert!(lines(&frame(text, (rows, columns), true)).len() <= rows.max(1) + 1);
        }
    }

    #[test]
    fn only_a_fresh_screen_is_cleared() {
        assert!(frame("a", (9, 9), true).contains(CLEAR));
        assert!(!frame("a", (9, 9), false).contains(CLEAR));
    }

    #[test]
    fn colours_take_no_room_and_full_lines_keep_their_end() {
        let coloured = "\x1b[32mready\x1b[0m";
        let drawn = frame(coloured, (3, 5), false);
        assert!(drawn.contains(&format!("{coloured}\r\n")), "{drawn:?}");
        let drawn = frame(coloured, (3, 6), false);
        let erased = format!("{coloured}{TO_END_OF_LINE}\r\n");
        assert!(drawn.contains(&erased), "{drawn:?}");
    }
}
