//! See `config` in `targets.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ghostwatch_fuzz::targets::config(data));
