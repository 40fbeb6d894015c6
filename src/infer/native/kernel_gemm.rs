//! Matrix multiplication: 1×1 convolutions, the stem and linear layers.
//!
//! `y[m][n] = bias[n] + sum over k of x[m][k] * w[k][n]`, then ReLU if wanted. Rows of `x` are
//! pixels of an NHWC map and are read where they lie, one broadcast per value, so that nothing is
//! copied; `w` is packed into panels of up to three vectors of columns. A tile of rows × columns
//! stays in registers over the whole of k:
//!
//! | instructions | columns × rows | registers for sums | beside them |
//! | --- | --- | --- | --- |
//! | AVX2 | 16 × 6, 24 × 3, 8 × 8 | 12, 9, 8 of 16 | 1 to 3 of `w`, 1 of `x` |
//! | AVX-512 | 48 × 8, 32 × 12, 16 × 12 | 24, 24, 12 of 32 | 1 to 3 of `w`, `x` from memory |
//!
//! On one core of an AVX2-only EPYC, whose peak was measured at 38.8 GFLOP/s (one multiply-add of a
//! vector per cycle): 36 to 39 in tiles of 16 × 6, 30 to 35 where the last panel is 24 wide (24 × 4
//! would fill all 16 registers: 22), 25 at 8 columns, 34 in the stem. AVX-512 has not been run.
//!
//! A value is always the sum in the order of k, whatever tile it falls into: so a batch gives bit
//! for bit what its pictures give alone.

#[cfg(target_arch = "x86_64")]
use crate::infer::native::kernel_vector::{V8, V16};
use crate::infer::native::{
    buffer::Buffer,
    kernel_vector::{Isa, Plain, Vector, dispatch},
};

/// Weights and bias of one layer, packed for an instruction set.
#[derive(Debug)]
pub(super) struct Packed {
    isa: Isa,
    /// Values per row of `x`.
    pub(super) k: usize,
    /// Columns, padding included.
    pub(super) n: usize,
    /// Panel after panel: `[k][columns of the panel]`.
    weights: Buffer,
    /// `n`, rounded up to whole vectors.
    bias: Buffer,
}

impl Packed {
    /// Packs `weights` of `[n][k]`. Column `j` of the result is row `columns[j]` of the weights, or
    /// padding that gives 0.
    pub(super) fn new(
        isa: Isa,
        (weights, bias): (&[f32], &[f32]),
        columns: &[Option<usize>],
    ) -> Packed {
        let (width, k) = (isa.width(), weights.len() / bias.len());
        let at = |column: usize| columns.get(column).copied().flatten();
        let mut packed = Vec::with_capacity(columns.len().next_multiple_of(width) * k);
        let mut first = 0;
        for vectors in panels(isa, columns.len()) {
            for row in 0..k {
                packed.extend(
                    (first..first + vectors * width)
                        .map(|it| at(it).map_or(0.0, |it| weights[it * k + row])),
                );
            }
            first += vectors * width;
        }
        let bias: Vec<f32> = (0..first).map(|it| at(it).map_or(0.0, |it| bias[it])).collect();
        let (weights, bias) = (Buffer::of(&packed), Buffer::of(&bias));
        Packed { isa, k, n: columns.len(), weights, bias }
    }
}

/// Vectors per panel, for so many columns.
fn panels(isa: Isa, columns: usize) -> impl Iterator<Item = usize> {
    let vectors = columns.div_ceil(isa.width());
    let (twos, threes) = match (isa, vectors % 3) {
        (Isa::Avx512, 0) => (0, vectors / 3),
        (Isa::Avx512, 2) => (1, vectors / 3),
        (Isa::Avx512, _) if 4 <= vectors => (2, vectors / 3 - 1),
        _ if vectors.is_multiple_of(2) => (vectors / 2, 0),
        _ if 3 <= vectors => ((vectors - 3) / 2, 1),
        _ => (0, 0),
    };
    let ones = vectors - 2 * twos - 3 * threes;
    let repeat = |size, count| std::iter::repeat_n(size, count);
    repeat(3, threes).chain(repeat(2, twos)).chain(repeat(1, ones))
}

