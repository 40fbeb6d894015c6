//! The network's layers, packed for an instruction set and laid out for a size of input.

use std::collections::BTreeMap;

use crate::infer::{
    native::{
        kernel_depth::Depth,
        kernel_gemm::Packed,
        kernel_vector::Isa,
        layout::{Channels, Map},
    },
    plan::{self, Config, Spec},
    weights::Tensor,
};

/// Everything that lanes share.
#[derive(Debug)]
pub(super) struct Net {
    pub(super) isa: Isa,
    pub(super) stem: Packed,
    /// What the stem writes.
    pub(super) first: Map,
    pub(super) blocks: Vec<Block>,
    pub(super) last: Packed,
    pub(super) last_runs: Vec<(usize, usize)>,
    pub(super) head: Packed,
    pub(super) head_runs: Vec<(usize, usize)>,
    pub(super) classifier: Packed,
    /// Real channels before the head and before the classifier: a linear layer reads these.
    pub(super) features: usize,
    pub(super) classes: usize,
}

/// A ghost bottleneck.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) expand: Ghost,
    pub(super) depthwise: Option<Depth>,
    pub(super) squeeze: Option<Squeeze>,
    pub(super) project: Ghost,
    pub(super) shortcut: Option<(Depth, Packed)>,
    pub(super) maps: Maps,
    /// Rows of input that go through all layers before the next.
    pub(super) strip: usize,
}

/// The maps between the layers of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Maps {
    pub(super) input: Map,
    /// After the first ghost module.
    pub(super) wide: Map,
    /// After the depthwise convolution; `wide` if there is none.
    pub(super) deep: Map,
    /// Primary half of the second ghost module.
    pub(super) half: Map,
    /// After the shortcut's depthwise convolution.
    pub(super) side: Map,
    pub(super) out: Map,
}

/// Half of the channels by a 1×1 convolution, the other half from those by a depthwise one.
#[derive(Debug)]
pub(super) struct Ghost {
    pub(super) primary: Packed,
    pub(super) cheap: Depth,
    /// Where the channels of the input are.
    pub(super) runs: Vec<(usize, usize)>,
}

/// Squeeze-excite.
#[derive(Debug)]
pub(super) struct Squeeze {
    pub(super) reduce: Packed,
    pub(super) expand: Packed,
    /// Where the channels of the map are.
    pub(super) runs: Vec<(usize, usize)>,
}

/// Layers of the plan with weights, BatchNorm folded in.
type Folded = plan::Block<Layer>;

struct Layer {
    spec: Spec,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Net {
    /// Packs the parameters for `isa` and pictures of `side` × `side`. A block takes strips of at
    /// most `strip` numbers between its layers.
    ///
    /// # Errors
    /// A parameter is missing or has another shape.
    pub(super) fn new(
        tensors: &BTreeMap<String, Tensor>,
        config: &Config,
        isa: Isa,
        side: usize,
        strip: usize,
    ) -> anyhow::Result<Net> {
        let folded = plan::plan(config).try_map(&mut |spec: Spec| {
            let (weight, bias) = spec.fold(tensors)?;
            anyhow::Ok(Layer { spec, weight, bias })
        })?;
        // As halves, though there are none, so that a block may add its input to its output.
        let mut channels = Channels::halves(folded.stem.spec.out);
        let stem = folded.stem.packed_stem(isa, &channels);
        let half = (side - 1) / 2 + 1;
        let first = Map::new(half, half, channels.len());
        let mut map = first;
        let mut blocks = Vec::new();
        for layers in folded.blocks {
            let block = Block::new(&layers, isa, map, &mut channels, strip);
            map = block.maps.out;
            blocks.push(block);
        }
        let last_runs = channels.runs();
        let wide = Channels::plain(folded.last.spec.out);
        let head_runs = wide.runs();
        Ok(Net {
            isa,
            stem,
            first,
            blocks,
            last: folded.last.packed(isa, &wide),
            last_runs,
            features: folded.head.spec.out,
            classes: folded.classifier.spec.out,
            head: folded.head.packed(isa, &Channels::plain(folded.head.spec.out)),
            head_runs,
            // Logits leave without padding.
            classifier: folded.classifier.packed_as(isa, folded.classifier.spec.out),
        })
    }
}

impl Layer {
    fn parts(&self) -> (&[f32], &[f32]) {
        (&self.weight, &self.bias)
    }

