//! Streams of which few pictures are wanted: what is decoded, and that the labels are the same.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use ghostwatch::{
    frame::Code,
    ledger::Stream,
    source::{Settings, Spec, gst::GstOpener},
};

use crate::{
    source::{Out, Ran, clip, run_opener, run_until, spec},
    support::size,
    support_media::ffmpeg,
    support_proxy::{Mode, Proxy},
    support_rtsp::{Media, Server},
};

/// Ten seconds of 25 pictures a second.
fn made(folder: &Path, name: &str, codec: &str) -> PathBuf {
    let path = folder.join(name);
    ffmpeg(&format!("-i {} -an -c:v {codec}", clip("bikes.mp4").display()), &path);
    path
}

/// Reads a file, with a limit; `whole`: every picture is decoded, and then most are dropped.
fn read(path: &Path, fps: f64, whole: bool) -> Ran {
    let spec = Spec { max_fps: Some(fps), ..spec(path.to_str().unwrap()) };
    let stream = Arc::new(Stream::new("test"));
    let opened = Spec { max_fps: spec.max_fps.filter(|_| !whole), ..spec.clone() };
    let mut opener = GstOpener::new(opened, stream.clone()).unwrap();
    let ran = run_opener(&mut opener, Settings::new(&spec, 0), stream, |_| false);
    ran.check_account();
    ran
}

fn times(ran: &Ran) -> Vec<u64> {
    ran.metas().map(|it| it.pts.as_millis() as u64).collect()
}

#[test]
fn fewer_pictures_are_decoded_and_the_same_ones_labelled() {
    let folder = tempfile::tempdir().unwrap();
    // A camera's groups, one of which a second; pictures that are shown before those that they are
    // made from; and groups that are open, at whose keyframes decoding must not begin.
    for (name, codec, fps, most) in [
        ("keys.mkv", "libx264 -g 25 -sc_threshold 0 -bf 0", 1.0, 40),
        ("groups.mkv", "libx264 -g 50 -sc_threshold 0 -bf 0", 1.0, 160),
        ("spare.mkv", "libx264 -g 50 -sc_threshold 0 -bf 2 -b_strategy 0", 5.0, 200),
        ("codes.ts", "libx264 -g 25 -sc_threshold 0 -bf 0", 1.0, 40),
        ("open.mkv", "libx264 -g 25 -bf 2 -flags -cgop -x264-params open-gop=1", 1.0, 240),
        (
            "h265.mkv",
            "libx265 -x265-params log-level=error:keyint=25:open-gop=0:bframes=0",
            1.0,
            40,
        ),
        ("cra.mkv", "libx265 -x265-params log-level=error:keyint=25:open-gop=1", 1.0, 240),
        ("mjpeg.mkv", "mjpeg", 2.0, 25),
        ("mpeg4.mkv", "mpeg4 -g 25", 1.0, 250),
    ] {
        let path = made(folder.path(), name, codec);
        let (all, few) = (read(&path, fps, true), read(&path, fps, false));
        assert_eq!(times(&few), times(&all), "{name}");
        let decoded = few.stream.decoded.load(Relaxed);
        let left_out = few.stream.left_out.load(Relaxed);
        println!("{name}: {decoded} decoded, {left_out} not");
        // What is held at the end of a file is forgotten without being counted as decoded.
        assert_eq!((decoded + left_out, few.stream.received.load(Relaxed)), (250, 250), "{name}");
        assert!(decoded <= most, "{name}: {decoded} decoded");
        assert_eq!(few.metas().map(|it| it.quality.flags.len()).sum::<usize>(), 0, "{name}");
        let sums = |ran: &Ran| -> Vec<u64> {
            let luma = ran.frames().map(|it| it.picture.planes.plane(0));
            luma.map(|it| it.iter().map(|it| u64::from(*it)).sum()).collect()
        };
        assert_eq!(sums(&few), sums(&all), "{name}: the pixels are the same");
    }
}

#[test]
fn a_camera_of_which_few_pictures_are_wanted_is_still_noticed_to_be_silent_in_time() {
    let server = Server::start(&Media::Pattern { size: (320, 240), fps: 25 }, 0, None);
    let proxy = Proxy::start(server.port());
    let spec = Spec { max_fps: Some(0.5), ..spec(proxy.url()) };
    let mut silent = None;
    let ran = run_until(&spec, |out| {
        let frames = out.iter().filter(|it| matches!(it, Out::Frame(_))).count();
        if frames == 5 && silent.is_none() {
            proxy.set(Mode::Silent);
            silent = Some(Instant::now());
        }
        matches!(out.last(), Some(Out::State(it)) if it.code.is_some())
    });
    let noticed = silent.unwrap().elapsed();
    assert_eq!(ran.changes().find_map(|it| it.code), Some(Code::Stall));
    // Not after five of the periods that are left: those are two seconds.
    let limits = Duration::from_secs(3)..Duration::from_secs(6);
    assert!(limits.contains(&noticed), "{noticed:?}");
    let gaps: Vec<_> = times(&ran).windows(2).map(|it| it[1] - it[0]).collect();
    assert!(gaps.iter().all(|it| (1_500..2_600).contains(it)), "{gaps:?}");
    assert_eq!(ran.stream.dropped_total() + 5, ran.stream.decoded.load(Relaxed));
}

/// Processor time of this process.
fn cpu() -> Duration {
    let text = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

#[test]
#[ignore = "a figure, not a promise: processor time of limited streams"]
fn figures_of_what_a_limited_stream_costs() {
    let folder = tempfile::tempdir().unwrap();
    let seconds = size(10, 60);
    let from = clip("bigbuckbunny.mp4");
    for (name, gop, b) in [("IPPP, 1 s", 25, 0), ("IPPP, 2 s", 50, 0), ("IbbP, 2 s", 50, 2)] {
        let path = folder.path().join(format!("{gop}-{b}.mkv"));
        let codec = "-c:v libx264 -preset veryfast -b:v 4M -sc_threshold 0 -b_strategy 0";
        let video = format!("-an -vf scale=1920:1080 -t {seconds} -g {gop} -bf {b}");
        ffmpeg(&format!("-stream_loop 20 -i {} {video} {codec}", from.display()), &path);
        for fps in [1.0, 5.0] {
            let [before, after] = [true, false].map(|whole| {
                let started = cpu();
                let ran = read(&path, fps, whole);
                let spent = (cpu() - started).as_secs_f64() / seconds as f64;
                (spent * 1e3, ran.frames().count(), ran.stream.decoded.load(Relaxed))
            });
            println!(
                "1080p25 {name} at {fps}/s: {:.0} -> {:.0} ms of processor time a second \
                 ({:.0} %), {} -> {} labels, {} -> {} decoded",
                before.0,
                after.0,
                after.0 / before.0 * 100.0,
                before.1,
                after.1,
                before.2,
                after.2,
            );
        }
    }
}
