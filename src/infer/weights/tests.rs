//! Tests of the weights readers over files that PyTorch made, over hand-made hostile ones, and
//! over mutations of both.

use std::{fs, path::PathBuf, process::Command, time::Instant};

use super::*;
use crate::infer::selftest::{self, Reference};

/// Names and shapes of the fixtures' tensors, in the order that their values count in.
const SHAPES: [(&str, &[usize]); 4] = [
    ("conv.weight", &[2, 3, 2, 2]),
    ("bn.running_mean", &[3]),
    ("classifier.weight", &[4, 3]),
    ("classifier.bias", &[4]),
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/weights").join(name)
}

fn expected() -> BTreeMap<String, Tensor> {
    let tensor = |(index, (name, shape)): (usize, &(&str, &[usize]))| {
        let count: usize = shape.iter().product();
        let data = (0..count).map(|it| (index * 100 + it) as f32 / 8.0).collect();
        ((*name).to_owned(), Tensor { shape: shape.to_vec(), data })
    };
    SHAPES.iter().enumerate().map(tensor).collect()
}

fn refusal(bytes: &[u8]) -> Problem {
    parse(bytes, false).expect_err("the bytes are refused")
}

fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("ghostwatch-weights-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    folder.join(name)
}

#[test]
fn every_form_that_pytorch_writes_gives_the_same_numbers() {
    let names = [
        "zip.pth",
        "legacy.pth",
        "zip-proto4.pth",
        "legacy-proto4.pth",
        "zip-float16.pth",
        "zip-bfloat16.pth",
        "zip-float64.pth",
        "legacy-float16.pth",
        "zip-module.pth",
        "legacy-module.pth",
        "zip-nested.pth",
        "zip-parameter.pth",
        "zip-strided.pth",
        "legacy-strided.pth",
        "full.safetensors",
        "bare.safetensors",
        "float16.safetensors",
        "bfloat16.safetensors",
        "float64.safetensors",
    ];
    // bfloat16 has eight bits of precision: the values beyond 32 are rounded.
    let rounded = |value: f32, name: &str| match name.contains("bfloat16") {
        true => {
            let bits = value.to_bits();
            f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
        }
        false => value,
    };
    for name in names {
        let checkpoint = read(&fixture(name)).unwrap();
        let mut tensors = expected();
        for tensor in tensors.values_mut() {
            tensor.data.iter_mut().for_each(|it| *it = rounded(*it, name));
        }
        assert_eq!(checkpoint.tensors, tensors, "{name}");
        assert_eq!(checkpoint.metadata.num_classes, 4, "{name}");
        assert_eq!(checkpoint.sha256.len(), 64);
    }
}

#[test]
fn a_modules_own_state_dict_and_a_shared_storage_are_read() {
    let checkpoint = read(&fixture("zip-module-metadata.pth")).unwrap();
    assert_eq!(checkpoint.tensors["classifier.bias"], expected()["classifier.bias"]);
    let checkpoint = read(&fixture("zip-shared.pth")).unwrap();
    assert_eq!(checkpoint.tensors["again"], checkpoint.tensors["conv.weight"]);
}

#[test]
fn what_is_no_state_dict_is_refused_with_its_reason() {
    let rows = [
        ("evil-zip.pth", "asks for `posix.system` at byte"),
        ("evil-legacy.pth", "asks for `posix.system` at byte"),
        ("evil-proto4.pth", "asks for `posix.system` at byte"),
        ("evil-bare.pth", "a pickle, but not one of PyTorch"),
        ("whole-model.pth", "asks for `__main__.Module` at byte"),
        ("torchscript.pt", "a TorchScript archive (it has `torchscript/"),
        ("not-a-dict.pth", "something else than a dictionary"),
        ("not-tensors.pth", "`classifier.weight` is not a tensor"),
        ("integers.pth", "tensor `classifier.weight` has type int64"),
        ("compressed.pth", "is compressed or encrypted"),
        ("big-endian.pth", "big-endian"),
        ("no-storage.pth", "tensor `conv.weight`: its storage `0` is missing"),
        ("short-storage.pth", "tensor `conv.weight`: its storage has 92 bytes for 24 elements"),
        ("truncated-zip.pth", "ends early: the archive's directory"),
        ("truncated-legacy.pth", "ends early: "),
        ("truncated-full.safetensors", "ends early: "),
        ("header-2-63.safetensors", "is 9223372036854775808, the limit is 4194304"),
    ];
    for (name, expected) in rows {
        let error = read(&fixture(name)).expect_err(name);
        let WeightsError::Content { path, source } = error else { panic!("{name}: {error}") };
        assert_eq!(path, fixture(name));
        assert!(source.to_string().contains(expected), "{name}: {source}");
    }
    assert!(!Path::new("ghostwatch-was-here").exists(), "the pickle's code has run");
}

