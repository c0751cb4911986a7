//! The arena that is in use, and the threads that pre-fault it.

use std::io;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::prefault::Prefault;
use super::{Arena, Shape};
use crate::plan::ArenaPlan;

/// Keeps the arena of one epoch at a time.
#[derive(Debug)]
pub struct Keeper {
    plan: ArenaPlan,
    /// Ends the pre-faulting.
    stop: CancellationToken,
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    epoch: u64,
    arena: Arc<Arena>,
    /// Until it has been waited for.
    prefault: Option<Prefault>,
}

impl Keeper {
    pub fn new(plan: ArenaPlan, stop: CancellationToken) -> Self {
        Self {
            plan,
            stop,
            current: None,
        }
    }

    pub fn arena(&self) -> Option<&Arena> {
        self.current.as_ref().map(|current| &*current.arena)
    }

    /// The arena of this epoch and shape; made anew when it is another one than before. Its pages
    /// come later.
    pub fn of(&mut self, wanted: Option<(u64, Shape)>) -> io::Result<Option<Arc<Arena>>> {
        let Some((epoch, shape)) = wanted else {
            self.current = None;
            return Ok(None);
        };
        if let Some(current) = &self.current
            && current.epoch == epoch
        {
            return Ok(Some(current.arena.clone()));
        }
        // Waits for the threads of the one before, which end after one small step.
        self.current = None;
        let arena = Arc::new(Arena::create(shape, &self.plan)?);
        tracing::info!(
            slots = shape.slots,
            bytes = shape.arena_bytes,
            pages = ?arena.file.pages,
            numa = ?arena.file.numa,
            "arena made"
        );
        let prefault = Prefault::start(
            arena.file.share()?,
            self.plan.prefault_threads,
            self.stop.child_token(),
        );
        self.current = Some(Current {
            epoch,
            arena: arena.clone(),
            prefault: Some(prefault),
        });
        Ok(Some(arena))
    }

    /// Bytes of the arena that have been touched.
    pub fn prefaulted(&self) -> u64 {
        let prefault = |current: &Current| current.prefault.as_ref().map(Prefault::bytes);
        self.current.as_ref().and_then(prefault).unwrap_or(0)
    }

    /// The threads, to be dropped where waiting for them harms nobody.
    pub fn take_prefault(&mut self) -> Option<Prefault> {
        self.current.as_mut()?.prefault.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::arena::Rows;

    fn shape() -> Shape {
        let rows = Rows {
            bytes: 1000,
            writers: 1,
            verify: false,
        };
        Shape::fit(1 << 20, rows).unwrap()
    }

    #[test]
    fn an_arena_lasts_as_long_as_its_epoch() {
        let stop = CancellationToken::new();
        let mut keeper = Keeper::new(ArenaPlan::default(), stop.clone());
        let mut of = |epoch: u64| keeper.of(Some((epoch, shape()))).unwrap().unwrap();
        let first = of(1);
        assert!(Arc::ptr_eq(&first, &of(1)));
        assert!(!Arc::ptr_eq(&first, &of(2)));
        assert!(keeper.arena().is_some());
        assert!(keeper.of(None).unwrap().is_none());
        assert!(keeper.arena().is_none() && keeper.prefaulted() == 0);
        assert!(!stop.is_cancelled(), "the next arena is pre-faulted too");
    }

    #[test]
    fn what_was_cancelled_touches_nothing_more() {
        let stop = CancellationToken::new();
        stop.cancel();
        let mut keeper = Keeper::new(ArenaPlan::default(), stop);
        keeper.of(Some((1, shape()))).unwrap();
        drop(keeper.take_prefault());
        assert_eq!(keeper.prefaulted(), 0);
        assert!(keeper.arena().is_some());
    }
}
