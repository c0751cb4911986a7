//! How many legs may be sent once more: so that a fleet that fails as a whole is not asked several times as much.
//!
//! A bucket of retries. Each request puts a fifth of one in, each second one more, each retry takes one out. It begins
//! full, with one retry for every request that can be in flight: a single node that dies costs nobody an answer,
//! however many it had. What goes on failing is retried for a fifth of the requests at most.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Of a retry, in thousandths.
const RETRY: u64 = 1_000;
const BY_REQUEST: u64 = RETRY / 5;
/// So that a router with little to do may still try again.
const BY_SECOND: u64 = RETRY;

#[derive(Debug)]
pub(super) struct RetryBudget {
    bucket: Mutex<Bucket>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    level: u64,
    most: u64,
    filled: Instant,
}

impl Bucket {
    fn new(retries: usize, now: Instant) -> Self {
        let most = (retries.max(1) as u64).saturating_mul(RETRY);
        Self {
            level: most,
            most,
            filled: now,
        }
    }

    fn fill(&mut self, more: u64) {
        self.level = self.level.saturating_add(more).min(self.most);
    }

    fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled);
        let millis = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
        self.fill(millis.saturating_mul(BY_SECOND) / 1_000);
        self.filled = self.filled.max(now);
        let enough = self.level >= RETRY;
        if enough {
            self.level -= RETRY;
        }
        enough
    }
}

impl RetryBudget {
    /// `retries`: how many it holds at most.
    pub(super) fn new(retries: usize) -> Self {
        Self {
            bucket: Mutex::new(Bucket::new(retries, Instant::now())),
        }
    }

    /// A request has come.
    pub(super) fn request(&self) {
        self.with(|bucket| bucket.fill(BY_REQUEST));
    }

    /// A leg is to be sent once more; false: it may not.
    pub(super) fn take(&self) -> bool {
        self.with(|bucket| bucket.take(Instant::now()))
    }

    /// Retries that are left.
    pub(super) fn left(&self) -> u64 {
        self.with(|bucket| bucket.level / RETRY)
    }

    fn with<T>(&self, act: impl FnOnce(&mut Bucket) -> T) -> T {
        act(&mut self.bucket.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_begins_full_and_is_then_a_fifth_of_the_requests() {
        let now = Instant::now();
        let mut bucket = Bucket::new(100, now);
        assert_eq!((0..1_000).filter(|_| bucket.take(now)).count(), 100);
        let retried = (0..1_000).filter(|_| {
            bucket.fill(BY_REQUEST);
            bucket.take(now)
        });
        assert_eq!(retried.count(), 200);
    }

    #[test]
    fn an_idle_router_gets_one_each_second_up_to_the_most() {
        let now = Instant::now();
        let mut bucket = Bucket::new(2, now);
        assert!(bucket.take(now) && bucket.take(now) && !bucket.take(now));
        assert!(!bucket.take(now + Duration::from_millis(900)));
        assert!(bucket.take(now + Duration::from_millis(1_000)));
        let much_later = now + Duration::from_secs(100_000);
        assert!(bucket.take(much_later) && bucket.take(much_later) && !bucket.take(much_later));
        // A clock that seems to go back gives nothing.
        assert!(!bucket.take(now));
    }

    proptest! {
        #[test]
        fn retries_are_bounded_by_requests_and_time(
            steps in prop::collection::vec((any::<bool>(), 0u64..500), 0..500), most in 1usize..50,
        ) {
            let start = Instant::now();
            let (mut now, mut requests, mut retries) = (start, 0u64, 0u64);
            let mut bucket = Bucket::new(most, start);
            for (request, pause) in steps {
                now += Duration::from_millis(pause);
                if request {
                    requests += 1;
                    bucket.fill(BY_REQUEST);
                } else {
                    retries += u64::from(bucket.take(now));
                }
                let seconds = (now - start).as_millis() as u64;
                let earned = most as u64 * RETRY + requests * BY_REQUEST + seconds * BY_SECOND / 1_000;
                prop_assert!(retries * RETRY <= earned);
            }
        }
    }
}