#[test]
fn files_that_are_something_else_are_refused_by_their_kind() {
    let rows: [(&[u8], &str); 6] = [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html>", "a web page"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0", "gzip"),
        (b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "an empty zip"),
        (b"hello, hello, hello", "of no known format"),
    ];
    for (bytes, kind) in rows {
        let error = refusal(bytes).to_string();
        assert!(error.contains(kind), "{error}");
    }
    assert!(matches!(read(Path::new("/")), Err(WeightsError::Io { .. })));
    assert!(matches!(read(Path::new("no/such/file")), Err(WeightsError::Io { .. })));
}

#[test]
fn a_checkpoint_that_does_not_fit_the_network_is_told_everything_at_once() {
    let shapes = |rows: &[(&str, &[usize])]| -> Vec<(String, Vec<usize>)> {
        rows.iter().map(|it| (it.0.to_owned(), it.1.to_vec())).collect()
    };
    let checkpoint = read(&fixture("zip.pth")).unwrap();
    assert_eq!(check(&checkpoint, &shapes(&SHAPES)), Ok(()));
    let mut other = SHAPES;
    other[0].0 = "stem.weight";
    other[3].1 = &[5];
    assert_eq!(
        check(&checkpoint, &shapes(&other)).unwrap_err().to_string(),
        "the checkpoint does not fit the network; 1 missing: stem.weight; 1 extra: conv.weight; \
         1 misshapen: classifier.bias [4] instead of [5]"
    );
    let error = check(&read(&fixture("nan.pth")).unwrap(), &shapes(&SHAPES)).unwrap_err();
    assert_eq!(error.not_finite, ["classifier.bias", "conv.weight"]);
    let many: Vec<_> = (0..30).map(|it| (format!("layer{it:02}"), vec![1])).collect();
    let error = check(&checkpoint, &many).unwrap_err().to_string();
    assert!(error.contains("30 missing: layer00, ") && error.contains("layer19 and 10 more"));
}

#[test]
fn a_checkpoint_brings_its_own_geometry_and_the_published_one_is_256_224() {
    let full = read(&fixture("full.safetensors")).unwrap().metadata;
    assert_eq!((full.resize, full.input), (128, 112));
    assert_eq!(full.provenance["trained_on"], "nothing");
    let published = read(&fixture("zip.pth")).unwrap().metadata;
    assert_eq!(published, Metadata::published(4));
    assert_eq!((published.resize, published.input), (256, 224));
}

#[test]
fn what_is_written_is_read_back_the_same() {
    let mut checkpoint = read(&fixture("zip.pth")).unwrap();
    checkpoint.metadata.labels_sha256 = Some("ab".repeat(32));
    checkpoint.metadata.provenance.insert("origin".into(), "other \"quoted\"\n".into());
    checkpoint.metadata.reference = Some(Reference {
        by: "self".into(),
        pictures: selftest::PICTURES.into(),
        logits: vec![vec![0.1, -3.402_823_5e38, 1e-45, 16_777_217.0]; 3],
    });
    let path = scratch("round.safetensors");
    checkpoint.sha256 = write(&path, &checkpoint).unwrap();
    assert_eq!(read(&path).unwrap(), checkpoint);
    assert_eq!(
        fs::read_dir(path.parent().unwrap())
            .unwrap()
            .filter(|it| { it.as_ref().unwrap().file_name().to_string_lossy().contains(".round") })
            .count(),
        0,
        "the temporary file is left"
    );
    let nowhere = scratch("no-folder/x.safetensors");
    assert!(matches!(write(&nowhere, &checkpoint), Err(WeightsError::Io { .. })));
}

