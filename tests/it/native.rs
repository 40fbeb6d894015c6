//! Our own engine: what `auto` takes, and beside libtorch, where that is there, the same logits, labels
//! and refusals.

use ghostwatch::infer::{
    Model,
    device::{GpuStatus, Network},
    engine::Engine,
    load::{Choice, checkpoint, load},
    plan::Config,
    selftest,
    wanted::{Precision, Use, Wanted},
};

use crate::{
    end_to_end::{configure, drain, get, root, start},
    golden,
    support::wait_until,
};

/// max |difference| / max |logit|.
const ALLOWED: f64 = 1e-5;

fn wanted(device: Use, max_batch: usize) -> Wanted {
    Wanted { device, precision: None, max_batch, buckets: None }
}

fn pictures(count: usize, side: usize) -> Vec<Vec<u8>> {
    let mut pictures = selftest::pictures(side);
    let bytes = side * side * 3;
    let more = (pictures.len()..count).map(|it| 2 * it + 5);
    pictures.extend(more.map(|step| (0..bytes).map(|at| ((at / 3 * step) >> 4) as u8).collect()));
    pictures
}

#[cfg(feature = "libtorch")]
#[test]
fn native_gives_the_logits_of_libtorch_for_other_widths_sizes_and_classes() {
    for (width, side, classes) in [(0.5, 64, 12), (1.3, 45, 3), (1.0, 112, 12)] {
        let config = Config { width, classes };
        let tensors = golden::weights(&config);
        let network =
            Network { config, tensors: &tensors, side, mean: [0.5, 0.45, 0.4], std: [0.2; 3] };
        let none = GpuStatus::Absent;
        let mut ours = Engine::start(&network, &wanted(Use::Native, 4), &none).unwrap();
        let mut theirs = Engine::start(&network, &wanted(Use::Cpu, 4), &none).unwrap();
        assert_eq!((ours.name(), theirs.name()), ("native", "libtorch"));
        let pictures = pictures(5, side);
        let batch: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
        let (got, want) = (ours.forward(&batch).unwrap(), theirs.forward(&batch).unwrap());
        let agreement = selftest::compare(&got, &want).unwrap();
        println!("width {width}, side {side}, {classes} classes: {agreement:?}");
        assert!(agreement.max_error <= ALLOWED && agreement.top1(), "{agreement:?}");
    }
}

#[test]
fn native_gives_the_shipped_checkpoints_logits_and_a_batch_those_of_its_pictures_alone() {
    let weights = root().join("weights/ghostnet-1x-demo.safetensors");
    let choice = Choice { weights, ..Choice::default() };
    // Without a GPU it is what auto takes.
    let mut loaded = load(&choice, &wanted(Use::Auto, 8), &GpuStatus::Absent).unwrap();
    println!("{:?}", loaded.agreement);
    assert_eq!(loaded.engine.name(), "native");
    assert!(loaded.passes() && loaded.agreement.max_error <= ALLOWED, "{:?}", loaded.agreement);
    assert_eq!((loaded.engine.precision(), &*loaded.engine.device()), (Precision::Fp32, "cpu"));
    let pictures = pictures(19, loaded.golden.geometry.crop);
    let batch: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
    let together = loaded.engine.forward(&batch).unwrap();
    let mut other = loaded.engine.lane().unwrap();
    other.warm_up().unwrap();
    for (picture, want) in batch.iter().zip(&together) {
        // Bit for bit, on another lane too.
        assert_eq!(&other.forward(&[picture]).unwrap()[0], want);
    }
}

#[test]
fn auto_without_a_gpu_is_native_and_the_log_and_the_metric_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let streams = "  p: {url: \"test:?size=64x48&fps=10\", realtime: true}\n";
    let listen = configure(folder, streams);
    let daemon = start(folder);
    let model = || {
        let text = get(&listen, "/metrics")?;
        text.lines().find(|it| it.starts_with("ghostwatch_model_info{")).map(str::to_owned)
    };
    wait_until("the daemon serves its metrics", || model().is_some());
    let model = model().unwrap();
    assert!(model.contains("{device=\"cpu\",engine=\"native\","), "{model}");
    drain(daemon, folder);
    let log = std::fs::read_to_string(folder.join("log")).unwrap();
    let line = log.lines().find(|it| it.contains("golden self-test agrees")).unwrap();
    assert!(line.contains("native"), "{line}");
}

#[cfg(not(feature = "libtorch"))]
#[test]
fn without_libtorch_what_needs_it_is_refused_in_words() {
    use crate::end_to_end::{ghostwatch, said};
    let folder = tempfile::tempdir().unwrap();
    for device in ["cpu", "cuda:0"] {
        let text =
            format!("version: 1\nstreams: {{p: {{url: \"test:\"}}}}\ndevice: {{use: {device}}}\n");
        std::fs::write(folder.path().join("config.yaml"), text).unwrap();
        let output = ghostwatch(folder.path()).arg("check").output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let want = format!(
            "config.yaml:3:15: device.use: `{device}` cannot be used; \
             this build has no libtorch: use auto or native"
        );
        assert!(said(&output).contains(&want), "{}", said(&output));
    }
    let output = ghostwatch(folder.path()).args(["speed", "--device", "cuda:0"]).output().unwrap();
    let want = "device cuda:0 cannot be used: this build has no libtorch: use auto or native";
    assert!(!output.status.success() && said(&output).contains(want), "{}", said(&output));
}

#[test]
fn native_refuses_other_precisions_and_sizes_in_words() {
    let config = Config { width: 0.5, classes: 3 };
    let tensors = golden::weights(&config);
    let network = Network { config, tensors: &tensors, side: 32, mean: [0.5; 3], std: [0.2; 3] };
    let start = |precision| {
        let wanted = Wanted { precision, ..wanted(Use::Native, 2) };
        Engine::start(&network, &wanted, &GpuStatus::Absent)
    };
    let said = start(Some(Precision::Bf16)).err().unwrap().to_string();
    assert_eq!(said, "device native computes in fp32, not in bf16: use auto or fp32");
    let said = start(None).unwrap().forward(&[&[0; 12]]).unwrap_err().to_string();
    assert_eq!(said, "an input has 12 bytes, not 3072 (3 x 32 x 32)");
}

#[test]
fn native_refuses_weights_for_another_number_of_classes() {
    let weights = root().join("weights/ghostnet-1x-demo.safetensors");
    let (checkpoint, config) = checkpoint(&weights).unwrap();
    let config = Config { classes: config.classes + 1, ..config };
    let network =
        Network { config, tensors: &checkpoint.tensors, side: 32, mean: [0.5; 3], std: [0.2; 3] };
    let made = Engine::start(&network, &wanted(Use::Native, 1), &GpuStatus::Absent);
    let said = made.err().unwrap().to_string();
    assert!(said.contains("tensor classifier.weight has shape"), "{said}");
}
