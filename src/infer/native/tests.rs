//! The kernels against plain loops in f64, on every instruction set that the processor has, and the
//! engine against timm's logits and against itself.

use super::{
    kernel_depth::{Depth, Finish, TAPS, Target, depthwise},
    kernel_gemm::Packed,
    kernel_map::{add, scale},
    layout::Channels,
    *,
};
use crate::infer::plan::expected;

/// Stands where no kernel may write.
const CANARY: f32 = -12_345.0;

/// Uniform in [-1, 1) in steps of 2^-23: one number of the splitmix64 sequence.
fn splitmix(index: u64) -> f64 {
    let mut z = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 40) as f64 / f64::from(1 << 23) - 1.0
}

fn numbers(seed: u64, count: usize) -> Vec<f32> {
    (0..count as u64).map(|it| splitmix(seed * 1_000_003 + it) as f32).collect()
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|it| it.available())
}

/// The weights of `tests/golden/make_ghostnet.py`.
fn weights(config: &Config) -> BTreeMap<String, Tensor> {
    let mut start = 0;
    let fill = |(name, shape): (String, Vec<usize>)| {
        let fan_in = shape[1..].iter().product::<usize>() as f64;
        let (scale, shift) = if name.ends_with("running_var") {
            (0.5, 1.0)
        } else if name.ends_with("running_mean") || name.ends_with("bias") {
            (0.125, 0.0)
        } else if shape.len() == 1 {
            (0.5, 1.0)
        } else {
            ((3.0 / fan_in).sqrt(), 0.0)
        };
        let count = shape.iter().product::<usize>() as u64;
        let data = (start..start + count).map(|it| (splitmix(it) * scale + shift) as f32);
        let tensor = Tensor { shape, data: data.collect() };
        start += count;
        (name, tensor)
    };
    expected(config).into_iter().map(fill).collect()
}

fn input(side: usize) -> Input {
    Input { side, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] }
}

fn lane(config: Config, side: usize, isa: Isa, strip: usize) -> Lane {
    Lane::with_strips(&weights(&config), &config, &input(side), isa, strip).unwrap()
}

fn pictures(count: usize, side: usize) -> Vec<Vec<u8>> {
    let byte = |it: u64| ((splitmix(it) + 1.0) * 128.0) as u8;
    let size = (side * side * 3) as u64;
    (0..count as u64).map(|it| (it * size..(it + 1) * size).map(byte).collect()).collect()
}

fn logits(lane: &mut Lane, pictures: &[Vec<u8>]) -> Vec<f32> {
    let batch: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
    let mut logits = Vec::new();
    lane.forward(&batch, &mut logits);
    logits
}

/// max |difference| / max |wanted|.
fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    assert!(got.iter().all(|it| it.is_finite()));
    let differences = got.iter().zip(want).map(|(got, want)| (f64::from(*got) - want).abs());
    let scale = want.iter().map(|it| it.abs()).fold(f64::MIN_POSITIVE, f64::max);
    differences.fold(0.0, f64::max) / scale
}

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

#[test]
fn a_product_is_that_of_plain_loops_for_all_tails_and_writes_nothing_else() {
    let runs = [(1, 3), (5, 1), (8, 7)];
    let (k, x_stride) = (11, 17);
    for isa in isas() {
        for n in (1..=66).chain([104, 112, 129]) {
            for m in (1..=14).chain([49, 61]) {
                let (weights, bias) = (numbers(1, n * k), numbers(2, n));
                // The last row ends with its last run: one value more would be outside.
                let x = numbers(3, (m - 1) * x_stride + 15);
                let columns: Vec<_> = (0..n).map(|it| (it % 7 != 3).then_some(it)).collect();
                let packed = Packed::new(isa, (&weights, &bias), &columns);
                let (relu, stride) = (m % 2 == 0, n + 3);
                let mut y = vec![CANARY; m * stride];
                let rows = Rows { x: &x, stride: x_stride, runs: &runs };
                multiply(&packed, rows, m, (&mut y, stride), relu);
                let mut want = Vec::new();
                for row in 0..m {
                    let x: Vec<f32> = runs
                        .iter()
                        .flat_map(|it| &x[row * x_stride + it.0..][..it.1])
                        .copied()
                        .collect();
                    for column in &columns {
                        let sum = column.map_or(0.0, |it| {
                            let weights = &weights[it * k..][..k];
                            let products = x.iter().zip(weights);
                            let products = products.map(|(a, b)| f64::from(*a) * f64::from(*b));
                            products.sum::<f64>() + f64::from(bias[it])
                        });
                        want.push(if relu { sum.max(0.0) } else { sum });
                    }
                }
                let got: Vec<f32> = y.chunks(stride).flat_map(|it| &it[..n]).copied().collect();
                assert!(error(&got, &want) < 1e-6, "{isa:?} {m} x {n}");
                assert!(y.chunks(stride).all(|it| it[n..].iter().all(|it| *it == CANARY)));
            }
        }
    }
}

