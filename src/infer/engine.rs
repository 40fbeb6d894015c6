//! The network behind one name, whichever engine computes it: libtorch or our own.

use anyhow::{bail, ensure};

use crate::infer::{
    Model,
    device::{self, GpuStatus, Network},
    native::{Input, Isa, Lane},
    wanted::{Precision, Use, Wanted},
};

/// The network on a device, for one thread. Lanes on other threads share its weights.
pub enum Engine {
    /// With libtorch.
    Libtorch(Box<device::Engine>),
    /// Without it.
    Native(Box<Native>),
}

/// Our own engine, fp32 on the CPU.
pub struct Native {
    lane: Lane,
    side: usize,
    classes: usize,
    max_batch: usize,
    /// All logits of a batch, one picture after the other.
    logits: Vec<f32>,
}

impl Engine {
    /// Puts the network on the device and chooses the precision. Not warmed up: that belongs on the
    /// thread that will use it.
    ///
    /// # Errors
    /// The parameters do not fit the network, the device cannot be used, or a wanted precision is
    /// not to be had there.
    pub fn start(network: &Network, wanted: &Wanted, gpu: &GpuStatus) -> anyhow::Result<Engine> {
        Ok(match wanted.device {
            Use::Native => Engine::Native(Box::new(Native::start(network, wanted)?)),
            _ => Engine::Libtorch(Box::new(device::Engine::start(network, wanted, gpu)?)),
        })
    }

    /// The same network for another thread.
    ///
    /// # Errors
    /// Out of memory.
    pub fn lane(&self) -> anyhow::Result<Engine> {
        Ok(match self {
            Engine::Libtorch(it) => Engine::Libtorch(Box::new(it.lane()?)),
            Engine::Native(it) => Engine::Native(Box::new(Native {
                lane: it.lane.another(),
                logits: Vec::with_capacity(it.logits.capacity()),
                ..**it
            })),
        })
    }

    /// The device's name: `cpu`, `cuda:0`.
    pub fn device(&self) -> String {
        match self {
            Engine::Libtorch(it) => it.device(),
            Engine::Native(_) => "cpu".into(),
        }
    }

    /// The precision in force.
    pub fn precision(&self) -> Precision {
        match self {
            Engine::Libtorch(it) => it.precision(),
            Engine::Native(_) => Precision::Fp32,
        }
    }

    /// What the user should know about the precision.
    pub fn note(&self) -> Option<&str> {
        match self {
            Engine::Libtorch(it) => it.note(),
            Engine::Native(_) => None,
        }
    }

    /// The largest error of the self-test that is still good, see
    /// [`crate::infer::selftest::Agreement`].
    pub fn allowed_error(&self) -> f64 {
        match self {
            Engine::Libtorch(it) => it.allowed_error(),
            // As for libtorch's fp32 on a CPU. Measured with the shipped checkpoint: under 1e-5.
            Engine::Native(_) => 1e-4,
        }
    }
}

impl Native {
    fn start(network: &Network, wanted: &Wanted) -> anyhow::Result<Native> {
        ensure!(0 < wanted.max_batch, "the largest batch is 0, it must be at least 1");
        if let Some(precision) = wanted.precision.filter(|it| *it != Precision::Fp32) {
            bail!("device native computes in fp32, not in {precision}: use auto or fp32");
        }
        let Network { config, tensors, side, mean, std } = *network;
        let (max_batch, classes) = (wanted.max_batch, config.classes);
        let lane = Lane::new(tensors, &config, &Input { side, mean, std }, Isa::best())?;
        let logits = Vec::with_capacity(max_batch * classes);
        Ok(Native { lane, side, classes, max_batch, logits })
    }
}

impl Model for Engine {
    fn forward(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>> {
        match self {
            Engine::Libtorch(it) => it.forward(batch),
            Engine::Native(it) => it.forward(batch),
        }
    }

    fn warm_up(&mut self) -> anyhow::Result<()> {
        match self {
            Engine::Libtorch(it) => it.warm_up(),
            Engine::Native(it) => it.warm_up(),
        }
    }
}

impl Model for Native {
    fn forward(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>> {
        let bytes = self.side * self.side * 3;
        if let Some(it) = batch.iter().find(|it| it.len() != bytes) {
            bail!("an input has {} bytes, not {bytes} (3 x {1} x {1})", it.len(), self.side);
        }
        self.logits.clear();
        self.lane.forward(batch, &mut self.logits);
        Ok(self.logits.chunks_exact(self.classes).map(<[f32]>::to_vec).collect())
    }

    /// Touches all memory once.
    fn warm_up(&mut self) -> anyhow::Result<()> {
        let picture = vec![0; self.side * self.side * 3];
        self.forward(&vec![picture.as_slice(); self.max_batch]).map(drop)
    }
}
