//! Random numbers that spread tries over time.

use std::hash::{BuildHasher, Hasher, RandomState};

/// A random number in 0.0..1.0, good enough to spread tries over time.
pub fn random() -> f64 {
    // The keys of the standard library's hash maps come from the operating system.
    let bits = RandomState::new().build_hasher().finish() >> 11;
    bits as f64 / (1_u64 << 53) as f64
}
