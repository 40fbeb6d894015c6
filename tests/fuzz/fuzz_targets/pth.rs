//! Fuzzes both PyTorch readers: the input is a `.pth` file, in the zip or the old stream format.

#![no_main]

use libfuzzer_sys::fuzz_target;

use crate::infer::weights;

#[path = "../infer.rs"]
mod infer;

fuzz_target!(|data: &[u8]| {
    // Both readers see every input, whatever its first bytes say.
    drop(weights::zip::parse(data));
    drop(weights::legacy::parse(data));
});
