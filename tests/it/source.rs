//! Sources on real media: what is decoded, how it is numbered, how failures are named.

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use ghostwatch::{
    frame::{Code, Frame, Layout, Matrix, Meta, Picture, State, StateChange},
    ledger::Stream,
    source::{self, Closed, End, Opener, Output, Settings, Spec, gst::GstOpener},
    stage::{Reason, StageName},
};
use tokio_util::sync::CancellationToken;

/// What came out of a source.
pub(crate) enum Out {
    Frame(Frame),
    State(StateChange),
}

/// Keeps what comes out, and stops the source when `enough` says so.
struct Recorder<F> {
    out: Vec<Out>,
    enough: F,
}

impl<F: FnMut(&[Out]) -> bool> Recorder<F> {
    fn keep(&mut self, out: Out, stop: &CancellationToken) {
        self.out.push(out);
        if (self.enough)(&self.out) {
            stop.cancel();
        }
    }
}

impl<F: FnMut(&[Out]) -> bool> Output for Recorder<F> {
    fn frame(&mut self, frame: Frame, stop: &CancellationToken) -> Result<(), Closed> {
        self.keep(Out::Frame(frame), stop);
        Ok(())
    }

    fn state(&mut self, change: StateChange, stop: &CancellationToken) -> Result<(), Closed> {
        self.keep(Out::State(change), stop);
        Ok(())
    }
}

/// What one run of a source gave.
pub(crate) struct Ran {
    pub(crate) stream: Arc<Stream>,
    pub(crate) end: End,
    out: Vec<Out>,
}

impl Ran {
    pub(crate) fn frames(&self) -> impl Iterator<Item = &Frame> {
        self.out.iter().filter_map(|it| match it {
            Out::Frame(frame) => Some(frame),
            Out::State(_) => None,
        })
    }

    pub(crate) fn metas(&self) -> impl Iterator<Item = &Meta> {
        self.frames().map(|it| &it.meta)
    }

    pub(crate) fn states(&self) -> Vec<(State, Option<Code>)> {
        self.changes().map(|it| (it.state, it.code)).collect()
    }

    pub(crate) fn changes(&self) -> impl Iterator<Item = &StateChange> {
        self.out.iter().filter_map(|it| match it {
            Out::Frame(_) => None,
            Out::State(change) => Some(change),
        })
    }

    /// Every decoded picture is a frame or counted, in its place, and time runs forward.
    pub(crate) fn check_account(&self) {
        let mut next = 0;
        let mut epoch = None;
        let mut time = SystemTime::UNIX_EPOCH;
        let mut total = 0;
        for out in &self.out {
            match out {
                Out::Frame(Frame { meta, .. }) => {
                    assert!(epoch.is_none_or(|it| it == meta.epoch), "{meta:?}");
                    assert_eq!(meta.frame, next + meta.skipped.total(), "{meta:?}");
                    assert!(next == 0 || time <= meta.time, "{meta:?}");
                    (next, epoch, time) = (meta.frame + 1, Some(meta.epoch), meta.time);
                }
                Out::State(StateChange { ended: Some(ended), .. }) => {
                    assert!(epoch.is_none_or(|it| it == ended.epoch), "{ended:?}");
                    assert_eq!(ended.frames, next + ended.skipped.total(), "{ended:?}");
                    total += ended.frames;
                    (next, epoch) = (0, None);
                }
                Out::State(_) => assert_eq!(next, 0, "an epoch goes on over a change of state"),
            }
        }
        assert_eq!(next, 0, "the last epoch was closed");
        let decoded = self.stream.decoded.load(Relaxed);
        assert_eq!(total, decoded);
        assert_eq!(decoded, self.frames().count() as u64 + self.stream.dropped_total());
    }
}

pub(crate) fn run_opener(
    opener: &mut dyn Opener,
    settings: Settings,
    stream: Arc<Stream>,
    enough: impl FnMut(&[Out]) -> bool,
) -> Ran {
    let mut recorder = Recorder { out: Vec::new(), enough };
    let stop = CancellationToken::new();
    let end = source::run(opener, stream.clone(), settings, &mut recorder, &stop);
    Ran { stream, end, out: recorder.out }
}

