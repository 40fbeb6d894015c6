//! GhostNet with weights that a formula gives, the same as `tests/golden/make_ghostnet.py` makes, on
//! each engine for a CPU that this build has.

use std::collections::BTreeMap;

use ghostwatch::infer::{
    Model,
    device::{GpuStatus, Network},
    engine::Engine,
    plan::{Config, expected},
    wanted::{Use, Wanted},
    weights::Tensor,
};

/// What the issue allows: max |difference| / max |logit|.
pub(crate) const ALLOWED: f64 = 1e-5;
/// Uniform in [-1, 1) in steps of 2^-23: one number of the splitmix64 sequence.
pub(crate) fn splitmix(index: u64) -> f64 {
    let mut z = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 40) as f64 / f64::from(1 << 23) - 1.0
}

fn scale_and_shift(name: &str, shape: &[usize]) -> (f64, f64) {
    if name.ends_with("running_var") {
        (0.5, 1.0)
    } else if name.ends_with("running_mean") || name.ends_with("bias") {
        (0.125, 0.0)
    } else if shape.len() == 1 {
        (0.5, 1.0)
    } else {
        ((3.0 / shape[1..].iter().product::<usize>() as f64).sqrt(), 0.0)
    }
}

pub(crate) fn weights(config: &Config) -> BTreeMap<String, Tensor> {
    let mut start = 0;
    let fill = |(name, shape): (String, Vec<usize>)| {
        let (scale, shift) = scale_and_shift(&name, &shape);
        let count = shape.iter().product::<usize>() as u64;
        let data = (start..start + count).map(|it| (splitmix(it) * scale + shift) as f32);
        let tensor = Tensor { shape, data: data.collect() };
        start += count;
        (name, tensor)
    };
    expected(config).into_iter().map(fill).collect()
}

/// max |difference| / max |logit|.
pub(crate) fn error(got: &[Vec<f64>], want: &[Vec<f64>]) -> f64 {
    assert_eq!(got.len(), want.len());
    let (mut difference, mut largest) = (0.0f64, 0.0f64);
    for (got, want) in got.iter().zip(want) {
        assert_eq!(got.len(), want.len());
        for (a, b) in got.iter().zip(want) {
            assert!(a.is_finite());
            difference = difference.max((a - b).abs());
            largest = largest.max(b.abs());
        }
    }
    difference / largest
}

#[test]
fn other_widths_have_the_parameter_counts_of_the_published_code() {
    let count = |width: f64| -> usize {
        let all = expected(&Config { width, classes: 1000 });
        let learned = all.iter().filter(|it| !it.0.contains("running_"));
        learned.map(|it| it.1.iter().product::<usize>()).sum()
    };
    assert_eq!([0.5, 1.0, 1.3].map(count), WIDTHS);
}

/// timm 1.0.22: the sum over `parameters()` of `ghostnet_050`, `_100`, `_130`.
const WIDTHS: [usize; 3] = [2_587_292, 5_182_508, 7_358_820];

/// The engines for a CPU that this build has.
pub(crate) fn engines() -> impl Iterator<Item = Use> {
    [Use::Cpu, Use::Native].into_iter().filter(|it| it.lacks().is_none())
}

/// An engine on the formula's weights, small enough to start at once.
fn engine(device: Use, max_batch: usize) -> Engine {
    start(device, max_batch, &|_| ()).unwrap()
}

fn start(
    device: Use,
    max_batch: usize,
    change: &dyn Fn(&mut BTreeMap<String, Tensor>),
) -> anyhow::Result<Engine> {
    let config = Config { width: 0.5, classes: 12 };
    let mut tensors = weights(&config);
    change(&mut tensors);
    let network =
        Network { config, tensors: &tensors, side: 64, mean: [0.5, 0.45, 0.4], std: [0.2; 3] };
    let wanted = Wanted { device, precision: None, max_batch, buckets: None };
    Engine::start(&network, &wanted, &GpuStatus::Absent)
}

pub(crate) fn pictures(count: usize) -> Vec<Vec<u8>> {
    let byte = |it: usize| ((splitmix(it as u64) + 1.0) * 128.0) as u8;
    (0..count).map(|it| (it * 12_288..(it + 1) * 12_288).map(byte).collect()).collect()
}

pub(crate) fn f64s(logits: Vec<Vec<f32>>) -> Vec<Vec<f64>> {
    logits.into_iter().map(|it| it.into_iter().map(f64::from).collect()).collect()
}

#[test]
fn padding_and_stale_rows_change_no_logit() {
    for device in engines() {
        let mut engine = engine(device, 6);
        let pictures = pictures(9);
        let all: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
        let alone = all.iter().flat_map(|it| engine.forward(&[it]).unwrap());
        let alone = f64s(alone.collect());
        // With libtorch 3 is padded to 4, 5 and 6 run as 6, 9 as 6 and 3; 0 is nothing.
        for size in [3, 5, 6, 9, 2, 1, 0] {
            let together = f64s(engine.forward(&all[..size]).unwrap());
            assert_eq!(together.len(), size);
            if 0 < size {
                let error = error(&together, &alone[..size]);
                assert!(error <= ALLOWED, "{device}: batch of {size}: {error:.1e}");
            }
        }
    }
}

#[test]
fn lanes_on_other_threads_give_the_same_logits() {
    for device in engines() {
        let mut first = engine(device, 4);
        let pictures = pictures(4);
        let batch: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
        let want = first.forward(&batch).unwrap();
        std::thread::scope(|scope| {
            for mut lane in [first.lane().unwrap(), first.lane().unwrap()] {
                let (batch, want) = (&batch, &want);
                scope.spawn(move || {
                    lane.warm_up().unwrap();
                    for _ in 0..8 {
                        assert_eq!(&lane.forward(batch).unwrap(), want, "{device}");
                    }
                });
            }
        });
    }
}

#[test]
fn an_input_of_another_size_is_refused_with_both_sizes() {
    for device in engines() {
        let said = engine(device, 1).forward(&[&[0; 12]]).unwrap_err().to_string();
        assert_eq!(said, "an input has 12 bytes, not 12288 (3 x 64 x 64)", "{device}");
    }
}

#[test]
fn a_missing_or_misshapen_parameter_is_named() {
    for device in engines() {
        let refused = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
            start(device, 1, change).err().unwrap().to_string()
        };
        let said = refused(&|it| drop(it.remove("blocks.3.0.bn_dw.bias")));
        assert_eq!(said, "no tensor blocks.3.0.bn_dw.bias");
        let said = refused(&|it| it.get_mut("classifier.weight").unwrap().shape = vec![11, 1280]);
        assert_eq!(said, "tensor classifier.weight has shape [11, 1280], not [12, 1280]");
        let said = refused(&|it| it.get_mut("conv_stem.weight").unwrap().data.truncate(107));
        assert_eq!(said, "tensor conv_stem.weight has 107 values, not 216");
    }
}
