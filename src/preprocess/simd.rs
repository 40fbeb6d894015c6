//! The inner loops for processors with AVX2; each has a twin in plain code that gives the same
//! bytes and is tested against it.
//!
//! Needed for the time budget of a frame, 1.5 ms: plain code is compiled for the oldest x86-64,
//! which has neither a byte shuffle nor a full 32-bit multiplication. On one core of an AMD EPYC
//! a 1080p frame takes 0.64 ms here and 2.1 ms in plain code as I420, 0.72 ms and 3.4 ms as RGB
//! (`benches/preprocess.rs`).

#![allow(unsafe_code, reason = "vector loads and stores, and functions for detected features")]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::preprocess::{Plane, resize, yuv};

/// How many pixels of weights one vector holds in the horizontal pass over RGB.
const GROUP: usize = 4;

/// Pillow's 22-bit weights are cut in two so that 16-bit multiplications suffice.
const LOW_BITS: u32 = 14;

/// Columns of an RGB resize, laid out for AVX2.
#[derive(Debug)]
pub(super) struct RgbTaps {
    /// The first pixel of each window; the groups from there and 4 bytes more are inside the row.
    starts: Vec<usize>,
    /// Per output pixel and group of four: 16 high parts, then 16 low parts.
    weights: Vec<[[i16; 16]; 2]>,
    /// Groups per output pixel.
    groups: usize,
    /// How many bytes of a row the kernel may read.
    row_bytes: usize,
}

impl RgbTaps {
    /// Lays out windows of `size` weights over rows of `input` pixels, `None` if those are too
    /// short for whole vectors.
    pub(super) fn new<'a>(
        windows: impl Iterator<Item = (usize, &'a [i32])>,
        size: usize,
        input: usize,
    ) -> Option<RgbTaps> {
        let groups = size.div_ceil(GROUP);
        // A load takes 16 bytes, of which a group uses 12: two more pixels hold the other 4.
        let last = input.checked_sub(groups * GROUP + 2)?;
        let (mut starts, mut weights) = (Vec::new(), Vec::new());
        for (start, window) in windows {
            let from = start.min(last);
            let lead = start - from;
            let at = |tap: usize| {
                tap.checked_sub(lead).and_then(|it| window.get(it)).copied().unwrap_or(0)
            };
            // A window that was moved to the left may need its tail beyond the last group.
            if (groups * GROUP..lead + window.len()).any(|tap| at(tap) != 0) {
                return None;
            }
            starts.push(from);
            for group in 0..groups {
                let mut parts = [[0; 16]; 2];
                // Lane by lane: the red, green and blue pairs of two pixels, and a pair unused.
                for slot in (0..16).filter(|it| it % 8 < 6) {
                    let weight = at(group * GROUP + slot / 8 * 2 + slot % 2);
                    parts[0][slot] = (weight >> LOW_BITS) as i16;
                    parts[1][slot] = (weight & ((1 << LOW_BITS) - 1)) as i16;
                }
                weights.push(parts);
            }
        }
        let end = starts.iter().max()? + groups * GROUP;
        Some(RgbTaps { starts, weights, groups, row_bytes: end * 3 + 4 })
    }

    /// How many bytes of a row the kernel may read.
    pub(super) fn row_bytes(&self) -> usize {
        self.row_bytes
    }
}

/// Proof that the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    /// Asks the processor.
    pub(super) fn detect() -> Option<Avx2> {
        is_x86_feature_detected!("avx2").then_some(Avx2(()))
    }

    /// The horizontal pass over four rows of RGB, into lines that begin every `pitch` bytes. Rows
    /// without a line of their own go to the last line. Overwrites a byte after each line.
    pub(super) fn across_rgb(
        self,
        taps: &RgbTaps,
        rows: [&[u8]; 4],
        lines: &mut [u8],
        pitch: usize,
    ) {
        assert!(rows.iter().all(|it| taps.row_bytes <= it.len()), "the rows are whole");
        assert!(taps.starts.len() * 3 < pitch && pitch <= lines.len(), "the lines have room");
        // SAFETY: a value of this type proves AVX2, and the sizes are asserted above.
        unsafe { across_rgb(taps, rows, lines, pitch) }
    }

    /// As [`resize::down`].
    pub(super) fn down(self, source: Plane<'_>, weights: &[i32], line: &mut [u8]) {
        // SAFETY: a value of this type proves AVX2.
        unsafe { down(source, weights, line) }
    }

    /// As [`yuv::blend_portable`].
    pub(super) fn blend(self, source: Plane<'_>, weights: &[i16], out: &mut [i16]) {
        let last = weights.len().saturating_sub(1) * source.stride;
        if out.len() < BLEND {
            return yuv::blend_portable(source, weights, out);
        }
        assert!(last + out.len() <= source.bytes.len(), "every tap's row is whole");
        // SAFETY: a value of this type proves AVX2, and the sizes are asserted above.
        unsafe { blend(source, weights, out) }
    }

    /// As [`yuv::dots_portable`].
    pub(super) fn dots(self, row: &[i16], taps: &yuv::Taps, out: &mut [i32]) {
        assert!(taps.last_start + taps.size <= row.len(), "every window is inside the row");
        assert!(taps.starts.len() == out.len(), "there is a window for every sum");
        assert!(taps.weights.len() == out.len() * taps.size, "every window has its weights");
        assert!(taps.size.is_multiple_of(8), "a window is whole vectors");
        // SAFETY: a value of this type proves AVX2, and the sizes are asserted above; `Taps::new`
        // alone makes taps, and no start is beyond `last_start`.
        unsafe { dots(row, taps, out) }
    }

    /// As [`yuv::Matrix::apply`].
    pub(super) fn colour(self, matrix: &yuv::Matrix, sums: &[Vec<i32>; 3], line: &mut [u8]) {
        // SAFETY: a value of this type proves AVX2.
        unsafe { colour(matrix, sums, line) }
    }
}

