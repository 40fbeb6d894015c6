//! Rules about the source text itself, so that they hold without a reviewer.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A name, and the only files or folders under `src/` whose code may say it.
const ONLY: &[(&str, &[&str])] = &[
    ("crossbeam_channel", &["edge.rs", "edge/", "infer/batch.rs", "pipeline.rs", "publish.rs"]),
    (
        "tch::",
        &[
            "infer/libtorch.rs",
            "infer/ghostnet.rs",
            "infer/fused.rs",
            "infer/input.rs",
            "infer/onednn.rs",
        ],
    ),
    ("use gstreamer", &["source/gst/"]),
    ("rusqlite", &["journal/"]),
    ("prometheus::", &["metrics.rs", "metrics/"]),
    ("serde_yaml", &["config/mod.rs"]),
    ("hyper::", &["control.rs", "http/", "sink/webhook.rs"]),
    ("async_nats", &["sink/nats.rs"]),
    ("nvml_wrapper::", &["metrics/gpus.rs"]),
    (
        "unsafe ",
        &[
            "preprocess/simd.rs",
            "infer/input.rs",
            "infer/gpu.rs",
            "infer/native/kernel_",
            "infer/onednn.rs",
            "crash/signal.rs",
            "process.rs",
        ],
    ),
    (
        "thread::Builder",
        &[
            "pipeline.rs",
            "control.rs",
            "http/mod.rs",
            "sink/mod.rs",
            "source/gst/",
            "source/reach.rs",
            "journal/",
            "infer/",
            "metrics/gpus.rs",
        ],
    ),
    (
        "Instant::now",
        &[
            "pulse.rs",
            "edge.rs",
            "edge/counts.rs",
            "source/",
            "infer/",
            "preprocess/worker.rs",
            "label.rs",
            "publish.rs",
            "observe.rs",
            "pipeline.rs",
            "journal/",
            "sink/",
            "http/",
            "metrics.rs",
            "metrics/",
            "cli/",
            "daemon.rs",
            "daemon/",
            "systemd.rs",
            "log.rs",
        ],
    ),
];

const FILE_LINES_MAX: usize = 500;

#[test]
fn names_stay_in_their_modules() {
    for (name, homes) in ONLY {
        let mut used = false;
        for (path, text) in sources() {
            if path.ends_with("tests.rs") || path.to_string_lossy().contains("tests/") {
                continue;
            }
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            let said = code.lines().any(|it| !it.trim_start().starts_with("//") && says(it, name));
            let home = homes.iter().any(|it| path.to_string_lossy().starts_with(it));
            assert!(home || !said, "src/{} may not use `{name}`: only {homes:?}", path.display());
            used |= said;
        }
        assert!(used, "`{name}` is used nowhere: remove its line from `ONLY`");
    }
}

/// Whether a line has the name, not only as the end of a longer one.
fn says(line: &str, name: &str) -> bool {
    let part_of_name = |it: char| it.is_alphanumeric() || it == '_';
    line.match_indices(name).any(|(at, _)| !line[..at].ends_with(part_of_name))
}

#[test]
fn every_file_says_what_it_is_and_is_short() {
    for (path, text) in sources() {
        let documented = text.starts_with("//! ") || text.starts_with("#![doc");
        assert!(documented, "src/{}: first line is not a `//!` sentence", path.display());
        let lines = text.lines().count();
        assert!(lines <= FILE_LINES_MAX, "src/{}: {lines} lines", path.display());
    }
}

#[test]
fn nothing_is_left_to_do() {
    for (path, text) in sources() {
        for word in ["todo!", "unimplemented!", "FIXME", "XXX"] {
            assert!(!text.contains(word), "src/{}: {word}", path.display());
        }
    }
}

#[test]
fn every_dependency_says_why() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let text = fs::read_to_string(manifest).unwrap();
    let part = |from: &str| text.split(from).nth(1).unwrap().split("\n[").next().unwrap();
    for line in part("[dependencies]").lines().chain(part("[dev-dependencies]").lines()) {
        if line.contains(" = ") {
            assert!(line.contains(" # "), "Cargo.toml: {line:?} does not say why");
        }
    }
}

/// Every `.rs` file under `src/`: its path from there, and its text.
fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                files.push((path.strip_prefix(&root).unwrap().to_owned(), text));
            }
        }
    }
    assert!(!files.is_empty());
    files
}
