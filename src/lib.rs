#![doc = include_str!("ARCHITECTURE.md")]

#[cfg(not(any(feature = "libtorch", feature = "native")))]
compile_error!("nothing would compute the network: enable the feature `libtorch` or `native`");

// In reading order: what flows, how it flows, then the stages one by one, then what runs them.
pub mod frame;
pub mod jitter;
pub mod ledger;
pub mod pulse;
pub mod secret;
pub mod stage;

pub mod edge;

pub mod source;

pub mod preprocess;

pub mod health;

pub mod infer;

pub mod postprocess;

pub mod label;

pub mod event;

pub mod journal;

pub mod publish;

pub mod pipeline;

pub mod sink;

pub mod config;

pub mod metrics;

pub mod http;

pub mod observe;

pub mod systemd;

pub mod crash;

pub mod control;

pub mod log;

#[allow(unsafe_code, reason = "mallopt and _exit")]
pub mod process;

pub mod daemon;

pub mod cli;

// What the fuzz targets do, and the replay of what they found.
#[cfg(test)]
#[path = "../tests/fuzz/targets.rs"]
#[allow(unreachable_pub, reason = "the fuzz crate reaches them")]
mod fuzz;
