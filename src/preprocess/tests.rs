//! The promises of preprocess, kept against `tests/golden/preprocess.json`.

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    frame::{Colour, Layout, Matrix, Picture, Planes, Siting},
    preprocess::{Geometry, PLANS_MAX, Preprocessor, centre, image},
    stage::Reject,
};

struct Bytes([Vec<u8>; 3]);

impl Planes for Bytes {
    fn plane(&self, index: usize) -> &[u8] {
        &self.0[index]
    }
}

const COLOUR: Colour = Colour {
    matrix: Matrix::Bt709,
    full_range: false,
    siting_x: Siting::Cosited,
    siting_y: Siting::Centre,
};

const DEFAULT: Geometry = Geometry { resize: 256, crop: 224 };

fn golden() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/preprocess.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn number(case: &Value, key: &str) -> usize {
    case[key].as_u64().unwrap() as usize
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|it| format!("{it:02x}")).collect()
}

/// `bytes_of` in `make_preprocess.py`.
fn byte_of(x: usize, y: usize, channel: usize, seed: usize) -> u8 {
    let (x, y) = (x as u32, y as u32);
    let ramp = (2 * x + y + channel as u32 * 40) as u8;
    let base = x.wrapping_mul(x).wrapping_add(y.wrapping_mul(y).wrapping_mul(3));
    let base = base.wrapping_add(x.wrapping_mul(y).wrapping_mul(2));
    let base = base.wrapping_add((channel * 85 + seed * 29) as u32);
    let noise = (base.wrapping_mul(2_654_435_761) >> 24) as u8;
    if ((x >> 5) ^ (y >> 5)) & 1 == 1 { noise } else { ramp }
}

/// A plane whose rows are `gap` bytes apart from the next, the last row without a gap.
fn plane((row, rows): (usize, usize), gap: usize, value: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((row + gap) * rows);
    for y in 0..rows {
        bytes.extend((0..row).map(|x| value(x, y)));
        bytes.resize(bytes.len() + if y + 1 < rows { gap } else { 0 }, 0xA5);
    }
    bytes
}

fn picture(layout: Layout, size: (usize, usize), colour: Colour, planes: Bytes) -> Picture {
    let strides = [0, 1, 2].map(|it| {
        let rows = if it == 0 || layout == Layout::Rgb { size.1 } else { size.1.div_ceil(2) };
        let row = match (layout, it) {
            (Layout::Rgb, _) => size.0 * 3,
            (_, 0) => size.0,
            (Layout::Nv12, _) => size.0.div_ceil(2) * 2,
            _ => size.0.div_ceil(2),
        };
        // With one row no gap shows in the length; any stride is right.
        if rows == 1 { row } else { (planes.0[it].len().saturating_sub(row)) / (rows - 1) }
    });
    let (width, height) = size;
    Picture { layout, colour, width, height, strides, planes: Box::new(planes) }
}

fn rgb(size: (usize, usize), gap: usize, seed: usize) -> Picture {
    let bytes = plane((size.0 * 3, size.1), gap, |x, y| byte_of(x / 3, y, x % 3, seed));
    picture(Layout::Rgb, size, COLOUR, Bytes([bytes, vec![], vec![]]))
}

/// The picture of `yuv_case` in `make_preprocess.py`.
fn yuv(
    layout: Layout,
    size: (usize, usize),
    gap: usize,
    (colour, seed): (Colour, usize),
) -> Picture {
    let half = (size.0.div_ceil(2), size.1.div_ceil(2));
    let squeezed = |x, y, channel, base, span| {
        base + (u32::from(byte_of(x, y, channel, seed)) * span / 255) as u8
    };
    let luma = plane(size, gap, |x, y| squeezed(x, y, 0, 80, 90));
    let planes = if layout == Layout::I420 {
        [1, 2].map(|it| plane(half, gap, |x, y| squeezed(x, y, it, 98, 60)))
    } else {
        let pairs = (half.0 * 2, half.1);
        [plane(pairs, gap, |x, y| squeezed(x / 2, y, 1 + x % 2, 98, 60)), vec![]]
    };
    let [second, third] = planes;
    picture(layout, size, colour, Bytes([luma, second, third]))
}

fn gray(size: (usize, usize), full_range: bool, seed: usize) -> Picture {
    let bytes = plane(size, 7, |x, y| byte_of(x, y, 0, seed));
    let colour = Colour { full_range, ..COLOUR };
    picture(Layout::Gray8, size, colour, Bytes([bytes, vec![], vec![]]))
}

