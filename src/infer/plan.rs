//! The network as a table of rows: names and shapes of the parameters, and how they are folded.
//!
//! Names and shapes are those of the published checkpoint, which timm's `ghostnet_100` shares.
//! BatchNorm is folded into the convolutions at load, in f64. Not here: what computes the layers
//! (`ghostnet.rs` with libtorch, `native/` without), where weights come from (`weights/`).

use std::collections::BTreeMap;

use anyhow::{Context, ensure};

use crate::infer::weights::Tensor;

/// Which GhostNet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Multiplies all channel counts; 1.0 is the published network.
    pub width: f64,
    /// How many logits, from 1.
    pub classes: usize,
}

impl Config {
    /// GhostNet 1.0x on ImageNet-1k, as published.
    pub const PUBLISHED: Config = Config { width: 1.0, classes: 1000 };
}

/// One bottleneck at width 1: kernel of the depthwise and shortcut convolutions, channels after
/// the first ghost module, channels out, squeeze-excite, stride.
struct Row(usize, usize, usize, bool, usize);

/// The stages of table 1 in "GhostNet: More Features from Cheap Operations" (CVPR 2020), with the
/// corrections of the published code (row 4 of stage 6 and the alternation in stage 8).
const STAGES: &[&[Row]] = &[
    &[Row(3, 16, 16, false, 1)],
    &[Row(3, 48, 24, false, 2)],
    &[Row(3, 72, 24, false, 1)],
    &[Row(5, 72, 40, true, 2)],
    &[Row(5, 120, 40, true, 1)],
    &[Row(3, 240, 80, false, 2)],
    &[
        Row(3, 200, 80, false, 1),
        Row(3, 184, 80, false, 1),
        Row(3, 184, 80, false, 1),
        Row(3, 480, 112, true, 1),
        Row(3, 672, 112, true, 1),
    ],
    &[Row(5, 672, 160, true, 2)],
    &[
        Row(5, 960, 160, false, 1),
        Row(5, 960, 160, true, 1),
        Row(5, 960, 160, false, 1),
        Row(5, 960, 160, true, 1),
    ],
];

/// Channels of the stem at width 1.
const STEM: usize = 16;
/// Channels of the last convolution at width 1.
const LAST: usize = 960;
/// Features before the classifier, at any width.
const FEATURES: usize = 1280;
/// PyTorch's default, which the checkpoint was trained with.
const BATCH_NORM_EPS: f64 = 1e-5;

/// Names and shapes of all parameters, in the order of the published checkpoint.
/// `num_batches_tracked` is not among them: inference has no use for it.
pub fn expected(config: &Config) -> Vec<(String, Vec<usize>)> {
    let mut all = Vec::new();
    let listed: Result<Net<()>, std::convert::Infallible> =
        plan(config).try_map(&mut |it: Spec| {
            it.list(&mut all);
            Ok(())
        });
    match listed {
        Ok(_) => all,
    }
}

/// All layers. `C` is a [`Spec`] in the plan and a layer with its weights in a network: one walk over
/// the table serves the list of names and the loading.
pub(super) struct Net<C> {
    pub(super) stem: C,
    pub(super) blocks: Vec<Block<C>>,
    pub(super) last: C,
    pub(super) head: C,
    pub(super) classifier: C,
}

/// A ghost bottleneck.
pub(super) struct Block<C> {
    pub(super) expand: Ghost<C>,
    /// `Some` iff the stride is not 1.
    pub(super) depthwise: Option<C>,
    pub(super) squeeze: Option<Squeeze<C>>,
    pub(super) project: Ghost<C>,
    /// `Some` iff input and output differ in shape.
    pub(super) shortcut: Option<(C, C)>,
}

/// Half of the channels by a 1×1 convolution, the other half from those by a depthwise one.
pub(super) struct Ghost<C> {
    pub(super) primary: C,
    pub(super) cheap: C,
}

/// Squeeze-excite: one factor per channel, from the channels' means.
pub(super) struct Squeeze<C> {
    pub(super) reduce: C,
    pub(super) expand: C,
}

impl<C> Net<C> {
    /// Visits the layers in the order of the checkpoint.
    pub(super) fn try_map<D, E>(self, f: &mut impl FnMut(C) -> Result<D, E>) -> Result<Net<D>, E> {
        let stem = f(self.stem)?;
        let blocks = self.blocks.into_iter().map(|it| it.try_map(f)).collect::<Result<_, E>>()?;
        Ok(Net {
            stem,
            blocks,
            last: f(self.last)?,
            head: f(self.head)?,
            classifier: f(self.classifier)?,
        })
    }

