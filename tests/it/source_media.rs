//! Files of every kind, and streams whose pictures change: counts, sizes, colours.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ghostwatch::{
    frame::{Code, Layout, Matrix, Picture},
    preprocess::{Geometry, Preprocessor},
    source::{End, Spec, url::Transport},
};

use crate::{
    source::{Out, frames_of, run_until, spec},
    support_media::{ffmpeg, frames_by_ffprobe, launch},
    support_rtsp::{Media, Server},
};

fn file(path: &Path) -> Spec {
    spec(path.to_str().unwrap())
}

#[test]
fn files_of_every_kind_give_as_many_pictures_as_ffprobe_counts() {
    let folder = tempfile::tempdir().unwrap();
    let video = "-f lavfi -i testsrc=size=320x240:rate=25:duration=3";
    let audio = format!("{video} -f lavfi -i sine=duration=3");
    for (name, arguments, pictures) in [
        ("b-frames.mp4", format!("{video} -c:v libx264 -bf 3"), 75),
        ("index-first.mp4", format!("{video} -c:v libx264 -movflags +faststart"), 75),
        // Without B-frames: with them and an edit list, qtdemux 1.22 leaves out the last two.
        ("fragments.mp4", format!("{video} -c:v libx264 -bf 0 -g 10 -movflags +frag_keyframe"), 75),
        ("with-audio.mp4", format!("{audio} -c:v libx264 -c:a aac"), 75),
        ("audio-first.mkv", format!("{audio} -map 1 -map 0 -c:v libx264 -c:a aac"), 75),
        ("b-frames.ts", format!("{video} -c:v libx264 -bf 3"), 75),
        ("h265.mp4", format!("{video} -c:v libx265 -x265-params log-level=error"), 75),
        ("variable.mp4", format!("{video} -vf select=not(mod(n\\,3)) -fps_mode vfr"), 25),
        ("variable.mkv", format!("{video} -vf select=lt(mod(n\\,7)\\,4) -fps_mode vfr"), 44),
        ("motion.avi", format!("{video} -c:v mjpeg"), 75),
    ] {
        let path = folder.path().join(name);
        ffmpeg(&format!("{arguments} -pix_fmt yuv420p"), &path);
        let ran = run_until(&file(&path), |_| false);
        assert_eq!(ran.end, End::Ended, "{name}: {:?}", ran.changes().collect::<Vec<_>>());
        assert_eq!(
            (ran.frames().count(), frames_by_ffprobe(&path)),
            (pictures, pictures),
            "{name}"
        );
        assert!(ran.metas().zip(ran.metas().skip(1)).all(|(a, b)| a.pts < b.pts), "{name}");
    }
}

#[test]
fn a_cut_or_empty_file_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str, options: &str| {
        let path = folder.path().join(name);
        let video = "-f lavfi -i testsrc2=size=320x240:rate=25:duration=3 -c:v libx264";
        ffmpeg(&format!("{video} -pix_fmt yuv420p {options}"), &path);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        path
    };
    let empty = folder.path().join("empty.mp4");
    fs::write(&empty, "").unwrap();
    // Without its index a file cannot be read; with it, what is there is.
    for (path, some) in [
        (make("index-last.mp4", ""), false),
        (make("index-first.mp4", "-movflags +faststart"), true),
        (make("cut.mkv", ""), true),
        (make("cut.ts", ""), true),
        (empty, false),
    ] {
        let started = Instant::now();
        let ran = run_until(&file(&path), |_| false);
        let (name, took) = (path.display(), started.elapsed());
        // parsebin can swallow the error of a demuxer, and did on a busy machine: then it is told when
        // there is no picture after 15 s.
        assert!(took < Duration::from_secs(20), "{name}: {took:?}");
        let count = ran.frames().count();
        if some {
            assert!((1..75).contains(&count), "{name}: {count}");
        } else {
            assert_eq!((count, ran.end), (0, End::Failed), "{name}");
            let code = ran.changes().last().unwrap().code;
            assert_eq!(code, Some(Code::Codec), "{name}");
        }
    }
}

