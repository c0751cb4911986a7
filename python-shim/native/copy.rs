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
    unsafe { each_page(plan, |cache, arena, size| copy(cache, arena, size)) };
}

/// # Safety
/// As for [`pegaflow_save`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pegaflow_load(plan: &Plan) {
    // SAFETY: as the caller promises.
    unsafe { each_page(plan, |cache, arena, size| copy(arena, cache, size)) };
}

/// Calls `visit` with a page in the cache, its place in the arena, and its size.
///
/// # Safety
/// As for [`pegaflow_save`].
unsafe fn each_page(plan: &Plan, visit: impl Fn(*mut u8, *mut u8, usize)) {
    fence(Ordering::Acquire);
    for at in 0..plan.count {
        // SAFETY: `blocks` and `slots` hold `count` numbers, `lanes` holds `lanes_len` lanes.
        let (block, slot) = unsafe { (*plan.blocks.add(at), *plan.slots.add(at)) };
        for lane in 0..plan.lanes_len {
            // SAFETY: as above; the page lies within the cache's and the arena's memory.
            unsafe {
                let lane = &*plan.lanes.add(lane);
                let cache = lane.cache.add(block as usize * lane.cache_stride);
                visit(
                    cache,
                    lane.arena.add(slot as usize * lane.arena_stride),
                    lane.size,
                );
            }
        }
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
    const AHEAD: usize = 8;

    /// Makes what was streamed visible before whatever is written next.
    pub fn finish() {
        // SAFETY: every x86-64 processor has it.
        unsafe { _mm_sfence() };
    }

    /// # Safety
    /// `size` bytes of both, which do not overlap.
    pub unsafe fn copy(from: *const u8, to: *mut u8, size: usize) {
        let head = to.align_offset(LINE).min(size);
        // Towards the end that no store has come near to (within a page): a large tensor begins 64
        // bytes into a page and the arena's rows at the start of one, and each line's load would
        // wait for the store of the line before it.
        let ahead = (to as usize).wrapping_sub(from as usize) % MEMORY;
        let backward = 0 < ahead && ahead < MEMORY / 2;
        let order = |step: usize, steps: usize| if backward { steps - 1 - step } else { step };
        // SAFETY: every access below stays within `size` bytes of both; lines are aligned in `to`.
        unsafe {
            ptr::copy_nonoverlapping(from, to, head);
            let mut done = head;
            while size - done >= APART * MEMORY {
                for step in 0..MEMORY / LINE {
                    let at = done + LINE * order(step, MEMORY / LINE);
                    lines(from.add(at), to.add(at), MEMORY, backward);
                }
                done += APART * MEMORY;
            }
            let groups = (size - done) / (APART * LINE);
            for step in 0..groups {
                let at = done + APART * LINE * order(step, groups);
                lines(from.add(at), to.add(at), LINE, backward);
            }
            done += groups * APART * LINE;
            ptr::copy_nonoverlapping(from.add(done), to.add(done), size - done);
        }
    }

    /// Four lines that lie `apart`: all loads, then all stores.
    ///
    /// # Safety
    /// 64 bytes of both at each of four places, `apart` from one another; `to` is aligned to 16.
    #[inline(always)]
    unsafe fn lines(from: *const u8, to: *mut u8, apart: usize, backward: bool) {
        let step = AHEAD * LINE;
        let soon = if backward {
            from.wrapping_sub(step)
        } else {
            from.wrapping_add(step)
        };
        // SAFETY: four times 64 bytes of both, as the caller promises.
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

#[cfg(not(target_arch = "x86_64"))]
use core::ptr::copy_nonoverlapping as copy;

#[cfg(not(target_arch = "x86_64"))]
fn finish() {}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
