//! Fuzzes the safetensors reader and the metadata; what is read must survive being written.

#![no_main]

use libfuzzer_sys::fuzz_target;

use crate::infer::weights;

#[path = "../infer.rs"]
mod infer;

fuzz_target!(|data: &[u8]| {
    if let Ok(first) = weights::parse(data, true) {
        let mut file = Vec::new();
        weights::safetensors::write(&mut file, &first.tensors, &first.metadata.strings())
            .expect("a vector takes everything");
        let second = weights::parse(&file, true).expect("what was written is read");
        assert_eq!(first.tensors.len(), second.tensors.len());
    }
});
