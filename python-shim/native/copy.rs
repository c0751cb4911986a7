//! Copies pages between a KV cache and the arena, many at a call. `build.rs` makes a small shared
//! library of this file and `checksum.rs` (no dependencies, no allocation), which the shim loads with
//! ctypes and does without if it cannot (`pegaflow_vllm/copy.py`).
//!
//! Why not NumPy: a page costs it about as much as 8 KiB of copying, and an ordinary copy reads
//! each line of its target before it overwrites it. Here lines are written past the cache, four
//! pages at a time as glibc does for copies of many MiB.
//!
//! The caller looks at the slots' generations before and after. Fences keep what is copied between the
//! two looks, and what was saved before whatever the caller says next, on every processor.
#![no_std]

mod checksum;

use core::sync::atomic::{Ordering, fence};

/// One layer: page `n` of the cache is `size` bytes at `cache + n * cache_stride`, its place in row
/// `n` of the arena is `arena + n * arena_stride`.
#[repr(C)]
pub struct Lane {
    cache: *mut u8,
    cache_stride: usize,
    arena: *mut u8,
    arena_stride: usize,
    size: usize,
}

/// Which pages: `blocks[i]` of every lane's cache and `slots[i]` of the arena, for `i` below `count`.
#[repr(C)]
pub struct Plan {
    lanes: *const Lane,
    lanes_len: usize,
    blocks: *const i64,
    slots: *const i64,
    count: usize,
}

/// # Safety
/// All pages that `plan` names exist and belong to this call; cache and arena do not overlap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pegaflow_save(plan: &Plan) {
    // SAFETY: as the caller promises.
    unsafe {
        each_page(plan, |page, next| {
            copy(page.cache, page.arena, page.size, next.cache)
        })
    };
}

/// # Safety
/// As for [`pegaflow_save`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pegaflow_load(plan: &Plan) {
    // SAFETY: as the caller promises.
    unsafe {
        each_page(plan, |page, next| {
            copy(page.arena, page.cache, page.size, next.arena)
        })
    };
}

/// One page in the cache, and its place in the arena.
#[derive(Clone, Copy)]
struct Page {
    cache: *mut u8,
    arena: *mut u8,
    size: usize,
}

impl Plan {
    /// Page `lane` of block `at`.
    ///
    /// # Safety
    /// `at` is below `count`, `lane` below `lanes_len`, and all is as for [`pegaflow_save`].
    unsafe fn page(&self, at: usize, lane: usize) -> Page {
        // SAFETY: `blocks` and `slots` hold `count` numbers, `lanes` holds `lanes_len` lanes; the page
        // lies within the cache's and the arena's memory.
        unsafe {
            let (block, slot) = (*self.blocks.add(at), *self.slots.add(at));
            let lane = &*self.lanes.add(lane);
            Page {
                cache: lane.cache.add(block as usize * lane.cache_stride),
                arena: lane.arena.add(slot as usize * lane.arena_stride),
                size: lane.size,
            }
        }
    }
}

/// Calls `visit` with each page and the one that comes after it (the last: with itself).
///
/// # Safety
/// As for [`pegaflow_save`].
unsafe fn each_page(plan: &Plan, visit: impl Fn(Page, Page)) {
    fence(Ordering::Acquire);
    let mut waiting: Option<Page> = None;
    for at in 0..plan.count {
        for lane in 0..plan.lanes_len {
            // SAFETY: both are below their counts.
            let next = unsafe { plan.page(at, lane) };
            if let Some(page) = waiting.replace(next) {
                visit(page, next);
            }
        }
    }
    if let Some(page) = waiting {
        visit(page, page);
    }
    finish();
    fence(Ordering::AcqRel);
}

#[cfg(target_arch = "x86_64")]
mod streaming {
    use core::arch::x86_64::{
        __m128i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_setzero_si128, _mm_sfence,
        _mm_stream_si128,
    };
    use core::ptr;

    const LINE: usize = 64;
    /// A page of memory. Beyond it the processor does not fetch ahead by itself; and a load waits
    /// for an earlier store whose address is the same within its page.
    const MEMORY: usize = 4096;
    const APART: usize = 4;
    /// How far ahead lines are asked for, in steps of [`APART`] lines; by measurement (docs/performance-store.md).
    const AHEAD: usize = 24;

    /// Makes what was streamed visible before whatever is written next.
    pub fn finish() {
        // SAFETY: every x86-64 processor has it.
        unsafe { _mm_sfence() };
    }