    #[cfg(feature = "libtorch")]
    pub(super) fn map_ref<D>(&self, f: &impl Fn(&C) -> D) -> Net<D> {
        Net {
            stem: f(&self.stem),
            blocks: self.blocks.iter().map(|it| it.map_ref(f)).collect(),
            last: f(&self.last),
            head: f(&self.head),
            classifier: f(&self.classifier),
        }
    }
}

impl<C> Block<C> {
    pub(super) fn try_map<D, E>(
        self,
        f: &mut impl FnMut(C) -> Result<D, E>,
    ) -> Result<Block<D>, E> {
        let expand = Ghost { primary: f(self.expand.primary)?, cheap: f(self.expand.cheap)? };
        let depthwise = self.depthwise.map(&mut *f).transpose()?;
        let squeeze = match self.squeeze {
            Some(it) => Some(Squeeze { reduce: f(it.reduce)?, expand: f(it.expand)? }),
            None => None,
        };
        let project = Ghost { primary: f(self.project.primary)?, cheap: f(self.project.cheap)? };
        let shortcut = match self.shortcut {
            Some((depthwise, pointwise)) => Some((f(depthwise)?, f(pointwise)?)),
            None => None,
        };
        Ok(Block { expand, depthwise, squeeze, project, shortcut })
    }

    #[cfg(feature = "libtorch")]
    pub(super) fn map_ref<D>(&self, f: &impl Fn(&C) -> D) -> Block<D> {
        let ghost = |it: &Ghost<C>| Ghost { primary: f(&it.primary), cheap: f(&it.cheap) };
        Block {
            expand: ghost(&self.expand),
            depthwise: self.depthwise.as_ref().map(f),
            squeeze: self
                .squeeze
                .as_ref()
                .map(|it| Squeeze { reduce: f(&it.reduce), expand: f(&it.expand) }),
            project: ghost(&self.project),
            shortcut: self.shortcut.as_ref().map(|it| (f(&it.0), f(&it.1))),
        }
    }
}

/// What one layer looks like in the checkpoint.
pub(super) struct Spec {
    /// Prefix of `weight`, and of `bias` where there is no BatchNorm.
    pub(super) name: String,
    /// Prefix of the BatchNorm that follows; `None` iff the layer has a bias of its own.
    pub(super) norm: Option<String>,
    pub(super) input: usize,
    pub(super) out: usize,
    /// 0: a linear layer.
    pub(super) kernel: usize,
    pub(super) stride: usize,
    pub(super) groups: usize,
}

impl Spec {
    pub(super) fn weight_shape(&self) -> Vec<usize> {
        let mut shape = vec![self.out, self.input / self.groups];
        if 0 < self.kernel {
            shape.extend([self.kernel; 2]);
        }
        shape
    }

    fn list(&self, all: &mut Vec<(String, Vec<usize>)>) {
        all.push((format!("{}.weight", self.name), self.weight_shape()));
        match &self.norm {
            None => all.push((format!("{}.bias", self.name), vec![self.out])),
            Some(norm) => {
                for part in ["weight", "bias", "running_mean", "running_var"] {
                    all.push((format!("{norm}.{part}"), vec![self.out]));
                }
            }
        }
    }

    /// Weight and bias, BatchNorm folded in.
    pub(super) fn fold(
        &self,
        tensors: &BTreeMap<String, Tensor>,
    ) -> anyhow::Result<(Vec<f32>, Vec<f32>)> {
        let take = |prefix: &str, part: &str, shape: &[usize]| -> anyhow::Result<&[f32]> {
            let name = format!("{prefix}.{part}");
            let it = tensors.get(&name).with_context(|| format!("no tensor {name}"))?;
            let found = &it.shape;
            ensure!(found == shape, "tensor {name} has shape {found:?}, not {shape:?}");
            let (values, wanted) = (it.data.len(), shape.iter().product::<usize>());
            ensure!(values == wanted, "tensor {name} has {values} values, not {wanted}");
            Ok(&it.data)
        };
        let weight = take(&self.name, "weight", &self.weight_shape())?;
        let per_channel = [self.out];
        let Some(norm) = &self.norm else {
            return Ok((weight.to_vec(), take(&self.name, "bias", &per_channel)?.to_vec()));
        };
        let gamma = take(norm, "weight", &per_channel)?;
        let beta = take(norm, "bias", &per_channel)?;
        let mean = take(norm, "running_mean", &per_channel)?;
        let var = take(norm, "running_var", &per_channel)?;
        let mut folded = Vec::with_capacity(weight.len());
        let mut bias = Vec::with_capacity(self.out);
        for (channel, kernel) in weight.chunks_exact(weight.len() / self.out).enumerate() {
            let spread = (f64::from(var[channel]) + BATCH_NORM_EPS).sqrt();
            let scale = f64::from(gamma[channel]) / spread;
            folded.extend(kernel.iter().map(|it| (f64::from(*it) * scale) as f32));
            bias.push((f64::from(beta[channel]) - f64::from(mean[channel]) * scale) as f32);
        }
        Ok((folded, bias))
    }
}

