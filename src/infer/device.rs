//! Which device computes the network, and with which engine: from what was asked for to what is
//! there and what this build has. Says nothing to libtorch itself: that is `libtorch.rs`.

use std::{collections::BTreeMap, path::Path};

use anyhow::{anyhow, bail, ensure};

use crate::infer::{
    plan::Config,
    wanted::{Precision, Use, Wanted},
    weights,
};

/// What there is to say about the machine's NVIDIA GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GpuStatus {
    /// There is none, or none that this build could use.
    Absent,
    /// One is there, but cannot be used, for this reason.
    Unusable(String),
    /// So many can be used.
    Ready(usize),
}

impl GpuStatus {
    /// Looks for a GPU, unless none is wanted, and loads the CUDA libraries if there is one: from
    /// `configured`, from `$GHOSTWATCH_CUDA` or from `cuda` beside the binary. Must come before all
    /// else that calls libtorch, which looks for CUDA once, at its first use.
    pub fn find(wanted: Use, configured: Option<&Path>) -> GpuStatus {
        match wanted {
            Use::Cpu | Use::Native => GpuStatus::Absent,
            Use::Auto | Use::Cuda(_) => look(configured),
        }
    }
}

#[cfg(feature = "libtorch")]
fn look(configured: Option<&Path>) -> GpuStatus {
    use crate::infer::{
        gpu::{self, Found},
        libtorch,
    };
    let set = match gpu::find(Path::new("/"), &gpu::places(configured)) {
        Found::Nothing => return GpuStatus::Absent,
        Found::Unusable(reason) => return GpuStatus::Unusable(reason),
        Found::Set(set) => set,
    };
    match gpu::load(&set).and_then(|()| libtorch::probe().map_err(|it| format!("{it:#}"))) {
        Ok(count) => GpuStatus::Ready(count),
        Err(reason) => GpuStatus::Unusable(reason),
    }
}

/// Without libtorch no GPU can be used, and whoever chose such a build knows it.
#[cfg(not(feature = "libtorch"))]
fn look(_configured: Option<&Path>) -> GpuStatus {
    GpuStatus::Absent
}

/// A network to be put on a device.
pub struct Network<'a> {
    /// Its size.
    pub config: Config,
    /// Its parameters, as in the checkpoint.
    pub tensors: &'a BTreeMap<String, weights::Tensor>,
    /// Width and height of an input in pixels.
    pub side: usize,
    /// Per channel, of pixels scaled to 0..=1.
    pub mean: [f32; 3],
    /// Per channel, of pixels scaled to 0..=1.
    pub std: [f32; 3],
}

/// Where the network is computed, and with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The CPU, with the engine of our own.
    Native,
    /// The CPU, with libtorch.
    Cpu,
    /// This GPU, with libtorch.
    Cuda(usize),
}

/// What is there and fits best.
///
/// # Errors
/// What was asked for is not there, or this build lacks what it needs.
pub(super) fn choose(wanted: &Wanted, gpu: &GpuStatus) -> anyhow::Result<Device> {
    if let Some(lacks) = wanted.device.lacks() {
        bail!("device {} cannot be used: {lacks}", wanted.device);
    }
    match (wanted.device, gpu) {
        (Use::Native, _) => Ok(Device::Native),
        (Use::Cpu, _) => Ok(Device::Cpu),
        (Use::Auto, GpuStatus::Absent | GpuStatus::Unusable(_)) => Ok(on_cpu(wanted.precision)),
        (Use::Auto, GpuStatus::Ready(_)) => Ok(Device::Cuda(0)),
        (Use::Cuda(index), GpuStatus::Ready(count)) => {
            let last = count - 1;
            ensure!(index <= last, "no device cuda:{index}: the last one is cuda:{last}");
            Ok(Device::Cuda(index))
        }
        (Use::Cuda(index), GpuStatus::Absent) => Err(anyhow!("no device cuda:{index}: no GPU")),
        (Use::Cuda(index), GpuStatus::Unusable(reason)) => {
            Err(anyhow!("device cuda:{index} cannot be used: {reason}"))
        }
    }
}

/// The engine of our own is the faster one; what it does not compute is libtorch's, if that is there.
fn on_cpu(precision: Option<Precision>) -> Device {
    let ours = precision.is_none_or(|it| it == Precision::Fp32);
    if Use::Native.lacks().is_none() && (ours || Use::Cpu.lacks().is_some()) {
        Device::Native
    } else {
        Device::Cpu
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(
        device: Use,
        precision: Option<Precision>,
        gpu: &GpuStatus,
    ) -> Result<Device, String> {
        let wanted = Wanted { device, precision, max_batch: 8, buckets: None };
        choose(&wanted, gpu).map_err(|it| it.to_string())
    }

    #[cfg(all(feature = "libtorch", feature = "native"))]
    #[test]
    fn auto_is_the_gpu_that_works_then_our_own_engine_then_libtorch_for_what_that_lacks() {
        let broken = GpuStatus::Unusable("no driver".into());
        for gpu in [&broken, &GpuStatus::Absent] {
            for precision in [None, Some(Precision::Fp32)] {
                assert_eq!(chosen(Use::Auto, precision, gpu), Ok(Device::Native));
            }
            assert_eq!(chosen(Use::Auto, Some(Precision::Bf16), gpu), Ok(Device::Cpu));
        }
        assert_eq!(chosen(Use::Auto, None, &GpuStatus::Ready(2)), Ok(Device::Cuda(0)));
        assert_eq!(chosen(Use::Cpu, None, &GpuStatus::Ready(1)), Ok(Device::Cpu));
        assert_eq!(chosen(Use::Native, None, &GpuStatus::Ready(1)), Ok(Device::Native));
    }

    #[cfg(feature = "libtorch")]
    #[test]
    fn a_gpu_that_was_asked_for_and_cannot_be_used_is_refused() {
        let broken = GpuStatus::Unusable("no driver".into());
        let said = chosen(Use::Cuda(0), None, &broken).unwrap_err();
        assert_eq!(said, "device cuda:0 cannot be used: no driver");
        assert_eq!(chosen(Use::Cuda(1), None, &GpuStatus::Ready(2)), Ok(Device::Cuda(1)));
        let said = chosen(Use::Cuda(2), None, &GpuStatus::Ready(2)).unwrap_err();
        assert_eq!(said, "no device cuda:2: the last one is cuda:1");
        let said = chosen(Use::Cuda(0), None, &GpuStatus::Absent).unwrap_err();
        assert_eq!(said, "no device cuda:0: no GPU");
    }

    #[cfg(not(feature = "libtorch"))]
    #[test]
    fn a_build_without_libtorch_refuses_what_needs_it_and_takes_its_own_engine() {
        for (device, name) in [(Use::Cpu, "cpu"), (Use::Cuda(1), "cuda:1")] {
            let said = chosen(device, None, &GpuStatus::Absent).unwrap_err();
            let want = "this build has no libtorch: use auto or native";
            assert_eq!(said, format!("device {name} cannot be used: {want}"));
        }
        for precision in [None, Some(Precision::Bf16)] {
            assert_eq!(chosen(Use::Auto, precision, &GpuStatus::Absent), Ok(Device::Native));
        }
        assert_eq!(GpuStatus::find(Use::Auto, None), GpuStatus::Absent);
    }
}
