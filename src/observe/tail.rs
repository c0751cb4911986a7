//! Reads along in a log that is rotated by renaming: `x.log` becomes `x.log.1`, that `x.log.2`, ...

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// How many old files are looked for.
const KEPT: u32 = 9;
/// What one [`Tail::read`] returns at most, and the history that [`Tail::open`] does.
const PIECE: u64 = 256 * 1024;
const HISTORY: u64 = 16 << 20;
const BLOCK: u64 = 64 * 1024;

/// A place in a log.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    /// `None` before the log exists.
    file: Option<File>,
    /// The beginning of a line that is not finished.
    partial: Vec<u8>,
}

impl Tail {
    /// The last `lines` lines, those of older files included, and a place behind them. A log that does
    /// not exist is empty.
    pub fn open(path: &Path, lines: usize) -> io::Result<(Self, Vec<u8>)> {
        let mut file = open(path)?;
        let mut text = Vec::new();
        let mut missing = lines;
        let mut seen = None;
        if let Some(file) = &mut file {
            seen = Some(identity(file)?);
            let end = file.seek(SeekFrom::End(0))?;
            text = last_lines(file, missing, end)?;
            file.seek(SeekFrom::Start(end))?;
            missing = missing.saturating_sub(count(&text));
        }
        for number in 1..=KEPT {
            if missing == 0 {
                break;
            }
            let Some(mut old) = open(&numbered(path, number))? else {
                break;
            };
            // It was renamed while we read it as the newest.
            if Some(identity(&old)?) == seen {
                continue;
            }
            let end = old.seek(SeekFrom::End(0))?;
            let mut older = last_lines(&mut old, missing, end)?;
            missing = missing.saturating_sub(count(&older));
            older.append(&mut text);
            text = older;
        }
        let tail = Self {
            path: path.to_owned(),
            file,
            partial: Vec::new(),
        };
        Ok((tail, text))
    }

    /// Whole lines that were written since; empty when there are none yet.
    pub fn read(&mut self) -> io::Result<Vec<u8>> {
        if self.file.is_none() {
            self.file = open(&self.path)?;
        }
        let Some(file) = &mut self.file else {
            return Ok(Vec::new());
        };
        let mut fresh = Vec::new();
        file.take(PIECE).read_to_end(&mut fresh)?;
        if fresh.is_empty()
            && let Some(next) = successor(&self.path, identity(file)?)?
        {
            // It got its last line before it was renamed, perhaps after we had looked.
            file.take(PIECE).read_to_end(&mut fresh)?;
            if fresh.is_empty() {
                self.file = Some(next);
                return self.read();
            }
        }
        self.partial.append(&mut fresh);
        let end = self.partial.iter().rposition(|byte| *byte == b'\n');
        let rest = self.partial.split_off(end.map_or(0, |end| end + 1));
        Ok(std::mem::replace(&mut self.partial, rest))
    }
}

/// The file that follows the one with this identity; `None`: it is the newest, or its successor has
/// not been made yet.
fn successor(path: &Path, current: (u64, u64)) -> io::Result<Option<File>> {
    let mut newer = open(path)?;
    if newer.as_ref().map(identity).transpose()? == Some(current) {
        return Ok(None);
    }
    for number in 1..=KEPT {
        let Some(old) = open(&numbered(path, number))? else {
            break;
        };
        if identity(&old)? == current {
            return Ok(newer);
        }
        newer = Some(old);
    }
    // It is gone already: the oldest that is left goes on.
    Ok(newer)
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    let meta = file.metadata()?;
    Ok((meta.dev(), meta.ino()))
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

fn count(text: &[u8]) -> usize {
    text.iter().filter(|byte| **byte == b'\n').count()
}

/// The last `lines` lines before `end`, as far as [`HISTORY`] reaches.
fn last_lines(file: &mut File, lines: usize, end: u64) -> io::Result<Vec<u8>> {
    if lines == 0 {
        return Ok(Vec::new());
    }
    let mut text = Vec::new();
    let mut start = end;
    // One more line feed than lines: the one before the first of them.
    while start > 0 && count(&text) <= lines && end - start < HISTORY {
        let block = start.min(BLOCK);
        start -= block;
        file.seek(SeekFrom::Start(start))?;
        let mut piece = Vec::new();
        file.take(block).read_to_end(&mut piece)?;
        piece.append(&mut text);
        text = piece;
    }
    let surplus = count(&text).saturating_sub(lines);
    let feeds = text.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
    let cut = feeds
        .map(|(at, _)| at + 1)
        .nth(surplus.wrapping_sub(1))
        .unwrap_or(0);
    Ok(text.split_off(cut))
}

/// Logs in a directory, by the name of what wrote them.
pub fn logs_in(dir: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".log")) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    struct Log {
        dir: tempfile::TempDir,
    }

    impl Log {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            Self { dir }
        }

        fn path(&self) -> PathBuf {
            self.dir.path().join("n.log")
        }

        fn write(&self, text: &str) {
            let mut options = File::options();
            let mut file = options.create(true).append(true).open(self.path()).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        }

        fn rotate(&self) {
            for number in (1..3).rev() {
                let old = numbered(&self.path(), number);
                if old.exists() {
                    fs::rename(old, numbered(&self.path(), number + 1)).unwrap();
                }
            }
            fs::rename(self.path(), numbered(&self.path(), 1)).unwrap();
        }

        fn open(&self, lines: usize) -> (Tail, String) {
            let (tail, text) = Tail::open(&self.path(), lines).unwrap();
            (tail, String::from_utf8(text).unwrap())
        }
    }

    fn read(tail: &mut Tail) -> String {
        String::from_utf8(tail.read().unwrap()).unwrap()
    }

    #[test]
    fn the_last_lines_reach_into_older_files() {
        let log = Log::new();
        assert_eq!(log.open(5).1, "");
        log.write("1\n2\n");
        log.rotate();
        log.write("3\n4\n");
        for (lines, text) in [
            (0, ""),
            (1, "4\n"),
            (2, "3\n4\n"),
            (3, "2\n3\n4\n"),
            (9, "1\n2\n3\n4\n"),
        ] {
            assert_eq!(log.open(lines).1, text);
        }
    }

    #[test]
    fn the_last_of_many_lines_are_found_across_blocks() {
        let log = Log::new();
        let line = "x".repeat(100);
        for number in 0..3000 {
            log.write(&format!("{number} {line}\n"));
        }
        let text = log.open(2000).1;
        assert_eq!(text.lines().count(), 2000);
        assert!(text.starts_with("1000 "));
    }

    #[test]
    fn every_line_is_read_once_whatever_is_rotated_meanwhile() {
        let log = Log::new();
        let (mut tail, _) = log.open(1);
        assert_eq!(read(&mut tail), "");
        log.write("1\nhal");
        assert_eq!(read(&mut tail), "1\n");
        log.write("f\n");
        assert_eq!(read(&mut tail), "half\n");
        log.write("2\n");
        log.rotate();
        assert_eq!(read(&mut tail), "2\n");
        assert_eq!(read(&mut tail), "", "the new file does not exist yet");
        log.write("3\n");
        log.rotate();
        log.write("4\n");
        assert_eq!(read(&mut tail) + &read(&mut tail), "3\n4\n");
        // So fast that our file is gone.
        for number in 5..9 {
            log.rotate();
            log.write(&format!("{number}\n"));
        }
        let rest: String = (0..5).map(|_| read(&mut tail)).collect();
        assert_eq!(rest, "5\n6\n7\n8\n");
    }
}
