//! GhostNet with libtorch against PyTorch: logits that `tests/golden/make_ghostnet.py` stored for
//! weights and inputs that a formula gives, the same here and there.

use std::{fs, path::Path};

use ghostwatch::infer::{
    Model, device,
    engine::Backend,
    ghostnet::GhostNet,
    libtorch::Engine,
    plan::Config,
    wanted::{Precision, Use, Wanted},
};
use tch::{Device, Kind};

use crate::golden::{ALLOWED, error, f64s, pictures, splitmix, weights};

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

/// An engine on the formula's weights, small enough to start at once.
fn engine(precision: Option<Precision>, max_batch: usize) -> anyhow::Result<Engine> {
    engine_with(&Wanted { device: Use::Cpu, precision, max_batch, buckets: None })
}

fn engine_with(wanted: &Wanted) -> anyhow::Result<Engine> {
    let config = Config { width: 0.5, classes: 12 };
    let tensors = weights(&config);
    let (side, mean, std) = (64, [0.5, 0.45, 0.4], [0.2; 3]);
    let network = device::Network { config, tensors: &tensors, side, mean, std };
    Engine::start(&network, wanted, device::Device::Cpu)
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
