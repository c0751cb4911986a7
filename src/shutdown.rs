//! The one way to end: signals become two tokens, and everything that runs watches them.
//!
//! ```text
//! running ── first SIGINT/SIGTERM/SIGHUP ──▶ graceful ── second signal ──▶ forced
//! ```
//!
//! `graceful`: take nothing new, finish or stop what runs, under its own deadline. `forced`: drop
//! everything and kill the children now.

use std::io;
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use tokio_util::sync::CancellationToken;

/// The two stages of the end. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    graceful: CancellationToken,
    forced: CancellationToken,
}

impl Shutdown {
    /// Cancelled when the end begins.
    pub fn graceful(&self) -> &CancellationToken {
        &self.graceful
    }

    /// Cancelled when patience has ended.
    pub fn forced(&self) -> &CancellationToken {
        &self.forced
    }

    /// Begins the end, if it has not begun yet.
    pub fn begin(&self) {
        self.graceful.cancel();
    }

    /// Goes one stage further. What a signal does; also for a part that cannot go on.
    pub fn advance(&self) {
        if self.graceful.is_cancelled() {
            self.forced.cancel();
        } else {
            self.graceful.cancel();
        }
    }
}

/// Turns signals into [`Shutdown::advance`] until it is dropped.
#[derive(Debug)]
pub struct SignalListener {
    handle: Handle,
    thread: Option<thread::JoinHandle<()>>,
}

impl SignalListener {
    /// Listens for SIGINT, SIGTERM and SIGHUP.
    pub fn install(shutdown: Shutdown) -> io::Result<Self> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let handle = signals.handle();
        let thread = thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in &mut signals {
                    let name = signal_hook::low_level::signal_name(signal).unwrap_or("signal");
                    if shutdown.graceful.is_cancelled() {
                        tracing::warn!("{name} again: killing everything now");
                    } else {
                        tracing::info!("{name}: stopping (once more to force)");
                    }
                    shutdown.advance();
                }
            })?;
        Ok(Self {
            handle,
            thread: Some(thread),
        })
    }
}

impl Drop for SignalListener {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            // The thread ends with the handle; a panic in it has nothing left to break.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_signal_asks_and_the_second_insists() {
        let shutdown = Shutdown::default();
        let listener = SignalListener::install(shutdown.clone()).unwrap();
        for (graceful, forced) in [(true, false), (true, true)] {
            signal_hook::low_level::raise(SIGHUP).unwrap();
            let started = std::time::Instant::now();
            while (
                shutdown.graceful().is_cancelled(),
                shutdown.forced().is_cancelled(),
            ) != (graceful, forced)
            {
                assert!(started.elapsed().as_secs() < 10, "the signal was not seen");
                thread::yield_now();
            }
        }
        drop(listener);
    }
}