/// Where the rows of `x` are: row `i` begins at `i * stride`, and its values are in runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows<'a> {
    pub(super) x: &'a [f32],
    pub(super) stride: usize,
    /// Offset in the row, and length.
    pub(super) runs: &'a [(usize, usize)],
}

/// Multiplies `count` rows into `y`, whose rows begin every `stride`; `n` values of each are
/// written.
pub(super) fn multiply(
    packed: &Packed,
    rows: Rows<'_>,
    count: usize,
    (y, stride): (&mut [f32], usize),
    relu: bool,
) {
    if count == 0 {
        return;
    }
    let values: usize = rows.runs.iter().map(|it| it.1).sum();
    let reach = rows.runs.iter().map(|it| it.0 + it.1).max().unwrap_or(0);
    assert_eq!(values, packed.k, "the runs are a row");
    assert!((count - 1) * rows.stride + reach <= rows.x.len(), "all rows are there");
    assert!((count - 1) * stride + packed.n <= y.len(), "y has room for all rows");
    let args = Args {
        x: rows.x.as_ptr(),
        x_stride: rows.stride,
        runs: rows.runs,
        packed,
        y: y.as_mut_ptr(),
        y_stride: stride,
        count,
        relu,
    };
    // SAFETY: an `Isa` is used only where it is available; the sizes are asserted above, and
    // `Packed::new` made the panels.
    unsafe { multiply_with(packed.isa, args) }
}

#[derive(Clone, Copy)]
struct Args<'a> {
    x: *const f32,
    x_stride: usize,
    runs: &'a [(usize, usize)],
    packed: &'a Packed,
    y: *mut f32,
    y_stride: usize,
    count: usize,
    relu: bool,
}

