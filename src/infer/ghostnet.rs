//! The network: GhostNet v1 as a table of rows, from normalised pixels to logits.
//!
//! Names and shapes of the parameters are those of the published checkpoint, which timm's
//! `ghostnet_100` shares. BatchNorm is folded into the convolutions at load, in f64. Not here: where
//! weights come from (`weights/`), devices and precision (`device.rs`).

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use tch::{Device, Kind, TchError};

use crate::infer::{fused::Fused, wanted::has_bf16, weights::Tensor};

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

/// The network with its weights on a device.
pub struct GhostNet(Kinds);

enum Kinds {
    /// Operator by operator.
    Plain(Net<Conv>),
    /// By oneDNN, several operators at once.
    Fused(Fused),
}

impl GhostNet {
    /// Takes the parameters that [`expected`] names and folds BatchNorm into the convolutions. On a
    /// CPU oneDNN runs them, if it can compute in that kind of number there.
    ///
    /// # Errors
    /// A parameter is missing or has another shape, or the device is out of memory.
    pub fn new(
        tensors: &BTreeMap<String, Tensor>,
        config: &Config,
        device: Device,
        kind: Kind,
    ) -> anyhow::Result<GhostNet> {
        let plain = GhostNet::plain(tensors, config, device, kind)?;
        let fits = kind == Kind::Float || kind == Kind::BFloat16 && has_bf16();
        Ok(match plain.0 {
            Kinds::Plain(net) if device == Device::Cpu && fits => {
                GhostNet(Kinds::Fused(Fused::new(net)?))
            }
            other => GhostNet(other),
        })
    }

    /// The same, operator by operator on every device: what the faster one is compared with.
    ///
    /// # Errors
    /// As with [`GhostNet::new`].
    pub fn plain(
        tensors: &BTreeMap<String, Tensor>,
        config: &Config,
        device: Device,
        kind: Kind,
    ) -> anyhow::Result<GhostNet> {
        let net = plan(config).try_map(&mut |it: Spec| -> anyhow::Result<Conv> {
            let (weight, bias) = it.fold(tensors)?;
            let place = |values: &[f32], shape: &[usize]| {
                let shape: Vec<i64> = shape.iter().map(|it| *it as i64).collect();
                let flat = tch::Tensor::f_from_slice(values)?;
                flat.f_reshape(shape)?.f_to_device(device)?.f_to_kind(kind)
            };
            Ok(Conv {
                weight: place(&weight, &it.weight_shape())?,
                bias: place(&bias, &[it.out])?,
                stride: it.stride as i64,
                padding: (it.kernel / 2) as i64,
                groups: it.groups as i64,
            })
        })?;
        Ok(GhostNet(Kinds::Plain(net)))
    }

    /// The same network once more, sharing the weights: one for each thread.
    pub fn share(&self) -> GhostNet {
        GhostNet(match &self.0 {
            Kinds::Plain(net) => Kinds::Plain(net.map_ref(&|it: &Conv| it.share())),
            Kinds::Fused(fused) => Kinds::Fused(fused.share()),
        })
    }

    /// Logits `[n, classes]` in f32 for normalised pixels `[n, 3, height, width]`. Fastest when
    /// the pixels lie channels last in memory.
    ///
    /// # Errors
    /// The device failed or is out of memory, or the shape does not fit.
    pub fn forward(&self, pixels: &tch::Tensor) -> Result<tch::Tensor, TchError> {
        let net = match &self.0 {
            Kinds::Fused(fused) => return fused.forward(pixels),
            Kinds::Plain(net) => net,
        };
        let mut x = net.stem.relu(pixels)?;
        for block in &net.blocks {
            x = block.forward(&x)?;
        }
        let x = pool(&net.last.relu(&x)?)?;
        let x = net.head.relu(&x)?;
        net.classifier.linear(&x)?.f_to_kind(Kind::Float)
    }
}

