//! The network on a device with libtorch: CPU or CUDA, precision, batch buckets, warm-up.
//!
//! Takes model inputs as bytes and gives logits. With `ghostnet.rs`, `fused.rs`, `input.rs` and
//! `onednn.rs` the only place that says `tch`. Not here: which device is chosen (`device.rs`), when
//! a batch is closed, and which thread runs which [`Engine`].

use std::{cell::Cell, sync::Once};

use anyhow::{Context, anyhow, bail, ensure};
use tch::{Device, Kind, TchError, Tensor};

use crate::infer::{
    Model,
    device::{self, Network},
    engine::Backend,
    ghostnet::GhostNet,
    input::{Input, Normal},
    selftest,
    wanted::{Precision, Wanted},
};

/// How many GPUs there are, after one convolution on the first of them.
pub(super) fn probe() -> anyhow::Result<usize> {
    let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    ensure!(
        0 < count && tch::Cuda::is_available(),
        "libtorch finds no usable device: the driver may be older than CUDA 13 needs (580)"
    );
    let convolve = || {
        let x = Tensor::f_ones([1, 8, 8, 8], (Kind::Float, Device::Cuda(0)))?;
        let weight = Tensor::f_ones([8, 8, 1, 1], (Kind::Float, Device::Cuda(0)))?;
        x.f_conv2d(&weight, None::<Tensor>, [1, 1], [0, 0], [1, 1], 1)?.f_sum(Kind::Float)
    };
    let sum = convolve().and_then(|it| it.f_double_value(&[])).map_err(said);
    let sum = sum.context("a convolution on the first device failed")?;
    ensure!(sum == 4096.0, "a convolution on the first device gives {sum}, not 4096");
    Ok(count)
}

/// The network on a device, for one thread. Lanes on other threads share its weights.
pub struct Engine {
    network: GhostNet,
    device: Device,
    precision: Precision,
    /// What the user should know about the precision.
    note: Option<String>,
    side: usize,
    max_batch: usize,
    /// The sizes to which batches are padded, in increasing order; the last is `max_batch`.
    buckets: Vec<usize>,
    input: Input,
}

impl Engine {
    /// Puts the network on the device, which is a GPU or else the CPU, and chooses the precision. Not
    /// warmed up: that belongs on the thread that will use it.
    ///
    /// # Errors
    /// The parameters do not fit the network, the device cannot be used, or a wanted precision
    /// gives other first labels than f32 on the self-test's pictures.
    pub fn start(
        network: &Network,
        wanted: &Wanted,
        device: device::Device,
    ) -> anyhow::Result<Engine> {
        ensure!(0 < wanted.max_batch, "the largest batch is 0, it must be at least 1");
        one_thread();
        let device = match device {
            device::Device::Cuda(index) => Device::Cuda(index),
            device::Device::Cpu | device::Device::Native => Device::Cpu,
        };
        let buckets = wanted.buckets.clone().unwrap_or_else(|| sizes(device, wanted.max_batch));
        let build = |device, precision| Engine::build(network, device, precision, &buckets);
        match (device, wanted.precision) {
            (_, Some(Precision::Fp32)) | (Device::Cpu, None) => build(device, Precision::Fp32),
            (Device::Cpu, Some(Precision::Fp16)) => {
                bail!("fp16 is for GPUs: on the CPU use fp32 or bf16");
            }
            (_, preferred) => {
                let precision = preferred.unwrap_or(Precision::Fp16);
                // Small: it sees the self-test's pictures once and goes.
                let mut exact = Engine::build(network, Device::Cpu, Precision::Fp32, &[1])?;
                let mut lower = build(device, precision)?;
                match (disagreement(&mut exact, &mut lower)?, preferred) {
                    (None, _) => Ok(Engine { note: emulated(device, precision), ..lower }),
                    (Some(reason), Some(_)) => bail!("{reason}; use fp32"),
                    (Some(reason), None) => {
                        Ok(Engine { note: Some(reason), ..build(device, Precision::Fp32)? })
                    }
                }
            }
        }
    }