pub(crate) fn run_until(spec: &Spec, enough: impl FnMut(&[Out]) -> bool) -> Ran {
    let stream = Arc::new(Stream::new("test"));
    let mut opener = GstOpener::new(spec.clone(), stream.clone()).unwrap();
    let ran = run_opener(&mut opener, Settings::new(spec, 0), stream, enough);
    ran.check_account();
    ran
}

fn run(spec: &Spec) -> Ran {
    run_until(spec, |_| false)
}

pub(crate) fn spec(url: impl AsRef<str>) -> Spec {
    Spec::parse(url.as_ref()).unwrap()
}

pub(crate) fn frames_of(out: &[Out]) -> usize {
    out.iter().filter(|it| matches!(it, Out::Frame(_))).count()
}

/// Stops at the first failure; its code and text.
pub(crate) fn first_failure(spec: &Spec) -> (State, Code, String) {
    let failed = |out: &[Out]| matches!(out.last(), Some(Out::State(it)) if it.code.is_some());
    let ran = run_until(spec, failed);
    let change = ran.changes().find(|it| it.code.is_some()).expect("it failed");
    assert_eq!(ran.states()[0], (State::Connecting, None));
    (change.state, change.code.unwrap(), change.detail.clone().unwrap())
}

/// A real clip; `scripts/setup` brings them.
pub(crate) fn clip(name: &str) -> PathBuf {
    let folder = env::var_os("GHOSTWATCH_CLIPS").map(PathBuf::from);
    let folder =
        folder.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/clips"));
    let path = folder.join(name);
    assert!(path.is_file(), "{} is missing: run scripts/setup", path.display());
    path
}

fn clip_spec(name: &str) -> Spec {
    spec(clip(name).to_str().unwrap())
}

#[test]
fn a_file_loses_no_picture() {
    // As counted by ffprobe -count_frames.
    for (name, frames, size) in [
        ("bikes.mp4", 250, (640, 272)),
        ("bigbuckbunny.mp4", 132, (1280, 720)),
        ("carphone_pristine.mp4", 120, (176, 144)),
    ] {
        for threads in [1, 2] {
            let ran = run(&Spec { decode_threads: threads, ..clip_spec(name) });
            assert_eq!(ran.end, End::Ended);
            assert_eq!(ran.frames().count(), frames, "{name} with {threads} threads");
            assert_eq!(ran.stream.received.load(Relaxed), frames as u64, "{name}");
            assert!(ran.metas().all(|it| it.size == size), "{name}");
            let states = [(State::Connecting, None), (State::Up, None), (State::Ended, None)];
            assert_eq!(ran.states(), states);
            assert!(ran.metas().zip(ran.metas().skip(1)).all(|(a, b)| a.pts < b.pts), "{name}");
            let timing = |it: &Meta| it.timing.arrived < it.timing.decoded;
            assert!(ran.metas().all(timing), "arrival is taken before the decoder");
        }
    }
}

#[test]
fn a_file_with_a_start_time_is_dated_by_it() {
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
    let ran = run(&Spec { start_time: Some(start), ..clip_spec("bikes.mp4") });
    assert!(ran.metas().all(|it| it.time == start + it.pts));
    assert_eq!(ran.metas().last().unwrap().pts.as_millis(), 40 * 249);
}

#[test]
fn a_looped_file_starts_an_epoch_each_time_and_loses_nothing() {
    let spec = Spec { looped: true, max_fps: Some(5.0), ..clip_spec("carphone_pristine.mp4") };
    let ran = run_until(&spec, |out| frames_of(out) == 50);
    assert_eq!(ran.end, End::Stopped);
    let mut frames = BTreeMap::<u64, usize>::new();
    ran.metas().for_each(|it| *frames.entry(it.epoch).or_default() += 1);
    // 120 pictures at 29.97 a second are 4.004 s, in which a grid of 0.2 s has 20 lines.
    assert_eq!(frames.into_iter().collect::<Vec<_>>(), [(0, 20), (1, 20), (2, 10)]);
    let ended: Vec<_> = ran.changes().filter_map(|it| it.ended).map(|it| it.frames).collect();
    assert_eq!(ended[0], ended[1]);
    assert_eq!(ran.states().last(), Some(&(State::Removed, None)));
    let rate = ran.stream.dropped(StageName::Source, Reason::Rate);
    assert_eq!(rate + 50, ran.stream.decoded.load(Relaxed));
}

