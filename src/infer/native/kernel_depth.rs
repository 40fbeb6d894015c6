//! Depthwise convolutions, 3×3 and 5×5, with stride 1 or 2, one row of the output at a time.
//!
//! A vector is channels of one pixel. Six neighbours along the row are summed at once (then four,
//! two, one): each input is loaded once for all of them, and a row of weights once, so that for 3×3
//! and stride 1 eleven loads serve 18 multiplications. Registers (AVX2): 6 sums, 3 or 5 weights, 1
//! input of 16. Pixels outside the picture are not multiplied, so that no map needs a border.
//!
//! On one core of an AVX2-only EPYC (peak 38.8 GFLOP/s): 3×3 with stride 1 22 to 27 from 112² to
//! 14², 13 at 7², where two of seven columns are at the edge; 3×3 with stride 2 15 to 19; 5×5 with
//! stride 2 12 to 20. AVX-512 has not been run.

#[cfg(target_arch = "x86_64")]
use crate::infer::native::kernel_vector::{V8, V16};
use crate::infer::native::{
    buffer::Buffer,
    kernel_vector::{Isa, Plain, Vector, dispatch},
};

/// The largest kernel.
pub(super) const TAPS: usize = 5;

/// Weights and bias of one layer, packed for an instruction set.
#[derive(Debug)]
pub(super) struct Depth {
    isa: Isa,
    /// Width and height of the kernel: 3 or 5.
    pub(super) kernel: usize,
    /// 1 or 2.
    pub(super) stride: usize,
    /// Channels, padding included.
    pub(super) channels: usize,
    /// Per vector of channels: the bias, then the taps by row and column.
    weights: Buffer,
}

impl Depth {
    /// Packs `weights` of `[channels][kernel * kernel]`. Channel `j` of the maps is
    /// `channels[j]` of the weights, or padding that gives 0.
    pub(super) fn new(
        isa: Isa,
        (weights, bias): (&[f32], &[f32]),
        (kernel, stride): (usize, usize),
        channels: &[Option<usize>],
    ) -> Depth {
        assert!([3, 5].contains(&kernel) && [1, 2].contains(&stride), "the kernel is one of ours");
        let (width, taps) = (isa.width(), kernel * kernel);
        let mut packed = Vec::new();
        for first in (0..channels.len()).step_by(width) {
            let at = |it: usize| channels.get(first + it).copied().flatten();
            packed.extend((0..width).map(|it| at(it).map_or(0.0, |it| bias[it])));
            for tap in 0..taps {
                let tap = |it: usize| at(it).map_or(0.0, |it| weights[it * taps + tap]);
                packed.extend((0..width).map(tap));
            }
        }
        let weights = Buffer::of(&packed);
        Depth { isa, kernel, stride, channels: channels.len(), weights }
    }

    /// How many rows of output `done` rows of `input` rows are enough for.
    pub(super) fn ready(&self, done: usize, input: usize) -> usize {
        if done == input {
            return self.out(input);
        }
        // Row r takes the rows up to `r * stride + kernel / 2`.
        done.checked_sub(self.kernel / 2 + 1).map_or(0, |it| it / self.stride + 1)
    }

    /// Rows or columns of output for rows or columns of input.
    pub(super) fn out(&self, input: usize) -> usize {
        (input - 1) / self.stride + 1
    }
}

/// Rows of the input around one row of the output.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window<'a> {
    /// `None`: the output's own buffer, of which other channels are read than written.
    pub(super) x: Option<&'a [f32]>,
    /// Where each of the kernel's rows begins; `None`: outside the picture.
    pub(super) rows: [Option<usize>; TAPS],
    /// Pixels per row.
    pub(super) width: usize,
    /// From pixel to pixel.
    pub(super) stride: usize,
}

/// What happens to a sum before it is stored.
#[derive(Clone, Copy, Debug)]
pub(super) enum Finish<'a> {
    Linear,
    Relu,
    /// Adds what lies at the same places of another buffer.
    Add(&'a [f32]),
    /// Adds what lies in the output.
    AddInPlace,
}

