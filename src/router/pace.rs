//! How often a stream is written to.
//!
//! ```text
//! up to BURST pieces at once ─▶ each as it comes
//! a node that keeps being faster than one piece in EVERY ─▶ what has come meanwhile, once in EVERY
//! ```
//!
//! Each write wakes the client and costs both sides more than a token does. What a person or a program notices is far
//! above a millisecond; a node that decodes thousands of tokens a second for one stream is read as often as that, not
//! for each of them. The choices of one step (`n`), and the last events, which come together, fit into a burst.

use std::time::Duration;

use tokio::time::Instant;

/// Between two pieces, on average.
const EVERY: Duration = Duration::from_millis(2);
/// So many pieces may come without a pause after a quiet time.
const BURST: u32 = 8;

/// Of one stream.
#[derive(Debug)]
pub(super) struct Pace {
    /// When as many pieces as have gone out would be due, one in [`EVERY`].
    due: Instant,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { due: now }
    }

    /// A piece goes out.
    pub(super) fn piece(&mut self, now: Instant) {
        self.due = self.due.max(now) + EVERY;
    }

    /// Until when the next one has to wait.
    pub(super) fn pause(&self, now: Instant) -> Option<Instant> {
        let until = self.due.checked_sub(EVERY * BURST)?;
        (until > now).then_some(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_out_at_once_and_what_follows_once_in_a_while() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        for _ in 0..BURST {
            assert_eq!(pace.pause(start), None);
            pace.piece(start);
        }
        assert_eq!(pace.pause(start), None);
        pace.piece(start);
        let next = start + EVERY;
        assert_eq!(pace.pause(start), Some(next));
        assert_eq!(pace.pause(next), None);
        pace.piece(next);
        assert_eq!(pace.pause(next), Some(next + EVERY));
    }

    #[test]
    fn tokens_that_come_slower_never_wait() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..1_000 {
            assert_eq!(pace.pause(now), None);
            pace.piece(now);
            now += EVERY;
        }
    }

    #[test]
    fn a_quiet_time_saves_up_one_burst_and_no_more() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        now += EVERY * 1_000;
        for _ in 0..=BURST {
            assert_eq!(pace.pause(now), None);
            pace.piece(now);
        }
        assert!(pace.pause(now).is_some());
    }
}
