//! The shipped checkpoint: it answers as PyTorch does, and a user's own classes work as it does.

use std::{collections::BTreeMap, fs, path::PathBuf};

use ghostwatch::{
    infer::{
        Model,
        device::{GpuStatus, Network},
        engine::Engine,
        load::{Choice, checkpoint, load},
        plan::Config,
        selftest::{self, Golden},
        wanted::{Use, Wanted},
        weights::{self, Checkpoint, Tensor, hex, metadata::Metadata},
    },
    postprocess::top,
    preprocess::Geometry,
};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    end_to_end::{FRAME, account, events, ghostwatch, root, said},
    golden::{self, engines},
};

const ALLOWED: f64 = 1e-5;

fn wanted(device: Use) -> Wanted {
    Wanted { device, precision: None, max_batch: 8, buckets: None }
}

fn shipped() -> PathBuf {
    root().join("weights/ghostnet-1x-demo.safetensors")
}

#[test]
fn the_shipped_checkpoint_gives_the_logits_that_pytorch_gave() {
    let (checkpoint, config) = checkpoint(&shipped()).unwrap();
    let metadata = &checkpoint.metadata;
    let reference = metadata.reference.as_ref().unwrap();
    assert!(reference.by.starts_with("pytorch "), "made by {}", reference.by);
    let network = Network {
        config,
        tensors: &checkpoint.tensors,
        side: metadata.input,
        mean: metadata.mean,
        std: metadata.std,
    };
    let geometry = Geometry { resize: metadata.resize, crop: metadata.input };
    let golden = Golden { geometry, reference: reference.clone(), allowed_error: ALLOWED };
    for device in engines() {
        let mut engine = Engine::start(&network, &wanted(device), &GpuStatus::Absent).unwrap();
        let agreement = golden.run(&mut engine).unwrap();
        println!("{device}: {agreement:?}");
        assert!(agreement.max_error <= ALLOWED && agreement.top1(), "{device}: {agreement:?}");
    }
    let labels = fs::read(root().join("weights/imagenet_classes.txt")).unwrap();
    assert_eq!(metadata.labels_sha256.as_deref(), Some(&*hex(&Sha256::digest(labels))));
}

#[test]
fn a_batch_of_the_shipped_checkpoint_gives_what_its_pictures_give_alone() {
    for device in engines() {
        let choice = Choice { weights: shipped(), ..Choice::default() };
        let mut loaded = load(&choice, &wanted(device), &GpuStatus::Absent).unwrap();
        let (side, bytes) = (loaded.golden.geometry.crop, loaded.golden.geometry.bytes());
        let mut pictures = selftest::pictures(side);
        for step in [37, 101, 211, 17, 5] {
            pictures.push((0..bytes).map(|it| ((it / 3 * step) >> 4) as u8).collect());
        }
        let all: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
        let together = loaded.engine.forward(&all).unwrap();
        for (index, picture) in all.iter().enumerate() {
            let alone = loaded.engine.forward(&[picture]).unwrap();
            let agreement = selftest::compare(&together[index..=index], &alone).unwrap();
            assert!(agreement.max_error <= ALLOWED, "{device}, picture {index}: {agreement:?}");
            let ids = |it: &[f32]| -> Vec<u32> {
                top(it, 5).unwrap().iter().map(|it| it.label_id).collect()
            };
            assert_eq!(ids(&together[index]), ids(&alone[0]), "{device}, picture {index}");
        }
    }
}

#[test]
fn a_photo_has_the_labels_that_pytorch_gave_it() {
    let golden = root().join("tests/golden");
    let want: Value = serde_json::from_slice(&fs::read(golden.join("demo.json")).unwrap()).unwrap();
    let want = want["top"].as_array().unwrap();
    for device in engines().map(|it| it.to_string()).chain(["auto".to_owned()]) {
        let output = ghostwatch(&golden)
            .args(["classify", "--format", "ndjson", "photo.jpg", "--device", &device])
            .arg("--weights")
            .arg(shipped())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        let got: Value = serde_json::from_slice(&output.stdout).unwrap();
        let got = got["data"]["top"].as_array().unwrap();
        let ids = |it: &[Value]| it.iter().map(|it| it["label_id"].clone()).collect::<Vec<_>>();
        assert_eq!(ids(got), ids(want), "{device}: {got:?}");
        for (got, want) in got.iter().zip(want) {
            let confidence = |it: &Value| it["confidence"].as_f64().unwrap();
            let difference = (confidence(got) - confidence(want)).abs();
            // Confidences are published with six digits.
            assert!(difference <= 2e-6, "{device}: {got} instead of {want}");
        }
    }
}

/// A fine-tuned model of 12 classes, as its user has it: a state_dict's tensors and nothing else.
/// On any picture its best five are the classes 11, 9, 7, 5 and 3, in this order.
fn own_classes() -> Checkpoint {
    let mut tensors: BTreeMap<String, Tensor> =
        golden::weights(&Config { classes: 12, ..Config::PUBLISHED });
    // The last layer's inputs are far below its biases then, whatever the picture is.
    let last = tensors.get_mut("classifier.weight").unwrap();
    last.data.iter_mut().for_each(|it| *it *= 1e-6);
    let bias = |it: usize| if it % 2 == 1 { it as f32 } else { -1.0 };
    tensors.get_mut("classifier.bias").unwrap().data = (0..12).map(bias).collect();
    Checkpoint { tensors, metadata: Metadata::published(12), sha256: String::new() }
}

#[test]
fn a_model_of_12_own_classes_labels_with_its_own_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    weights::write(&path("raw.safetensors"), &own_classes()).unwrap();
    let output = ghostwatch(folder.path())
        .args(["weights", "import", "raw.safetensors", "--name", "mine", "--to"])
        .arg(path("mine.safetensors"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let names: Vec<String> = (0..12).map(|it| format!("pallet {it}")).collect();
    fs::write(path("mine.txt"), names.join("\n")).unwrap();
    let config = |labels: &str| {
        let text = format!(
            "version: 1\nstreams:\n  p: {{url: \"test:?size=64x48&frames=12\"}}\n\
             model: {{weights: mine.safetensors, labels: {labels}}}\n\
             journal: {{path: journal.db, retain: {{keep_free: 0B}}}}\nhttp: {{listen: \"127.0.0.1:0\"}}\n"
        );
        fs::write(path("config.yaml"), text).unwrap();
    };
    config("mine.txt");
    let output = ghostwatch(folder.path()).args(["run", "--once"]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let events = events(folder.path());
    assert_eq!(account(&events)["p"], (12, 12));
    for event in events.iter().filter(|it| it["type"] == FRAME) {
        let top = event["data"]["top"].as_array().unwrap();
        let got: Vec<_> = top.iter().map(|it| it["label"].as_str().unwrap()).collect();
        assert_eq!(got, ["pallet 11", "pallet 9", "pallet 7", "pallet 5", "pallet 3"]);
        assert!(top.iter().all(|it| it.get("wnid").is_none()), "{event}");
        assert_eq!(event["data"]["model"]["labels"], "mine");
    }
    // Labels for another number of classes are refused before anything runs.
    fs::write(path("eleven.txt"), names[..11].join("\n")).unwrap();
    config("eleven.txt");
    let output = ghostwatch(folder.path()).args(["run", "--once"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = said(&output);
    assert!(said.contains("11 labels") && said.contains("12 classes"), "{said}");
}
