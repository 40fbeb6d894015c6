//! YUV pictures: each plane is resized to the crop, then the colours are converted.
//!
//! Both steps are linear, so their order does not matter in exact arithmetic, and this one
//! converts 224x224 pixels instead of two million. Chroma weights are the luma weights seen
//! through the bilinear chroma upsampling, so no plane is ever upsampled.

use crate::{
    frame::{Colour, Layout, Matrix as Standard, Siting},
    preprocess::{
        Plane,
        resize::{Axis, Window, windows},
        simd::Avx2,
    },
};

/// Fractional bits of a weight. The weights of a window add up to exactly 1.0.
pub(super) const WEIGHT_BITS: u32 = 14;

/// Fractional bits of a sample between the passes: 255 just fits an `i16`.
pub(super) const MIDDLE_BITS: u32 = 7;

/// Fractional bits of a colour coefficient.
const COLOUR_BITS: u32 = 13;

/// Fractional bits of a sample after both passes.
const SUM_BITS: u32 = MIDDLE_BITS + WEIGHT_BITS;

/// How many columns the portable vertical pass holds in registers at once.
const LANES: usize = 16;

/// Fixed point weights of one axis of one plane.
#[derive(Debug)]
pub(super) struct Taps {
    /// Weights per output sample, a multiple of 8.
    pub(super) size: usize,
    /// The first sample of each window, counted from `first`.
    pub(super) starts: Vec<usize>,
    /// `[outputs, size]`; zero after the end of a window.
    pub(super) weights: Vec<i16>,
    /// The greatest of `starts`.
    pub(super) last_start: usize,
    /// The first sample in use.
    first: usize,
    /// The one after the last in use.
    end: usize,
    /// The longest window, in samples.
    longest: usize,
}

impl Taps {
    fn new(windows: &[Window]) -> Taps {
        let longest = windows.iter().map(|it| it.weights.len()).max().unwrap_or(0);
        let size = longest.next_multiple_of(8);
        let first = windows.iter().map(|it| it.start).min().unwrap_or(0);
        let end = windows.iter().map(|it| it.start + it.weights.len()).max().unwrap_or(0);
        let starts: Vec<usize> = windows.iter().map(|it| it.start - first).collect();
        let last_start = starts.iter().copied().max().unwrap_or(0);
        let mut weights = vec![0; windows.len() * size];
        for (slots, window) in weights.chunks_exact_mut(size).zip(windows) {
            quantise(&window.weights, slots);
        }
        Taps { size, starts, weights, last_start, first, end, longest }
    }

    /// The start and the weights of one output row, no more of them than rows follow.
    fn row(&self, at: usize) -> (usize, &[i16]) {
        let count = self.longest.min(self.end - self.first - self.starts[at]);
        (self.first + self.starts[at], &self.weights[at * self.size..][..count])
    }

    /// How many samples are in use.
    fn used(&self) -> usize {
        self.end - self.first
    }
}

/// Rounds weights to fixed point such that they still add up to 1: all are cut off, and the
/// places left over go to the largest remainders.
fn quantise(weights: &[f64], slots: &mut [i16]) {
    let one = f64::from(1 << WEIGHT_BITS);
    let mut left = 1_i32 << WEIGHT_BITS;
    for (slot, weight) in slots.iter_mut().zip(weights) {
        *slot = (weight * one) as i16;
        left -= i32::from(*slot);
    }
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|a, b| (weights[*b] * one).fract().total_cmp(&(weights[*a] * one).fract()));
    for at in order.into_iter().take(left.max(0) as usize) {
        slots[at] += 1;
    }
}

/// The windows over chroma samples that give the same as `windows` over the upsampled chroma.
fn through_chroma(windows: &[Window], siting: Siting, samples: usize) -> Vec<Window> {
    let offset = match siting {
        Siting::Cosited => 0.0,
        Siting::Centre => 0.25,
    };
    let last = (samples - 1) as f64;
    // Where a luma sample lies among the chroma samples; outside, the border repeats.
    let place = |luma: usize| (luma as f64 / 2.0 - offset).clamp(0.0, last);
    let whole = |window: &Window| {
        let start = place(window.start) as usize;
        let end = place(window.start + window.weights.len() - 1).ceil() as usize + 1;
        let mut weights = vec![0.0; end - start];
        for (weight, luma) in window.weights.iter().zip(window.start..) {
            let (below, part) = (place(luma) as usize - start, place(luma).fract());
            weights[below] += weight * (1.0 - part);
            if 0.0 < part {
                weights[below + 1] += weight * part;
            }
        }
        Window { start, weights }
    };
    windows.iter().map(whole).collect()
}