    fn build(
        network: &Network,
        device: Device,
        precision: Precision,
        buckets: &[usize],
    ) -> anyhow::Result<Engine> {
        let _guard = tch::no_grad_guard();
        let max_batch = *buckets.last().expect("there is a largest batch");
        let normal = Normal::new(network.mean, network.std);
        let kind = kind(precision);
        let input = Input::new(device, kind, (max_batch, network.side), normal)?;
        Ok(Engine {
            network: GhostNet::new(network.tensors, &network.config, network.side, device, kind)?,
            device,
            precision,
            note: None,
            side: network.side,
            max_batch,
            buckets: buckets.to_vec(),
            input,
        })
    }

    /// The size to which a batch of `count` is padded, if it is not run in parts.
    pub fn padded(&self, count: usize) -> Option<usize> {
        self.buckets.iter().copied().find(|it| count <= *it)
    }

    /// One batch of at most `max_batch`.
    fn forward_one(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>> {
        let size = self.padded(batch.len()).expect("a part is at most the largest batch");
        let mut run = || {
            let logits = self.network.forward(&self.input.put(batch, size)?)?;
            let logits = logits.f_to_device(Device::Cpu)?.f_contiguous()?;
            let (_, classes) = logits.size2()?;
            let mut flat = vec![0.0f32; size * classes as usize];
            let count = flat.len();
            logits.f_copy_data(&mut flat, count)?;
            let rows = flat.chunks_exact(classes as usize).take(batch.len());
            Ok::<_, TchError>(rows.map(<[f32]>::to_vec).collect())
        };
        run().map_err(said).with_context(|| format!("a batch of {size} on {}", self.device()))
    }
}

impl Model for Engine {
    /// Batches over the largest size are run in parts.
    fn forward(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>> {
        let bytes = self.side * self.side * 3;
        if let Some(it) = batch.iter().find(|it| it.len() != bytes) {
            bail!("an input has {} bytes, not {bytes} (3 x {1} x {1})", it.len(), self.side);
        }
        one_thread();
        let _guard = tch::no_grad_guard();
        let mut all = Vec::with_capacity(batch.len());
        for part in batch.chunks(self.max_batch) {
            all.extend(self.forward_one(part)?);
        }
        Ok(all)
    }

    /// Runs every batch size once, so that no frame waits for the kernels of a new shape, and no
    /// memory grows later.
    fn warm_up(&mut self) -> anyhow::Result<()> {
        // The largest first: it claims the memory that the others then fit into.
        for size in self.buckets.clone().into_iter().rev() {
            let picture = vec![0; self.side * self.side * 3];
            self.forward(&vec![picture.as_slice(); size])
                .with_context(|| format!("warm-up with a batch of {size}"))?;
        }
        Ok(())
    }
}

impl Backend for Engine {
    fn name(&self) -> &'static str {
        "libtorch"
    }

    fn lane(&self) -> anyhow::Result<Box<dyn Backend>> {
        Ok(Box::new(Engine {
            network: self.network.share(),
            device: self.device,
            precision: self.precision,
            note: self.note.clone(),
            side: self.side,
            max_batch: self.max_batch,
            buckets: self.buckets.clone(),
            input: self.input.another()?,
        }))
    }

    fn device(&self) -> String {
        match self.device {
            Device::Cuda(index) => format!("cuda:{index}"),
            _ => "cpu".into(),
        }
    }

    fn precision(&self) -> Precision {
        self.precision
    }

