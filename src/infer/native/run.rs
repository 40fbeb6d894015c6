//! The layers of a block, strip by strip, and a whole batch.

use crate::infer::native::{
    buffer::Buffer,
    kernel_depth::{Depth, Finish, TAPS, Target, Window, depthwise},
    kernel_gemm::{Packed, Rows, multiply},
    kernel_map::{add, means, scale},
    kernel_vector::Isa,
    layout::Map,
    net::{Block, Net, Squeeze},
};

/// The maps between the layers of a block, large enough for every block. One per lane.
#[derive(Debug)]
pub(super) struct Work {
    wide: Buffer,
    deep: Buffer,
    half: Buffer,
    side: Buffer,
    /// Means, what they are reduced to, factors.
    squeeze: [Buffer; 3],
}

impl Work {
    pub(super) fn new(net: &Net) -> Work {
        let largest = |size: &dyn Fn(&Block) -> usize| {
            Buffer::new(net.blocks.iter().map(size).max().unwrap_or(0))
        };
        let reduced = |it: &Block| it.squeeze.as_ref().map_or(0, |it| it.reduce.n);
        Work {
            wide: largest(&|it| it.maps.wide.len()),
            deep: largest(&|it| it.maps.deep.len()),
            half: largest(&|it| it.maps.half.len()),
            side: largest(&|it| it.maps.side.len()),
            squeeze: [
                largest(&|it| it.maps.deep.channels),
                largest(&reduced),
                largest(&|it| it.maps.deep.channels),
            ],
        }
    }
}

/// How many rows of each map are done.
#[derive(Default)]
struct Done {
    /// Primary and cheap half of the first ghost module.
    primary: usize,
    wide: usize,
    deep: usize,
    half: usize,
    out: usize,
}

/// One block for one picture, from `x` to `y`.
pub(super) fn block(block: &Block, isa: Isa, x: &[f32], y: &mut [f32], work: &mut Work) {
    let mut done = Done::default();
    let maps = &block.maps;
    while done.out < maps.out.height {
        front(block, x, work, &mut done);
        if let Some(squeeze) = &block.squeeze {
            // The means are of the whole map.
            while done.primary < maps.input.height {
                front(block, x, work, &mut done);
            }
            let deep = if block.depthwise.is_some() { &mut work.deep } else { &mut work.wide };
            let deep = &mut deep[..maps.deep.len()];
            excite(squeeze, isa, deep, maps.deep.channels, &mut work.squeeze);
        }
        while done.half < done.deep {
            back(block, isa, x, y, work, &mut done);
        }
    }
}

/// A strip of the first ghost module and of the depthwise convolution.
fn front(block: &Block, x: &[f32], work: &mut Work, done: &mut Done) {
    let maps = &block.maps;
    let height = maps.input.height;
    let to = height.min(done.primary + block.strip);
    let runs = &block.expand.runs;
    let rows = done.primary..to;
    point(&block.expand.primary, (x, maps.input, runs), (&mut work.wide, maps.wide), rows, true);
    done.primary = to;
    let cheap = &block.expand.cheap;
    let ready = cheap.ready(to, height);
    for row in done.wide..ready {
        let window = window(cheap, None, maps.wide, row);
        let first = maps.wide.row(row) + cheap.channels;
        let target = Target { y: &mut work.wide, first, stride: maps.wide.channels };
        depthwise(cheap, window, target, Finish::Relu);
    }
    done.wide = ready;
    let Some(depth) = &block.depthwise else {
        done.deep = ready;
        return;
    };
    let ready = depth.ready(ready, height);
    for row in done.deep..ready {
        let window = window(depth, Some(&work.wide), maps.wide, row);
        let first = maps.deep.row(row);
        let target = Target { y: &mut work.deep, first, stride: maps.deep.channels };
        depthwise(depth, window, target, Finish::Linear);
    }
    done.deep = ready;
}

/// A strip of the second ghost module and of the shortcut.
fn back(block: &Block, isa: Isa, x: &[f32], y: &mut [f32], work: &mut Work, done: &mut Done) {
    let maps = &block.maps;
    let to = done.deep.min(done.half + block.strip);
    let deep = if block.depthwise.is_some() { &work.deep } else { &work.wide };
    let from = (&deep[..], maps.deep, &block.project.runs[..]);
    point(&block.project.primary, from, (&mut work.half, maps.half), done.half..to, false);
    done.half = to;
    let cheap = &block.project.cheap;
    let ready = cheap.ready(to, maps.out.height);
    if let Some((depth, packed)) = &block.shortcut {
        for row in done.out..ready {
            let window = window(depth, Some(x), maps.input, row);
            let first = maps.side.row(row);
            let target = Target { y: &mut work.side, first, stride: maps.side.channels };
            depthwise(depth, window, target, Finish::Linear);
        }
        let from = (&work.side[..], maps.side, &block.expand.runs[..]);
        point(packed, from, (y, maps.out), done.out..ready, false);
    }
    for row in done.out..ready {
        let window = window(cheap, Some(&work.half), maps.half, row);
        let start = maps.out.row(row);
        let target = Target { y, first: start + cheap.channels, stride: maps.out.channels };
        let identity = block.shortcut.is_none();
        let finish = if identity { Finish::Add(x) } else { Finish::AddInPlace };
        depthwise(cheap, window, target, finish);
        let primary = (&work.half[maps.half.row(row)..], maps.half.channels);
        let other = identity.then(|| &x[start..]);
        let sums = (&mut y[start..], maps.out.channels);
        add(isa, primary, other, sums, (maps.out.width, cheap.channels));
    }
    done.out = ready;
}

/// A 1×1 convolution of some rows.
fn point(
    packed: &Packed,
    (x, from, runs): (&[f32], Map, &[(usize, usize)]),
    (y, to): (&mut [f32], Map),
    rows: std::ops::Range<usize>,
    relu: bool,
) {
    let mut row = rows.start;
    while row < rows.end {
        let count = from.together(row, rows.end).min(to.together(row, rows.end));
        let x = Rows { x: &x[from.row(row)..], stride: from.channels, runs };
        let y = (&mut y[to.row(row)..], to.channels);
        multiply(packed, x, count * from.width, y, relu);
        row += count;
    }
}

/// The rows of `map` around row `row` of the output.
pub(super) fn window<'a>(depth: &Depth, x: Option<&'a [f32]>, map: Map, row: usize) -> Window<'a> {
    let mut rows = [None; TAPS];
    for (tap, it) in rows.iter_mut().enumerate().take(depth.kernel) {
        let at = (row * depth.stride + tap).checked_sub(depth.kernel / 2);
        *it = at.filter(|it| *it < map.height).map(|it| map.row(it));
    }
    Window { x, rows, width: map.width, stride: map.channels }
}

fn excite(
    squeeze: &Squeeze,
    isa: Isa,
    x: &mut [f32],
    channels: usize,
    [mean, reduced, factors]: &mut [Buffer; 3],
) {
    means(isa, x, &mut mean[..channels]);
    let rows = Rows { x: mean, stride: 0, runs: &squeeze.runs };
    multiply(&squeeze.reduce, rows, 1, (reduced, 0), true);
    let all = [(0, squeeze.expand.k)];
    let rows = Rows { x: reduced, stride: 0, runs: &all };
    multiply(&squeeze.expand, rows, 1, (factors, 0), false);
    let factors = &mut factors[..channels];
    for it in factors.iter_mut() {
        // Hard sigmoid.
        *it = (*it / 6.0 + 0.5).clamp(0.0, 1.0);
    }
    scale(isa, x, factors);
}
