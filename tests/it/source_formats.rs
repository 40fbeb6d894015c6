//! Pictures of every size and sampling, against the pixels that ffmpeg decodes.

use std::{fs, path::Path};

use ghostwatch::{
    frame::{Code, Frame, Layout, Picture},
    source::{End, Spec},
};

use crate::{
    source::{first_failure, run_until, spec},
    support_media::ffmpeg,
};

/// The bytes of a picture without padding, plane by plane, and ffmpeg's name for that.
fn packed(picture: &Picture) -> (Vec<Vec<u8>>, &'static str) {
    let (w, h) = (picture.width, picture.height);
    let (half_w, half_h) = (w.div_ceil(2), h.div_ceil(2));
    let (planes, name) = match picture.layout {
        // ffmpeg makes its own range of the picture where the name says another one.
        Layout::I420 if picture.colour.full_range => {
            (vec![(w, h), (half_w, half_h), (half_w, half_h)], "yuvj420p")
        }
        Layout::I420 => (vec![(w, h), (half_w, half_h), (half_w, half_h)], "yuv420p"),
        Layout::Nv12 => (vec![(w, h), (2 * half_w, half_h)], "nv12"),
        Layout::Rgb => (vec![(3 * w, h)], "rgb24"),
        Layout::Gray8 => (vec![(w, h)], "gray"),
    };
    let plane = |(i, (bytes, rows)): (usize, (usize, usize))| {
        let row = |y: usize| &picture.planes.plane(i)[y * picture.strides[i]..][..bytes];
        (0..rows).flat_map(row).copied().collect()
    };
    (planes.into_iter().enumerate().map(plane).collect(), name)
}

/// The largest mean difference of a plane to what ffmpeg decodes, in levels.
fn distance(picture: &Picture, path: &Path) -> f64 {
    let (planes, format) = packed(picture);
    let raw = path.with_extension("raw");
    let first = format!("-i {} -frames:v 1 -pix_fmt {format} -f rawvideo", path.display());
    ffmpeg(&first, &raw);
    let expected = fs::read(raw).unwrap();
    assert_eq!(expected.len(), planes.iter().map(Vec::len).sum::<usize>(), "{path:?}");
    let mut expected = expected.as_slice();
    let mut worst = 0.0;
    for plane in planes {
        let (these, rest) = expected.split_at(plane.len());
        let sum: u64 = plane.iter().zip(these).map(|it| u64::from(it.0.abs_diff(*it.1))).sum();
        worst = f64::max(worst, sum as f64 / plane.len() as f64);
        expected = rest;
    }
    worst
}

fn made(folder: &Path, size: (u32, u32), arguments: &str) -> std::path::PathBuf {
    let path = folder.join("a.mp4");
    let video = format!("-f lavfi -i testsrc2=size={}x{}:rate=25", size.0, size.1);
    ffmpeg(&format!("{video} -frames:v 3 {arguments}"), &path);
    path
}

/// What `videoconvert` makes of other samplings is its affair, but no row is elsewhere: that differs
/// by tens of levels.
const CONVERTED: f64 = 12.0;

#[test]
fn pixels_of_every_sampling_depth_and_size_are_those_that_ffmpeg_decodes() {
    let folder = tempfile::tempdir().unwrap();
    let x265 = "-c:v libx265 -x265-params log-level=error";
    let interlaced = "-c:v libx264 -flags +ildct+ilme -x264opts tff=1 -pix_fmt yuv420p";
    for (size, arguments, most) in [
        ((16, 16), "-c:v libx264 -pix_fmt yuv420p", 0.0),
        ((18, 34), "-c:v libx264 -pix_fmt yuv420p", 0.0),
        ((642, 362), "-c:v libx264 -pix_fmt yuv420p", 0.0),
        ((1366, 768), &format!("{x265} -pix_fmt yuv420p"), 0.0),
        ((640, 368), interlaced, 0.0),
        ((642, 362), "-c:v libx264 -pix_fmt yuvj420p", 0.0),
        ((642, 362), &format!("{x265} -pix_fmt yuvj420p"), 0.0),
        ((642, 362), "-c:v libx264 -pix_fmt yuv420p10le", CONVERTED),
        ((642, 362), &format!("{x265} -pix_fmt yuv420p10le"), CONVERTED),
        ((642, 362), "-c:v libx264 -pix_fmt yuv422p", CONVERTED),
        ((642, 362), "-c:v libx264 -pix_fmt yuv422p10le", CONVERTED),
        ((642, 362), "-c:v libx264 -pix_fmt yuv444p", CONVERTED),
        ((642, 362), &format!("{x265} -pix_fmt yuv444p"), CONVERTED),
    ] {
        let path = made(folder.path(), size, arguments);
        let ran = run_until(&spec(path.to_str().unwrap()), |_| false);
        assert_eq!((ran.end, ran.frames().count()), (End::Ended, 3), "{size:?} {arguments}");
        assert!(ran.metas().all(|it| it.size == size), "{size:?} {arguments}");
        let full = |it: &Frame| {
            let is_full = it.picture.colour.full_range == arguments.contains("yuvj");
            is_full || it.picture.layout == Layout::Rgb
        };
        assert!(ran.frames().all(full), "{size:?} {arguments}");
        let picture = &ran.frames().next().unwrap().picture;
        let distance = distance(picture, &path);
        println!("{size:?} {arguments}: {distance:.3} as {:?}", picture.layout);
        assert!(distance <= most, "{size:?} {arguments}: {distance} as {:?}", picture.layout);
    }
}

#[test]
fn pictures_of_8192x8192_are_refused_or_read_as_the_limits_say() {
    let folder = tempfile::tempdir().unwrap();
    let path = made(folder.path(), (8192, 8192), "-c:v libx264 -preset ultrafast -pix_fmt yuv420p");
    let it = spec(path.to_str().unwrap());
    let (_, code, detail) = first_failure(&it);
    assert_eq!(code, Code::Codec);
    assert!(detail.contains("8192x8192") && detail.contains("limits.max_width"), "{detail}");
    let ran = run_until(&Spec { limits: (8192, 8192), ..it }, |_| false);
    assert_eq!((ran.end, ran.frames().count()), (End::Ended, 3));
    assert_eq!(distance(&ran.frames().next().unwrap().picture, &path), 0.0);
}

#[test]
fn a_rotated_picture_is_given_as_it_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    let options = "-c:v libx264 -pix_fmt yuv420p -metadata:s:v rotate=90";
    let path = made(folder.path(), (320, 240), options);
    let ran = run_until(&spec(path.to_str().unwrap()), |_| false);
    assert_eq!((ran.end, ran.frames().count()), (End::Ended, 3));
    assert!(ran.metas().all(|it| it.size == (320, 240)));
}
