//! Damaged streams through real decoders: which broken pictures are noticed, and what becomes of them.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ghostwatch::{
    frame::{Frame, Picture},
    health::{self, Flag},
    ledger::Stream,
    source::{End, Settings, gst::GstOpener},
    stage::{Reason, StageName},
};

use crate::{
    source::{Out, Ran, clip, run_opener, run_until, spec},
    support::size,
    support_media::ffmpeg,
    support_proxy::{Damage, Mode, Proxy, Random},
    support_rtsp::{Media, Server},
};

const H264: &str = "libx264";
const H265: &str = "libx265 -x265-params log-level=error";

/// A scene with motion everywhere, four times as fast as it was, with a keyframe every 25 pictures.
fn made(folder: &Path, codec: &str) -> PathBuf {
    let path = folder.join(format!("{}.mp4", &codec[..7]));
    let from = clip("bikes.mp4");
    let video = "-an -vf setpts=PTS/4 -r 100 -g 25 -b:v 1600k";
    ffmpeg(&format!("-i {} {video} -c:v {codec}", from.display()), &path);
    path
}

/// Every fourth pixel of every fourth row of the luma.
fn luma(picture: &Picture) -> Vec<u8> {
    let plane = picture.planes.plane(0);
    let rows = (0..picture.height).step_by(4);
    rows.flat_map(|y| plane[y * picture.strides[0]..][..picture.width].iter().step_by(4))
        .copied()
        .collect()
}

fn difference(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum: u64 = a.iter().zip(b).map(|it| u64::from(it.0.abs_diff(*it.1))).sum();
    sum as f64 / a.len() as f64
}

/// A picture that is further than this from what was sent is broken: the mean difference in levels.
const BROKEN: f64 = 1.0;

/// What became of the pictures of a damaged stream.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    dropped: u64,
    /// Handed on though broken.
    missed: usize,
    /// Handed on, and as sent.
    good: usize,
}

/// Compares what was handed on with what was sent: with the picture of the same time, or with the
/// most similar one where times are others.
fn outcome(ran: &Ran, sent: &[(Duration, Vec<u8>)], by_time: bool) -> Outcome {
    let broken = |frame: &&Frame| {
        let got = luma(&frame.picture);
        let of_time = |it: &&(Duration, Vec<u8>)| !by_time || it.0 == frame.meta.pts;
        let near = sent.iter().filter(of_time).map(|it| difference(&it.1, &got));
        BROKEN < near.fold(255.0, f64::min)
    };
    let missed = ran.frames().filter(broken).count();
    let dropped = ran.stream.dropped(StageName::Source, Reason::Corrupt);
    assert_eq!(dropped, ran.stream.dropped_total());
    Outcome { dropped, missed, good: ran.frames().count() - missed }
}

fn whole(path: &Path) -> Vec<(Duration, Vec<u8>)> {
    let ran = run_until(&spec(path.to_str().unwrap()), |_| false);
    assert_eq!((ran.end, ran.stream.dropped_total()), (End::Ended, 0), "nothing is broken in it");
    ran.frames().map(|it| (it.meta.pts, luma(&it.picture))).collect()
}

