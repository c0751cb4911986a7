//! CRC-32 as zlib computes it (polynomial 0xedb88320, bits in reverse), of rows of the arena.
//!
//! ```text
//! processor with PCLMULQDQ ─▶ 64 bytes at a time as four 128-bit remainders, folded into one at the end
//! any other, and the last bytes of a row ─▶ eight bytes at a time through tables
//! ```
//!
//! Folding is Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel,
//! 2009): the constants are x^n modulo the polynomial for the distances that a remainder is carried on.

use core::slice;
use core::sync::atomic::{Ordering, fence};

/// `sums[i]` gets the CRC of `size` bytes at `first + slots[i] * stride`, for `i` below `count`.
#[repr(C)]
pub struct Rows {
    first: *const u8,
    stride: usize,
    size: usize,
    slots: *const i64,
    sums: *mut u32,
    count: usize,
}

/// # Safety
/// All rows and all numbers that `rows` names exist. Where somebody writes a row meanwhile, its sum is that of
/// no row that ever was: every byte is read once, and nothing else depends on it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pegaflow_crc32(rows: &Rows) {
    fence(Ordering::Acquire);
    for at in 0..rows.count {
        // SAFETY: `slots` and `sums` hold `count` numbers, and the row lies within the arena, as the caller
        // promises.
        unsafe {
            let slot = *rows.slots.add(at) as usize;
            let row = slice::from_raw_parts(rows.first.add(slot * rows.stride), rows.size);
            *rows.sums.add(at) = crc32(row);
        }
    }
    // The caller looks at the slots' generations next, or says that it has written the rows.
    fence(Ordering::AcqRel);
}

fn crc32(bytes: &[u8]) -> u32 {
    let (state, rest) = fold(!0, bytes);
    !by_tables(state, rest)
}

/// `state` after as much of `bytes` as can be folded here, and the rest.
#[cfg(all(target_arch = "x86_64", not(pegaflow_tables_only)))]
fn fold(state: u32, bytes: &[u8]) -> (u32, &[u8]) {
    match bytes.as_chunks::<{ folding::BLOCK }>() {
        ([first, others @ ..], rest) if folding::is_available() => {
            // SAFETY: the processor has the instructions.
            (unsafe { folding::fold(state, first, others) }, rest)
        }
        _ => (state, bytes),
    }
}

#[cfg(not(all(target_arch = "x86_64", not(pegaflow_tables_only))))]
fn fold(state: u32, bytes: &[u8]) -> (u32, &[u8]) {
    (state, bytes)
}

const POLYNOMIAL: u32 = 0xedb8_8320;

/// `TABLES[n][byte]`: what `byte` comes to after `n` more zero bytes.
static TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut sum = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            sum = (sum >> 1) ^ (POLYNOMIAL * (sum & 1));
            bit += 1;
        }
        tables[0][byte] = sum;
        byte += 1;
    }
    let mut n = 1;
    while n < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[n - 1][byte];
            tables[n][byte] = (before >> 8) ^ tables[0][before as usize & 0xff];
            byte += 1;
        }
        n += 1;
    }
    tables
}

fn by_tables(mut state: u32, bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        let word = u64::from_le_bytes(*word) ^ u64::from(state);
        state = 0;
        for (at, byte) in word.to_le_bytes().into_iter().enumerate() {
            state ^= TABLES[7 - at][byte as usize];
        }
    }
    for byte in rest {
        state = (state >> 8) ^ TABLES[0][((state ^ u32::from(*byte)) & 0xff) as usize];
    }
    state
}

#[cfg(all(target_arch = "x86_64", not(pegaflow_tables_only)))]
mod folding {
    use core::arch::x86_64::{
        __cpuid, __m128i, _mm_and_si128, _mm_clmulepi64_si128, _mm_cvtsi32_si128,
        _mm_extract_epi32, _mm_loadu_si128, _mm_set_epi32, _mm_set_epi64x, _mm_srli_si128,
        _mm_xor_si128,
    };
    use core::sync::atomic::{AtomicU8, Ordering};

    /// Bytes of four remainders.
    pub const BLOCK: usize = 64;