    /// Why `auto` did not choose half precision on a GPU, or that the CPU has no instructions for
    /// the one asked for.
    fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Measured on the shipped checkpoint on an AVX2 CPU: 3e-7 in f32, 6e-3 in bf16; the rest is
    /// room for other CPUs. Not measured on a GPU: cuDNN multiplies f32 with 10 bits of mantissa
    /// (TF32), as many as fp16 has.
    fn allowed_error(&self) -> f64 {
        match (self.device, self.precision) {
            (Device::Cpu, Precision::Fp32) => 1e-4,
            (_, Precision::Fp32 | Precision::Fp16) => 2e-2,
            (_, Precision::Bf16) => 1e-1,
        }
    }
}

/// Keeps libtorch from spreading an operator over threads of its own. They wait for each other by
/// spinning, and collapse when the cores have other work, such as decoding: on two cores under a
/// load of 10, batch 8, two threads gave 4-11 pictures/s, two lanes of one thread 45-50.
fn one_thread() {
    static BETWEEN_OPERATORS: Once = Once::new();
    thread_local! {
        // OpenMP keeps the number per thread.
        static DONE: Cell<bool> = const { Cell::new(false) };
    }
    BETWEEN_OPERATORS.call_once(|| tch::set_num_interop_threads(1));
    if !DONE.replace(true) {
        tch::set_num_threads(1);
    }
}

/// Why a lower precision must not be used: `None` if the first labels of all pictures agree.
fn disagreement(exact: &mut Engine, lower: &mut Engine) -> anyhow::Result<Option<String>> {
    let side = exact.side;
    let want = selftest::answers(exact, side)?;
    let found = selftest::compare(&selftest::answers(lower, side)?, &want)?;
    let agree = found.top1() && found.max_error.is_finite();
    Ok((!agree).then(|| {
        format!(
            "{} on {} gives another first label than fp32 on {} of {} self-test pictures \
             (largest error {:.1e})",
            lower.precision,
            lower.device(),
            found.pictures - found.same_top1,
            found.pictures,
            found.max_error,
        )
    }))
}

fn emulated(device: Device, precision: Precision) -> Option<String> {
    let emulated = device == Device::Cpu && precision == Precision::Bf16 && !has_bf16();
    emulated.then(|| {
        // 3 against 110 pictures/s at batch 8 on one core of an AVX2-only EPYC.
        "this CPU has no AVX-512: bf16 is over 20 times slower than fp32 here".into()
    })
}

/// What libtorch asks of a CPU before it lets oneDNN compute in bf16.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_bf16() -> bool {
    is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn has_bf16() -> bool {
    true
}

fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::Fp32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
        Precision::Fp16 => Kind::Half,
    }
}

/// Batches on a CPU have at most this size: larger ones are no faster there, as what a layer gives
/// no longer fits the caches. Measured on an AVX2 EPYC, one core, in pictures a second of its time:
/// 50 alone, 67 by four, 71 by eight, 73 by 16, 69 by 32.
const CPU_BATCH: usize = 8;

/// The sizes that batches are padded to. A CPU computes what is padded like all else, so there are
/// more of them; not all, as oneDNN keeps a thousand convolutions, and each size has over a hundred.
fn sizes(device: Device, max: usize) -> Vec<usize> {
    if device != Device::Cpu {
        return powers(max);
    }
    let max = max.min(CPU_BATCH);
    let mut all: Vec<usize> = [1, 2, 3, 4, 6, 8].into_iter().filter(|it| *it < max).collect();
    all.push(max);
    all
}

/// Powers of two up to the largest batch, and that.
fn powers(max: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (1..=max).map(|it| it.next_power_of_two().min(max)).collect();
    all.dedup();
    all
}

/// libtorch's message without the C++ stack under it.
pub(super) fn said(error: TchError) -> anyhow::Error {
    let text = error.to_string();
    anyhow!("{}", text.lines().next().unwrap_or_default().trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_padded_to_powers_of_two_and_the_largest_size() {
        assert_eq!(powers(32), [1, 2, 4, 8, 16, 32]);
        assert_eq!(powers(12), [1, 2, 4, 8, 12]);
        assert_eq!(powers(1), [1]);
        assert_eq!(sizes(Device::Cuda(0), 32), [1, 2, 4, 8, 16, 32]);
        assert_eq!(sizes(Device::Cpu, 32), [1, 2, 3, 4, 6, 8]);
        assert_eq!(sizes(Device::Cpu, 5), [1, 2, 3, 4, 5]);
        assert_eq!(sizes(Device::Cpu, 1), [1]);
    }
}