/// Where a row of output goes: its pixels begin at `first` and every `stride`.
#[derive(Debug)]
pub(super) struct Target<'a> {
    pub(super) y: &'a mut [f32],
    pub(super) first: usize,
    pub(super) stride: usize,
}

/// Computes one row of output.
pub(super) fn depthwise(depth: &Depth, window: Window<'_>, target: Target<'_>, finish: Finish<'_>) {
    let width = depth.out(window.width);
    let reach = (window.width - 1) * window.stride + depth.channels;
    let there = window.x.map_or(target.y.len(), <[f32]>::len);
    let whole = window.rows[..depth.kernel].iter().flatten().all(|it| it + reach <= there);
    let end = target.first + (width - 1) * target.stride + depth.channels;
    assert!(whole, "the window's rows are there");
    assert!(end <= target.y.len(), "y has room for a row");
    let y = target.y.as_mut_ptr();
    let added = match finish {
        Finish::Add(it) => {
            assert!(end <= it.len(), "what is added has the output's places");
            it.as_ptr().wrapping_add(target.first)
        }
        Finish::AddInPlace => y.wrapping_add(target.first).cast_const(),
        Finish::Linear | Finish::Relu => std::ptr::null(),
    };
    let x = window.x.map_or(y.cast_const(), <[f32]>::as_ptr);
    let args = Args {
        // In bounds by the assertion above.
        rows: window.rows.map(|it| it.map_or(std::ptr::null(), |it| x.wrapping_add(it))),
        x_width: window.width,
        x_stride: window.stride,
        depth,
        y: y.wrapping_add(target.first),
        y_stride: target.stride,
        y_width: width,
        relu: matches!(finish, Finish::Relu),
        added,
    };
    // SAFETY: an `Isa` is used only where it is available; the sizes are asserted above, and
    // `Depth::new` packed the weights.
    unsafe { depthwise_with(depth.isa, args) }
}

#[derive(Clone, Copy)]
struct Args<'a> {
    /// Null: outside the picture.
    rows: [*const f32; TAPS],
    x_width: usize,
    x_stride: usize,
    depth: &'a Depth,
    y: *mut f32,
    y_stride: usize,
    y_width: usize,
    relu: bool,
    /// Null: nothing.
    added: *const f32,
}