    /// Copies, and asks for the first lines of `next`, which is what will be copied from after this.
    ///
    /// # Safety
    /// `size` bytes of `from` and `to`, which do not overlap.
    pub unsafe fn copy(from: *const u8, to: *mut u8, size: usize, next: *const u8) {
        let head = to.align_offset(LINE).min(size);
        // Towards the end that no store has come near to (within a page): a large tensor begins 64
        // bytes into a page and the arena's rows at the start of one, and each line's load would
        // wait for the store of the line before it.
        let ahead = (to as usize).wrapping_sub(from as usize) % MEMORY;
        let backward = 0 < ahead && ahead < MEMORY / 2;
        // SAFETY: every access below stays within `size` bytes of both; lines are aligned in `to`.
        unsafe {
            ptr::copy_nonoverlapping(from, to, head);
            if next != from.add(size) {
                touch(next, size);
            }
            let mut done = head;
            while size - done >= APART * MEMORY {
                let stretch = Stretch {
                    lines: MEMORY / LINE,
                    step: LINE,
                    apart: MEMORY,
                    backward,
                };
                let left = size - done - APART * MEMORY;
                let then = if left >= APART * MEMORY {
                    from.add(done + APART * MEMORY)
                } else {
                    next
                };
                stretch.copy(from.add(done), to.add(done), then);
                done += APART * MEMORY;
            }
            let groups = (size - done) / (APART * LINE);
            let stretch = Stretch {
                lines: groups,
                step: APART * LINE,
                apart: LINE,
                backward,
            };
            stretch.copy(from.add(done), to.add(done), next);
            done += groups * APART * LINE;
            ptr::copy_nonoverlapping(from.add(done), to.add(done), size - done);
        }
    }

    /// Asks for a line of each page of memory, so that the processor knows where they are when their turn
    /// comes: finding that out takes as long as copying some lines, and where pages follow one another it
    /// is hidden anyway.
    fn touch(first: *const u8, size: usize) {
        for at in (0..size).step_by(MEMORY) {
            // SAFETY: nothing is read; the address may be anything.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(first.wrapping_add(at).cast()) };
        }
    }

    /// `lines` times four lines that lie `apart`, `step` bytes from one another.
    struct Stretch {
        lines: usize,
        step: usize,
        apart: usize,
        backward: bool,
    }

    impl Stretch {
        /// Where the `n`th four lines are.
        #[inline(always)]
        fn at(&self, n: usize) -> usize {
            self.step * if self.backward { self.lines - 1 - n } else { n }
        }

        /// # Safety
        /// The stretch lies within both; `to` is aligned to a line. `then` may be anything.
        #[inline(always)]
        unsafe fn copy(&self, from: *const u8, to: *mut u8, then: *const u8) {
            for n in 0..self.lines {
                let soon = if n + AHEAD < self.lines {
                    from.wrapping_add(self.at(n + AHEAD))
                } else {
                    then.wrapping_add(self.at((n + AHEAD - self.lines).min(self.lines - 1)))
                };
                let at = self.at(n);
                // SAFETY: as the caller promises.
                unsafe { lines(from.add(at), to.add(at), self.apart, soon) };
            }
        }
    }

    /// Four lines that lie `apart`: all loads, then all stores; and asks for the four at `soon`.
    ///
    /// # Safety
    /// 64 bytes of both at each of four places, `apart` from one another; `to` is aligned to 16.
    #[inline(always)]
    unsafe fn lines(from: *const u8, to: *mut u8, apart: usize, soon: *const u8) {
        // SAFETY: four times 64 bytes of both, as the caller promises; what is only asked for may be
        // anywhere.
        unsafe {
            let mut words: [__m128i; 4 * APART] = [_mm_setzero_si128(); 4 * APART];
            for (at, word) in words.iter_mut().enumerate() {
                *word = _mm_loadu_si128(from.add(at / 4 * apart).cast::<__m128i>().add(at % 4));
            }
            for part in 0..APART {
                _mm_prefetch::<_MM_HINT_T0>(soon.wrapping_add(part * apart).cast());
            }
            for (at, word) in words.iter().enumerate() {
                _mm_stream_si128(to.add(at / 4 * apart).cast::<__m128i>().add(at % 4), *word);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
use streaming::{copy, finish};

/// # Safety
/// `size` bytes of both, which do not overlap.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy(from: *const u8, to: *mut u8, size: usize, _next: *const u8) {
    // SAFETY: as the caller promises.
    unsafe { core::ptr::copy_nonoverlapping(from, to, size) };
}

#[cfg(not(target_arch = "x86_64"))]
fn finish() {}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
