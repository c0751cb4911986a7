//! The shared memory that KV is copied through: its layout, and its file.
//!
//! ```text
//! 0             checksum_offset                header_bytes                                 arena_bytes
//! ├─ u32 × slots ─┼─ writers × (u32 × slots) ────┼─ slot 0: rank 0 | rank 1 | .. ─┼─ slot 1: .. ─┤
//!   generations     checksums, if there are any    stride ≥ row_bytes × writers
//! ```
//!
//! A slot has a row of each rank that writes: of every one, or of rank 0 alone where all ranks have
//! the same KV.
//!
//! The checksums are the workers': the engine makes room for them, and neither writes nor reads them.
//!
//! The file is a memfd that can neither shrink nor grow, so no mapping of it reaches beyond its end.
//! The engine keeps a mapping of the generations only; rows are read and written by vLLM workers.
//!
//! ```text
//! first worker's row size ─ Shape::fit ─▶ file: memfd of the planned pages, on the planned NUMA nodes
//!                                           ├─▶ sent to the workers at once
//!                                           └─▶ prefault: threads touch its pages meanwhile
//! ```
//!
//! A second tier (SSD) would sit beside this module, not in it: it reads and writes whole slots
//! through a mapping of its own, under leases like a worker's, and knows no layout but [`Shape`].

mod file;
mod keeper;
mod prefault;
mod sys;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::MmapRaw;

use self::file::MemoryFile;
pub use self::keeper::Keeper;
use crate::host::HUGE_PAGE;
use crate::plan::{ArenaPlan, PageKind};

/// Where the rows begin and how long everything is.
const PAGE: u64 = 4096;
/// Rows begin on a cache line.
const LINE: u64 = 64;
/// A generation or a checksum.
const CELL: u64 = 4;
/// The generation of a slot's first chunk; 0 never is one.
pub const FIRST_GENERATION: u32 = 1;

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Of one rank.
    pub bytes: u64,
    /// One row of each.
    pub writers: u32,
    /// With a checksum of each.
    pub verify: bool,
}

/// The sizes of an arena, all in bytes but `slots`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub slots: u32,
    pub row_bytes: u64,
    pub stride: u64,
    /// Where rank 0's checksums begin, those of the next rank right behind them; 0: there are none.
    pub checksum_offset: u64,
    pub header_bytes: u64,
    pub arena_bytes: u64,
}

impl Shape {
    /// The most slots that fit into `capacity` bytes; `None` when not even one does. A capacity of
    /// whole 2 MiB makes an arena of whole 2 MiB, as huge pages need it.
    pub fn fit(capacity: u64, rows: Rows) -> Option<Self> {
        let writers = u64::from(rows.writers);
        let stride = rows
            .bytes
            .checked_mul(writers)?
            .checked_next_multiple_of(LINE)?;
        if stride == 0 {
            return None;
        }
        let checksums = if rows.verify { CELL * writers } else { 0 };
        let generations = |slots: u64| (slots * CELL).next_multiple_of(LINE);
        let header = |slots: u64| (generations(slots) + slots * checksums).next_multiple_of(PAGE);
        let most = capacity.checked_sub(PAGE)? / stride;
        let mut slots = most.min(u64::from(u32::MAX));
        // One page of header is left out already; take back what the others need.
        while slots > 0 && header(slots) + slots * stride > capacity {
            slots -= (header(slots) + slots * stride - capacity)
                .div_ceil(stride + CELL + checksums)
                .clamp(1, slots);
        }
        if slots == 0 {
            return None;
        }
        let page = if capacity.is_multiple_of(HUGE_PAGE) {
            HUGE_PAGE
        } else {
            PAGE
        };
        let header_bytes = header(slots);
        Some(Self {
            slots: u32::try_from(slots).ok()?,
            row_bytes: rows.bytes,
            stride,
            checksum_offset: if rows.verify { generations(slots) } else { 0 },
            header_bytes,
            arena_bytes: (header_bytes + slots * stride).next_multiple_of(page),
        })
    }

    /// Where a rank's checksums begin; 0: there are none.
    pub fn checksum_offset_of(&self, rank: u64) -> u64 {
        match self.checksum_offset {
            0 => 0,
            first => first + rank * u64::from(self.slots) * CELL,
        }
    }
}

/// A sealed memory file and the mapping of its generations.
#[derive(Debug)]
pub struct Arena {
    file: MemoryFile,
    generations: MmapRaw,
    shape: Shape,
}