/// A map, its depthwise convolution, and what plain loops make of it.
struct Case {
    isa: Isa,
    kernel: usize,
    stride: usize,
    height: usize,
    width: usize,
    channels: usize,
}

impl Case {
    fn check(&self) {
        let Case { isa, kernel, stride, height, width, channels } = *self;
        let layout = Channels::plain(channels);
        let (c, taps) = (layout.len(), kernel * kernel);
        let (weights, bias) = (numbers(4, channels * taps), numbers(5, channels));
        let depth = Depth::new(isa, (&weights, &bias), (kernel, stride), &layout.positions);
        let x = numbers(6, height * width * c);
        let (rows, columns) = (depth.out(height), depth.out(width));
        let y_stride = c + 8;
        let length = rows * columns * y_stride;
        let other = numbers(7, length);
        for finish in [Finish::Linear, Finish::Relu, Finish::Add(&other), Finish::AddInPlace] {
            let mut y = vec![CANARY; length];
            for row in 0..rows {
                let window = run::window(&depth, Some(&x), layout::Map::new(height, width, c), row);
                assert_eq!(window.rows[kernel..TAPS].iter().flatten().count(), 0);
                let target =
                    Target { y: &mut y, first: row * columns * y_stride, stride: y_stride };
                depthwise(&depth, window, target, finish);
            }
            let mut want = Vec::new();
            for at in 0..rows * columns {
                for channel in 0..c {
                    let place = (at / columns * stride, at % columns * stride);
                    let sum = if channel < channels {
                        let weights = &weights[channel * taps..][..taps];
                        f64::from(bias[channel]) + self.sum(&x, c, weights, place, channel)
                    } else {
                        0.0
                    };
                    want.push(match finish {
                        Finish::Linear => sum,
                        Finish::Relu => sum.max(0.0),
                        Finish::Add(it) => sum + f64::from(it[at * y_stride + channel]),
                        Finish::AddInPlace => sum + f64::from(CANARY),
                    });
                }
            }
            let got: Vec<f32> = y.chunks(y_stride).flat_map(|it| &it[..c]).copied().collect();
            let what = format!("{isa:?} {kernel}/{stride} {height}x{width}x{channels} {finish:?}");
            assert!(error(&got, &want) < 1e-6, "{}", &what[..what.len().min(80)]);
            assert!(y.chunks(y_stride).all(|it| it[c..].iter().all(|it| *it == CANARY)));
        }
    }

    fn sum(
        &self,
        x: &[f32],
        c: usize,
        weights: &[f32],
        place: (usize, usize),
        channel: usize,
    ) -> f64 {
        let mut sum = 0.0;
        for (tap, weight) in weights.iter().enumerate() {
            let row = (place.0 + tap / self.kernel).checked_sub(self.kernel / 2);
            let column = (place.1 + tap % self.kernel).checked_sub(self.kernel / 2);
            let (Some(row), Some(column)) = (row, column) else { continue };
            if row < self.height && column < self.width {
                let x = x[(row * self.width + column) * c + channel];
                sum += f64::from(x) * f64::from(*weight);
            }
        }
        sum
    }
}

#[test]
fn a_depthwise_convolution_is_that_of_plain_loops_for_all_sizes_strides_and_tails() {
    for isa in isas() {
        for (kernel, stride) in [(3, 1), (3, 2), (5, 1), (5, 2)] {
            for width in 1..=16 {
                for (height, channels) in [(1, 8), (2, 3), (5, 20), (7, 16)] {
                    Case { isa, kernel, stride, height, width, channels }.check();
                }
            }
        }
    }
}

#[test]
fn means_factors_and_sums_of_maps_are_those_of_plain_loops() {
    for isa in isas() {
        for (pixels, channels) in [(1, 8), (3, 24), (49, 40), (10, 5)] {
            let x = numbers(8, pixels * channels);
            let column = |it: usize| x.iter().skip(it).step_by(channels).copied();
            let mut got = vec![CANARY; channels];
            means(isa, &x, &mut got);
            let want: Vec<f64> = (0..channels)
                .map(|it| column(it).map(f64::from).sum::<f64>() / pixels as f64)
                .collect();
            assert!(error(&got, &want) < 1e-6);
            let mut scaled = x.clone();
            scale(isa, &mut scaled, &got);
            let all = x.iter().zip(got.iter().cycle());
            assert!(scaled.iter().zip(all).all(|(a, (x, factor))| *a == x * factor));
            let stride = channels + 2;
            let other = numbers(9, pixels * stride);
            let (mut apart, mut inside) = (vec![CANARY; pixels * stride], other.clone());
            let size = (pixels, channels);
            add(isa, (&x, channels), Some(&other), (&mut apart, stride), size);
            add(isa, (&x, channels), None, (&mut inside, stride), size);
            for (at, it) in apart.iter().enumerate() {
                let (pixel, channel) = (at / stride, at % stride);
                let there = channel < channels;
                let sum = if there { x[pixel * channels + channel] + other[at] } else { CANARY };
                assert_eq!(*it, sum);
                assert_eq!(inside[at], if there { sum } else { other[at] });
            }
        }
    }
}

