//! In which order chunks are evicted.
//!
//! ```text
//!                     not asked for again            asked for again
//!   no longer held ──────────▶ Once ◀── too many ── Hot ◀──────────── no longer held
//!                               │                    │
//!                    first      ▼      when Once     ▼
//!                             evicted   is empty   evicted
//! ```
//!
//! Two lists of the chunks that nothing holds, each from the longest unused to the last used. What
//! was only written and handed on (a scan) passes through `Once` and never displaces what requests
//! share, which is in `Hot`; `Hot` is limited, so that what was shared long ago goes too.
//!
//! A chunk comes to the end of a list when it stops being held, a parent always after its
//! children, and a parent is `Hot` when a child is. So the first of `Once`, or of `Hot` when that
//! is empty, never has a child: leaves are evicted before what they need, without looking for them.

use super::Index;
use super::chunk::{Chunk, NONE, Parent, Place};

/// Slots that `Hot` may fill, in percent; what is held counts for neither list. Measured in `traces`: more
/// keeps more of what is shared through scans, and loses to plain LRU where many conversations, hot
/// until they end, do not fit.
const HOT_PERCENT: u64 = 25;

#[derive(Debug)]
pub struct Order {
    once: List,
    hot: List,
    most_hot: u32,
}

#[derive(Debug)]
struct List {
    first: u32,
    last: u32,
    len: u32,
}

impl List {
    const EMPTY: Self = Self {
        first: NONE,
        last: NONE,
        len: 0,
    };
}

impl Order {
    pub fn new(slots: u32) -> Self {
        let most_hot = u64::from(slots) * HOT_PERCENT / 100;
        Self {
            once: List::EMPTY,
            hot: List::EMPTY,
            most_hot: u32::try_from(most_hot).unwrap_or(u32::MAX),
        }
    }

    /// Chunks that are not held.
    pub fn evictable(&self) -> u32 {
        self.once.len + self.hot.len
    }

    pub fn victim(&self) -> Option<u32> {
        let firsts = [self.once.first, self.hot.first];
        firsts.into_iter().find(|&first| first != NONE)
    }

    fn list(&mut self, place: Place) -> Option<&mut List> {
        match place {
            Place::Held => None,
            Place::Once => Some(&mut self.once),
            Place::Hot => Some(&mut self.hot),
        }
    }
}

impl Index {
    /// Changes a chunk and carries what that means for `held` up to its ancestors.
    pub(super) fn change(&mut self, slot: u32, change: impl FnOnce(&mut Chunk)) {
        let mut above = self.change_one(slot, change);
        while let Some(news) = above {
            above = self.change_one(news.parent, |parent| {
                parent.hot |= news.hot;
                parent.held_children = if news.held {
                    parent.held_children + 1
                } else {
                    parent.held_children.saturating_sub(1)
                };
            });
        }
    }

    fn change_one(&mut self, slot: u32, change: impl FnOnce(&mut Chunk)) -> Option<News> {
        let chunk = self.chunk_mut(slot)?;
        let (was_held, was_leased) = (chunk.is_held(), chunk.leases > 0);
        change(chunk);
        let (held, leased) = (chunk.is_held(), chunk.leases > 0);
        let (hot, parent) = (chunk.hot, chunk.parent.map(Parent::at));
        self.leased = self.leased + u32::from(leased) - u32::from(was_leased);
        if held == was_held {
            return None;
        }
        if held {
            self.unlist(slot);
        } else {
            self.append(slot, if hot { Place::Hot } else { Place::Once });
            self.cool_down();
        }
        let parent = parent.filter(|&parent| self.current(parent).is_some())?;
        Some(News {
            parent: parent.slot,
            held,
            hot,
        })
    }

    /// Moves what was used longest ago out of `Hot` while that is too long.
    fn cool_down(&mut self) {
        while self.order.hot.len > self.order.most_hot {
            let coldest = self.order.hot.first;
            self.unlist(coldest);
            if let Some(chunk) = self.chunk_mut(coldest) {
                chunk.hot = false;
            }
            self.append(coldest, Place::Once);
        }
    }

    fn append(&mut self, slot: u32, place: Place) {
        let Some(list) = self.order.list(place) else {
            return;
        };
        let before = std::mem::replace(&mut list.last, slot);
        list.len += 1;
        if before == NONE {
            list.first = slot;
        }
        if let Some(last) = self.chunk_mut(before) {
            last.after = slot;
        }
        if let Some(chunk) = self.chunk_mut(slot) {
            (chunk.before, chunk.after, chunk.place) = (before, NONE, place);
        }
    }

    /// Takes a chunk out of its list, if it is in one.
    pub(super) fn unlist(&mut self, slot: u32) {
        let Some(chunk) = self.chunk_mut(slot) else {
            return;
        };
        let place = std::mem::replace(&mut chunk.place, Place::Held);
        let (before, after) = (chunk.before, chunk.after);
        (chunk.before, chunk.after) = (NONE, NONE);
        let Some(list) = self.order.list(place) else {
            return;
        };
        list.len -= 1;
        if before == NONE {
            list.first = after;
        }
        if after == NONE {
            list.last = before;
        }
        if let Some(chunk) = self.chunk_mut(before) {
            chunk.after = after;
        }
        if let Some(chunk) = self.chunk_mut(after) {
            chunk.before = before;
        }
    }

    /// A list from its first to its last: for tests.
    #[cfg(test)]
    pub(super) fn listed(&self, place: Place) -> Vec<u32> {
        let list = match place {
            Place::Held => return Vec::new(),
            Place::Once => &self.order.once,
            Place::Hot => &self.order.hot,
        };
        let mut found = Vec::new();
        let (mut at, mut before) = (list.first, NONE);
        while let Some(chunk) = self.chunk(at) {
            assert_eq!((chunk.before, chunk.place), (before, place));
            found.push(at);
            (before, at) = (at, chunk.after);
        }
        assert_eq!((list.last, list.len as usize), (before, found.len()));
        found
    }
}

/// What a parent is told.
struct News {
    parent: u32,
    /// Its child became held, or no longer is.
    held: bool,
    /// Its child is.
    hot: bool,
}
