//! From model inputs to scores: batching ([`batch`]), the network as a table ([`plan`]), the device
//! and the engine that computes it ([`device`], [`engine`]), its weights ([`weights`]) and the proof
//! that it computes what it should ([`selftest`]).
//!
//! There are two engines, each behind a cargo feature of its name: libtorch (`libtorch.rs`,
//! `ghostnet.rs` and what they use), and our own (`native/`, and `own.rs` as the daemon sees it).

pub mod batch;
pub mod device;
pub mod engine;
#[cfg(feature = "libtorch")]
mod fused;
#[cfg(feature = "libtorch")]
pub mod ghostnet;
#[allow(unsafe_code, reason = "loads libraries")]
pub mod gpu;
#[cfg(feature = "libtorch")]
mod input;
#[cfg(feature = "libtorch")]
pub mod libtorch;
pub mod load;
#[cfg(feature = "native")]
pub mod native;
#[cfg(feature = "libtorch")]
mod onednn;
#[cfg(feature = "native")]
mod own;
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