#[test]
fn max_fps_takes_every_fifth_picture_of_25() {
    let ran = run(&Spec { max_fps: Some(5.0), ..clip_spec("bikes.mp4") });
    let times: Vec<_> = ran.metas().map(|it| it.pts.as_millis()).collect();
    assert_eq!(times, (0..250).step_by(5).map(|it| it * 40).collect::<Vec<_>>());
    let stream = &ran.stream;
    let decoded = stream.decoded.load(Relaxed) + stream.left_out.load(Relaxed);
    assert_eq!((decoded, stream.received.load(Relaxed)), (250, 250));
}

#[test]
fn a_file_in_realtime_comes_at_its_own_rate() {
    let started = Instant::now();
    let spec = Spec { realtime: true, ..clip_spec("bikes.mp4") };
    let ran = run_until(&spec, |out| frames_of(out) == 51);
    assert!(Duration::from_secs(2) <= started.elapsed(), "{:?}", started.elapsed());
    let decoded: Vec<_> = ran.metas().map(|it| it.timing.decoded).collect();
    assert!(Duration::from_millis(1_900) <= decoded[50] - decoded[0]);
}

/// The sample of a plane at a place, with `step` bytes per sample.
fn at(picture: &Picture, plane: usize, (x, y): (usize, usize), step: usize) -> &[u8] {
    let start = y * picture.strides[plane] + x * step;
    &picture.planes.plane(plane)[start..start + step]
}

#[test]
fn planes_are_read_in_place_in_every_format_and_size() {
    for (width, height) in [(16, 16), (17, 33), (35, 19), (641, 479), (1279, 721)] {
        for (format, layout) in [
            ("I420", Layout::I420),
            ("NV12", Layout::Nv12),
            ("RGB", Layout::Rgb),
            ("GRAY8", Layout::Gray8),
            ("I420_10LE", Layout::I420),
        ] {
            let url = format!("test:?size={width}x{height}&frames=2&pattern=red&format={format}");
            let ran = run(&spec(&url));
            assert_eq!((ran.end, ran.frames().count()), (End::Ended, 2), "{url}");
            let picture = &ran.frames().last().unwrap().picture;
            assert_eq!((picture.layout, picture.width, picture.height), (layout, width, height));
            check_red(picture, &url);
        }
    }
}

/// Checks the corners of each plane.
fn check_red(picture: &Picture, url: &str) {
    let (width, height) = (picture.width, picture.height);
    let corners = |w: usize, h: usize| [(0, 0), (w - 1, 0), (0, h - 1), (w - 1, h - 1)];
    let (half_w, half_h) = (width.div_ceil(2), height.div_ceil(2));
    // Red in BT.601, and in BT.709 where the test source takes that for its size.
    let [y, u, v] = match picture.colour.matrix {
        Matrix::Bt601 => [81, 90, 240],
        _ => [63, 102, 240],
    };
    let near =
        |got: &[u8], expected: &[u8]| got.iter().zip(expected).all(|(a, b)| a.abs_diff(*b) <= 1);
    for place in corners(width, height) {
        match picture.layout {
            Layout::I420 | Layout::Nv12 => {
                let got = at(picture, 0, place, 1);
                assert!(near(got, &[y]), "{url} {place:?}: {got:?} {:?}", picture.colour);
            }
            Layout::Rgb => assert_eq!(at(picture, 0, place, 3), [255, 0, 0], "{url}"),
            Layout::Gray8 => {
                let got = at(picture, 0, place, 1);
                assert!((60..=82).contains(&got[0]), "{url}: {got:?} {:?}", picture.colour);
            }
        }
    }
    for place in corners(half_w, half_h) {
        match picture.layout {
            Layout::I420 => {
                let got = [at(picture, 1, place, 1)[0], at(picture, 2, place, 1)[0]];
                assert!(near(&got, &[u, v]), "{url} {place:?}: {got:?}");
            }
            Layout::Nv12 => {
                let got = at(picture, 1, place, 2);
                assert!(near(got, &[u, v]), "{url} {place:?}: {got:?}");
            }
            Layout::Rgb | Layout::Gray8 => (),
        }
    }
}

