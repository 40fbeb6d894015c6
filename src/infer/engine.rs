//! The network behind one name, whichever engine computes it: libtorch or our own.

#[cfg(feature = "libtorch")]
use crate::infer::libtorch;
#[cfg(feature = "native")]
use crate::infer::own::Own;
use crate::infer::{
    Model,
    device::{self, Device, GpuStatus, Network},
    wanted::{Precision, Wanted},
};

/// A network on a device, for one thread.
pub trait Backend: Model {
    /// The engine's name: `libtorch`, `native`.
    fn name(&self) -> &'static str;

    /// The same network for another thread: the weights are shared, what it works in is not.
    ///
    /// # Errors
    /// Out of memory.
    fn lane(&self) -> anyhow::Result<Box<dyn Backend>>;

    /// The device's name: `cpu`, `cuda:0`.
    fn device(&self) -> String;

    /// The precision in force.
    fn precision(&self) -> Precision;

    /// What the user should know about the precision.
    fn note(&self) -> Option<&str> {
        None
    }

    /// The largest error of the self-test that is still good, see
    /// [`crate::infer::selftest::Agreement`].
    fn allowed_error(&self) -> f64;
}

/// Whichever was chosen.
pub struct Engine(Box<dyn Backend>);

impl Engine {
    /// Chooses the device and the engine, puts the network there and chooses the precision. Not
    /// warmed up: that belongs on the thread that will use it.
    ///
    /// # Errors
    /// The parameters do not fit the network, the device cannot be used, or a wanted precision is
    /// not to be had there.
    pub fn start(network: &Network, wanted: &Wanted, gpu: &GpuStatus) -> anyhow::Result<Engine> {
        Ok(Engine(match device::choose(wanted, gpu)? {
            #[cfg(feature = "native")]
            Device::Native => Box::new(Own::start(network, wanted)?),
            #[cfg(feature = "libtorch")]
            device => Box::new(libtorch::Engine::start(network, wanted, device)?),
            #[cfg(not(feature = "libtorch"))]
            Device::Cpu | Device::Cuda(_) => unreachable!("what the build lacks is not chosen"),
        }))
    }

    /// See [`Backend::lane`].
    ///
    /// # Errors
    /// Out of memory.
    pub fn lane(&self) -> anyhow::Result<Engine> {
        self.0.lane().map(Engine)
    }

    /// See [`Backend::name`].
    pub fn name(&self) -> &'static str {
        self.0.name()
    }

    /// See [`Backend::device`].
    pub fn device(&self) -> String {
        self.0.device()
    }

    /// See [`Backend::precision`].
    pub fn precision(&self) -> Precision {
        self.0.precision()
    }

    /// See [`Backend::note`].
    pub fn note(&self) -> Option<&str> {
        self.0.note()
    }

    /// See [`Backend::allowed_error`].
    pub fn allowed_error(&self) -> f64 {
        self.0.allowed_error()
    }
}

impl Model for Engine {
    fn forward(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>> {
        self.0.forward(batch)
    }

    fn warm_up(&mut self) -> anyhow::Result<()> {
        self.0.warm_up()
    }
}
