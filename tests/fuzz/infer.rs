//! The readers, by path, and the little that they need from beside them.

#![allow(dead_code, reason = "a target uses a part of the readers")]

#[path = "../../src/infer/selftest.rs"]
pub mod selftest;
#[path = "../../src/infer/weights/mod.rs"]
pub mod weights;

/// The main crate's trait; the readers run no model.
pub trait Model: Send {
    /// Logits for each of `batch`.
    ///
    /// # Errors
    /// The device failed.
    fn forward(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>>;
}
