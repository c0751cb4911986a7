//! Copies pages between a KV cache and the arena, many at a call. `build.rs` makes a small shared
//! library of this file alone (no dependencies, no allocation), which the shim loads with ctypes
//! and does without if it cannot (`pegaflow_vllm/copy.py`).
//!
//! Why not NumPy: a page costs it about as much as 8 KiB of copying, and an ordinary copy reads
//! each line of its target before it overwrites it. Here lines are written past the cache, four
//! pages at a time as glibc does for copies of many MiB.
#![no_std]

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
unsafe fn each_page(plan: &Plan, visit: impl Fn(*mut u8, *mut u8, usize)) {
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
}

#[cfg(target_arch = "x86_64")]
mod streaming {
    use core::arch::x86_64::{
        __m128i, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_sfence, _mm_stream_si128,
    };
    use core::ptr;

    const LINE: usize = 64;
    /// A page of memory: beyond it, the processor does not fetch ahead by itself.
    const MEMORY: usize = 4096;
    const APART: usize = 4;

    /// Makes what was streamed visible before whatever is written next.
    pub fn finish() {
        // SAFETY: every x86-64 processor has it.
        unsafe { _mm_sfence() };
    }

    pub unsafe fn copy(from: *const u8, to: *mut u8, size: usize) {
        let head = to.align_offset(LINE).min(size);
        // SAFETY: every access below stays within `size` bytes of both; lines are aligned in `to`.
        unsafe {
            ptr::copy_nonoverlapping(from, to, head);
            let mut done = head;
            while size - done >= APART * MEMORY {
                for at in (0..MEMORY).step_by(LINE) {
                    for part in 0..APART {
                        let at = done + part * MEMORY + at;
                        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(at + 8 * LINE).cast());
                        line(from.add(at), to.add(at));
                    }
                }
                done += APART * MEMORY;
            }
            while size - done >= LINE {
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(done + 16 * LINE).cast());
                line(from.add(done), to.add(done));
                done += LINE;
            }
            ptr::copy_nonoverlapping(from.add(done), to.add(done), size - done);
        }
    }

    #[inline(always)]
    unsafe fn line(from: *const u8, to: *mut u8) {
        let (from, to) = (from.cast::<__m128i>(), to.cast::<__m128i>());
        // SAFETY: 64 bytes of both, as the caller promises.
        unsafe {
            let words = [
                _mm_loadu_si128(from),
                _mm_loadu_si128(from.add(1)),
                _mm_loadu_si128(from.add(2)),
                _mm_loadu_si128(from.add(3)),
            ];
            _mm_stream_si128(to, words[0]);
            _mm_stream_si128(to.add(1), words[1]);
            _mm_stream_si128(to.add(2), words[2]);
            _mm_stream_si128(to.add(3), words[3]);
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
