//! The network on the CPU: the same layers as [`ghostnet`], put together for oneDNN.
//!
//! ReLU and the additions are part of the convolutions. The two halves of a ghost module's output are
//! kept apart where what follows works by channel; the convolution that needs both is split in two,
//! of which the second adds to what the first gave. That leaves one copy a block, of its narrow end.
//!
//! [`ghostnet`]: crate::infer::ghostnet

use tch::{Kind, TchError, Tensor};

use crate::infer::{
    ghostnet::{Conv, pool},
    onednn::{After, Packed, Shape},
    plan::{Block, Net},
};

/// All layers.
pub(super) struct Fused {
    stem: Packed,
    blocks: Vec<Bottleneck>,
    last: Packed,
    head: Packed,
    classifier: Conv,
}

/// What is done to the first and to the second half of the channels.
struct Halves(Packed, Packed);

struct Bottleneck {
    /// The convolution, and the depthwise one of what that gives.
    expand: Halves,
    depthwise: Option<Halves>,
    squeeze: Option<(Packed, Packed)>,
    /// Of the first half, and of the second, to be added.
    project: Halves,
    cheap: Packed,
    /// Depthwise, and 1×1.
    shortcut: Option<(Packed, Packed)>,
}

/// What a stride leaves of a side: the convolutions are padded so that both borders count.
fn strided(side: i64, stride: i64) -> i64 {
    (side + stride - 1) / stride
}

impl Fused {
    /// Packs the weights for inputs of `side` × `side`.
    pub(super) fn new(net: Net<Conv>, side: usize) -> Result<Fused, TchError> {
        let stem = packed(&net.stem, side as i64)?;
        let mut side = strided(side as i64, net.stem.stride);
        let mut blocks = Vec::with_capacity(net.blocks.len());
        for block in &net.blocks {
            blocks.push(Bottleneck::new(block, side)?);
            side = strided(side, block.depthwise.as_ref().map_or(1, |it| it.stride));
        }
        let (last, head) = (packed(&net.last, side)?, packed(&net.head, 1)?);
        Ok(Fused { stem, blocks, last, head, classifier: net.classifier })
    }

    /// The same, sharing the weights.
    pub(super) fn share(&self) -> Fused {
        Fused {
            stem: self.stem.share(),
            blocks: self.blocks.iter().map(Bottleneck::share).collect(),
            last: self.last.share(),
            head: self.head.share(),
            classifier: self.classifier.share(),
        }
    }

    /// See [`GhostNet::forward`].
    ///
    /// [`GhostNet::forward`]: crate::infer::ghostnet::GhostNet::forward
    pub(super) fn forward(&self, pixels: &Tensor) -> Result<Tensor, TchError> {
        let mut x = self.stem.apply(pixels, After::Relu)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        let x = pool(&self.last.apply(&x, After::Relu)?)?;
        let x = self.head.apply(&x, After::Relu)?;
        self.classifier.linear(&x)?.f_to_kind(Kind::Float)
    }
}

impl Bottleneck {
    /// `side`: of what comes in.
    fn new(block: &Block<Conv>, side: i64) -> Result<Bottleneck, TchError> {
        let after = strided(side, block.depthwise.as_ref().map_or(1, |it| it.stride));
        let squeeze = block.squeeze.as_ref().map(|it| (&it.reduce, &it.expand));
        let shortcut = block.shortcut.as_ref().map(|it| (&it.0, &it.1));
        let pair = |it: (&Conv, &Conv), first, second| {
            Ok::<_, TchError>((packed(it.0, first)?, packed(it.1, second)?))
        };
        Ok(Bottleneck {
            expand: Halves(
                packed(&block.expand.primary, side)?,
                packed(&block.expand.cheap, side)?,
            ),
            depthwise: block.depthwise.as_ref().map(|it| by_channel(it, side)).transpose()?,
            squeeze: squeeze.map(|it| pair(it, 1, 1)).transpose()?,
            project: by_input(&block.project.primary, after)?,
            cheap: packed(&block.project.cheap, after)?,
            shortcut: shortcut.map(|it| pair(it, side, after)).transpose()?,
        })
    }

    fn share(&self) -> Bottleneck {
        let halves = |it: &Halves| Halves(it.0.share(), it.1.share());
        let pair = |it: &(Packed, Packed)| (it.0.share(), it.1.share());
        Bottleneck {
            expand: halves(&self.expand),
            depthwise: self.depthwise.as_ref().map(halves),
            squeeze: self.squeeze.as_ref().map(pair),
            project: halves(&self.project),
            cheap: self.cheap.share(),
            shortcut: self.shortcut.as_ref().map(pair),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let mut first = self.expand.0.apply(x, After::Relu)?;
        let mut second = self.expand.1.apply(&first, After::Relu)?;
        if let Some(Halves(a, b)) = &self.depthwise {
            first = a.apply(&first, After::Nothing)?;
            second = b.apply(&second, After::Nothing)?;
        }
        if let Some((reduce, expand)) = &self.squeeze {
            let means = Tensor::f_cat(&[pool(&first)?, pool(&second)?], 1)?;
            let means = reduce.apply(&means, After::Relu)?;
            let factors = expand.apply(&means, After::Nothing)?.f_hardsigmoid_()?;
            let half = factors.size()[1] / 2;
            first = first.f_mul_(&factors.f_narrow(1, 0, half)?)?;
            second = second.f_mul_(&factors.f_narrow(1, half, half)?)?;
        }
        let primary = self.project.0.apply(&first, After::Nothing)?;
        let primary = self.project.1.add_to(primary, &second)?;
        let cheap = self.cheap.apply(&primary, After::Nothing)?;
        let mut y = Tensor::f_cat(&[primary, cheap], 1)?;
        match &self.shortcut {
            None => y.f_add_(x),
            Some((depthwise, pointwise)) => {
                pointwise.add_to(y, &depthwise.apply(x, After::Nothing)?)
            }
        }
    }
}

fn packed(conv: &Conv, side: i64) -> Result<Packed, TchError> {
    Packed::new(&conv.weight, Some(&conv.bias), shape(conv), side)
}

fn shape(conv: &Conv) -> Shape {
    Shape { stride: conv.stride, padding: conv.padding, groups: conv.groups }
}

/// Splits a depthwise convolution by its channels.
fn by_channel(conv: &Conv, side: i64) -> Result<Halves, TchError> {
    let half = conv.weight.size()[0] / 2;
    let part = |start| {
        let weight = conv.weight.f_narrow(0, start, half)?;
        let bias = conv.bias.f_narrow(0, start, half)?;
        Packed::new(&weight, Some(&bias), Shape { groups: half, ..shape(conv) }, side)
    };
    Ok(Halves(part(0)?, part(half)?))
}

/// Splits a 1×1 convolution by the channels that it reads: what it gives is the sum.
fn by_input(conv: &Conv, side: i64) -> Result<Halves, TchError> {
    let half = conv.weight.size()[1] / 2;
    let part =
        |start, bias| Packed::new(&conv.weight.f_narrow(1, start, half)?, bias, shape(conv), side);
    Ok(Halves(part(0, Some(&conv.bias))?, part(half, None)?))
}