/// Flips so many bits of the pictures' data.
fn flipped(path: &Path, seed: u64, bits: usize) -> PathBuf {
    let mut bytes = fs::read(path).unwrap();
    let data = bytes.windows(4).position(|it| it == b"mdat").unwrap() + 4;
    let length = u32::from_be_bytes(bytes[data - 8..data - 4].try_into().unwrap()) as usize - 8;
    let mut random = Random(seed);
    for _ in 0..bits {
        let at = data + (random.next() * length as f64) as usize;
        bytes[at] ^= 1 << (random.next() * 8.0) as u32;
    }
    let path = path.with_extension(format!("{seed}.mp4"));
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn flipped_bits_are_noticed_in_h264_and_some_of_them_in_h265() {
    let folder = tempfile::tempdir().unwrap();
    for codec in [H264, H265] {
        let path = made(folder.path(), codec);
        let sent = whole(&path);
        assert_eq!(sent.len(), 250);
        let mut all = Outcome::default();
        for seed in 1..=size(4, 40) {
            let path = flipped(&path, seed, 2 + 4 * (seed as usize % 4));
            let ran = run_until(&spec(path.to_str().unwrap()), |_| false);
            assert_eq!(ran.end, End::Ended);
            assert!(ran.metas().all(|it| it.size == (640, 272)));
            let it = outcome(&ran, &sent, true);
            println!("{codec} {seed}: {it:?}");
            all.dropped += it.dropped;
            all.missed += it.missed;
            all.good += it.good;
        }
        println!("{codec}: {all:?}");
        if codec == H264 {
            assert_eq!(all.missed, 0, "{all:?}");
        }
        assert!(0 < all.dropped && 0 < all.good, "{all:?}");
    }
}

/// Reads the file over RTSP, through a proxy that damages it.
fn damaged(path: &Path, codec: &str, damage: Damage) -> (Ran, Proxy) {
    let media = match codec {
        H264 => Media::File { path: path.to_owned(), times: 1 },
        _ => Media::H265File(path.to_owned()),
    };
    let server = Server::start(&media, 0, None);
    let proxy = Proxy::start(server.port());
    proxy.set(Mode::Damage(damage));
    let failed = |out: &[Out]| matches!(out.last(), Some(Out::State(it)) if it.code.is_some());
    (run_until(&spec(proxy.url()), failed), proxy)
}

#[test]
fn after_a_lost_packet_nearly_all_pictures_are_counted_and_not_handed_on_until_a_keyframe() {
    let folder = tempfile::tempdir().unwrap();
    for codec in [H264, H265] {
        let path = made(folder.path(), codec);
        let sent = whole(&path);
        for (loss, seed) in [0.01, 0.05, 0.2].into_iter().take(size(2, 3)).zip(1..) {
            let none = Damage::default();
            let (ran, proxy) = damaged(&path, codec, Damage { seed, loss, ..none });
            let it = outcome(&ran, &sent, false);
            println!("{codec} loss {loss}: {it:?} {:?}", proxy.done());
            // Not all, and not yet explained why: measured were 1 of 179 in H.264, 5 of 107 in H.265.
            assert!(it.missed as u64 * 10 <= it.dropped, "{codec} {loss}: {it:?}");
            assert!(0 < it.dropped, "{codec} loss {loss}: {it:?} {:?}", proxy.done());
        }
    }
}

#[test]
fn bits_that_flip_on_the_way_are_noticed_in_h264_but_for_few() {
    let folder = tempfile::tempdir().unwrap();
    for codec in [H264, H265].into_iter().take(size(1, 2)) {
        let path = made(folder.path(), codec);
        let sent = whole(&path);
        for (flip, seed) in [0.005, 0.05].into_iter().zip(1..) {
            let (ran, proxy) = damaged(&path, codec, Damage { seed, flip, ..Damage::default() });
            let it = outcome(&ran, &sent, false);
            println!("{codec} flip {flip}: {it:?} {:?}", proxy.done());
            // One flip in 21 had the decoder take another way and say nothing.
            if codec == H264 {
                assert!(it.missed as u64 * 50 <= it.dropped, "{it:?} {:?}", proxy.done());
                assert!(0 < it.dropped, "{it:?} {:?}", proxy.done());
            }
        }
    }
}

#[test]
fn broken_pictures_go_on_with_their_flag_where_that_is_configured() {
    let folder = tempfile::tempdir().unwrap();
    let path = made(folder.path(), H264);
    let spec = spec(flipped(&path, 1, 6).to_str().unwrap());
    let run = |label_corrupt_pictures| {
        let settings = health::Settings { label_corrupt_pictures, ..health::Settings::default() };
        let stream = Arc::new(Stream::watched("a", settings));
        let mut opener = GstOpener::new(spec.clone(), stream.clone()).unwrap();
        let ran = run_opener(&mut opener, Settings::new(&spec, 0), stream, |_| false);
        ran.check_account();
        let corrupt = |it: &&Frame| it.meta.quality.flags == [Flag::Corrupt];
        let flagged = ran.frames().filter(corrupt).count() as u64;
        (flagged, ran.stream.dropped(StageName::Source, Reason::Corrupt), ran.frames().count())
    };
    let (flagged, dropped, all) = run(true);
    assert!(0 < flagged && dropped == 0, "{flagged} {dropped}");
    assert_eq!(run(false), (0, flagged, all - flagged as usize));
}
