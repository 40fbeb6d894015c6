//! How fast the network and the way from a file to its labels are: figures, not promises.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use crate::{
    golden::weights,
    source::{clip, spec},
    support::{Batches, Collect, size, within},
    support_media::ffmpeg,
};
use ghostwatch::{
    edge::WhenFull,
    infer::{
        Model,
        batch::Batching,
        device::{GpuStatus, Network},
        engine::Engine,
        plan::Config,
        wanted::{Use, Wanted},
    },
    ledger::Stream,
    pipeline::{Parts, Pipeline},
    preprocess::Geometry,
    source::{Settings, Spec, gst::GstOpener},
};

/// Processor time of this thread in seconds.
#[cfg(feature = "libtorch")]
fn cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

#[cfg(feature = "libtorch")]
#[test]
#[ignore = "a figure, not a promise: the network by batch size"]
fn figures_of_the_network_by_batch_size() {
    use ghostwatch::infer::ghostnet::GhostNet;
    use tch::{Device, Kind};

    tch::set_num_threads(1);
    let _guard = tch::no_grad_guard();
    let config = Config::PUBLISHED;
    let tensors = weights(&config);
    let plain = GhostNet::plain(&tensors, &config, Device::Cpu, Kind::Float).unwrap();
    let fused = GhostNet::new(&tensors, &config, 224, Device::Cpu, Kind::Float).unwrap();
    for count in [1_i64, 2, 4, 8, 16, 32] {
        let x = tch::Tensor::rand([count, 224, 224, 3], (Kind::Float, Device::Cpu));
        let x = x.permute([0, 3, 1, 2]);
        let mut best = [f64::MAX; 2];
        for _ in 0..size(8, 40) {
            for (best, network) in best.iter_mut().zip([&plain, &fused]) {
                let started = cpu();
                drop(network.forward(&x).unwrap());
                *best = best.min(cpu() - started);
            }
        }
        let [plain, fused] = best.map(|it| count as f64 / it);
        println!(
            "batch {count}: {plain:.1} -> {fused:.1} pictures/s of one core ({:.2} x)",
            fused / plain
        );
    }
}

/// Pictures a second from files to labels, on two lanes.
fn labels_a_second(paths: &[PathBuf], decode_threads: u32) -> f64 {
    let config = Config::PUBLISHED;
    let tensors = weights(&config);
    let network = Network { config, tensors: &tensors, side: 224, mean: [0.5; 3], std: [0.25; 3] };
    let wanted = Wanted { device: Use::Auto, precision: None, max_batch: 32, buckets: None };
    let engine = Engine::start(&network, &wanted, &GpuStatus::Absent).unwrap();
    let models = [engine.lane().unwrap(), engine].map(|it| Box::new(it) as Box<dyn Model>);
    let sink = Collect::default();
    let publish = sink.clone();
    let parts = Parts {
        geometry: Geometry { resize: 256, crop: 224 },
        models: models.into(),
        selftest: None,
        preprocess_workers: 2,
        batching: Batching { max_size: 32, max_wait: Duration::from_millis(5) },
        top: 5,
        watch: Arc::new(Batches::default()),
        publish: Box::new(|input, _pulse| publish.run(input)),
    };
    let mut pipeline = Pipeline::start(parts).unwrap();
    let mut start = Instant::now();
    for (number, path) in paths.iter().enumerate() {
        let spec = Spec { decode_threads, ..spec(path.to_str().unwrap()) };
        let stream = Arc::new(Stream::new(format!("s{number}")));
        let opener = Box::new(GstOpener::new(spec.clone(), stream.clone()).unwrap());
        let settings = Settings::new(&spec, 0);
        pipeline.add_source(opener, stream, settings, (WhenFull::Block, 1), |_| ()).unwrap();
    }
    // The first pictures wait for the warm-up.
    while sink.frames.load(Relaxed) < 64 {
        assert!(start.elapsed() < Duration::from_secs(300));
        std::thread::sleep(Duration::from_millis(1));
    }
    let first = sink.frames.load(Relaxed);
    start = Instant::now();
    while 0 < pipeline.sources() {
        pipeline.next_exit(within(600_000)).expect("a file ends");
    }
    pipeline.stop(within(60_000)).unwrap();
    (sink.frames.load(Relaxed) - first) as f64 / start.elapsed().as_secs_f64()
}

#[test]
#[ignore = "a figure, not a promise: from files to labels, by the decoder's threads"]
fn figures_from_files_to_labels() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("1080p.mkv");
    let video = "-an -vf scale=1920:1080 -c:v libx264 -preset veryfast -b:v 4M -g 50 -bf 0";
    let from = clip("bigbuckbunny.mp4");
    let count = size(264, 1_320);
    ffmpeg(&format!("-stream_loop 20 -i {} {video} -frames:v {count}", from.display()), &path);
    for round in 0..size(2, 5) {
        for threads in [1, 2] {
            let fps = labels_a_second(std::slice::from_ref(&path), threads);
            println!("round {round}: one file, {threads} decoder threads: {fps:.1} labels/s");
        }
        for threads in [1, 2] {
            let fps = labels_a_second(&vec![path.clone(); size(4, 16)], threads);
            println!(
                "round {round}: many files, {threads} decoder threads each: {fps:.1} labels/s"
            );
        }
    }
}