fn run(picture: &Picture, geometry: Geometry, simd: bool) -> Vec<u8> {
    let mut preprocessor =
        if simd { Preprocessor::new(geometry) } else { Preprocessor::scalar(geometry) };
    let mut out = vec![0; geometry.bytes()];
    preprocessor.run(picture, &mut out).unwrap();
    out
}

#[test]
fn rgb_and_full_range_grey_give_the_bytes_of_pillow_and_torchvision() {
    let golden = golden();
    let cases = golden["resize"].as_array().unwrap();
    assert!(20 <= cases.len(), "the golden file has at least 20 sizes");
    for case in cases {
        let size = (number(case, "width"), number(case, "height"));
        let geometry = Geometry { resize: number(case, "resize"), crop: number(case, "crop") };
        let seed = number(case, "seed");
        let is_gray = case["gray"].as_bool().unwrap();
        let picture = if is_gray { gray(size, true, seed) } else { rgb(size, 13, seed) };
        for simd in [true, false] {
            let out = run(&picture, geometry, simd);
            assert_eq!(case["sha256"], hash(&out), "simd {simd}, {case}");
        }
    }
}

fn siting(name: &Value) -> Siting {
    if name == "cosited" { Siting::Cosited } else { Siting::Centre }
}

#[test]
fn yuv_is_within_two_levels_of_float64_and_a_quarter_on_average() {
    for case in golden()["yuv"].as_array().unwrap() {
        let size = (number(case, "width"), number(case, "height"));
        let geometry = Geometry { resize: number(case, "resize"), crop: number(case, "crop") };
        let matrix = match case["matrix"].as_str().unwrap() {
            "bt601" => Matrix::Bt601,
            "bt709" => Matrix::Bt709,
            _ => Matrix::Bt2020,
        };
        let colour = Colour {
            matrix,
            full_range: case["full_range"].as_bool().unwrap(),
            siting_x: siting(&case["siting_x"]),
            siting_y: siting(&case["siting_y"]),
        };
        let planar = yuv(Layout::I420, size, 3, (colour, number(case, "seed")));
        let out = run(&planar, geometry, true);
        let step = geometry.crop / 8;
        let pixels = (0..64).map(|it| (step / 2 + it / 8 * step, step / 2 + it % 8 * step));
        let ours = pixels.flat_map(|(y, x)| &out[(y * geometry.crop + x) * 3..][..3]);
        let theirs = case["samples"].as_array().unwrap().iter().map(|it| it.as_f64().unwrap());
        let (mut worst, mut sum) = (0.0_f64, 0.0);
        for (ours, theirs) in ours.zip(theirs) {
            worst = worst.max((f64::from(*ours) - theirs).abs());
            sum += (f64::from(*ours) - theirs.round()).abs();
        }
        // Rounding alone is 0.5 at worst, and nothing once the other side is rounded as well.
        assert!(worst < 0.6 && sum / 192.0 < 0.1, "{worst} {sum} in {size:?} {colour:?}");

        let interleaved = yuv(Layout::Nv12, size, 5, (colour, number(case, "seed")));
        assert!(out == run(&interleaved, geometry, true), "NV12 as I420 in {case}");
        assert!(out == run(&planar, geometry, false), "plain code as AVX2 in {case}");
        assert!(out == run(&interleaved, geometry, false), "plain NV12 in {case}");
    }
}

#[test]
fn limited_range_grey_is_stretched_to_full_range() {
    let luma = plane((50, 40), 0, |x, _| if x < 25 { 16 } else { 235 });
    let colour = Colour { full_range: false, ..COLOUR };
    let picture = picture(Layout::Gray8, (50, 40), colour, Bytes([luma, vec![], vec![]]));
    let out = run(&picture, DEFAULT, true);
    assert_eq!((&out[..3], &out[out.len() - 3..]), (&[0; 3][..], &[255; 3][..]));
}

#[test]
fn primaries_come_out_as_they_are_defined() {
    let one = |yuv: [u8; 3], matrix, full_range| {
        let planes = Bytes(yuv.map(|it| vec![it; 64]));
        let colour = Colour { matrix, full_range, ..COLOUR };
        let picture = picture(Layout::I420, (8, 8), colour, planes);
        let out = run(&picture, DEFAULT, true);
        [out[0], out[1], out[2]]
    };
    assert_eq!(one([235, 128, 128], Matrix::Bt709, false), [255; 3]);
    assert_eq!(one([16, 128, 128], Matrix::Bt2020, false), [0; 3]);
    assert_eq!(one([81, 90, 240], Matrix::Bt601, false), [254, 0, 0]);
    assert_eq!(one([173, 42, 26], Matrix::Bt709, false), [0, 255, 1], "clipped");
    assert_eq!(one([76, 85, 255], Matrix::Bt601, true), [254, 0, 0]);
}

