//! The bundle for machines with a GPU: what of it can be tried without one.

use std::{env, fs, path::Path, process::Command};

const BYTES_MAX: u64 = 64 << 20;

#[test]
fn the_bundle_for_a_gpu_is_small_and_runs_on_the_cpu_with_nothing_but_itself_and_libtorch() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("bundle.tar.gz");
    let made = Command::new(root.join("scripts/gpu-check"))
        .args(["--binary", env!("CARGO_BIN_EXE_ghostwatch"), "--output"])
        .arg(&bundle)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "{said}");
    let bytes = fs::metadata(&bundle).unwrap().len();
    assert!(bytes < BYTES_MAX, "{bytes}");
    let unpacked =
        Command::new("tar").arg("-xzf").arg(&bundle).arg("-C").arg(folder.path()).status().unwrap();
    assert!(unpacked.success());

    let libtorch = env::var_os("LIBTORCH").map_or_else(|| root.join(".libtorch"), Into::into);
    let ran = Command::new(folder.path().join("gpu-check/run"))
        .args(["--device", "cpu", "--batches", "1,3", "--seconds", "1", "--streams", "1"])
        .arg("--libtorch")
        .arg(libtorch.join("lib"))
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("TMPDIR", folder.path())
        .current_dir("/")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&ran.stdout);
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{text}{said}");
    assert!(text.contains("parity     64 of 64 first labels as on the CPU in fp32"), "{text}");
    // The clip has 132 pictures; none is lost where none gives way.
    let whole = "end to end 132 labels of 1 files of 720p as fast as they can be taken";
    assert!(text.contains(whole), "{text}");
    assert!(text.contains("720p in their own time"), "{text}");
}
