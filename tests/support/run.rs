//! One run of the binary.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{HANG, Site, processes, send};

/// One run of `pegaflow up`; killed when dropped.
pub struct Pegaflow<'s> {
    pub site: &'s Site,
    pub(super) child: Child,
    pub(super) log: PathBuf,
    pub(super) started: Instant,
}

impl Pegaflow<'_> {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Standard output and error so far.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub async fn wait_for_log(&mut self, text: &str) {
        loop {
            let output = self.output();
            if output.contains(text) {
                return;
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("pegaflow ended ({status}) before it said {text:?}");
            }
            assert!(
                self.started.elapsed() < HANG,
                "pegaflow has not said {text:?}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn signal(&self, signal: Signal) {
        self.site.processes();
        send(self.pid(), signal);
    }

    /// Waits for the end.
    pub async fn wait(&mut self, limit: Duration) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                started.elapsed() < limit,
                "pegaflow still runs after {limit:?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// SIGTERM, then everything has to be gone.
    pub async fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait(HANG).await;
        assert_eq!(status.code(), Some(0), "exit status after SIGTERM");
        self.site.assert_nothing_left(Duration::from_secs(1)).await;
    }
}

impl Drop for Pegaflow<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- processes");
            for pid in self.site.processes() {
                eprintln!("{}", processes::describe(pid));
            }
        }
        // The rest of the tree is the site's to kill; after an orderly end there is none.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