/// Buffers for one row, reused from frame to frame. They only ever grow.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// A row after the vertical pass: Y; U; V; U and V interleaved.
    rows: [Vec<i16>; 4],
    /// The same after the horizontal pass: Y, U, V.
    sums: [Vec<i32>; 3],
}

impl Scratch {
    fn fit(&mut self, row: usize, sums: usize) {
        for it in self.rows.iter_mut().filter(|it| it.len() < row) {
            it.resize(row, 0);
        }
        self.sums.iter_mut().for_each(|it| it.resize(sums, 0));
    }
}

/// The tables for one picture size.
#[derive(Debug)]
pub(super) struct Plan {
    luma: (Taps, Taps),
    /// `None` iff the picture is grey.
    chroma: Option<(Taps, Taps)>,
    interleaved: bool,
}

impl Plan {
    /// Both axes and both sitings are given columns first.
    pub(super) fn new(axes: (Axis, Axis), layout: Layout, siting: (Siting, Siting)) -> Plan {
        let (across, down) = (windows(axes.0), windows(axes.1));
        let half = |axis: Axis| axis.input.div_ceil(2);
        let chroma = (layout != Layout::Gray8).then(|| {
            let across = through_chroma(&across, siting.0, half(axes.0));
            let down = through_chroma(&down, siting.1, half(axes.1));
            (Taps::new(&across), Taps::new(&down))
        });
        let luma = (Taps::new(&across), Taps::new(&down));
        Plan { luma, chroma, interleaved: layout == Layout::Nv12 }
    }

    /// Makes one model input. `how` is the colour matrix, and the vector unit if there is one.
    pub(super) fn run(
        &self,
        planes: &[Plane<'_>; 3],
        how: (&Matrix, Option<Avx2>),
        scratch: &mut Scratch,
        out: &mut [u8],
    ) {
        let (matrix, simd) = how;
        let crop = self.luma.0.starts.len();
        // A window's zero weights may reach beyond the row, hence the room after it.
        let room = |taps: &Taps, per: usize| taps.used() * per + taps.size;
        let chroma_room = self.chroma.as_ref().map_or(0, |it| room(&it.0, 2));
        scratch.fit(room(&self.luma.0, 1).max(chroma_room), crop);
        let Scratch { rows: [y, u, v, uv], sums } = scratch;
        if self.chroma.is_none() {
            sums[1].fill(128 << SUM_BITS);
            sums[2].fill(128 << SUM_BITS);
        }
        for (at, line) in out.chunks_exact_mut(crop * 3).enumerate() {
            let Taps { first, .. } = self.luma.0;
            let used = self.luma.0.used();
            blend(planes[0], (first, self.luma.1.row(at)), simd, &mut y[..used]);
            dots(y, &self.luma.0, simd, &mut sums[0]);
            if let Some((across, down)) = &self.chroma {
                let (first, used) = (across.first, across.used());
                if self.interleaved {
                    let both = &mut uv[..used * 2];
                    blend(planes[1], (first * 2, down.row(at)), simd, both);
                    for (pair, (u, v)) in both.chunks_exact(2).zip(u.iter_mut().zip(v.iter_mut())) {
                        (*u, *v) = (pair[0], pair[1]);
                    }
                } else {
                    blend(planes[1], (first, down.row(at)), simd, &mut u[..used]);
                    blend(planes[2], (first, down.row(at)), simd, &mut v[..used]);
                }
                dots(u, across, simd, &mut sums[1]);
                dots(v, across, simd, &mut sums[2]);
            }
            match simd {
                Some(avx2) => avx2.colour(matrix, sums, line),
                None => matrix.apply(sums, line),
            }
        }
    }
}

/// The vertical pass for one output row. `place` is the first byte of each row in use, the first
/// row, and the weights from that row on.
fn blend(plane: Plane<'_>, place: (usize, (usize, &[i16])), simd: Option<Avx2>, out: &mut [i16]) {
    let (first, (row, weights)) = place;
    let source = Plane { bytes: &plane.bytes[row * plane.stride + first..], ..plane };
    match simd {
        Some(avx2) => avx2.blend(source, weights, out),
        None => blend_portable(source, weights, out),
    }
}

/// The vertical pass in plain code; `source` begins with the first sample in use.
pub(super) fn blend_portable(source: Plane<'_>, weights: &[i16], out: &mut [i16]) {
    const DOWN: u32 = WEIGHT_BITS - MIDDLE_BITS;
    let rest = out.len() / LANES * LANES;
    for (chunk, at) in out.chunks_mut(LANES).zip((0..).step_by(LANES)) {
        let mut sums = [1_i32 << (DOWN - 1); LANES];
        for (tap, weight) in weights.iter().enumerate() {
            let samples = &source.bytes[tap * source.stride + at..];
            let weight = i32::from(*weight);
            if at < rest {
                for (sum, sample) in sums.iter_mut().zip(&samples[..LANES]) {
                    *sum += i32::from(*sample) * weight;
                }
            } else {
                for (sum, sample) in sums.iter_mut().zip(&samples[..chunk.len()]) {
                    *sum += i32::from(*sample) * weight;
                }
            }
        }
        for (out, sum) in chunk.iter_mut().zip(sums) {
            *out = (sum >> DOWN) as i16;
        }
    }
}

/// The horizontal pass over one row.
fn dots(row: &[i16], taps: &Taps, simd: Option<Avx2>, out: &mut [i32]) {
    match simd {
        Some(avx2) => avx2.dots(row, taps, out),
        None => dots_portable(row, taps, out),
    }
}

/// The horizontal pass in plain code.
pub(super) fn dots_portable(row: &[i16], taps: &Taps, out: &mut [i32]) {
    let weights = taps.weights.chunks_exact(taps.size);
    for ((out, start), weights) in out.iter_mut().zip(&taps.starts).zip(weights) {
        let samples = row[*start..].chunks_exact(8).zip(weights.chunks_exact(8));
        *out = samples
            .map(|(samples, weights)| {
                let products = samples.iter().zip(weights);
                products.map(|it| i32::from(*it.0) * i32::from(*it.1)).sum::<i32>()
            })
            .sum();
    }
}

/// From YUV to RGB in fixed point.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    /// What black is in Y, in middle bits.
    black: i32,
    luma: i32,
    red_v: i32,
    green_u: i32,
    green_v: i32,
    blue_u: i32,
}

