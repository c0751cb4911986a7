//! The time that counts against a node: pegaflow's own.
//!
//! Where pegaflow itself stood still (SIGSTOP, a frozen container, a machine that gave it no processor), the
//! node could not be looked at, and what it said meanwhile has not been read yet. Every deadline would be
//! over in the moment when pegaflow goes on, and nodes that work would be restarted.

use std::time::{Duration, Instant};

/// Who looks at the clock at least this often has not stood still.
const TICK: Duration = Duration::from_secs(1);
/// A busy machine is late by itself.
const LATE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct Clock {
    seen: Instant,
    /// In which pegaflow stood still.
    lost: Duration,
}

impl Clock {
    pub fn new(real: Instant) -> Self {
        Self {
            seen: real,
            lost: Duration::ZERO,
        }
    }

    /// What the clock shows at `real`.
    pub fn read(&mut self, real: Instant) -> Instant {
        let gap = real.saturating_duration_since(self.seen);
        if gap > TICK + LATE {
            self.lost += gap - TICK;
        }
        self.seen = real;
        real.checked_sub(self.lost).unwrap_or(real)
    }

    /// When the clock wants to be read again, if something is due when it shows `deadline`.
    pub fn next_look(&self, deadline: Option<Instant>) -> Instant {
        let tick = self.seen + TICK;
        deadline.map_or(tick, |at| tick.min(at + self.lost))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pegaflow_slept_through_does_not_count() {
        let start = Instant::now();
        let mut clock = Clock::new(start);
        let deadline = start + TICK * 60;
        let mut real = start;
        while clock.read(real) < deadline {
            real = clock.next_look(Some(deadline));
        }
        assert_eq!(real, deadline, "who is never late loses nothing");

        let before = clock.read(real);
        real += Duration::from_secs(3600);
        let after = clock.read(real);
        assert_eq!(after, before + TICK);
        // And is woken by the real clock.
        assert_eq!(clock.next_look(Some(after + TICK / 2)), real + TICK / 2);
    }

    #[test]
    fn a_busy_machine_is_no_stop() {
        let mut real = Instant::now();
        let mut clock = Clock::new(real);
        for _ in 0..100 {
            real += TICK + LATE;
            assert_eq!(clock.read(real), real);
        }
    }
}
