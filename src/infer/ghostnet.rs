//! The network with libtorch, from normalised pixels to logits.
//!
//! Not here: the table of layers and the folding of BatchNorm (`plan.rs`), where weights come from
//! (`weights/`), devices and precision (`libtorch.rs`).

use std::collections::BTreeMap;

use tch::{Device, Kind, TchError};

use crate::infer::{
    fused::Fused,
    libtorch::has_bf16,
    plan::{Block, Config, Ghost, Net, Spec, Squeeze, plan},
    weights::Tensor,
};

/// The network with its weights on a device.
pub struct GhostNet(Kinds);

enum Kinds {
    /// Operator by operator.
    Plain(Net<Conv>),
    /// By oneDNN, several operators at once.
    Fused(Fused),
}

impl GhostNet {
    /// Takes the parameters that [`expected`](super::plan::expected) names and folds BatchNorm into the convolutions. On a
    /// CPU oneDNN runs them, if it can compute in that kind of number there, fastest for inputs of
    /// `side` × `side`.
    ///
    /// # Errors
    /// A parameter is missing or has another shape, or the device is out of memory.
    pub fn new(
        tensors: &BTreeMap<String, Tensor>,
        config: &Config,
        side: usize,
        device: Device,
        kind: Kind,
    ) -> anyhow::Result<GhostNet> {
        let plain = GhostNet::plain(tensors, config, device, kind)?;
        let fits = kind == Kind::Float || kind == Kind::BFloat16 && has_bf16();
        Ok(match plain.0 {
            Kinds::Plain(net) if device == Device::Cpu && fits => {
                GhostNet(Kinds::Fused(Fused::new(net, side)?))
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