/// How many columns [`blend`] takes at once.
#[cfg(target_arch = "x86_64")]
const BLEND: usize = 32;

/// # Safety
///
/// Rows hold `taps.row_bytes`; lines hold whole pitches, a pitch more than a line.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn across_rgb(taps: &RgbTaps, rows: [&[u8]; 4], lines: &mut [u8], pitch: usize) {
    const NONE: i8 = -128;
    const N: i8 = NONE;
    let shuffle = _mm256_setr_epi8(
        0, N, 3, N, 1, N, 4, N, 2, N, 5, N, N, N, N, N, //
        6, N, 9, N, 7, N, 10, N, 8, N, 11, N, N, N, N, N,
    );
    let half = _mm_set1_epi32(1 << 21);
    let last = lines.len() / pitch - 1;
    let targets = [0, 1, 2, 3].map(|it: usize| it.min(last) * pitch);
    let windows = taps.starts.iter().zip(taps.weights.chunks_exact(taps.groups));
    for (x, (start, weights)) in windows.enumerate() {
        let mut high = [_mm256_setzero_si256(); 4];
        let mut low = [_mm256_setzero_si256(); 4];
        for (group, parts) in weights.iter().enumerate() {
            let offset = (start + group * GROUP) * 3;
            // SAFETY: the parts are 32 bytes each; 16 bytes from `offset` are inside
            // `taps.row_bytes`, which `RgbTaps::new` derives from the last start.
            unsafe {
                let weights_high = _mm256_loadu_si256(parts[0].as_ptr().cast());
                let weights_low = _mm256_loadu_si256(parts[1].as_ptr().cast());
                for row in 0..4 {
                    let bytes = _mm_loadu_si128(rows[row].as_ptr().add(offset).cast());
                    let pairs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), shuffle);
                    let product_high = _mm256_madd_epi16(pairs, weights_high);
                    let product_low = _mm256_madd_epi16(pairs, weights_low);
                    high[row] = _mm256_add_epi32(high[row], product_high);
                    low[row] = _mm256_add_epi32(low[row], product_low);
                }
            }
        }
        let mut sums = [half; 4];
        for row in 0..4 {
            let both = _mm256_add_epi32(_mm256_slli_epi32::<14>(high[row]), low[row]);
            let lanes = (_mm256_castsi256_si128(both), _mm256_extracti128_si256::<1>(both));
            let sum = _mm_add_epi32(half, _mm_add_epi32(lanes.0, lanes.1));
            sums[row] = _mm_srai_epi32::<22>(sum);
        }
        let words = (_mm_packs_epi32(sums[0], sums[1]), _mm_packs_epi32(sums[2], sums[3]));
        let pixels = _mm_packus_epi16(words.0, words.1);
        // SAFETY: a line has room for its pixels and a byte more.
        unsafe {
            let mut line = |row: usize| lines.as_mut_ptr().add(targets[row] + x * 3).cast::<i32>();
            line(0).write_unaligned(_mm_extract_epi32::<0>(pixels));
            line(1).write_unaligned(_mm_extract_epi32::<1>(pixels));
            line(2).write_unaligned(_mm_extract_epi32::<2>(pixels));
            line(3).write_unaligned(_mm_extract_epi32::<3>(pixels));
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn down(source: Plane<'_>, weights: &[i32], line: &mut [u8]) {
    resize::down(source, weights, line);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn colour(matrix: &yuv::Matrix, sums: &[Vec<i32>; 3], line: &mut [u8]) {
    matrix.apply(sums, line);
}

/// # Safety
///
/// Every tap's row holds as many bytes as `out` has places, and that is at least [`BLEND`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn blend(source: Plane<'_>, weights: &[i16], out: &mut [i16]) {
    const DOWN: i32 = (yuv::WEIGHT_BITS - yuv::MIDDLE_BITS) as i32;
    let zero = _mm256_setzero_si256();
    let mut at = 0;
    while at < out.len() {
        // The last block steps back over columns that are done, instead of a loop for the rest.
        let column = at.min(out.len() - BLEND);
        let mut sums = [_mm256_set1_epi32(1 << (DOWN - 1)); 4];
        for (pair, both) in weights.chunks(2).enumerate() {
            let second = both.get(1).copied().unwrap_or(0);
            let weight = _mm256_set1_epi32(i32::from(both[0]) | i32::from(second) << 16);
            let offset = pair * 2 * source.stride + column;
            // An odd last tap is paired with itself at weight 0, to stay inside the plane.
            let next = offset + (both.len() - 1) * source.stride;
            // SAFETY: both rows exist, and 32 bytes from `column` are inside them.
            let (first, second) = unsafe {
                let bytes = source.bytes.as_ptr();
                (
                    _mm256_loadu_si256(bytes.add(offset).cast()),
                    _mm256_loadu_si256(bytes.add(next).cast()),
                )
            };
            let low = _mm256_unpacklo_epi8(first, second);
            let high = _mm256_unpackhi_epi8(first, second);
            let pairs = [
                _mm256_unpacklo_epi8(low, zero),
                _mm256_unpackhi_epi8(low, zero),
                _mm256_unpacklo_epi8(high, zero),
                _mm256_unpackhi_epi8(high, zero),
            ];
            for (sum, pair) in sums.iter_mut().zip(pairs) {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pair, weight));
            }
        }
        let sums = sums.map(|it| _mm256_srai_epi32::<DOWN>(it));
        // Per 128-bit lane these hold columns 0 to 7 and 8 to 15.
        let (low, high) =
            (_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
        // SAFETY: 32 places from `column` are inside `out`.
        unsafe {
            let target = out.as_mut_ptr().add(column);
            _mm256_storeu_si256(target.cast(), _mm256_permute2x128_si256::<0x20>(low, high));
            _mm256_storeu_si256(
                target.add(16).cast(),
                _mm256_permute2x128_si256::<0x31>(low, high),
            );
        }
        at += BLEND;
    }
}