impl Matrix {
    pub(super) fn new(colour: Colour) -> Matrix {
        let (red, blue) = match colour.matrix {
            Standard::Bt601 => (0.299, 0.114),
            Standard::Bt709 => (0.2126, 0.0722),
            Standard::Bt2020 => (0.2627, 0.0593),
        };
        let green = 1.0 - red - blue;
        let (black, luma, chroma) =
            if colour.full_range { (0, 1.0, 1.0) } else { (16, 255.0 / 219.0, 255.0 / 224.0) };
        let fixed = |value: f64| (value * f64::from(1 << COLOUR_BITS)).round() as i32;
        Matrix {
            black: black << MIDDLE_BITS,
            luma: fixed(luma),
            red_v: fixed(2.0 * (1.0 - red) * chroma),
            green_u: fixed(-2.0 * (1.0 - blue) * blue / green * chroma),
            green_v: fixed(-2.0 * (1.0 - red) * red / green * chroma),
            blue_u: fixed(2.0 * (1.0 - blue) * chroma),
        }
    }

    /// Converts one row of sums to pixels.
    #[inline(always)]
    pub(super) fn apply(&self, sums: &[Vec<i32>; 3], line: &mut [u8]) {
        const DOWN: u32 = COLOUR_BITS + MIDDLE_BITS;
        let narrow = |sum: i32| (sum + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS;
        let byte = |sum: i32| (sum >> DOWN).clamp(0, 255) as u8;
        let [y, u, v] = sums;
        let samples = y.iter().zip(u).zip(v);
        for (pixel, ((y, u), v)) in line.chunks_exact_mut(3).zip(samples) {
            let y = (narrow(*y) - self.black) * self.luma + (1 << (DOWN - 1));
            let u = narrow(*u) - (128 << MIDDLE_BITS);
            let v = narrow(*v) - (128 << MIDDLE_BITS);
            pixel[0] = byte(y + v * self.red_v);
            pixel[1] = byte(y + u * self.green_u + v * self.green_v);
            pixel[2] = byte(y + u * self.blue_u);
        }
    }
}