dispatch! { depthwise_with(args: Args<'_>) = sized }

#[inline(always)]
unsafe fn sized<V: Vector>(args: Args<'_>) {
    // SAFETY: the caller's.
    unsafe {
        match (args.depth.kernel, args.depth.stride) {
            (3, 1) => all_channels::<V, 3, 1>(args),
            (3, _) => all_channels::<V, 3, 2>(args),
            (_, 1) => all_channels::<V, 5, 1>(args),
            (_, _) => all_channels::<V, 5, 2>(args),
        }
    }
}

#[inline(always)]
unsafe fn all_channels<V: Vector, const K: usize, const S: usize>(args: Args<'_>) {
    let channels = args.depth.channels;
    let mut weights = args.depth.weights.as_ptr();
    let mut first = 0;
    while first < channels {
        let left = channels - first;
        let lanes = Lanes { weights, first, count: left };
        // SAFETY: the caller's.
        unsafe {
            if V::WIDTH <= left {
                lanes.columns::<V, K, S, true>(&args);
            } else {
                lanes.columns::<V, K, S, false>(&args);
            }
            weights = weights.add((K * K + 1) * V::WIDTH);
        }
        first += V::WIDTH;
    }
}

/// A vector of channels.
#[derive(Clone, Copy)]
struct Lanes {
    weights: *const f32,
    first: usize,
    /// How many of the vector there are, if it is not whole.
    count: usize,
}

impl Lanes {
    #[inline(always)]
    unsafe fn columns<V: Vector, const K: usize, const S: usize, const WHOLE: bool>(
        self,
        args: &Args<'_>,
    ) {
        // Between these no column of the window is outside the picture.
        let from = (K / 2).div_ceil(S).min(args.y_width);
        let fit = (args.x_width + K / 2).checked_sub(K).map_or(0, |it| it / S + 1);
        let to = fit.clamp(from, args.y_width);
        // SAFETY: the caller's.
        unsafe {
            for column in 0..from {
                self.edge::<V, K, S, WHOLE>(args, column);
            }
            let mut column = self.run::<V, K, S, 6, WHOLE>(args, from, to);
            column = self.run::<V, K, S, 4, WHOLE>(args, column, to);
            column = self.run::<V, K, S, 2, WHOLE>(args, column, to);
            column = self.run::<V, K, S, 1, WHOLE>(args, column, to);
            for column in column..args.y_width {
                self.edge::<V, K, S, WHOLE>(args, column);
            }
        }
    }

    /// `N` outputs at once while they fit; gives the first column that is left.
    #[inline(always)]
    unsafe fn run<V: Vector, const K: usize, const S: usize, const N: usize, const WHOLE: bool>(
        self,
        args: &Args<'_>,
        from: usize,
        to: usize,
    ) -> usize {
        let mut column = from;
        while column + N <= to {
            // SAFETY: the caller's.
            unsafe { self.inner::<V, K, S, N, WHOLE>(args, column) };
            column += N;
        }
        column
    }

    /// `N` outputs from `column` on.
    #[inline(always)]
    unsafe fn inner<
        V: Vector,
        const K: usize,
        const S: usize,
        const N: usize,
        const WHOLE: bool,
    >(
        self,
        args: &Args<'_>,
        column: usize,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [V::load(self.weights); N];
            let first = (column * S - K / 2) * args.x_stride + self.first;
            for row in 0..K {
                if args.rows[row].is_null() {
                    continue;
                }
                let x = args.rows[row].add(first);
                let mut taps = [V::splat(0.0); K];
                for tap in 0..K {
                    taps[tap] = V::load(self.weights.add((1 + row * K + tap) * V::WIDTH));
                }
                for at in 0..(N - 1) * S + K {
                    let x = self.load::<V, WHOLE>(x.add(at * args.x_stride));
                    for index in 0..N {
                        if index * S <= at && at < index * S + K {
                            sums[index] = sums[index].add_product(x, taps[at - index * S]);
                        }
                    }
                }
            }
            for index in 0..N {
                self.finish::<V, WHOLE>(args, column + index, sums[index]);
            }
        }
    }

    /// One output, where a part of the window may be outside the picture.
    #[inline(always)]
    unsafe fn edge<V: Vector, const K: usize, const S: usize, const WHOLE: bool>(
        self,
        args: &Args<'_>,
        column: usize,
    ) {
        let from = (K / 2).saturating_sub(column * S);
        let to = K.min(args.x_width + K / 2 - column * S);
        // SAFETY: the caller's; the taps from `from` to `to` are inside the picture.
        unsafe {
            let mut sum = V::load(self.weights);
            for row in 0..K {
                if args.rows[row].is_null() {
                    continue;
                }
                for tap in from..to {
                    let at = (column * S + tap - K / 2) * args.x_stride + self.first;
                    let x = self.load::<V, WHOLE>(args.rows[row].add(at));
                    let tap = V::load(self.weights.add((1 + row * K + tap) * V::WIDTH));
                    sum = sum.add_product(x, tap);
                }
            }
            self.finish::<V, WHOLE>(args, column, sum);
        }
    }

    #[inline(always)]
    unsafe fn load<V: Vector, const WHOLE: bool>(self, from: *const f32) -> V {
        // SAFETY: the caller's.
        unsafe { if WHOLE { V::load(from) } else { V::load_part(from, self.count) } }
    }

    #[inline(always)]
    unsafe fn finish<V: Vector, const WHOLE: bool>(self, args: &Args<'_>, column: usize, sum: V) {
        let at = column * args.y_stride + self.first;
        // SAFETY: the caller's.
        unsafe {
            let mut sum = sum;
            if args.relu {
                sum = sum.max(V::splat(0.0));
            }
            if !args.added.is_null() {
                sum = sum.add(self.load::<V, WHOLE>(args.added.add(at)));
            }
            let y = args.y.add(at);
            if WHOLE { sum.store(y) } else { sum.store_part(y, self.count) }
        }
    }
}
