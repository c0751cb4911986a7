//! A log file of bounded size.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use crate::fleet::NodeId;

/// `<node>.log`, with `<node>.log.1` (newest) to `.N` beside it. Survives a full disk: lines that cannot
/// be written are dropped, because a child must never wait for its log.
pub struct LogFile {
    path: PathBuf,
    max_bytes: u64,
    /// Old files that are kept.
    keep: u32,
    open: Option<(File, u64)>,
    complained: bool,
}

impl LogFile {
    pub fn new(path: PathBuf, max_bytes: u64, keep: u32) -> Self {
        Self {
            path,
            max_bytes,
            keep,
            open: None,
            complained: false,
        }
    }

    pub fn write_line(&mut self, node: &NodeId, line: &str) {
        match self.try_write(line) {
            Ok(()) => self.complained = false,
            Err(error) => {
                self.open = None;
                if !self.complained {
                    self.complained = true;
                    let path = self.path.display();
                    tracing::warn!("node {node}: lines are lost, cannot write {path}: {error}");
                }
            }
        }
    }

    fn try_write(&mut self, line: &str) -> io::Result<()> {
        let (mut file, size) = match self.open.take() {
            Some(open) => open,
            None => self.open()?,
        };
        file.write_all(format!("{line}\n").as_bytes())?;
        let size = size.saturating_add(u64::try_from(line.len()).unwrap_or(0) + 1);
        if size < self.max_bytes {
            self.open = Some((file, size));
            return Ok(());
        }
        drop(file);
        self.rotate()
    }

    fn open(&self) -> io::Result<(File, u64)> {
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        let file = options.open(&self.path)?;
        let size = file.metadata()?.len();
        Ok((file, size))
    }

    fn rotate(&self) -> io::Result<()> {
        // Of a run that kept more.
        for number in self.keep + 1.. {
            if fs::remove_file(self.numbered(number)).is_err() {
                break;
            }
        }
        for number in (1..self.keep).rev() {
            let old = self.numbered(number);
            if old.exists() {
                fs::rename(old, self.numbered(number + 1))?;
            }
        }
        fs::rename(&self.path, self.numbered(1))
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn rotation_keeps_some_old_files_of_bounded_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n.log");
        for surplus in [4, 5] {
            fs::write(
                dir.path().join(format!("n.log.{surplus}")),
                "of another run",
            )
            .unwrap();
        }
        let mut log = LogFile::new(path.clone(), 100, 3);
        for number in 0..200 {
            log.write_line(&"n".into(), &format!("line {number:04}"));
        }
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["n.log.1", "n.log.2", "n.log.3"]);
        let newest = fs::read_to_string(dir.path().join("n.log.1")).unwrap();
        assert!(newest.ends_with("line 0199\n"));
        for name in names {
            let file = dir.path().join(name).metadata().unwrap();
            assert!(file.len() <= 110);
            assert_eq!(file.permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn what_cannot_be_written_is_lost_quietly_and_writing_resumes() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("later");
        let mut log = LogFile::new(missing.join("n.log"), 100, 3);
        log.write_line(&"n".into(), "lost");
        fs::create_dir(&missing).unwrap();
        log.write_line(&"n".into(), "kept");
        let text = fs::read_to_string(missing.join("n.log")).unwrap();
        assert_eq!(text, "kept\n");
    }
}
