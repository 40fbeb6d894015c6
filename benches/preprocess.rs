//! Time per frame of preprocess on one core: `cargo bench --bench preprocess`.
//!
//! `benches/preprocess.py` runs this beside Pillow and torchvision. Each line is the picture, the
//! median and the tenth percentile in milliseconds. Frames take turns, so that a picture's bytes
//! come from memory as they do behind a decoder. With arguments only the lines that begin like one
//! of them: `1920x1080`, or `"1280x720 I420"`.

use std::{env, hint::black_box, time::Instant};

use ghostwatch::{
    frame::{Colour, Layout, Matrix, Picture, Planes, Siting},
    preprocess::{Geometry, Preprocessor},
};

/// How many frames take turns.
const FRAMES: usize = 8;

struct Bytes([Vec<u8>; 3]);

impl Planes for Bytes {
    fn plane(&self, index: usize) -> &[u8] {
        &self.0[index]
    }
}

/// A picture of noise: the worst case for nothing, since no step depends on the values.
fn picture(layout: Layout, width: usize, height: usize, seed: u32) -> Picture {
    let mut state = seed | 1;
    let mut noise = |count: usize| -> Vec<u8> {
        let next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        };
        std::iter::repeat_with(next).take(count).collect()
    };
    let (half, half_height) = (width.div_ceil(2), height.div_ceil(2));
    let strides = match layout {
        Layout::I420 => [width, half, half],
        Layout::Nv12 => [width, half * 2, 0],
        Layout::Rgb => [width * 3, 0, 0],
        Layout::Gray8 => [width, 0, 0],
    };
    let rows = [height, half_height, half_height];
    let planes = Box::new(Bytes([0, 1, 2].map(|it| noise(strides[it] * rows[it]))));
    let colour = Colour {
        matrix: Matrix::Bt709,
        full_range: false,
        siting_x: Siting::Cosited,
        siting_y: Siting::Centre,
    };
    Picture { layout, colour, width, height, strides, planes }
}

fn main() {
    let wanted: Vec<String> = env::args().skip(1).filter(|it| it != "--bench").collect();
    let geometry = Geometry { resize: 256, crop: 224 };
    let mut preprocessor = Preprocessor::new(geometry);
    let mut out = vec![0; geometry.bytes()];
    for (width, height) in [(640, 360), (1280, 720), (1920, 1080), (3840, 2160)] {
        for layout in [Layout::I420, Layout::Nv12, Layout::Rgb, Layout::Gray8] {
            let name = format!("{width}x{height} {layout:?}");
            let chosen = wanted.is_empty() || wanted.iter().any(|it| name.starts_with(it.as_str()));
            if !chosen {
                continue;
            }
            let frames: Vec<Picture> =
                (1..=FRAMES).map(|it| picture(layout, width, height, it as u32)).collect();
            let mut times: Vec<f64> = (0..FRAMES * 25)
                .map(|it| {
                    let start = Instant::now();
                    let done = preprocessor.run(black_box(&frames[it % FRAMES]), &mut out);
                    black_box((done.is_ok(), &out));
                    start.elapsed().as_secs_f64() * 1e3
                })
                .collect();
            times.sort_by(f64::total_cmp);
            let (median, tenth) = (times[times.len() / 2], times[times.len() / 10]);
            println!("{name} {median:.3} {tenth:.3}");
        }
    }
}