    fn packed(&self, isa: Isa, out: &Channels) -> Packed {
        Packed::new(isa, self.parts(), &out.positions)
    }

    fn packed_as(&self, isa: Isa, out: usize) -> Packed {
        Packed::new(isa, self.parts(), &(0..out).map(Some).collect::<Vec<_>>())
    }

    /// The stem reads whole pixels of three rows: the checkpoint's order is channel, row, column,
    /// that of the picture row, column, channel.
    fn packed_stem(&self, isa: Isa, out: &Channels) -> Packed {
        let area = self.spec.kernel * self.spec.kernel;
        let colours = self.spec.input;
        let mut turned = Vec::with_capacity(self.weight.len());
        for kernel in self.weight.chunks_exact(area * colours) {
            for at in 0..area {
                turned.extend((0..colours).map(|it| kernel[it * area + at]));
            }
        }
        Packed::new(isa, (&turned, &self.bias), &out.positions)
    }

    fn depth(&self, isa: Isa, channels: &[Option<usize>]) -> Depth {
        Depth::new(isa, self.parts(), (self.spec.kernel, self.spec.stride), channels)
    }
}

impl Block {
    fn new(layers: &Folded, isa: Isa, input: Map, channels: &mut Channels, strip: usize) -> Block {
        let from = channels.clone();
        let wide = Channels::halves(2 * layers.expand.primary.spec.out);
        let out = Channels::halves(2 * layers.project.primary.spec.out);
        *channels = out.clone();
        let depthwise = layers.depthwise.as_ref().map(|it| it.depth(isa, &wide.positions));
        let size = |it: usize| depthwise.as_ref().map_or(it, |depth| depth.out(it));
        let (height, width) = (size(input.height), size(input.width));
        let squeeze = layers.squeeze.as_ref().map(|it| Squeeze {
            reduce: it.reduce.packed_as(isa, it.reduce.spec.out),
            expand: it.expand.packed(isa, &wide),
            runs: wide.runs(),
        });
        let strip = (strip / (input.width * wide.len())).clamp(1, input.height);
        // A row of the depthwise convolution needs `kernel` rows of the map before it, which lags
        // behind the strip by one row.
        let lag = 2 + depthwise.as_ref().map_or(1, |it| it.kernel);
        let all = |rows: usize| if squeeze.is_some() { usize::MAX } else { rows };
        let wide_rows = if depthwise.is_some() { strip + lag } else { all(strip + lag) };
        let wide_map = Map::new(input.height, input.width, wide.len()).keeping(wide_rows);
        let deep = Map::new(height, width, wide.len()).keeping(all(strip + 3));
        let maps = Maps {
            input,
            wide: wide_map,
            deep: if depthwise.is_some() { deep } else { wide_map },
            half: Map::new(height, width, out.len() / 2).keeping(strip + 6),
            side: Map::new(height, width, from.len()).keeping(strip + 6),
            out: Map::new(height, width, out.len()),
        };
        Block {
            expand: Ghost::new(&layers.expand, isa, &from),
            depthwise,
            squeeze,
            project: Ghost::new(&layers.project, isa, &wide),
            shortcut: layers
                .shortcut
                .as_ref()
                .map(|(depth, point)| (depth.depth(isa, &from.positions), point.packed(isa, &out))),
            maps,
            strip,
        }
    }
}

impl Ghost {
    fn new(layers: &plan::Ghost<Layer>, isa: Isa, from: &Channels) -> Ghost {
        let half = Channels::plain(layers.primary.spec.out);
        Ghost {
            primary: layers.primary.packed(isa, &half),
            cheap: layers.cheap.depth(isa, &half.positions),
            runs: from.runs(),
        }
    }
}