dispatch! { multiply_with(args: Args<'_>) = blocked }

/// Bytes of `x` that are multiplied with all panels before the next: they stay in the L2 cache.
const BLOCK: usize = 128 << 10;

#[inline(always)]
unsafe fn blocked<V: Vector>(args: Args<'_>) {
    let block = (BLOCK / 4 / args.packed.k).max(24);
    let mut first = 0;
    while first < args.count {
        let count = block.min(args.count - first);
        // SAFETY: the caller's, for a part of the rows.
        unsafe {
            let x = args.x.add(first * args.x_stride);
            let y = args.y.add(first * args.y_stride);
            all_panels::<V>(Args { x, y, count, ..args });
        }
        first += count;
    }
}

/// Panels of two vectors that a single row is multiplied with at once: with one of them it would
/// wait for its own sums. AVX2: 20 to 28 GFLOP/s instead of 15, and 10.6 to 11.0 ms per image at
/// batch 1 instead of 11.4 to 12.1. On AVX-512 there are never as many such panels.
const ABREAST: usize = 4;

#[inline(always)]
unsafe fn all_panels<V: Vector>(args: Args<'_>) {
    let Packed { weights, bias, n, k, isa } = args.packed;
    let (mut column, mut weights) = (0, weights.as_ptr());
    let mut panels = panels(*isa, *n).peekable();
    while let Some(&vectors) = panels.peek() {
        let all = ABREAST * 2 * V::WIDTH;
        let abreast = args.count == 1 && vectors == 2 && column + all <= *n;
        let columns = if abreast { all } else { (vectors * V::WIDTH).min(n - column) };
        // SAFETY: the caller's; a panel is `k` rows of its vectors.
        unsafe {
            let bias = bias.as_ptr().add(column);
            let panel = Panel { weights, bias, y: args.y.add(column), columns };
            match vectors {
                _ if abreast => panel.row::<V>(&args),
                3 => panel.rows3::<V>(&args),
                2 => panel.rows2::<V>(&args),
                _ => panel.rows1::<V>(&args),
            }
            weights = weights.add(k * columns.next_multiple_of(V::WIDTH));
        }
        column += columns;
        panels.nth(if abreast { ABREAST - 1 } else { 0 });
    }
}

#[derive(Clone, Copy)]
struct Panel {
    weights: *const f32,
    bias: *const f32,
    y: *mut f32,
    columns: usize,
}

/// Splits the rows into tiles of nearly the same height, at most the largest arm: 49 rows are
/// five tiles of 5 and four of 6, not eight of 6 and one of 1 that takes as long as one of 6.
macro_rules! tiles {
    ($name:ident, $vectors:literal, $($height:literal)*) => {
        #[inline(always)]
        unsafe fn $name<V: Vector>(self, args: &Args<'_>) {
            let tiles = args.count.div_ceil(V::HEIGHTS[$vectors - 1]);
            let mut row = 0;
            for tile in 0..tiles {
                let height = (args.count + tile) / tiles;
                // SAFETY: the caller's; `height` rows from `row` are among the `count`.
                unsafe {
                    match height {
                        $($height => self.tile::<V, $height, $vectors>(args, row),)*
                        _ => unreachable!("a tile has at most as many rows as fit"),
                    }
                }
                row += height;
            }
        }
    };
}

impl Panel {
    tiles!(rows3, 3, 8 7 6 5 4 3 2 1);
    tiles!(rows2, 2, 12 11 10 9 8 7 6 5 4 3 2 1);
    tiles!(rows1, 1, 12 11 10 9 8 7 6 5 4 3 2 1);

    /// One row with [`ABREAST`] panels of two vectors, in the same order of sums as a tile.
    #[inline(always)]
    unsafe fn row<V: Vector>(self, args: &Args<'_>) {
        let panel = args.packed.k * 2 * V::WIDTH;
        // SAFETY: the caller's; the panels lie one after the other.
        unsafe {
            let mut sums = [[V::splat(0.0); 2]; ABREAST];
            for at in 0..2 * ABREAST {
                sums[at / 2][at % 2] = V::load(self.bias.add(at * V::WIDTH));
            }
            let mut weights = self.weights;
            for &(offset, length) in args.runs {
                for at in offset..offset + length {
                    let x = V::splat(*args.x.add(at));
                    for index in 0..ABREAST {
                        for vector in 0..2 {
                            let w = weights.add(index * panel + vector * V::WIDTH);
                            sums[index][vector] = sums[index][vector].add_product(x, V::load(w));
                        }
                    }
                    weights = weights.add(2 * V::WIDTH);
                }
            }
            let floor = V::splat(if args.relu { 0.0 } else { f32::NEG_INFINITY });
            for at in 0..2 * ABREAST {
                sums[at / 2][at % 2].max(floor).store(self.y.add(at * V::WIDTH));
            }
        }
    }

    /// The micro-kernel.
    #[inline(always)]
    unsafe fn tile<V: Vector, const ROWS: usize, const VECTORS: usize>(
        self,
        args: &Args<'_>,
        row: usize,
    ) {
        // Such a tile is not used, and should not be compiled.
        if V::HEIGHTS[VECTORS - 1] < ROWS {
            return;
        }
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [[V::splat(0.0); VECTORS]; ROWS];
            for vector in 0..VECTORS {
                let bias = V::load(self.bias.add(vector * V::WIDTH));
                for sums in &mut sums {
                    sums[vector] = bias;
                }
            }
            let mut weights = self.weights;
            let x = args.x.add(row * args.x_stride);
            for &(offset, length) in args.runs {
                let mut from = x.add(offset);
                for _ in 0..length {
                    let mut w = [V::splat(0.0); VECTORS];
                    for vector in 0..VECTORS {
                        w[vector] = V::load(weights.add(vector * V::WIDTH));
                    }
                    for row in 0..ROWS {
                        let x = V::splat(*from.add(row * args.x_stride));
                        for vector in 0..VECTORS {
                            sums[row][vector] = sums[row][vector].add_product(x, w[vector]);
                        }
                    }
                    from = from.add(1);
                    weights = weights.add(VECTORS * V::WIDTH);
                }
            }
            let floor = V::splat(if args.relu { 0.0 } else { f32::NEG_INFINITY });
            for (index, sums) in sums.into_iter().enumerate() {
                let y = self.y.add((row + index) * args.y_stride);
                for (vector, sum) in sums.into_iter().enumerate() {
                    let (sum, first) = (sum.max(floor), vector * V::WIDTH);
                    let left = self.columns - first;
                    if V::WIDTH <= left {
                        sum.store(y.add(first));
                    } else {
                        sum.store_part(y.add(first), left);
                    }
                }
            }
        }
    }
}
