//! Files that are cut or damaged anywhere, and servers that mean harm: an end with a code, in time.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use ghostwatch::{
    frame::{Code, State},
    source::{End, Spec},
};

use crate::{
    source::{Ran, run_until, spec},
    support::size,
    support_camera::{H264, SDP, camera, described},
    support_media::{ffmpeg, frames_by_ffprobe},
    support_proxy::Random,
};

/// A file that never gives a picture is given up after 15 s; this machine may be busy.
const LONGEST: Duration = Duration::from_secs(25);

/// Reads what may be damaged. It ends in order or is down with a code and a reason, in time, and
/// its pictures have the size that they were made with.
fn read(path: &Path, what: &str) -> Ran {
    let started = Instant::now();
    let ran = run_until(&spec(path.to_str().unwrap()), |_| false);
    assert!(started.elapsed() < LONGEST, "{what}: {:?}", started.elapsed());
    let last = ran.changes().last().unwrap();
    match ran.end {
        End::Ended => assert_eq!((last.state, last.code), (State::Ended, None), "{what}"),
        End::Failed => {
            assert_eq!(last.state, State::Down, "{what}");
            assert!(matches!(last.code, Some(Code::Codec | Code::Error)), "{what}: {last:?}");
            let detail = last.detail.as_deref().unwrap();
            assert!(detail.contains(path.to_str().unwrap()), "{what}: {detail}");
            println!("{what}: {:?} {detail}", last.code);
        }
        other => panic!("{what}: {other:?}"),
    }
    ran
}

#[test]
fn a_file_that_is_cut_or_damaged_anywhere_ends_in_order_or_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged");
    let mut slow = 0;
    let mut runs = 0;
    for codec in ["libx264", "libx265 -x265-params log-level=error"] {
        for (container, options) in
            [("mp4", ""), ("mp4", "-movflags +faststart"), ("mkv", ""), ("ts", ""), ("raw", "")]
        {
            let container = match (container, &codec[..7]) {
                ("raw", "libx264") => "h264",
                ("raw", _) => "hevc",
                (other, _) => other,
            };
            let whole = folder.path().join(format!("whole.{container}"));
            let video = "-f lavfi -i testsrc2=size=320x240:rate=25:duration=1 -pix_fmt yuv420p";
            ffmpeg(&format!("{video} -c:v {codec} {options}"), &whole);
            let what = format!("{codec} {container} {options}");
            let ran = read(&whole, &what);
            let frames = frames_by_ffprobe(&whole);
            assert_eq!((ran.end, ran.frames().count()), (End::Ended, frames), "{what}");
            let bytes = fs::read(&whole).unwrap();
            let mut check = |bytes: &[u8], what: String| {
                fs::write(&path, bytes).unwrap();
                let started = Instant::now();
                let ran = read(&path, &what);
                slow += usize::from(Duration::from_secs(5) < started.elapsed());
                runs += 1;
                assert!(ran.stream.decoded.load(std::sync::atomic::Ordering::Relaxed) <= 40);
            };
            // At equal distances, and in steps of a few bytes through both ends, where indexes are.
            let places = size(4, 60);
            for i in 0..places {
                let at = bytes.len() * i / places;
                check(&bytes[..at], format!("{what} cut at {at}"));
                let near = (37 * i).min(bytes.len());
                check(&bytes[..bytes.len() - near], format!("{what} cut {near} before its end"));
            }
            for seed in 0..size(4, 150) {
                let mut bytes = bytes.clone();
                let mut random = Random(seed);
                // Every third time only in the first or last bytes, where the headers are.
                let (from, length) = match seed % 3 {
                    0 => (0, bytes.len()),
                    1 => (0, 1_000),
                    _ => (bytes.len() - 1_000, 1_000),
                };
                for _ in 0..1 + seed % 20 {
                    let at = from + (random.next() * length as f64) as usize;
                    bytes[at] ^= 1 << (random.next() * 8.0) as u32;
                }
                check(&bytes, format!("{what} flipped with seed {seed}"));
            }
        }
    }
    println!("{runs} damaged files, {slow} took more than 5 s");
    // Not by the time after which a file without a picture is given up.
    assert_eq!(slow, 0);
}

/// The failure of a server that means harm, and how long it took.
fn told(spec: &Spec) -> (Code, String, Duration) {
    let started = Instant::now();
    let (state, code, detail) = crate::source::first_failure(spec);
    assert_eq!(state, State::Down);
    let plain = detail.chars().all(|it| !it.is_control());
    assert!(plain && detail.len() < 2_000, "{detail:?}");
    (code, detail, started.elapsed())
}

#[test]
fn a_server_that_sends_without_end_is_given_up_and_takes_little_memory() {
    let before = memory();
    for (what, url) in [
        ("headers", camera(|_| Some(format!("200 OK\r\n{}\r\n", "X-A: b\r\n".repeat(1_000_000))))),
        ("one header", camera(|_| Some(format!("200 OK\r\nX-A: {}\r\n\r\n", "b".repeat(8 << 20))))),
        (
            "tracks",
            camera(|method| {
                let public = "200 OK\r\nPublic: DESCRIBE, SETUP, PLAY\r\n\r\n".to_owned();
                let sdp = || described(&(SDP.to_owned() + &H264.repeat(100_000)));
                Some(if method == "DESCRIBE" { sdp() } else { public })
            }),
        ),
        (
            "one line",
            camera(|method| {
                let public = "200 OK\r\nPublic: DESCRIBE, SETUP, PLAY\r\n\r\n".to_owned();
                let sdp = || described(&format!("{SDP}a=x:{}\r\n{H264}", "y".repeat(16 << 20)));
                Some(if method == "DESCRIBE" { sdp() } else { public })
            }),
        ),
        ("redirects", camera(|_| Some("302 Moved\r\nLocation: {url}\x1b[31m\r\n\r\n".to_owned()))),
        (
            "escapes",
            camera(|_| Some("500 \x1b[2Jbad\x07 thing\r\nServer: \x1b]0;x\x07\r\n\r\n".to_owned())),
        ),
    ] {
        let (code, detail, took) = told(&spec(&url));
        println!("{what}: {code:?} after {took:?}, {} KiB more: {detail}", memory() - before);
        assert!(took < Duration::from_secs(30), "{what}: {took:?}");
    }
    let grown = memory() - before;
    assert!(grown < 300_000, "{grown} KiB more");
}

/// The most memory that this process ever had, in KiB.
fn memory() -> i64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|it| it.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