impl Arena {
    pub fn create(shape: Shape, plan: &ArenaPlan) -> io::Result<Self> {
        let file = MemoryFile::create(shape.arena_bytes, plan)?;
        // The mapping of huge pages can be undone only in whole ones.
        let header = match file.pages {
            PageKind::Huge => shape.header_bytes.next_multiple_of(HUGE_PAGE),
            PageKind::Transparent | PageKind::Normal => shape.header_bytes,
        };
        let arena = Self {
            generations: file.map(0, header)?,
            file,
            shape,
        };
        for slot in 0..shape.slots {
            arena.set_generation(slot, FIRST_GENERATION);
        }
        Ok(arena)
    }

    /// What a worker maps.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.file.as_fd()
    }

    /// Publishes that slot's chunk: who reads this value afterwards knows that every older chunk
    /// of the slot is void.
    pub fn set_generation(&self, slot: u32, generation: u32) {
        if let Some(cell) = self.cell(slot) {
            cell.store(generation, Ordering::Release);
        }
    }

    fn cell(&self, slot: u32) -> Option<&AtomicU32> {
        let offset = usize::try_from(slot).ok()?.checked_mul(size_of::<u32>())?;
        let end = offset.checked_add(size_of::<u32>())?;
        if slot >= self.shape.slots || end > self.generations.len() {
            return None;
        }
        #[expect(
            unsafe_code,
            reason = "shared memory can be reached only by raw pointer"
        )]
        // SAFETY: `offset..end` lies within the mapping (checked above), which lives as long as
        // `self`; the file is sealed against shrinking, so the pages exist. The mapping begins on
        // a page and `offset` is a multiple of four, so the pointer is aligned. Other processes
        // may write the cell at any time, which an atomic allows.
        let cell =
            unsafe { AtomicU32::from_ptr(self.generations.as_mut_ptr().add(offset).cast::<u32>()) };
        Some(cell)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_shape_fits_and_wastes_less_than_a_slot_and_two_pages(
            capacity in 0..1u64 << 40,
            row_bytes in 1..1u64 << 24,
            writers in 1..64u32,
            verify: bool,
        ) {
            let stride = (row_bytes * u64::from(writers)).next_multiple_of(64);
            match Shape::fit(capacity, Rows { bytes: row_bytes, writers, verify }) {
                Some(shape) => {
                    let slots = u64::from(shape.slots);
                    let sums = if verify { slots * 4 * u64::from(writers) } else { 0 };
                    prop_assert_eq!(shape.stride, stride);
                    prop_assert!(shape.header_bytes >= slots * 4 + sums);
                    prop_assert!(shape.header_bytes.is_multiple_of(PAGE));
                    prop_assert_eq!(shape.checksum_offset != 0, verify);
                    prop_assert!(!verify || shape.checksum_offset >= slots * 4);
                    prop_assert!(shape.checksum_offset + sums <= shape.header_bytes);
                    prop_assert!(shape.header_bytes + slots * stride <= capacity);
                    prop_assert!(shape.header_bytes + slots * stride <= shape.arena_bytes);
                    let each = stride + 4 + if verify { 4 * u64::from(writers) } else { 0 };
                    prop_assert!(capacity - slots * each < each + 2 * PAGE);
                }
                None => prop_assert!(capacity < stride + PAGE),
            }
        }

        #[test]
        fn whole_huge_pages_stay_whole_and_within_the_capacity(
            pages in 1..1u64 << 20,
            row_bytes in 1..1u64 << 24,
            writers in 1..64u32,
        ) {
            let capacity = pages * HUGE_PAGE;
            let verify = pages % 2 == 0;
            if let Some(shape) = Shape::fit(capacity, Rows { bytes: row_bytes, writers, verify }) {
                prop_assert!(shape.arena_bytes.is_multiple_of(HUGE_PAGE));
                prop_assert!(shape.arena_bytes <= capacity);
            }
        }
    }

    #[test]
    fn the_file_is_sealed_and_generations_are_shared() {
        let rows = Rows {
            bytes: 1000,
            writers: 2,
            verify: false,
        };
        let shape = Shape::fit(1 << 20, rows).unwrap();
        let arena = Arena::create(shape, &ArenaPlan::default()).unwrap();
        let file = &arena.file.file;
        assert_eq!(file.metadata().unwrap().len(), shape.arena_bytes);
        assert!(file.set_len(1).is_err());
        assert!(file.set_len(shape.arena_bytes * 2).is_err());

        arena.set_generation(3, 7);
        arena.set_generation(shape.slots, 7);
        let read = |slot: u32| {
            let mut bytes = [0; 4];
            std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, u64::from(slot) * 4)
                .unwrap();
            u32::from_ne_bytes(bytes)
        };
        assert_eq!((read(2), read(3), read(4)), (1, 7, 1));
        assert_eq!((read(shape.slots - 1), read(shape.slots)), (1, 0));
    }
}
