//! From model inputs to scores: batching ([`batch`]), the network as a table ([`plan`]) and with
//! libtorch ([`ghostnet`]) or without it ([`native`]), the device it runs on ([`device`]), its weights ([`weights`]) and the
//! proof that it computes what it should ([`selftest`]).

pub mod batch;
pub mod device;
pub mod engine;
mod fused;
pub mod ghostnet;
#[allow(unsafe_code, reason = "loads libraries")]
pub mod gpu;
mod input;
pub mod load;
pub mod native;
mod onednn;
pub mod plan;
pub mod selftest;
pub mod wanted;
pub mod weights;

/// The network on a device. A trait so that tests need no libtorch.
pub trait Model: Send {
    /// Logits for each of `batch`, in the same order. Pictures are `[side, side, 3]` bytes.
    ///
    /// # Errors
    /// The device failed; the daemon cannot go on.
    fn forward(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>>;

    /// Does once, on the thread that will call [`Model::forward`], what would make a first call
    /// slow.
    ///
    /// # Errors
    /// The device failed.
    fn warm_up(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
}