#[derive(serde::Deserialize)]
struct Golden {
    cases: Vec<Answers>,
}

#[derive(serde::Deserialize)]
struct Answers {
    classes: usize,
    side: usize,
    f64: Vec<Vec<f64>>,
}

/// The pictures of `make_ghostnet.py`, `[count, side, side, 3]`.
fn normalised(count: usize, side: usize) -> Vec<f32> {
    let (area, mut pixels) = (side * side, vec![0.0; count * side * side * 3]);
    for (index, it) in pixels.iter_mut().enumerate() {
        let (pixel, colour) = (index / 3, index % 3);
        let at = (pixel / area * 3 + colour) * area + pixel % area;
        *it = (splitmix((1 << 40) + at as u64) * 2.0) as f32;
    }
    pixels
}

#[test]
fn logits_equal_pytorchs_on_every_instruction_set() {
    let golden = include_str!("../../../tests/golden/ghostnet.json");
    let golden: Golden = serde_json::from_str(golden).unwrap();
    for case in golden.cases {
        let config = Config { classes: case.classes, ..Config::PUBLISHED };
        let pixels = normalised(case.f64.len(), case.side);
        for isa in isas() {
            let mut got = Vec::new();
            lane(config, case.side, isa, STRIP).forward_normalised(&pixels, &mut got);
            let error = error(&got, &case.f64.concat());
            println!("{} classes, {isa:?}: {error:.1e}", case.classes);
            assert!(error <= 1e-5, "{} classes, {isa:?}: {error:.1e}", case.classes);
        }
    }
}

const SMALL_NET: Config = Config { width: 0.5, classes: 12 };

#[test]
fn a_batch_gives_bit_for_bit_what_its_pictures_give_alone_and_again() {
    for isa in isas() {
        let mut lane = lane(SMALL_NET, 64, isa, STRIP);
        let pictures = pictures(2 * TOGETHER + 1, 64);
        let alone: Vec<f32> =
            pictures.iter().flat_map(|it| logits(&mut lane, std::slice::from_ref(it))).collect();
        assert!(alone.chunks(12).is_sorted_by(|a, b| a != b), "the pictures differ");
        for size in [0, 2, 3, TOGETHER, TOGETHER + 1, 2 * TOGETHER + 1] {
            let together = logits(&mut lane, &pictures[..size]);
            assert_eq!(together, alone[..size * 12], "{isa:?}, a batch of {size}");
        }
        assert_eq!(logits(&mut lane.another(), &pictures), alone);
    }
}

#[test]
fn strips_of_any_height_give_the_same_bits() {
    let isa = Isa::best();
    for side in [33, 64, 97] {
        let pictures = pictures(1, side);
        // All rows at once.
        let whole = logits(&mut lane(SMALL_NET, side, isa, 1 << 30), &pictures);
        for strip in [1, 1500, 4000, 9000, STRIP] {
            let got = logits(&mut lane(SMALL_NET, side, isa, strip), &pictures);
            assert_eq!(got, whole, "side {side}, strips of {strip}");
        }
    }
}

#[test]
fn instruction_sets_agree_for_all_widths_sizes_and_numbers_of_classes() {
    for (width, side, classes) in [(0.5, 32, 1), (1.3, 47, 12), (0.1, 1, 3), (1.0, 112, 12)] {
        let config = Config { width, classes };
        let pictures = pictures(2, side);
        let want = f64s(&logits(&mut lane(config, side, Isa::Portable, STRIP), &pictures));
        for isa in isas() {
            let error = error(&logits(&mut lane(config, side, isa, STRIP), &pictures), &want);
            assert!(error <= 1e-5, "width {width}, side {side}, {isa:?}: {error:.1e}");
        }
    }
}

#[test]
fn instructions_that_the_processor_lacks_are_refused() {
    let weights = weights(&SMALL_NET);
    for isa in Isa::ALL {
        let made = Lane::new(&weights, &SMALL_NET, &input(32), isa);
        assert_eq!(made.is_ok(), isa.available(), "{isa:?}");
    }
}