#[test]
fn pixels_outside_the_crop_are_not_used() {
    let size = (641, 359);
    let used = |at: usize, size: usize| {
        let scale = 359.0 / 256.0;
        let middle = (at as f64 + 0.5 - size as f64 / 2.0).abs();
        // Half the crop, the reach of the filter, and two pixels for chroma.
        middle < (112.0 + 1.0) * scale + 3.0
    };
    for layout in [Layout::Rgb, Layout::I420, Layout::Nv12, Layout::Gray8] {
        let make = |other: u8| {
            let chroma = |it: usize| (it.div_ceil(2), 2);
            let value = |x: usize, y: usize, (width, step): (usize, usize)| {
                let inside = used(x * step, width) && used(y * step, size.1);
                if inside { byte_of(x, y, 0, 1) } else { other }
            };
            let half = (chroma(size.0).0, chroma(size.1).0);
            let luma = |x, y| value(x, y, (size.0, 1));
            let single = |x, y| value(x, y, (size.0, 2));
            let planes = match layout {
                Layout::Rgb => {
                    [plane((size.0 * 3, size.1), 4, |x, y| luma(x / 3, y)), vec![], vec![]]
                }
                Layout::Gray8 => [plane(size, 4, luma), vec![], vec![]],
                Layout::I420 => {
                    [plane(size, 4, luma), plane(half, 4, single), plane(half, 4, single)]
                }
                Layout::Nv12 => {
                    let pairs = plane((half.0 * 2, half.1), 4, |x, y| single(x / 2, y));
                    [plane(size, 4, luma), pairs, vec![]]
                }
            };
            picture(layout, size, COLOUR, Bytes(planes))
        };
        for simd in [true, false] {
            let (first, second) = (run(&make(0), DEFAULT, simd), run(&make(255), DEFAULT, simd));
            assert!(first == second, "{layout:?}, simd {simd}");
        }
    }
}

#[test]
fn a_plane_shorter_than_its_rows_is_refused() {
    let mut preprocessor = Preprocessor::new(DEFAULT);
    let mut out = vec![0; DEFAULT.bytes()];
    for layout in [Layout::Rgb, Layout::I420, Layout::Nv12, Layout::Gray8] {
        let planes = || [1, 2, 3].map(|it| vec![0_u8; if it == 1 { 33 * 17 * 3 } else { 34 * 9 }]);
        let strides = match layout {
            Layout::Rgb => [99, 0, 0],
            Layout::Nv12 => [99, 34, 0],
            _ => [99, 34, 34],
        };
        let make = |planes, strides| {
            let planes = Box::new(Bytes(planes));
            Picture { layout, colour: COLOUR, width: 33, height: 17, strides, planes }
        };
        assert_eq!(preprocessor.run(&make(planes(), strides), &mut out), Ok(()), "{layout:?}");
        let count = strides.iter().filter(|it| 0 < **it).count();
        let count = if layout == Layout::Gray8 { 1 } else { count };
        for index in 0..count {
            let mut short = planes();
            let row = strides[index] - if layout == Layout::Rgb { 0 } else { 1 };
            short[index].truncate(strides[index] * if index == 0 { 16 } else { 8 } + row.min(16));
            let error = preprocessor.run(&make(short, strides), &mut out);
            assert_eq!(error, Err(Reject::BadShape), "{layout:?} plane {index}");
            let mut narrow = strides;
            narrow[index] = 16;
            let error = preprocessor.run(&make(planes(), narrow), &mut out);
            assert_eq!(error, Err(Reject::BadShape), "{layout:?} stride {index}");
            narrow[index] = usize::MAX / 2;
            let error = preprocessor.run(&make(planes(), narrow), &mut out);
            assert_eq!(error, Err(Reject::BadShape), "{layout:?} huge stride {index}");
        }
    }
}

#[test]
fn an_empty_or_endless_picture_is_refused() {
    let mut preprocessor = Preprocessor::new(DEFAULT);
    let mut out = vec![0; DEFAULT.bytes()];
    for (width, height) in [(0, 5), (5, 0), (0, 0), (65_536, 1), (1, usize::MAX)] {
        let planes = Box::new(Bytes([vec![], vec![], vec![]]));
        let strides = [usize::MAX; 3];
        let layout = Layout::Rgb;
        let picture = Picture { layout, colour: COLOUR, width, height, strides, planes };
        assert_eq!(preprocessor.run(&picture, &mut out), Err(Reject::BadSize));
    }
}