    /// For a remainder that is carried on by four of its lengths, and by one; for the last 64 and 32 bits.
    const BY_FOUR: (i64, i64) = (0x1_c6e4_1596, 0x1_5444_2bd4);
    const BY_ONE: (i64, i64) = (0x0_ccaa_009e, 0x1_7519_97d0);
    const TO_64_BITS: i64 = 0x1_63cd_6124;
    /// Of the Barrett reduction to 32 bits: the quotient x^64 / P, and P itself.
    const QUOTIENT_AND_P: (i64, i64) = (0x1_f701_1641, 0x1_db71_0641);

    const UNKNOWN: u8 = 0;
    const NO: u8 = 1;
    const YES: u8 = 2;

    /// Asked once: a virtual machine answers `cpuid` slowly.
    pub fn is_available() -> bool {
        static KNOWN: AtomicU8 = AtomicU8::new(UNKNOWN);
        match KNOWN.load(Ordering::Relaxed) {
            UNKNOWN => {
                const PCLMULQDQ: u32 = 1 << 1;
                const SSE4_1: u32 = 1 << 19;
                let has = __cpuid(1).ecx & (PCLMULQDQ | SSE4_1) == PCLMULQDQ | SSE4_1;
                KNOWN.store(if has { YES } else { NO }, Ordering::Relaxed);
                has
            }
            known => known == YES,
        }
    }

    /// The state after `first` and `others`.
    ///
    /// # Safety
    /// The processor has PCLMULQDQ and SSE 4.1: [`is_available`].
    #[target_feature(enable = "pclmulqdq,sse4.1")]
    pub unsafe fn fold(state: u32, first: &[u8; BLOCK], others: &[[u8; BLOCK]]) -> u32 {
        let mut lanes = load(first);
        lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(state as i32));
        let by_four = _mm_set_epi64x(BY_FOUR.0, BY_FOUR.1);
        for block in others {
            let next = load(block);
            for (lane, next) in lanes.iter_mut().zip(next) {
                *lane = carry(*lane, next, by_four);
            }
        }
        let by_one = _mm_set_epi64x(BY_ONE.0, BY_ONE.1);
        let [a, b, c, d] = lanes;
        let sum = carry(carry(carry(a, b, by_one), c, by_one), d, by_one);

        let low_32 = _mm_set_epi32(0, 0, 0, !0);
        let upper = _mm_srli_si128::<8>(sum);
        let sum = _mm_xor_si128(_mm_clmulepi64_si128::<0x10>(sum, by_one), upper);
        let upper = _mm_srli_si128::<4>(sum);
        let lower = _mm_and_si128(sum, low_32);
        let to_64 = _mm_clmulepi64_si128::<0x00>(lower, _mm_set_epi64x(0, TO_64_BITS));
        let sum = _mm_xor_si128(to_64, upper);

        let barrett = _mm_set_epi64x(QUOTIENT_AND_P.0, QUOTIENT_AND_P.1);
        let quotient = _mm_clmulepi64_si128::<0x10>(_mm_and_si128(sum, low_32), barrett);
        let product = _mm_clmulepi64_si128::<0x00>(_mm_and_si128(quotient, low_32), barrett);
        _mm_extract_epi32::<1>(_mm_xor_si128(product, sum)) as u32
    }

    #[target_feature(enable = "pclmulqdq,sse4.1")]
    fn load(block: &[u8; BLOCK]) -> [__m128i; 4] {
        let first = block.as_ptr().cast::<__m128i>();
        // SAFETY: four times 16 bytes are the block; the instruction needs no alignment.
        [0, 1, 2, 3].map(|at| unsafe { _mm_loadu_si128(first.add(at)) })
    }

    /// `remainder`, as far on as `keys` say, together with what is there.
    #[target_feature(enable = "pclmulqdq,sse4.1")]
    fn carry(remainder: __m128i, next: __m128i, keys: __m128i) -> __m128i {
        let low = _mm_clmulepi64_si128::<0x00>(remainder, keys);
        let high = _mm_clmulepi64_si128::<0x11>(remainder, keys);
        _mm_xor_si128(_mm_xor_si128(low, high), next)
    }
}
