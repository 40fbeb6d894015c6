//! GhostNet against PyTorch: logits that `tests/golden/make_ghostnet.py` stored for weights and
//! inputs that a formula gives, the same here and there.

use std::{collections::BTreeMap, fs, path::Path};

use ghostwatch::infer::{
    Model,
    device::{Engine, GpuStatus, Network},
    ghostnet::GhostNet,
    plan::{Config, expected},
    wanted::{Precision, Use, Wanted},
    weights::Tensor,
};
use tch::{Device, Kind};

/// What the issue allows: max |difference| / max |logit|.
const ALLOWED: f64 = 1e-5;
const SEED_INPUT: u64 = 1 << 40;

#[derive(serde::Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    classes: usize,
    side: usize,
    /// Of the first three pictures, all classes.
    f32: Vec<Vec<f64>>,
    f64: Vec<Vec<f64>>,
    /// Of 32 pictures, every so many classes.
    every: usize,
    f64_of_32: Vec<Vec<f64>>,
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/ghostnet.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Uniform in [-1, 1) in steps of 2^-23: one number of the splitmix64 sequence.
fn splitmix(index: u64) -> f64 {
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

/// Normalised pictures `[count, 3, side, side]`; the first ones do not depend on the count.
fn inputs(count: usize, side: usize) -> tch::Tensor {
    let values = (0..(count * 3 * side * side) as u64).map(|it| splitmix(SEED_INPUT + it) * 2.0);
    let values: Vec<f32> = values.map(|it| it as f32).collect();
    tch::Tensor::from_slice(&values).reshape([count as i64, 3, side as i64, side as i64])
}

fn logits(network: &GhostNet, x: &tch::Tensor) -> Vec<Vec<f64>> {
    // Channels last in memory, as the daemon feeds it.
    let x = x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
    let out = tch::no_grad(|| network.forward(&x)).unwrap();
    Vec::<Vec<f64>>::try_from(out.to_kind(Kind::Double)).unwrap()
}

/// max |difference| / max |logit|.
fn error(got: &[Vec<f64>], want: &[Vec<f64>]) -> f64 {
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

fn top5(logits: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    order.truncate(5);
    order
}

fn network(classes: usize) -> GhostNet {
    let config = Config { classes, ..Config::PUBLISHED };
    GhostNet::new(&weights(&config), &config, 224, Device::Cpu, Kind::Float).unwrap()
}

fn case(classes: usize) -> (Case, GhostNet) {
    let case = golden().cases.into_iter().find(|it| it.classes == classes).unwrap();
    (case, network(classes))
}

#[test]
fn logits_equal_pytorchs_in_batches_of_1_3_and_32_for_1000_and_12_classes() {
    for classes in [1000, 12] {
        let (case, network) = case(classes);
        let x = inputs(32, case.side);
        let one = logits(&network, &x.narrow(0, 0, 1));
        let three = logits(&network, &x.narrow(0, 0, 3));
        let all = logits(&network, &x);
        let sparse: Vec<Vec<f64>> =
            all.iter().map(|it| it.iter().copied().step_by(case.every).collect()).collect();
        let rows = [
            ("batch 1, f32", &one[..], &case.f32[..1]),
            ("batch 1, f64", &one[..], &case.f64[..1]),
            ("batch 3, f32", &three[..], &case.f32[..]),
            ("batch 3, f64", &three[..], &case.f64[..]),
            ("batch 32, f32", &all[..3], &case.f32[..]),
            ("batch 32, f64", &all[..3], &case.f64[..]),
            ("batch 32, f64, all pictures", &sparse[..], &case.f64_of_32[..]),
        ];
        for (name, got, want) in rows {
            let error = error(got, want);
            println!("{classes} classes, {name}: {error:.1e}");
            assert!(error <= ALLOWED, "{classes} classes, {name}: {error:.1e} > {ALLOWED:.0e}");
        }
    }
}

#[test]
fn operators_put_together_give_what_they_give_alone() {
    for classes in [1000, 12] {
        let config = Config { classes, ..Config::PUBLISHED };
        let plain = GhostNet::plain(&weights(&config), &config, Device::Cpu, Kind::Float).unwrap();
        let network = network(classes);
        for (count, side) in [(1, 224), (3, 224), (32, 224), (3, 96)] {
            let x = inputs(count, side);
            let error = error(&logits(&network, &x), &logits(&plain, &x));
            println!("{classes} classes, {count} pictures of {side}: {error:.1e}");
            // Were they the same network, it would be 0.
            assert!(
                0.0 < error && error <= ALLOWED,
                "{classes} classes, batch {count}: {error:.1e}"
            );
        }
    }
}

#[test]
fn a_batch_gives_what_its_pictures_give_alone() {
    let (case, network) = case(1000);
    let x = inputs(8, case.side);
    let together = logits(&network, &x);
    for (index, row) in together.iter().enumerate() {
        let alone = logits(&network, &x.narrow(0, index as i64, 1));
        let (error, picture) = (error(std::slice::from_ref(row), &alone), index);
        assert!(error <= ALLOWED, "picture {picture}: {error:.1e}");
        assert_eq!(top5(row), top5(&alone[0]), "picture {picture}");
    }
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

/// An engine on the formula's weights, small enough to start at once.
fn engine(precision: Option<Precision>, max_batch: usize) -> anyhow::Result<Engine> {
    engine_with(&Wanted { device: Use::Cpu, precision, max_batch, buckets: None })
}

fn engine_with(wanted: &Wanted) -> anyhow::Result<Engine> {
    let config = Config { width: 0.5, classes: 12 };
    let tensors = weights(&config);
    let network =
        Network { config, tensors: &tensors, side: 64, mean: [0.5, 0.45, 0.4], std: [0.2; 3] };
    Engine::start(&network, wanted, &GpuStatus::Absent)
}

fn pictures(count: usize) -> Vec<Vec<u8>> {
    let byte = |it: usize| ((splitmix(it as u64) + 1.0) * 128.0) as u8;
    (0..count).map(|it| (it * 12_288..(it + 1) * 12_288).map(byte).collect()).collect()
}

fn f64s(logits: Vec<Vec<f32>>) -> Vec<Vec<f64>> {
    logits.into_iter().map(|it| it.into_iter().map(f64::from).collect()).collect()
}

#[test]
fn padding_and_stale_rows_change_no_logit() {
    let mut engine = engine(None, 6).unwrap();
    let pictures = pictures(9);
    let all: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
    let alone: Vec<Vec<f32>> = all.iter().flat_map(|it| engine.forward(&[it]).unwrap()).collect();
    let alone = f64s(alone);
    // 3 is padded to 4, 5 and 6 run as 6, 9 as 6 and 3; 0 is nothing.
    for size in [3, 5, 6, 9, 2, 1, 0] {
        let together = f64s(engine.forward(&all[..size]).unwrap());
        assert_eq!(together.len(), size);
        if 0 < size {
            let error = error(&together, &alone[..size]);
            assert!(error <= ALLOWED, "batch of {size}: {error:.1e}");
        }
    }
}

#[test]
fn batches_are_padded_to_the_sizes_that_are_configured() {
    let buckets = Some(vec![2, 5]);
    let wanted = Wanted { device: Use::Cpu, precision: None, max_batch: 5, buckets };
    let mut engine = engine_with(&wanted).unwrap();
    let sizes: Vec<_> = (1..=6).map(|it| engine.padded(it)).collect();
    assert_eq!(sizes, [Some(2), Some(2), Some(5), Some(5), Some(5), None]);
    let pictures = pictures(7);
    let all: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
    let alone: Vec<Vec<f32>> = all.iter().flat_map(|it| engine.forward(&[it]).unwrap()).collect();
    let alone = f64s(alone);
    // 7 is run as 5 and 2.
    for size in [1, 2, 3, 5, 7] {
        let together = f64s(engine.forward(&all[..size]).unwrap());
        let error = error(&together, &alone[..size]);
        assert!(error <= ALLOWED, "batch of {size}: {error:.1e}");
    }
}

#[test]
fn lanes_on_other_threads_give_the_same_logits() {
    let mut first = engine(None, 4).unwrap();
    let pictures = pictures(4);
    let batch: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
    let want = first.forward(&batch).unwrap();
    std::thread::scope(|scope| {
        for mut lane in [first.lane().unwrap(), first.lane().unwrap()] {
            let (batch, want) = (&batch, &want);
            scope.spawn(move || {
                lane.warm_up().unwrap();
                for _ in 0..8 {
                    assert_eq!(&lane.forward(batch).unwrap(), want);
                }
            });
        }
    });
}

#[test]
fn pixels_are_normalised_as_torchvision_does() {
    let mut engine = engine(None, 1).unwrap();
    let picture = &pictures(1)[0];
    let got = f64s(engine.forward(&[picture]).unwrap());
    let (mean, std) = (tch::Tensor::from_slice(&[0.5f32, 0.45, 0.4]), 0.2f32);
    let x = tch::Tensor::from_slice(picture).reshape([1, 64, 64, 3]).to_kind(Kind::Float);
    let x = (x / 255.0 - mean) / f64::from(std);
    let config = Config { width: 0.5, classes: 12 };
    let network = GhostNet::new(&weights(&config), &config, 64, Device::Cpu, Kind::Float).unwrap();
    let want = logits(&network, &x.permute([0, 3, 1, 2]));
    assert!(error(&got, &want) <= 1e-6, "{got:?} {want:?}");
}

#[test]
fn an_input_of_another_size_is_refused_with_both_sizes() {
    let said = engine(None, 1).unwrap().forward(&[&[0; 12]]).unwrap_err().to_string();
    assert_eq!(said, "an input has 12 bytes, not 12288 (3 x 64 x 64)");
}

#[test]
fn bf16_on_the_cpu_runs_when_asked_for_and_fp16_is_refused() {
    let mut exact = engine(None, 2).unwrap();
    assert_eq!((exact.precision(), exact.device().as_str()), (Precision::Fp32, "cpu"));
    let mut lower = engine(Some(Precision::Bf16), 2).unwrap();
    assert_eq!(lower.precision(), Precision::Bf16);
    let picture = &pictures(1)[0];
    let want = f64s(exact.forward(&[picture]).unwrap());
    let error = error(&f64s(lower.forward(&[picture]).unwrap()), &want);
    assert!(0.0 < error && error <= lower.allowed_error(), "{error:.1e}");
    let said = engine(Some(Precision::Fp16), 2).err().unwrap().to_string();
    assert!(said.contains("fp16 is for GPUs"), "{said}");
}

#[test]
fn a_missing_or_misshapen_parameter_is_named() {
    let config = Config { width: 0.5, classes: 12 };
    let refused = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut tensors = weights(&config);
        change(&mut tensors);
        let it = GhostNet::new(&tensors, &config, 224, Device::Cpu, Kind::Float);
        it.err().unwrap().to_string()
    };
    let said = refused(&|it| drop(it.remove("blocks.3.0.bn_dw.bias")));
    assert_eq!(said, "no tensor blocks.3.0.bn_dw.bias");
    let said = refused(&|it| it.get_mut("classifier.weight").unwrap().shape = vec![11, 1280]);
    assert_eq!(said, "tensor classifier.weight has shape [11, 1280], not [12, 1280]");
    let said = refused(&|it| it.get_mut("conv_stem.weight").unwrap().data.truncate(215));
    assert_eq!(said, "tensor conv_stem.weight has 215 values, not 216");
}
