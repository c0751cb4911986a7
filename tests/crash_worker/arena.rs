//! The mapped arena, as words: every access is atomic, so a race is a value, not undefined behaviour.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};
use pegaflow::engine::client::Client;
use pegaflow::engine::protocol::{SlotRef, Welcome};

use crate::spec::{ROW_BYTES, ROW_WORDS};

pub struct Arena {
    map: MmapRaw,
    welcome: Welcome,
}

impl Arena {
    pub fn map(client: &Client) -> Self {
        let welcome = *client.welcome();
        let len = usize::try_from(welcome.arena_bytes).unwrap();
        let end = welcome.header_bytes + u64::from(welcome.slots) * welcome.stride;
        assert!(end <= welcome.arena_bytes && u64::from(welcome.slots) * 4 <= welcome.header_bytes);
        assert!(welcome.rank_offset + ROW_BYTES <= welcome.stride);
        let map = MmapOptions::new().len(len).map_raw(client.arena().unwrap());
        Self {
            map: map.unwrap(),
            welcome,
        }
    }

    pub fn epoch(&self) -> u64 {
        self.welcome.epoch
    }

    /// Whether the slot holds this chunk. Orders what was read before against what this reads.
    pub fn is_current(&self, at: SlotRef) -> bool {
        fence(Ordering::SeqCst);
        at.slot < self.welcome.slots && self.generation(at.slot) == at.generation
    }

    #[expect(unsafe_code, reason = "the arena is shared with other processes")]
    fn generation(&self, slot: u32) -> u32 {
        assert!(slot < self.welcome.slots);
        // SAFETY: within the header (`map` has checked its size) and aligned, since the mapping begins
        // on a page; only ever accessed atomically; the file is sealed, so the page exists.
        let cell = unsafe {
            let cells: *const AtomicU32 = self.map.as_ptr().cast();
            &*cells.add(slot as usize)
        };
        cell.load(Ordering::Acquire)
    }

    /// Where this rank's checksum of a slot is; `None`: the store keeps none.
    #[expect(unsafe_code, reason = "the arena is shared with other processes")]
    pub fn sum(&self, slot: u32) -> Option<&AtomicU32> {
        let first = usize::try_from(self.welcome.checksum_offset).unwrap();
        if first == 0 {
            return None;
        }
        let header = usize::try_from(self.welcome.header_bytes).unwrap();
        let at = first + slot as usize * 4;
        assert!(slot < self.welcome.slots && at.is_multiple_of(4) && at + 4 <= header);
        // SAFETY: within the header (checked above, as its size was in `map`) and aligned; only ever
        // accessed atomically; the file is sealed, so the page exists.
        Some(unsafe { &*self.map.as_ptr().add(at).cast::<AtomicU32>() })
    }

    /// This rank's part of a slot.
    #[expect(unsafe_code, reason = "the arena is shared with other processes")]
    pub fn row(&self, slot: u32) -> &[AtomicU64] {
        assert!(slot < self.welcome.slots);
        let Welcome {
            header_bytes,
            stride,
            rank_offset,
            ..
        } = self.welcome;
        let start = header_bytes + u64::from(slot) * stride + rank_offset;
        let start = usize::try_from(start).unwrap();
        assert!(start.is_multiple_of(8) && start + ROW_WORDS * 8 <= self.map.len());
        // SAFETY: inside the mapping and aligned (checked above); only ever accessed atomically; the
        // mapping lives as long as `self`, and the file is sealed, so the pages exist.
        unsafe {
            let first: *const AtomicU64 = self.map.as_mut_ptr().add(start).cast_const().cast();
            std::slice::from_raw_parts(first, ROW_WORDS)
        }
    }
}
