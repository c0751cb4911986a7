//! A log file of bounded size.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::unistd::{dup2_stderr, dup2_stdout};

/// `x.log`, with `x.log.1` (newest) to `.N` beside it. Survives a full disk: lines that cannot be
/// written are dropped, because nobody must ever wait for a log.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    max_bytes: u64,
    /// Old files that are kept.
    keep: u32,
    open: Option<File>,
    takes_stdio: bool,
    complained: bool,
}

impl LogFile {
    pub fn new(path: PathBuf, max_bytes: u64, keep: u32) -> Self {
        Self {
            path,
            max_bytes,
            keep,
            open: None,
            takes_stdio: false,
            complained: false,
        }
    }

    /// Standard output and error of this process go there too: panics, and what a library prints. They
    /// leave where they went at once, and follow each rotation; in between they go nowhere.
    pub fn with_stdio(self) -> io::Result<Self> {
        let null = File::options().write(true).open("/dev/null")?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        Ok(Self {
            takes_stdio: true,
            ..self
        })
    }

    /// Complains when lines begin to be lost, once.
    pub fn write_line(&mut self, line: &str) {
        match self.try_write(line) {
            Ok(()) => self.complained = false,
            Err(error) => {
                self.open = None;
                if !self.complained {
                    self.complained = true;
                    let path = self.path.display();
                    tracing::warn!("lines are lost, cannot write {path}: {error}");
                }
            }
        }
    }

    fn try_write(&mut self, line: &str) -> io::Result<()> {
        let mut file = match self.open.take() {
            Some(open) => open,
            None => self.open()?,
        };
        file.write_all(format!("{line}\n").as_bytes())?;
        // Not counted along: standard output and error are others' to write to.
        if file.metadata()?.len() < self.max_bytes {
            self.open = Some(file);
            return Ok(());
        }
        drop(file);
        self.rotate()
    }

    fn open(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        let file = options.open(&self.path)?;
        if self.takes_stdio {
            dup2_stdout(&file)?;
            dup2_stderr(&file)?;
        }
        Ok(file)
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
            log.write_line(&format!("line {number:04}"));
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
        log.write_line("lost");
        fs::create_dir(&missing).unwrap();
        log.write_line("kept");
        let text = fs::read_to_string(missing.join("n.log")).unwrap();
        assert_eq!(text, "kept\n");
    }
}