/// A run of one colour in one H.264 stream.
struct Piece {
    size: (u32, u32),
    /// Range, matrix, transfer and primaries, in GStreamer's numbers.
    colorimetry: &'static str,
    rgb: [u8; 3],
}

const FRAMES: usize = 12;

/// Writes pieces one after the other, as a camera does whose settings are changed.
fn h264(folder: &Path, pieces: &[Piece]) -> PathBuf {
    let mut all = Vec::new();
    for (i, it) in pieces.iter().enumerate() {
        let path = folder.join(format!("{i}.h264"));
        let ((width, height), [r, g, b]) = (it.size, it.rgb);
        launch(&format!(
            "videotestsrc num-buffers={FRAMES} pattern=solid-color \
             foreground-color=0xff{r:02x}{g:02x}{b:02x} \
             ! video/x-raw,format=RGB,width={width},height={height},framerate=25/1 \
             ! videoconvert ! video/x-raw,format=I420,colorimetry={} \
             ! x264enc pass=qual quantizer=2 speed-preset=fast \
             ! video/x-h264,stream-format=byte-stream ! filesink location=\"{}\"",
            it.colorimetry,
            path.display()
        ));
        all.extend(fs::read(path).unwrap());
    }
    let path = folder.join("all.h264");
    fs::write(&path, all).unwrap();
    path
}

fn check_rgb(picture: &Picture, expected: [u8; 3], most: u8) {
    let geometry = Geometry { resize: 64, crop: 64 };
    let mut pixels = vec![0; 64 * 64 * 3];
    Preprocessor::new(geometry).run(picture, &mut pixels).unwrap();
    for pixel in pixels.chunks(3) {
        let near = pixel.iter().zip(expected).all(|(a, b)| a.abs_diff(b) <= most);
        assert!(near, "{pixel:?}, expected {expected:?}: {:?}", picture.colour);
    }
}

#[test]
fn sizes_and_colours_may_change_in_a_stream_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let pieces = [
        Piece { size: (640, 360), colorimetry: "2:4:16:4", rgb: [200, 100, 50] },
        Piece { size: (320, 240), colorimetry: "2:3:5:1", rgb: [40, 180, 90] },
        Piece { size: (320, 240), colorimetry: "2:4:16:4", rgb: [40, 180, 90] },
        Piece { size: (1282, 722), colorimetry: "2:3:5:1", rgb: [90, 60, 210] },
        Piece { size: (64, 64), colorimetry: "1:3:5:1", rgb: [200, 100, 50] },
    ];
    let path = h264(folder.path(), &pieces);
    for threads in [1, 2] {
        let ran = run_until(&Spec { decode_threads: threads, ..file(&path) }, |_| false);
        assert_eq!(ran.end, End::Ended, "{:?}", ran.changes().collect::<Vec<_>>());
        assert_eq!(ran.frames().count(), FRAMES * pieces.len());
        for (frame, i) in ran.frames().zip(0..) {
            let piece = &pieces[i / FRAMES];
            assert_eq!(frame.meta.size, piece.size, "frame {i}");
            check_rgb(&frame.picture, piece.rgb, 3);
        }
    }
}

#[test]
fn matrix_and_range_come_from_the_stream() {
    let folder = tempfile::tempdir().unwrap();
    for (matrix, text) in [(Matrix::Bt601, "4"), (Matrix::Bt709, "3"), (Matrix::Bt2020, "6")] {
        for (full_range, range) in [(false, 2), (true, 1)] {
            let colorimetry = format!("{range}:{text}:5:1").leak();
            let rgb = [200, 100, 50];
            let path = h264(folder.path(), &[Piece { size: (320, 240), colorimetry, rgb }]);
            let ran = run_until(&file(&path), |_| false);
            assert_eq!(ran.frames().count(), FRAMES);
            let picture = &ran.frames().last().unwrap().picture;
            let colour = picture.colour;
            assert_eq!((colour.matrix, colour.full_range), (matrix, full_range), "{colorimetry}");
            check_rgb(picture, rgb, 3);
        }
    }
}

