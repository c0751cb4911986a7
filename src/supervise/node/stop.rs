//! The shutdown, as a source of events.

use crate::shutdown::Shutdown;

use super::super::state::Event;

/// Each stage of the shutdown, once.
pub(super) struct StopSignals {
    shutdown: Shutdown,
    seen: Seen,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Nothing,
    Stop,
    Force,
}

impl StopSignals {
    pub(super) fn new(shutdown: Shutdown) -> Self {
        Self {
            shutdown,
            seen: Seen::Nothing,
        }
    }

    /// Cancel-safe.
    pub(super) async fn next(&mut self) -> Event {
        match self.seen {
            Seen::Nothing => {
                self.shutdown.graceful().cancelled().await;
                self.seen = Seen::Stop;
                Event::Stop
            }
            Seen::Stop => {
                self.shutdown.forced().cancelled().await;
                self.seen = Seen::Force;
                Event::Force
            }
            Seen::Force => std::future::pending().await,
        }
    }
}
