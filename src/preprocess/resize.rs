//! Pillow's bilinear antialiased resize of 8-bit pictures, computed only where the crop needs it.
//!
//! The arithmetic is that of Pillow's `src/libImaging/Resample.c`: weights in double precision,
//! rounded to 22 bits, a horizontal pass rounded to bytes and then a vertical one. Every output
//! byte is the same; the passes merely leave out what the crop would throw away.

use crate::preprocess::{Plane, simd::Avx2, simd::RgbTaps};

/// Fractional bits of a weight: 32 less 8 for the sample and 2 to be safe, as in `Resample.c`.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// Half of the last place, to round instead of cutting off.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// How many output bytes the vertical pass holds in registers at once.
const LANES: usize = 32;

/// The input samples that one output sample is made of.
#[derive(Clone, Debug)]
pub(super) struct Window {
    /// The first input sample.
    pub(super) start: usize,
    /// The weights of it and the ones that follow; they add up to 1.
    pub(super) weights: Vec<f64>,
}

/// One axis of a resize with a crop after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Axis {
    /// Samples before.
    pub(super) input: usize,
    /// Samples after the resize.
    pub(super) output: usize,
    /// The first of those that the crop keeps.
    pub(super) first: usize,
    /// How many it keeps.
    pub(super) count: usize,
}

/// The windows of the kept samples, as `precompute_coeffs` in `Resample.c` has them for the
/// triangle filter.
pub(super) fn windows(axis: Axis) -> Vec<Window> {
    let scale = axis.input as f64 / axis.output as f64;
    // Antialiasing: the triangle is as wide as two output samples, but never narrower than two
    // input samples. Its support of 1.0 times this scale is the scale itself.
    let support = scale.max(1.0);
    let per_sample = 1.0 / support;
    (axis.first..axis.first + axis.count)
        .map(|at| {
            let centre = (at as f64 + 0.5) * scale;
            // The casts truncate toward zero, as in C; a negative start becomes 0.
            let start = (centre - support + 0.5) as usize;
            let end = ((centre + support + 0.5) as usize).min(axis.input);
            let mut weights: Vec<f64> = (0..end - start)
                .map(|it| {
                    let distance = ((it + start) as f64 - centre + 0.5) * per_sample;
                    (1.0 - distance.abs()).max(0.0)
                })
                .collect();
            // One after the other, because the order of the sum is part of the result.
            let total = weights.iter().fold(0.0, |sum, it| sum + it);
            if total != 0.0 {
                weights.iter_mut().for_each(|it| *it /= total);
            }
            Window { start, weights }
        })
        .collect()
}

/// Weights in Pillow's fixed point, the same number of them for every output sample.
#[derive(Debug)]
struct Taps {
    /// Weights per output sample.
    size: usize,
    /// The first input sample of each output sample; `start + size` stays inside the input.
    starts: Vec<usize>,
    /// `[outputs, size]`; zero where a window is shorter.
    weights: Vec<i32>,
}

impl Taps {
    fn new(windows: &[Window], input: usize) -> Taps {
        let size = windows.iter().map(|it| it.weights.len()).max().unwrap_or(0);
        let mut taps = Taps { size, starts: Vec::new(), weights: Vec::new() };
        for window in windows {
            let start = window.start.min(input - size);
            let lead = window.start - start;
            taps.starts.push(start);
            let from = taps.weights.len();
            taps.weights.resize(from + size, 0);
            for (slot, weight) in taps.weights[from + lead..].iter_mut().zip(&window.weights) {
                *slot = (0.5 + weight * f64::from(1 << PRECISION_BITS)) as i32;
            }
        }
        taps
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.starts.iter().copied().zip(self.weights.chunks_exact(self.size))
    }
}

/// The tables for one picture size.
#[derive(Debug)]
pub(super) struct Plan {
    columns: Taps,
    rows: Taps,
    /// The same columns as AVX2 wants them. `None` iff the picture is too narrow for its loads, or
    /// is not RGB.
    wide: Option<RgbTaps>,
    /// The first source row in use and the one after the last.
    first_row: usize,
    end_row: usize,
    channels: usize,
}

impl Plan {
    pub(super) fn new(columns: Axis, rows: Axis, channels: usize) -> Plan {
        let across = windows(columns);
        let down = windows(rows);
        let rows = Taps::new(&down, rows.input);
        let first_row = rows.starts.iter().copied().min().unwrap_or(0);
        let end_row = rows.starts.iter().copied().max().unwrap_or(0) + rows.size;
        let taps = Taps::new(&across, columns.input);
        let wide =
            if channels == 3 { RgbTaps::new(taps.iter(), taps.size, columns.input) } else { None };
        Plan { columns: taps, rows, wide, first_row, end_row, channels }
    }