#[test]
fn a_picture_beyond_the_limit_is_refused_with_both_sizes() {
    for it in [clip_spec("bikes.mp4"), spec("test:?size=640x272&frames=1")] {
        let (state, code, detail) = first_failure(&Spec { limits: (639, 4320), ..it });
        assert_eq!((state, code), (State::Down, Code::Codec));
        assert!(detail.contains("640x272") && detail.contains("639x4320"), "{detail}");
    }
}

#[test]
fn a_file_that_is_missing_or_no_video_is_tried_once_and_is_down() {
    let folder = env::temp_dir();
    let missing = folder.join("ghostwatch-no-such-file.mp4");
    let text = folder.join(format!("ghostwatch-{}.mp4", std::process::id()));
    std::fs::write(&text, "no video at all\n".repeat(100)).unwrap();
    for (path, expected) in [(&missing, Code::NotFound), (&text, Code::Codec)] {
        let ran = run(&spec(path.to_str().unwrap()));
        assert_eq!(ran.end, End::Failed);
        assert_eq!(ran.states(), [(State::Connecting, None), (State::Down, Some(expected))]);
        let detail = ran.changes().last().unwrap().detail.clone().unwrap();
        assert!(detail.contains(path.to_str().unwrap()), "{detail}");
        let connects = [&ran.stream.connects, &ran.stream.connects_failed];
        assert_eq!(connects.map(|it| it.load(Relaxed)), [0, 1]);
        assert_eq!(ran.stream.info(), None);
    }
    std::fs::remove_file(&text).unwrap();
}

#[test]
fn a_live_test_pattern_comes_at_its_rate_and_ends_after_its_frames() {
    let ran = run(&Spec { realtime: true, ..spec("test:?size=64x48&fps=50&frames=26") });
    assert_eq!((ran.end, ran.frames().count()), (End::Ended, 26));
    let decoded: Vec<_> = ran.metas().map(|it| it.timing.decoded).collect();
    assert!(Duration::from_millis(450) <= decoded[25] - decoded[0]);
}

/// Codes the start of a clip again; needs Debian's `ffmpeg`.
fn recoded(to: &Path, arguments: &[&str]) {
    let output = Command::new("ffmpeg")
        .args(["-nostdin", "-loglevel", "error", "-i"])
        .arg(clip("bikes.mp4"))
        .args(["-an", "-frames:v", "10"])
        .args(arguments)
        .arg(to)
        .output()
        .expect("ffmpeg is there: run scripts/setup test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_stream_says_its_codec_and_its_size() {
    let folder = tempfile::tempdir().unwrap();
    let check = |spec: &Spec, codec: &str, size: (u32, u32)| {
        let ran = run(spec);
        assert_eq!(ran.stream.info(), Some((codec.to_owned(), size.0, size.1)));
        let connects = [&ran.stream.connects, &ran.stream.connects_failed];
        assert_eq!(connects.map(|it| it.load(Relaxed)), [1, 0]);
    };
    check(&spec("test:?size=96x64&frames=3"), "raw", (96, 64));
    check(&clip_spec("bikes.mp4"), "h264", (640, 272));
    for (name, encoder, codec) in [
        ("a.avi", "mjpeg", "mjpeg"),
        ("a.mp4", "libx265", "h265"),
        ("b.mp4", "mpeg4", "mpeg4"),
        ("a.mpg", "mpeg2video", "mpeg2"),
        ("a.webm", "libvpx", "vp8"),
    ] {
        let path = folder.path().join(name);
        recoded(&path, &["-c:v", encoder, "-s", "320x240"]);
        check(&spec(path.to_str().unwrap()), codec, (320, 240));
    }
}

#[test]
fn a_size_that_changes_in_the_middle_of_a_stream_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let mut both = Vec::new();
    for (name, size) in [("a.ts", "320x240"), ("b.ts", "200x120")] {
        let path = folder.path().join(name);
        recoded(&path, &["-c:v", "libx264", "-s", size]);
        both.extend(std::fs::read(path).unwrap());
    }
    let path = folder.path().join("both.ts");
    std::fs::write(&path, both).unwrap();
    let ran = run(&spec(path.to_str().unwrap()));
    let sizes: Vec<_> = ran.metas().map(|it| it.size).collect();
    assert_eq!(sizes, [[(320, 240); 10], [(200, 120); 10]].concat());
    assert_eq!(ran.stream.info(), Some(("h264".to_owned(), 200, 120)));
}