/// The table at a width, with the checkpoint's names.
pub(super) fn plan(config: &Config) -> Net<Spec> {
    let wide = |channels: usize| divisible(channels as f64 * config.width);
    let conv = |name: String, norm: Option<String>, input, out| Spec {
        name,
        norm,
        input,
        out,
        kernel: 1,
        stride: 1,
        groups: 1,
    };
    let mut input = wide(STEM);
    let stem = conv("conv_stem".into(), Some("bn1".into()), 3, input);
    let stem = Spec { kernel: 3, stride: 2, ..stem };
    let mut blocks = Vec::new();
    for (stage, rows) in STAGES.iter().enumerate() {
        for (index, &Row(kernel, middle, out, squeeze, stride)) in rows.iter().enumerate() {
            let (middle, out) = (wide(middle), wide(out));
            let sizes = Sizes { input, middle, out, kernel, stride };
            blocks.push(plan_block(&format!("blocks.{stage}.{index}"), sizes, squeeze));
            input = out;
        }
    }
    let last = format!("blocks.{}.0", STAGES.len());
    let features = wide(LAST);
    Net {
        stem,
        blocks,
        last: conv(format!("{last}.conv"), Some(format!("{last}.bn1")), input, features),
        // The features are pooled to 1×1 before the head: a linear layer, stored as a convolution.
        head: conv("conv_head".into(), None, features, FEATURES),
        classifier: Spec { kernel: 0, ..conv("classifier".into(), None, FEATURES, config.classes) },
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    input: usize,
    middle: usize,
    out: usize,
    kernel: usize,
    stride: usize,
}

fn plan_block(name: &str, sizes: Sizes, squeeze: bool) -> Block<Spec> {
    let Sizes { input, middle, out, kernel, stride } = sizes;
    let point = |conv: &str, norm: Option<&str>, input, out| Spec {
        name: format!("{name}.{conv}"),
        norm: norm.map(|it| format!("{name}.{it}")),
        input,
        out,
        kernel: 1,
        stride: 1,
        groups: 1,
    };
    let depth = |conv: &str, norm: &str, channels, kernel, stride| Spec {
        kernel,
        stride,
        groups: channels,
        ..point(conv, Some(norm), channels, channels)
    };
    // All channel counts are multiples of 4, so the halves need no rounding and the published
    // code's slice to the first `out` channels never takes anything away.
    let ghost = |ghost: &str, input, out: usize| {
        let named = |part: &str| format!("{ghost}.{part}");
        let (conv, norm) = (named("primary_conv.0"), named("primary_conv.1"));
        let (cheap, cheap_norm) = (named("cheap_operation.0"), named("cheap_operation.1"));
        Ghost {
            primary: point(&conv, Some(&norm), input, out / 2),
            cheap: depth(&cheap, &cheap_norm, out / 2, 3, 1),
        }
    };
    let reduced = divisible(middle as f64 * 0.25);
    Block {
        expand: ghost("ghost1", input, middle),
        depthwise: (1 < stride).then(|| depth("conv_dw", "bn_dw", middle, kernel, stride)),
        squeeze: squeeze.then(|| Squeeze {
            reduce: point("se.conv_reduce", None, middle, reduced),
            expand: point("se.conv_expand", None, reduced, middle),
        }),
        project: ghost("ghost2", middle, out),
        shortcut: (input != out || 1 < stride).then(|| {
            let first = depth("shortcut.0", "shortcut.1", input, kernel, stride);
            (first, point("shortcut.2", Some("shortcut.3"), input, out))
        }),
    }
}

/// The nearest multiple of 4, at least 4, and not under 90 % of the value: `_make_divisible` of
/// the published code.
fn divisible(value: f64) -> usize {
    let rounded = (((value + 2.0) as usize) / 4 * 4).max(4);
    if (rounded as f64) < 0.9 * value { rounded + 4 } else { rounded }
}
