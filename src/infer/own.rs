//! The engine of our own ([`native`](crate::infer::native)) as one of the daemon's: fp32 on the CPU.

use anyhow::{bail, ensure};

use crate::infer::{
    Model,
    device::Network,
    engine::Backend,
    native::{Input, Isa, Lane},
    wanted::{Precision, Wanted},
};

/// A network on one thread.
pub(super) struct Own {
    lane: Lane,
    side: usize,
    classes: usize,
    max_batch: usize,
    /// All logits of a batch, one picture after the other.
    logits: Vec<f32>,
}

impl Own {
    /// Packs the weights for the fastest instructions that the processor has.
    pub(super) fn start(network: &Network, wanted: &Wanted) -> anyhow::Result<Own> {
        ensure!(0 < wanted.max_batch, "the largest batch is 0, it must be at least 1");
        if let Some(precision) = wanted.precision.filter(|it| *it != Precision::Fp32) {
            bail!("device native computes in fp32, not in {precision}: use auto or fp32");
        }
        let Network { config, tensors, side, mean, std } = *network;
        let (max_batch, classes) = (wanted.max_batch, config.classes);
        let lane = Lane::new(tensors, &config, &Input { side, mean, std }, Isa::best())?;
        let logits = Vec::with_capacity(max_batch * classes);
        Ok(Own { lane, side, classes, max_batch, logits })
    }
}

impl Backend for Own {
    fn name(&self) -> &'static str {
        "native"
    }

    fn lane(&self) -> anyhow::Result<Box<dyn Backend>> {
        Ok(Box::new(Own {
            lane: self.lane.another(),
            logits: Vec::with_capacity(self.max_batch * self.classes),
            ..*self
        }))
    }

    fn device(&self) -> String {
        "cpu".into()
    }

    fn precision(&self) -> Precision {
        Precision::Fp32
    }

    /// As for libtorch's fp32 on a CPU. Measured with the shipped checkpoint: under 1e-5.
    fn allowed_error(&self) -> f64 {
        1e-4
    }
}

impl Model for Own {
    /// Allocates nothing but its answer.
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

#[cfg(test)]
#[allow(unsafe_code, reason = "an allocator that counts")]
mod tests;
