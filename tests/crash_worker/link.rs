//! The connection between a scheduler and a worker of one incarnation: a line of JSON per job, an empty
//! line per job done. Only the processes themselves hold its ends, so a death shows at once.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::spec::Job;

pub struct Link(BufReader<UnixStream>);

impl Link {
    /// From an inherited descriptor.
    pub fn inherited(fd: BorrowedFd<'_>) -> Self {
        Self(BufReader::new(fd.try_clone_to_owned().unwrap().into()))
    }

    /// False: the other end is dead.
    pub fn send(&mut self, job: &Job) -> bool {
        let mut line = serde_json::to_vec(job).unwrap();
        line.push(b'\n');
        self.0.get_mut().write_all(&line).is_ok()
    }

    /// The next job; none when the scheduler is dead and nothing is left to do.
    pub fn next(&mut self) -> Option<Job> {
        let line = self.line()?;
        Some(serde_json::from_str(&line).unwrap())
    }

    pub fn done(&mut self) {
        // The scheduler may be dead.
        let _ = self.0.get_mut().write_all(b"\n");
    }

    /// Waits until the worker has done one more job. False: it is dead.
    pub fn wait(&mut self) -> bool {
        self.line().is_some()
    }

    /// Whether the other end is dead.
    pub fn hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.0.get_ref().as_fd(), PollFlags::POLLHUP)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = self.0.read_line(&mut line);
        // A line that was cut short by a kill is none.
        (read.is_ok() && line.ends_with('\n')).then_some(line)
    }
}
