//! Chunks that turned out to be damaged: what a reader found is not what was saved.
//!
//! ```text
//! Ready, found by its key ── condemn ──▶ found no more ── not held, and its turn ──▶ evicted
//!                                        keeps its slot, its leases and its place among parents and children
//! ```
//!
//! The key is free at once, so the chunk can be saved anew in another slot. The damaged one is in
//! nobody's way: whoever is reading it may go on (and find out by itself), and its children, which are
//! whole, still come before it in the order of eviction. New ones do not come under it.

use super::{Condemned, Index};
use crate::engine::protocol::SlotRef;

impl Index {
    pub fn condemn(&mut self, at: SlotRef) -> Condemned {
        let Some(chunk) = self.current_mut(at).filter(|chunk| chunk.ready) else {
            return Condemned::Ignored;
        };
        if std::mem::replace(&mut chunk.damaged, true) {
            return Condemned::Already;
        }
        self.damaged += 1;
        if let Some(chunk) = self.chunk(at.slot) {
            self.by_key.remove(self.hash(chunk.key.as_bytes()), at.slot);
        }
        Condemned::Now
    }
}