/// All layers. `C` is a [`Spec`] in the plan and a [`Conv`] in the network: one walk over the
/// table serves the list of names and the loading.
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
    fn try_map<D, E>(self, f: &mut impl FnMut(C) -> Result<D, E>) -> Result<Net<D>, E> {
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

    fn map_ref<D>(&self, f: &impl Fn(&C) -> D) -> Net<D> {
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
    fn try_map<D, E>(self, f: &mut impl FnMut(C) -> Result<D, E>) -> Result<Block<D>, E> {
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

    fn map_ref<D>(&self, f: &impl Fn(&C) -> D) -> Block<D> {
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
struct Spec {
    /// Prefix of `weight`, and of `bias` where there is no BatchNorm.
    name: String,
    /// Prefix of the BatchNorm that follows; `None` iff the layer has a bias of its own.
    norm: Option<String>,
    input: usize,
    out: usize,
    /// 0: a linear layer.
    kernel: usize,
    stride: usize,
    groups: usize,
}

impl Spec {
    fn weight_shape(&self) -> Vec<usize> {
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
    fn fold(&self, tensors: &BTreeMap<String, Tensor>) -> anyhow::Result<(Vec<f32>, Vec<f32>)> {
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
fn plan(config: &Config) -> Net<Spec> {
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

/// A convolution with bias, BatchNorm folded in.
pub(super) struct Conv {
    pub(super) weight: tch::Tensor,
    pub(super) bias: tch::Tensor,
    pub(super) stride: i64,
    pub(super) padding: i64,
    pub(super) groups: i64,
}

impl Conv {
    pub(super) fn share(&self) -> Conv {
        Conv { weight: self.weight.shallow_clone(), bias: self.bias.shallow_clone(), ..*self }
    }

    fn apply(&self, x: &tch::Tensor) -> Result<tch::Tensor, TchError> {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        x.f_conv2d(&self.weight, Some(&self.bias), stride, padding, [1, 1], self.groups)
    }

    fn relu(&self, x: &tch::Tensor) -> Result<tch::Tensor, TchError> {
        self.apply(x)?.f_relu_()
    }

    pub(super) fn linear(&self, x: &tch::Tensor) -> Result<tch::Tensor, TchError> {
        x.f_flatten(1, -1)?.f_linear(&self.weight, Some(&self.bias))
    }
}

impl Ghost<Conv> {
    fn relu(&self, x: &tch::Tensor) -> Result<tch::Tensor, TchError> {
        let primary = self.primary.relu(x)?;
        let cheap = self.cheap.relu(&primary)?;
        tch::Tensor::f_cat(&[primary, cheap], 1)
    }

    fn linear(&self, x: &tch::Tensor) -> Result<tch::Tensor, TchError> {
        let primary = self.primary.apply(x)?;
        let cheap = self.cheap.apply(&primary)?;
        tch::Tensor::f_cat(&[primary, cheap], 1)
    }
}

impl Squeeze<Conv> {
    /// Scales `x` in place and gives it back.
    fn scale(&self, mut x: tch::Tensor) -> Result<tch::Tensor, TchError> {
        let factors = self.expand.apply(&self.reduce.relu(&pool(&x)?)?)?.f_hardsigmoid_()?;
        x.f_mul_(&factors)
    }
}

impl Block<Conv> {
    fn forward(&self, x: &tch::Tensor) -> Result<tch::Tensor, TchError> {
        let mut y = self.expand.relu(x)?;
        if let Some(depthwise) = &self.depthwise {
            y = depthwise.apply(&y)?;
        }
        if let Some(squeeze) = &self.squeeze {
            y = squeeze.scale(y)?;
        }
        let mut y = self.project.linear(&y)?;
        match &self.shortcut {
            None => y.f_add_(x),
            Some((depthwise, pointwise)) => y.f_add_(&pointwise.apply(&depthwise.apply(x)?)?),
        }
    }
}

/// The mean of each channel: `[n, channels, 1, 1]`.
pub(super) fn pool(x: &tch::Tensor) -> Result<tch::Tensor, TchError> {
    x.f_mean_dim(&[2i64, 3][..], true, None)
}