#[test]
fn every_pixel_of_every_size_and_format_is_where_it_belongs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("raw");
    for (width, height) in [
        (16, 16),
        (17, 16),
        (16, 17),
        (18, 18),
        (33, 35),
        (641, 361),
        (16, 4096),
        (4096, 16),
        (1279, 721),
    ] {
        for (format, layout) in [
            ("I420", Layout::I420),
            ("NV12", Layout::Nv12),
            ("RGB", Layout::Rgb),
            ("GRAY8", Layout::Gray8),
            ("YUY2", Layout::Rgb),
        ] {
            let url =
                format!("test:?size={width}x{height}&frames=1&pattern=colors&format={format}");
            let ran = run_until(&spec(&url), |_| false);
            let picture = &ran.frames().next().unwrap_or_else(|| panic!("{url}")).picture;
            assert_eq!((picture.width, picture.height), (width, height));
            assert_eq!(picture.layout, layout, "{url}");
            // At odd widths red comes out as dark as 217, not yet explained: see README, Limits.
            if format == "YUY2" && width % 2 == 1 {
                continue;
            }
            if format == "YUY2" {
                // How exactly it is converted is videoconvert's affair, but not the colour.
                let ran = run_until(&spec(url.replace("colors", "red")), |_| false);
                // Measured at 16x16: 249, 1, 0.
                check_rgb(&ran.frames().next().unwrap().picture, [255, 0, 0], 16);
                continue;
            }
            launch(&format!(
                "videotestsrc num-buffers=1 pattern=colors \
                 ! video/x-raw,format={format},width={width},height={height},framerate=30/1 \
                 ! filesink location=\"{}\"",
                path.display()
            ));
            check_planes(picture, &fs::read(&path).unwrap(), &url);
        }
    }
}

/// Compares with a picture as GStreamer lays it out: rows padded to 4 bytes, and the planes of
/// I420 and NV12 to an even number of rows.
fn check_planes(picture: &Picture, raw: &[u8], url: &str) {
    let (w, h) = (picture.width, picture.height);
    let (half_w, half_h) = (w.div_ceil(2), h.div_ceil(2));
    let luma_rows = h.next_multiple_of(2);
    // Bytes of a row, rows, rows stored.
    let planes = match picture.layout {
        Layout::I420 => vec![(w, h, luma_rows), (half_w, half_h, half_h), (half_w, half_h, half_h)],
        Layout::Nv12 => vec![(w, h, luma_rows), (2 * half_w, half_h, half_h)],
        Layout::Rgb => vec![(3 * w, h, h)],
        Layout::Gray8 => vec![(w, h, h)],
    };
    let mut start = 0;
    for (i, (bytes, rows, stored)) in planes.into_iter().enumerate() {
        let stride = bytes.next_multiple_of(4);
        for y in 0..rows {
            let at = y * picture.strides[i];
            let got = &picture.planes.plane(i)[at..at + bytes];
            let expected = &raw[start + y * stride..][..bytes];
            assert!(got == expected, "{url}: plane {i}, row {y}");
        }
        start += stored * stride;
    }
    assert_eq!(start, raw.len(), "{url}: the whole picture was compared");
}

#[test]
fn h265_and_jpeg_over_rtsp_and_rtp_over_udp_give_pictures() {
    for (media, transport) in [
        (Media::H265 { size: (320, 240), fps: 25 }, Transport::Tcp),
        (Media::H265 { size: (320, 240), fps: 25 }, Transport::Udp),
        (Media::Jpeg { size: (320, 240), fps: 25 }, Transport::Tcp),
        (Media::Pattern { size: (320, 240), fps: 25 }, Transport::Udp),
        (Media::Pattern { size: (320, 240), fps: 25 }, Transport::Auto),
    ] {
        let server = Server::start(&media, 0, None);
        let failed = |out: &[Out]| matches!(out.last(), Some(Out::State(it)) if it.code.is_some());
        let ran = run_until(&Spec { transport, ..spec(server.url()) }, |out| {
            30 <= frames_of(out) || failed(out)
        });
        let changes: Vec<_> = ran.changes().collect();
        assert_eq!(ran.frames().count(), 30, "{media:?} {transport:?}: {changes:?}");
        assert!(ran.metas().all(|it| it.size == (320, 240)));
    }
}
