//! A guard process, spoken to as the supervisor does.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use nix::unistd::Pid;

use super::{LIMIT, alive, eventually, marker};

pub struct Guard {
    pub process: Child,
    pub socket: BufReader<UnixStream>,
    pub marker: String,
    pub run_dir: tempfile::TempDir,
}

impl Guard {
    /// The leader: python, with the marker as `sys.argv[1]`.
    pub fn start(script: &str) -> Self {
        Self::start_with(script, &["--private-shm"])
    }

    pub fn start_with(script: &str, flags: &[&str]) -> Self {
        let marker = marker();
        let run_dir = tempfile::tempdir().unwrap();
        std::fs::write(run_dir.path().join("lock"), "").unwrap();
        std::fs::write(run_dir.path().join("engine.sock"), "").unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(LIMIT)).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_pegaflow"))
            .args(["__guard", "--node", "n", "--run-dir"])
            .arg(run_dir.path())
            .args(flags)
            .args(["--", "python3", "-c", script, &marker])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            process,
            socket: BufReader::new(ours),
            marker,
            run_dir,
        }
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.socket.read_line(&mut line).unwrap();
        match line.trim_end().rsplit_once(' ') {
            // The guard's clock is nobody's business here.
            Some((report, _)) if line.starts_with("exited ") => report.to_owned(),
            _ => line.trim_end().to_owned(),
        }
    }

    /// The leader's pid.
    pub fn spawned(&mut self) -> Pid {
        let line = self.line();
        let pid = line.strip_prefix("spawned ").expect(&line).parse().unwrap();
        Pid::from_raw(pid)
    }

    /// Waits until `count` processes of the tree run, the guard included.
    pub fn wait_for(&self, count: usize) {
        eventually("the tree is complete", || {
            alive(&self.marker).len() == count
        });
    }

    pub fn send(&mut self, command: &str) {
        self.socket.get_mut().write_all(command.as_bytes()).unwrap();
    }

    /// Call after `empty`.
    pub fn assert_gone(mut self) {
        assert_eq!(self.line(), "empty");
        assert!(self.process.wait().unwrap().success());
        assert_eq!(alive(&self.marker), Vec::<i32>::new());
        assert!(self.run_dir.path().join("engine.sock").exists());
    }
}
