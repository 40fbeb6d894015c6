//! Lets the binary and the tests find libtorch, if they need it, without `LD_LIBRARY_PATH`.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=build.rs");
    let wanted = env::var_os("CARGO_FEATURE_LIBTORCH").and(env::var_os("LIBTORCH"));
    let Some(libtorch) = wanted.map(PathBuf::from) else {
        return;
    };
    // The link in the checkout may move with it; the cache behind it does not.
    let lib = fs::canonicalize(libtorch.join("lib")).unwrap_or(libtorch.join("lib"));
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    // dlopen of the CUDA set needs symbols that the linker would otherwise see no use for.
    println!("cargo:rustc-link-arg=-Wl,--no-as-needed");
}
