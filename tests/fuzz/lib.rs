//! The part of the daemon that takes bytes from strangers, without libtorch and GStreamer.
//!
//! The modules are those of `src/`, under the same names, so that [`targets`] means the same here
//! and in the daemon's own tests.

#![allow(dead_code, reason = "the targets use a part of each module")]

#[path = "../../src"]
mod daemon {
    pub mod config;
    pub mod edge;
    pub mod event;
    pub mod frame;
    pub mod ledger;
    pub mod postprocess;
    pub mod preprocess;
    pub mod pulse;
    pub mod secret;
    pub mod stage;

    pub mod cli {
        pub mod text;
    }
    pub mod http {
        mod access;
        pub mod query;

        pub use access::{Access, Token};
    }
    pub mod infer {
        pub mod batch;
        pub mod selftest;
        pub mod wanted;
        pub mod weights;

        /// The daemon's trait; nothing here runs a model.
        pub trait Model: Send {
            /// Logits for each of `batch`.
            ///
            /// # Errors
            /// The device failed.
            fn forward(&mut self, batch: &[&[u8]]) -> anyhow::Result<Vec<Vec<f32>>>;

            /// Nothing.
            ///
            /// # Errors
            /// Never.
            fn warm_up(&mut self) -> anyhow::Result<()> {
                Ok(())
            }
        }
    }
    pub mod journal {
        pub mod filter;
        pub mod retain;
    }
    pub mod sink {
        pub mod broker;
        pub mod settings;
    }
    pub mod source {
        pub mod fingerprint;
        pub mod url;
    }
}

pub use daemon::*;

pub mod targets;