#[test]
fn metadata_that_contradicts_itself_is_refused_with_its_key() {
    let tensors = expected();
    let good = read(&fixture("full.safetensors")).unwrap().metadata.strings();
    let rows = [
        ("num_classes", Some("5")),
        ("num_classes", Some("many")),
        ("resize", None),
        ("resize", Some("100")),
        ("resize", Some("5000")),
        ("input", Some("0")),
        ("mean", Some("0.5,0.5")),
        ("std", Some("0.2,0,0.2")),
        ("std", Some("0.2,NaN,0.2")),
        ("labels_sha256", Some("abc")),
        ("reference", Some("{}")),
        ("reference", Some(r#"{"by":"self","pictures":"selftest-v1","logits":[]}"#)),
        ("reference", Some(r#"{"by":"self","pictures":"selftest-v1","logits":[[1],[2],[3]]}"#)),
    ];
    assert!(Metadata::parse(good.clone(), &tensors).is_ok());
    for (key, value) in rows {
        let mut strings = good.clone();
        match value {
            Some(value) => drop(strings.insert(key.into(), value.into())),
            None => drop(strings.remove(key)),
        }
        let error = Metadata::parse(strings, &tensors).expect_err(key);
        assert!(matches!(error, Problem::Metadata { .. }), "{key}: {error}");
    }
}

/// A safetensors file of a header and a number of zero bytes.
fn safe(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.resize(file.len() + data, 0);
    file
}

#[test]
fn a_safetensors_header_that_lies_is_refused() {
    let entry = |shape: &str, from: u64, to: u64| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let (a, next) = (entry("[2]", 0, 8), entry("[2]", 8, 16));
    let rows = [
        (format!(r#"{{"a":{a},"b":{a}}}"#), "tensor `b`: it starts at 0, inside of another"),
        (format!(r#"{{"a":{a},"b":{}}}"#, entry("[2]", 4, 12)), "tensor `b`: it starts at 4"),
        (format!(r#"{{"b":{next}}}"#), "tensor `b`: bytes 0 to 8 before it belong to no tensor"),
        (format!(r#"{{"a":{a}}}"#), "8 bytes follow the last tensor"),
        (format!(r#"{{"a":{a},"b":{}}}"#, entry("[4]", 8, 24)), "ends early: tensor `b`"),
        (format!(r#"{{"a":{a},"b":{}}}"#, entry("[3]", 8, 16)), "tensor `b`: 8 bytes, but shape"),
        (format!(r#"{{"a":{}}}"#, entry("[4294967296,4294967296]", 0, 16)), "too many elements"),
        (format!(r#"{{"a":{}}}"#, entry("[2]", 8, 0)), "before its start"),
        (format!(r#"{{"a":{a},"a":{next}}}"#), "`a` occurs twice"),
        (format!(r#"{{"a":{a},"__metadata__":{{"x":"1","x":"2"}}}}"#), "`x` occurs twice"),
        (format!(r#"{{"a":{a},"b":{}}}"#, next.replace("F32", "I32")), "`b` has type I32"),
        (format!(r#"{{"a":{a},"b":{}}}"#, next.replace("[2]", "[-2]")), "no safetensors header"),
        (format!(r#"{{"a":{a},"b":{{"dtype":"F32"}}}}"#), "no safetensors header"),
        (format!(r#"{{"a":{}"#, "[".repeat(100_000)), "no safetensors header"),
    ];
    for (header, expected) in rows {
        let error = refusal(&safe(&header, 16)).to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// A stream in the old format with the given main pickle and what follows it.
fn stream(pickle: &[u8], rest: &[u8]) -> Vec<u8> {
    let mut file = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.".to_vec();
    file.extend(b"\x80\x02M\xe9\x03.\x80\x02}X\x0d\0\0\0little_endian\x88s.\x80\x02");
    file.extend(pickle);
    file.extend(rest);
    file
}

/// A dictionary with tensor `w` over storage `0` of four floats, rebuilt with the given offset,
/// shape and strides.
fn view(offset: &[u8], shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let mut pickle =
        b"}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage".to_vec();
    pickle.extend(b"ctorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04NtQ");
    pickle.extend([offset, shape, strides, b"\x89NtRs."].concat());
    let storage = [b"\x80\x02]X\x01\0\0\x000a.\x04\0\0\0\0\0\0\0".as_slice(), &[0; 16]].concat();
    stream(&pickle, &storage)
}

#[test]
fn a_view_that_reaches_outside_its_storage_is_refused() {
    // It is read, but for its having no head: so the rows below fail for their own reasons.
    assert!(
        refusal(&view(b"K\x00", b"K\x04\x85", b"K\x01\x85")).to_string().contains("num_classes")
    );
    let rows: [([&[u8]; 3], &str); 7] = [
        ([b"K\x01", b"K\x04\x85", b"K\x01\x85"], "reach outside"),
        ([b"K\x00", b"K\x03\x85", b"K\x02\x85"], "reach outside"),
        (
            [b"K\x00", b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"],
            "2147483647 elements in a storage of 4",
        ),
        (
            [b"K\x00", b"K\x02\x85", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85"],
            "reach outside",
        ),
        ([b"K\x00", b"K\x02\x85", b"J\xff\xff\xff\xff\x85"], "strides are no sizes"),
        ([b"J\xff\xff\xff\xff", b"K\x02\x85", b"K\x01\x85"], "offset is no size"),
        ([b"K\x00", b"K\x02\x85", b"K\x01K\x01\x86"], "1 extents, 2 strides"),
    ];
    for ([offset, shape, strides], expected) in rows {
        let error = refusal(&view(offset, shape, strides)).to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_pickle_can_neither_call_nor_nest_nor_claim_its_way_out() {
    let deep = [b")".as_slice(), &b"\x85".repeat(200_000), b"."].concat();
    let rows: [(&[u8], &str); 11] = [
        (b"cos\nsystem\n(X\x02\0\0\0lstR.", "asks for `os.system` at byte 2"),
        (b"X\x08\0\0\0builtinsX\x04\0\0\0eval\x93.", "asks for `builtins.eval`"),
        (b"cbuiltins\n\x1b[31m\n.", r"asks for `builtins.\u{1b}[31m`"),
        (b"(ios\nsystem\n.", "opcode 0x69"),
        (b"\x82\x01.", "opcode 0x82"),
        (b"ccollections\nOrderedDict\n)\x81.", "opcode 0x81"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffx.", "ends early: the pickle at byte 11"),
        (b"X\xff\xff\xff\x7fx.", "ends early: the pickle at byte 7"),
        (b"(0.", "opcode 0x30"),
        (b"R.", "takes a value that is not there"),
        (&deep, "ends early"),
    ];
    for (pickle, expected) in rows {
        let error = refusal(&stream(pickle, b"")).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let many = refusal(&stream(&b")".repeat(300_000), b"")).to_string();
    assert!(many.contains("number of objects is 262145, the limit is 262144"), "{many}");
    let long = refusal(&stream(&b"N".repeat(2 << 20), b"")).to_string();
    assert!(long.contains("the limit is 1048576"), "{long}");
}

/// Every stored file and corpus entry.
fn corpus() -> Vec<(String, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut files = Vec::new();
    for folder in ["golden/weights", "fuzz/corpus/pth", "fuzz/corpus/safetensors"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            files.push((path.display().to_string(), fs::read(&path).unwrap()));
        }
    }
    assert!(40 < files.len(), "the corpus has {} files", files.len());
    files.sort();
    files
}

/// The peak of this process's memory in KiB.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|it| it.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// One change of a few kinds; `random` gives the next of a fixed sequence.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut impl FnMut(usize) -> usize) {
    for _ in 0..=random(3) {
        let at = random(bytes.len() + 1).min(bytes.len().saturating_sub(1));
        match random(6) {
            _ if bytes.is_empty() => bytes.extend(other),
            0 => bytes[at] ^= 1 << random(8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random(5)],
            2 => bytes.truncate(at),
            3 => drop(bytes.remove(at)),
            4 => {
                let end = bytes.len().min(at + [4, 8][random(2)]);
                bytes[at..end].fill([0, 0xff][random(2)]);
            }
            _ => {
                let from = random(other.len().max(1)).min(other.len());
                let piece = &other[from..other.len().min(from + 64)];
                bytes.splice(at..bytes.len().min(at + random(65)), piece.iter().copied());
            }
        }
    }
}

/// Runs in a process of its own, so that its memory can be measured.
#[test]
#[ignore = "the next test starts it"]
fn mutations_child() {
    let files = corpus();
    let before = peak_kib();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % below.max(1)
    };
    let (mut slowest, mut read) = (std::time::Duration::ZERO, 0);
    for (name, file) in &files {
        for _ in 0..3000 {
            let mut bytes = file.clone();
            let other = &files[random(files.len())].1;
            mutate(&mut bytes, other, &mut random);
            let start = Instant::now();
            read += usize::from(parse(&bytes, name.ends_with("safetensors")).is_ok());
            slowest = slowest.max(start.elapsed());
        }
    }
    // What could grow most for its size: values without end, and strings.
    for opcode in [b")", b"]", b"}", b"N", b"("] {
        let start = Instant::now();
        refusal(&stream(&opcode.repeat(pickle::PICKLE_MAX - 16), b""));
        slowest = slowest.max(start.elapsed());
    }
    let grown = peak_kib() - before;
    println!("{} files, {read} read, slowest {slowest:?}, grown {grown} KiB", files.len());
    assert!(slowest.as_secs_f64() < 1.0, "one file took {slowest:?}");
    assert!(grown < 64 << 10, "memory grew by {grown} KiB");
}

#[test]
fn no_mutation_of_any_file_makes_a_reader_panic_or_grow() {
    let name = format!("{}::mutations_child", module_path!().split_once("::").unwrap().1);
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{said}{}", String::from_utf8_lossy(&child.stderr));
    assert!(said.contains("1 passed"), "{said}");
}
