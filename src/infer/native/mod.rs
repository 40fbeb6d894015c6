//! An engine of our own for this one network on a CPU: from the crop's bytes to logits, without
//! libtorch.
//!
//! Maps are NHWC: the channels of a pixel lie together, padded to whole vectors of 8, and the two
//! halves of a ghost module each have their own padding:
//!
//! ```text
//! pixel 0                                   pixel 1
//! | primary: 12, 4 of padding | cheap: 12, 4 | primary: 12, 4 | cheap: 12, 4 | ...
//!   ^ written by the 1x1        ^ written by the 3x3 that reads the places before it
//! ```
//!
//! So a 1×1 convolution is a matrix multiplication that reads pixels where they lie ([`Packed`](kernel_gemm::Packed)),
//! a depthwise convolution takes vectors of channels without a shuffle, and there is no
//! concatenation: both halves are written in place. Padding is skipped by the multiplications and
//! is 0 elsewhere. (Blocks of 16 channels with their pixels together, NCHWc, would give rows of the
//! depthwise convolutions that lie together, but halves such as 12 or 36 would be padded to 16.)
//!
//! A block goes through all its layers in strips of rows, so that what is between its layers stays
//! in the cache; only squeeze-excite, which needs the means of the whole map, divides a block in
//! two. A lane is one thread; it allocates nothing after it was made.

mod buffer;
#[allow(unsafe_code, reason = "vector loads and stores, and functions for detected features")]
#[allow(clippy::needless_range_loop, reason = "constant bounds are unrolled; iterators hide them")]
mod kernel_depth;
#[allow(unsafe_code, reason = "vector loads and stores, and functions for detected features")]
#[allow(clippy::needless_range_loop, reason = "constant bounds are unrolled; iterators hide them")]
mod kernel_gemm;
#[allow(unsafe_code, reason = "vector loads and stores, and functions for detected features")]
mod kernel_map;
#[allow(unsafe_code, reason = "vector loads and stores, and functions for detected features")]
mod kernel_vector;
mod layout;
mod net;
mod run;

use std::{collections::BTreeMap, sync::Arc};

pub use crate::infer::native::kernel_vector::Isa;
use crate::infer::{
    native::{
        buffer::Buffer,
        kernel_gemm::{Rows, multiply},
        kernel_map::means,
        net::Net,
        run::Work,
    },
    plan::Config,
    weights::Tensor,
};

/// Numbers between the layers of a block that are worked on at once: a quarter of an L2 cache of
/// 512 KiB.
const STRIP: usize = 32 << 10;

/// Blocks from the first whose output has at most this many pixels take the whole batch before the
/// next block: their weights are larger than their maps.
const SMALL: usize = 14 * 14;

/// The most pictures that go through the later blocks together.
const TOGETHER: usize = 8;

/// The network for one thread. Weights are shared between lanes.
#[derive(Debug)]
pub struct Lane {
    net: Arc<Net>,
    side: usize,
    table: Arc<[[f32; 3]; 256]>,
    /// Three rows of the picture, normalised, with a pixel of padding at both ends, and a row of
    /// zeros.
    lines: Buffer,
    work: Work,
    /// Between the early blocks.
    early: [Buffer; 2],
    /// Between the later blocks, of all pictures.
    later: [Buffer; 2],
    /// Of all pictures: means, and features.
    pooled: Buffer,
    features: Buffer,
    logits: Buffer,
}

/// What the pictures of a network are.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    /// Width and height in pixels.
    pub side: usize,
    /// Per channel, of pixels scaled to 0..=1.
    pub mean: [f32; 3],
    /// Per channel, of pixels scaled to 0..=1.
    pub std: [f32; 3],
}

impl Lane {
    /// Packs the parameters that [`crate::infer::plan::expected`] names.
    ///
    /// # Errors
    /// A parameter is missing or has another shape, or the processor lacks the instructions.
    pub fn new(
        tensors: &BTreeMap<String, Tensor>,
        config: &Config,
        input: &Input,
        isa: Isa,
    ) -> anyhow::Result<Lane> {
        Lane::with_strips(tensors, config, input, isa, STRIP)
    }

    fn with_strips(
        tensors: &BTreeMap<String, Tensor>,
        config: &Config,
        input: &Input,
        isa: Isa,
        strip: usize,
    ) -> anyhow::Result<Lane> {
        anyhow::ensure!(isa.available(), "this processor has no {isa:?}");
        anyhow::ensure!(0 < input.side, "pictures have a side of 0");
        let net = Arc::new(Net::new(tensors, config, isa, input.side, strip)?);
        Ok(Lane::of(net, input.side, Arc::new(table(input))))
    }

    /// The same network for another thread.
    pub fn another(&self) -> Lane {
        Lane::of(self.net.clone(), self.side, self.table.clone())
    }

    fn of(net: Arc<Net>, side: usize, table: Arc<[[f32; 3]; 256]>) -> Lane {
        let split = split(&net);
        let largest = |from: usize, to: usize| {
            let maps = net.blocks[from..to].iter().map(|it| it.maps.out.len());
            maps.max().unwrap_or(0).max(if from == 0 { net.first.len() } else { 0 })
        };
        let before = split.checked_sub(1).map_or(net.first, |it| net.blocks[it].maps.out);
        let last = net.blocks.last().map_or(net.first, |it| it.maps.out);
        let later = largest(split, net.blocks.len()).max(before.len());
        let later = later.max(last.height * last.width * net.last.n);
        Lane {
            lines: Buffer::new(4 * 3 * (side + 2)),
            work: Work::new(&net),
            early: [0; 2].map(|_| Buffer::new(largest(0, split))),
            later: [0; 2].map(|_| Buffer::new(TOGETHER * later)),
            pooled: Buffer::new(TOGETHER * net.last.n),
            features: Buffer::new(TOGETHER * net.head.n),
            logits: Buffer::new(TOGETHER * net.classes),
            net,
            side,
            table,
        }
    }

