//! How many instructions a frame costs outside of the decoder and the network, counted by callgrind.
//!
//! A count does not depend on what else the machine does, so a change that costs 5 % is seen where a
//! clock sees nothing. It does depend on the compiler's version and on the profile: the pins hold
//! for the tests' own (`[profile.dev]`, with its optimised dependencies) and rustc 1.95. callgrind
//! shows the program an AVX2 processor at most, so that AVX-512 machines count the same. After a
//! change on purpose, or of the compiler, the message of the failed test has the new number.

use std::{
    env, fs,
    hint::black_box,
    process::Command,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use ghostwatch::{
    event::{Context, Event},
    frame::{
        Colour, Dated, Layout, Matrix, Meta, Picture, Planes, Siting, Skipped, TimeSource, Timing,
    },
    health::Quality,
    ledger::{InFlight, Stream},
    postprocess::{Ranked, top},
    preprocess::{Geometry, Preprocessor},
};

/// Set for the process that runs under callgrind.
const COUNTING: &str = "GHOSTWATCH_COUNT_INSTRUCTIONS";

/// How far a count may be from its pin, in parts of it.
const ROOM: u64 = 20;

/// The steps in the order in which they are counted, and how many instructions each takes.
const PINNED: [(&str, u64); 4] = [
    ("preprocess of a 1080p frame with AVX2", 32_523_310),
    ("preprocess of a 720p frame in plain code", 56_295_108),
    ("the best five of a thousand", 77_240),
    ("an event", 46_480),
];

const GEOMETRY: Geometry = Geometry { resize: 256, crop: 224 };

#[test]
fn a_frames_own_steps_cost_what_they_did() {
    let plain_only = !is_x86_feature_detected!("avx2");
    let counts = counts();
    let mut wrong = Vec::new();
    for ((what, pinned), count) in PINNED.into_iter().zip(counts) {
        println!("{what}: {count} instructions, pinned are {pinned}");
        // Without the instructions plain code takes the place of the first.
        let is_there = !(plain_only && what.ends_with("AVX2"));
        let room = pinned / ROOM;
        if is_there && !(pinned - room..=pinned + room).contains(&count) {
            wrong.push(format!("{what}: {count} instructions, pinned are {pinned}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What runs under callgrind: each step twice, as the first time may build tables.
#[test]
#[ignore = "the test above runs it, under callgrind"]
fn each_step_once_more() {
    assert!(env::var_os(COUNTING).is_some(), "it asserts nothing: the test above counts it");
    let (large, small) = (picture(1920, 1080), picture(1280, 720));
    let (mut fast, mut plain) = (Preprocessor::new(GEOMETRY), Preprocessor::scalar(GEOMETRY));
    let mut out = vec![0; GEOMETRY.bytes()];
    let logits: Vec<f32> = (0..1000).map(|it| ((it * 7919) % 1000) as f32 / 100.0).collect();
    let (mut meta, context) = (meta(), context());
    let best = [0, 1, 2, 3, 4].map(|it| Ranked { label_id: it, confidence: 0.125 });
    let handed_over = meta.timing.arrived + Duration::from_micros(13_440);
    for counting in [false, true] {
        let count = |once: &mut dyn FnMut()| if counting { counted(once) } else { once() };
        count(&mut || fast.run(black_box(&large), &mut out).unwrap());
        count(&mut || plain.run(black_box(&small), &mut out).unwrap());
        count(&mut || drop(black_box(top(black_box(&logits), 5).unwrap())));
        count(&mut || {
            let event = Event::frame(black_box(&meta), 16, &best, &context, handed_over);
            black_box(event.envelope("01JH8Z6Q3K5V9W2X4Y6Z8A0B2C", 1_848_201));
        });
    }
    meta.stream.published();
}

/// What callgrind counts between its call and its return, and nothing else.
#[inline(never)]
fn counted(once: &mut dyn FnMut()) {
    once();
    black_box(());
}

/// The instructions of each step. In one run, as callgrind takes most of its time for libtorch's
/// loading.
fn counts() -> Vec<u64> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("counts");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--toggle-collect=it::instructions::counted"])
        .arg("--dump-after=it::instructions::counted")
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(env::current_exe().unwrap())
        .args(["instructions::each_step_once_more", "--exact", "--ignored", "--test-threads=1"])
        .env(COUNTING, "1")
        .output()
        .expect("valgrind runs; `scripts/setup test` installs it");
    let said = String::from_utf8_lossy(&output.stderr);
    let ran = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && ran.contains("1 passed"), "{ran}{said}");
    let count = |step: usize| {
        let path = folder.path().join(format!("counts.{step}"));
        let text = fs::read_to_string(&path).unwrap_or_else(|it| panic!("{it}: {said}"));
        let line = text.lines().find_map(|it| it.strip_prefix("summary: "));
        line.and_then(|it| it.trim().parse().ok()).unwrap_or_else(|| panic!("no count: {text}"))
    };
    (1..=PINNED.len()).map(count).collect()
}

struct Bytes([Vec<u8>; 3]);

impl Planes for Bytes {
    fn plane(&self, index: usize) -> &[u8] {
        &self.0[index]
    }
}

/// What a decoder gives; the cost does not depend on the values.
fn picture(width: usize, height: usize) -> Picture {
    let plane = |size: usize| (0..size).map(|it| (it * 31) as u8).collect();
    let quarter = width / 2 * (height / 2);
    Picture {
        layout: Layout::I420,
        colour: Colour {
            matrix: Matrix::Bt709,
            full_range: false,
            siting_x: Siting::Cosited,
            siting_y: Siting::Centre,
        },
        width,
        height,
        strides: [width, width / 2, width / 2],
        planes: Box::new(Bytes([plane(width * height), plane(quarter), plane(quarter)])),
    }
}

fn meta() -> Meta {
    let arrived = Instant::now();
    let after = |micros| arrived + Duration::from_micros(micros);
    Meta {
        stream: InFlight::decoded(Arc::new(Stream::new("front"))),
        epoch: 3,
        frame: 184_820,
        pts: Duration::from_millis(61_606_700),
        time: SystemTime::UNIX_EPOCH,
        dated: Dated { source: TimeSource::Arrival, error: None, clock_offset_ns: None },
        ingest_time: SystemTime::UNIX_EPOCH,
        size: (1920, 1080),
        timing: Timing {
            taken: after(5300),
            preprocessed: after(6100),
            started: after(7000),
            inferred: after(13400),
            ..Timing::at(arrived, after(4100))
        },
        skipped: Skipped::default(),
        quality: Quality::default(),
    }
}

fn context() -> Context {
    Context {
        instance: "host-a".into(),
        model: "ghostnet_1x".into(),
        weights: "5f2b9c41aa07deadbeef".into(),
        label_set: "imagenet-1k".into(),
        precision: "fp32".into(),
        device: "cpu".into(),
        labels: vec![(Some("n01440764".into()), "tench".into()); 5],
    }
}