    /// Resizes and crops one plane of interleaved samples. `middle` holds the picture between the
    /// two passes; it only ever grows. One channel is written three times.
    pub(super) fn run(
        &self,
        plane: Plane<'_>,
        middle: &mut Vec<u8>,
        simd: Option<Avx2>,
        out: &mut [u8],
    ) {
        let width = self.columns.starts.len() * self.channels;
        // The vector code stores a pixel as four bytes, hence the room after each row.
        let pitch = (width + 4).next_multiple_of(LANES);
        let needed = (self.end_row - self.first_row) * pitch;
        if middle.len() < needed {
            middle.resize(needed, 0);
        }
        let middle = &mut middle[..needed];
        match (simd, &self.wide) {
            (Some(avx2), Some(taps)) => self.across_wide(plane, (avx2, taps), middle, pitch),
            _ => self.across(plane, middle, pitch),
        }
        let lines = self.rows.iter().zip(out.chunks_exact_mut(self.columns.starts.len() * 3));
        for ((start, weights), line) in lines {
            let source =
                Plane { bytes: &middle[(start - self.first_row) * pitch..], stride: pitch };
            let line = if self.channels == 3 { line } else { &mut line[..width] };
            match simd {
                Some(avx2) => avx2.down(source, weights, line),
                None => down(source, weights, line),
            }
        }
        if self.channels == 1 {
            spread(out, width);
        }
    }

    fn across(&self, plane: Plane<'_>, middle: &mut [u8], pitch: usize) {
        for (line, row) in middle.chunks_exact_mut(pitch).zip(self.first_row..) {
            let source = &plane.bytes[row * plane.stride..];
            if self.channels == 3 {
                across::<3>(source, &self.columns, line);
            } else {
                across::<1>(source, &self.columns, line);
            }
        }
    }

    fn across_wide(
        &self,
        plane: Plane<'_>,
        (avx2, taps): (Avx2, &RgbTaps),
        middle: &mut [u8],
        pitch: usize,
    ) {
        let row_of = |row: usize| &plane.bytes[row * plane.stride..][..taps.row_bytes()];
        let mut row = self.first_row;
        for lines in middle.chunks_mut(4 * pitch) {
            // The last block repeats its last row, so that the kernel knows one shape only.
            let rows = [0, 1, 2, 3].map(|it| row_of((row + it).min(self.end_row - 1)));
            avx2.across_rgb(taps, rows, lines, pitch);
            row += 4;
        }
    }
}

/// The horizontal pass over one row.
fn across<const CHANNELS: usize>(source: &[u8], taps: &Taps, line: &mut [u8]) {
    for ((start, weights), out) in taps.iter().zip(line.chunks_exact_mut(CHANNELS)) {
        let mut sums = [HALF; CHANNELS];
        let samples = source[start * CHANNELS..].chunks_exact(CHANNELS);
        for (sample, weight) in samples.zip(weights) {
            for (sum, value) in sums.iter_mut().zip(sample) {
                *sum += i32::from(*value) * weight;
            }
        }
        for (byte, sum) in out.iter_mut().zip(sums) {
            *byte = clip8(sum);
        }
    }
}

/// The vertical pass for one output row; `source` begins with the window's first row.
#[inline(always)]
pub(super) fn down(source: Plane<'_>, weights: &[i32], line: &mut [u8]) {
    let mut chunks = line.chunks_exact_mut(LANES);
    let mut at = 0;
    for chunk in chunks.by_ref() {
        let mut sums = [HALF; LANES];
        for (tap, weight) in weights.iter().enumerate() {
            let row = &source.bytes[tap * source.stride + at..][..LANES];
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        for (byte, sum) in chunk.iter_mut().zip(sums) {
            *byte = clip8(sum);
        }
        at += LANES;
    }
    for (offset, byte) in chunks.into_remainder().iter_mut().enumerate() {
        let samples = source.bytes[at + offset..].iter().step_by(source.stride);
        let sum = samples.zip(weights).fold(HALF, |sum, it| sum + i32::from(*it.0) * it.1);
        *byte = clip8(sum);
    }
}

fn clip8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Turns the grey values at the start of each output row into pixels, from the last to the first
/// so that none is overwritten before it is read.
fn spread(out: &mut [u8], width: usize) {
    for line in out.chunks_exact_mut(width * 3) {
        for x in (0..width).rev() {
            let value = line[x];
            line[x * 3..][..3].fill(value);
        }
    }
}