    /// Appends `classes` logits per picture to `logits`; pictures are `[side, side, 3]` bytes.
    ///
    /// # Panics
    /// If a picture has another size.
    pub fn forward(&mut self, pictures: &[&[u8]], logits: &mut Vec<f32>) {
        let row = self.side * 3;
        for part in pictures.chunks(TOGETHER) {
            for (index, picture) in part.iter().enumerate() {
                assert_eq!(picture.len(), row * self.side, "a picture has the network's size");
                self.early(index, |lane, line, y| {
                    let picture = picture[y * row..][..row].as_chunks::<3>().0;
                    for (to, from) in line.as_chunks_mut::<3>().0.iter_mut().zip(picture) {
                        for colour in 0..3 {
                            to[colour] = lane[usize::from(from[colour])][colour];
                        }
                    }
                });
            }
            self.rest(part.len());
            logits.extend_from_slice(&self.logits[..part.len() * self.net.classes]);
        }
    }

    /// As [`Lane::forward`], for pixels that are normalised already.
    #[cfg(test)]
    fn forward_normalised(&mut self, pictures: &[f32], logits: &mut Vec<f32>) {
        let row = self.side * 3;
        for part in pictures.chunks(TOGETHER * row * self.side) {
            for (index, picture) in part.chunks_exact(row * self.side).enumerate() {
                self.early(index, |_, line, y| line.copy_from_slice(&picture[y * row..][..row]));
            }
            let count = part.len() / row / self.side;
            self.rest(count);
            logits.extend_from_slice(&self.logits[..count * self.net.classes]);
        }
    }

    /// The stem and the early blocks of one picture, whose rows `fill` writes.
    fn early(&mut self, index: usize, fill: impl Fn(&[[f32; 3]; 256], &mut [f32], usize)) {
        let net = self.net.clone();
        let split = split(&net);
        let [x, y] = &mut self.early;
        let length = 3 * (self.side + 2);
        for row in 0..net.first.height {
            // Two new rows for each row of output; the one before them is there already.
            for at in 2 * row..(2 * row + 2).min(self.side) {
                let line = &mut self.lines[at % 3 * length..][3..length - 3];
                fill(&self.table, line, at);
            }
            let runs = [0, 1, 2].map(|tap: usize| {
                let at = (2 * row + tap).checked_sub(1).filter(|it| *it < self.side);
                (at.map_or(3, |it| it % 3) * length, 9)
            });
            let rows = Rows { x: &self.lines, stride: 6, runs: &runs };
            let target = (&mut x[net.first.row(row)..], net.first.channels);
            multiply(&net.stem, rows, net.first.width, target, true);
        }
        for block in &net.blocks[..split] {
            run::block(block, net.isa, x, y, &mut self.work);
            std::mem::swap(x, y);
        }
        let out = split.checked_sub(1).map_or(net.first, |it| net.blocks[it].maps.out).len();
        self.later[0][index * out..][..out].copy_from_slice(&x[..out]);
    }

    /// The later blocks and the head, for so many pictures.
    fn rest(&mut self, count: usize) {
        let net = self.net.clone();
        let [x, y] = &mut self.later;
        for block in &net.blocks[split(&net)..] {
            let (from, to) = (block.maps.input.len(), block.maps.out.len());
            for index in 0..count {
                let (x, y) = (&x[index * from..][..from], &mut y[index * to..][..to]);
                run::block(block, net.isa, x, y, &mut self.work);
            }
            std::mem::swap(x, y);
        }
        let last = net.blocks.last().map_or(net.first, |it| it.maps.out);
        let (pixels, wide) = (last.height * last.width, net.last.n);
        let rows = Rows { x, stride: last.channels, runs: &net.last_runs };
        multiply(&net.last, rows, count * pixels, (y, wide), true);
        for (map, mean) in
            y.chunks_exact(pixels * wide).zip(self.pooled.chunks_exact_mut(wide)).take(count)
        {
            means(net.isa, map, mean);
        }
        let rows = Rows { x: &self.pooled, stride: wide, runs: &net.head_runs };
        let features = net.head.n;
        multiply(&net.head, rows, count, (&mut self.features, features), true);
        let all = [(0, net.features)];
        let rows = Rows { x: &self.features, stride: features, runs: &all };
        multiply(&net.classifier, rows, count, (&mut self.logits, net.classes), false);
    }
}

/// The first block that takes the whole batch.
fn split(net: &Net) -> usize {
    let small = |it: &net::Block| it.maps.out.height * it.maps.out.width <= SMALL;
    net.blocks.iter().position(small).unwrap_or(net.blocks.len())
}

/// From bytes to what the network was trained on, rounded as torchvision's `ToTensor` and
/// `Normalize` round.
fn table(input: &Input) -> [[f32; 3]; 256] {
    let mut table = [[0.0; 3]; 256];
    for (byte, row) in table.iter_mut().enumerate() {
        for (channel, it) in row.iter_mut().enumerate() {
            *it = (byte as f32 / 255.0 - input.mean[channel]) / input.std[channel];
        }
    }
    table
}

#[cfg(test)]
mod tests;