#[test]
fn every_small_size_and_the_longest_sides_run_in_both_codes() {
    let geometry = Geometry { resize: 40, crop: 33 };
    let sizes = (1..24).flat_map(|it| [(it, 24 - it), (it, it), (it * 5, 9)]);
    for size in sizes.chain([(65_535, 1), (1, 65_535), (65_535, 40), (33, 2000)]) {
        for layout in [Layout::I420, Layout::Nv12] {
            let picture = yuv(layout, size, 1, (COLOUR, 3));
            assert!(run(&picture, geometry, true) == run(&picture, geometry, false), "{size:?}");
        }
        for picture in [rgb(size, 0, 3), gray(size, true, 3)] {
            assert!(run(&picture, geometry, true) == run(&picture, geometry, false), "{size:?}");
        }
    }
}

#[test]
fn one_preprocessor_serves_more_kinds_than_it_remembers() {
    let mut preprocessor = Preprocessor::new(DEFAULT);
    let mut out = vec![0; DEFAULT.bytes()];
    for round in 0..2 {
        for width in 20..20 + PLANS_MAX + 3 {
            let picture = yuv(Layout::I420, (width, 20), 0, (COLOUR, 3));
            preprocessor.run(&picture, &mut out).unwrap();
            assert!(out == run(&picture, DEFAULT, true), "{width} in round {round}");
        }
    }
    assert_eq!(preprocessor.plans.len(), PLANS_MAX);
}

#[test]
fn streams_of_different_kinds_take_turns_without_new_tables() {
    let mut preprocessor = Preprocessor::new(DEFAULT);
    let mut out = vec![0; DEFAULT.bytes()];
    let full_range = Colour { full_range: true, ..COLOUR };
    let centred = Colour { siting_x: Siting::Centre, ..COLOUR };
    let pictures = [
        yuv(Layout::I420, (64, 48), 0, (COLOUR, 3)),
        yuv(Layout::Nv12, (64, 48), 0, (COLOUR, 3)),
        yuv(Layout::I420, (64, 48), 0, (centred, 3)),
        yuv(Layout::I420, (64, 48), 0, (full_range, 3)),
        rgb((64, 48), 0, 3),
        gray((64, 48), true, 3),
        gray((64, 48), false, 3),
        rgb((48, 64), 0, 3),
    ];
    for turn in [0, 1, 2, 3, 4, 5, 6, 7, 0, 7, 3, 5, 1, 6, 2, 4, 4] {
        preprocessor.run(&pictures[turn], &mut out).unwrap();
        assert!(out == run(&pictures[turn], DEFAULT, true), "picture {turn}");
    }
    assert_eq!(preprocessor.plans.len(), pictures.len());
}

#[test]
fn halves_round_to_even_as_in_python() {
    let expected = [(224, 0), (225, 0), (226, 1), (227, 2), (228, 2), (229, 2), (230, 3), (231, 4)];
    for (size, first) in expected {
        assert_eq!(centre(size, 224), first, "{size}");
    }
}

#[test]
fn picture_files_have_the_pixels_of_pillow() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/pictures/");
    let mut wrong = Vec::new();
    for case in golden()["pictures"].as_array().unwrap() {
        let file = case["file"].as_str().unwrap();
        let image = image::decode(&std::fs::read(format!("{directory}{file}")).unwrap()).unwrap();
        let size = (number(case, "width"), number(case, "height"));
        assert_eq!((image.width, image.height), size, "{file}");
        if case["sha256"] != hash(&image.pixels) {
            wrong.push(file.to_owned());
        }
    }
    assert_eq!(wrong, [""; 0]);
}

#[test]
fn a_file_that_ends_early_is_refused() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/pictures/");
    for file in ["61x45-420.jpg", "61x45-444-progressive.jpg", "rgb-8.png", "palette-4.png"] {
        let bytes = std::fs::read(format!("{directory}{file}")).unwrap();
        // Up to the pixels' last bytes: 12 of IEND, or 2 of the end mark and those before it.
        for length in 0..bytes.len() - 24 {
            assert!(image::decode(&bytes[..length]).is_err(), "{file} cut to {length}");
        }
    }
}

#[test]
fn a_file_of_another_kind_is_refused_with_a_hint() {
    let error = image::decode(b"GIF89a").unwrap_err().to_string();
    assert_eq!(error, "the file is neither PNG nor JPEG; convert it to one of them");
}