/// # Safety
///
/// Every window is inside the row and has a place in `out`; windows are whole vectors of 8.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn dots(row: &[i16], taps: &yuv::Taps, out: &mut [i32]) {
    let dot = |at: usize| {
        let mut sum = _mm_setzero_si128();
        for tap in (0..taps.size).step_by(8) {
            // SAFETY: the caller keeps the window inside the row and the weights.
            let (samples, weights) = unsafe {
                (
                    _mm_loadu_si128(row.as_ptr().add(taps.starts[at] + tap).cast()),
                    _mm_loadu_si128(taps.weights.as_ptr().add(at * taps.size + tap).cast()),
                )
            };
            sum = _mm_add_epi32(sum, _mm_madd_epi16(samples, weights));
        }
        sum
    };
    let mut blocks = out.chunks_exact_mut(4);
    let mut at = 0;
    for block in blocks.by_ref() {
        let halves =
            (_mm_hadd_epi32(dot(at), dot(at + 1)), _mm_hadd_epi32(dot(at + 2), dot(at + 3)));
        // SAFETY: a block is four places.
        unsafe {
            let target = block.as_mut_ptr().cast();
            _mm_storeu_si128(target, _mm_hadd_epi32(halves.0, halves.1));
        }
        at += 4;
    }
    for place in blocks.into_remainder() {
        let pairs = _mm_hadd_epi32(dot(at), dot(at));
        *place = _mm_cvtsi128_si32(_mm_hadd_epi32(pairs, pairs));
        at += 1;
    }
}

/// Stands for the vector unit where there is none: has no values.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Clone, Copy, Debug)]
pub(super) enum Avx2 {}

#[cfg(not(target_arch = "x86_64"))]
impl Avx2 {
    pub(super) fn detect() -> Option<Avx2> {
        None
    }

    pub(super) fn across_rgb(self, _: &RgbTaps, _: [&[u8]; 4], _: &mut [u8], _: usize) {
        match self {}
    }

    pub(super) fn down(self, _: Plane<'_>, _: &[i32], _: &mut [u8]) {
        match self {}
    }

    pub(super) fn blend(self, _: Plane<'_>, _: &[i16], _: &mut [i16]) {
        match self {}
    }

    pub(super) fn dots(self, _: &[i16], _: &yuv::Taps, _: &mut [i32]) {
        match self {}
    }

    pub(super) fn colour(self, _: &yuv::Matrix, _: &[Vec<i32>; 3], _: &mut [u8]) {
        match self {}
    }
}
