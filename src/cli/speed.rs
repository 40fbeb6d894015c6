//! `ghostwatch speed`: what the network's device gives, by batch size, and how its answers compare
//! with those of libtorch on the CPU.
//!
//! From bytes to logits, so with the way to a GPU and back. Not here: decoding, preprocess, the journal.

use std::{
    io::{self, Write as _},
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    cli::Exit,
    infer::{
        Model as _,
        device::GpuStatus,
        engine::Engine,
        load::{self, Choice},
        selftest,
        wanted::{Precision, Use, Wanted},
    },
};

/// What to measure.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// auto, cpu, native or cuda:N.
    #[arg(long, default_value = "auto")]
    device: Use,
    /// fp32, bf16 or fp16 [default: as the daemon chooses].
    #[arg(long)]
    precision: Option<Precision>,
    /// Batch sizes.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32",
        value_parser = clap::value_parser!(u16).range(1..=1024))]
    batches: Vec<u16>,
    /// How long each batch size is measured.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=600))]
    seconds: u16,
    /// The checkpoint.
    #[arg(long, default_value = "weights/ghostnet-1x-demo.safetensors", value_name = "FILE")]
    weights: PathBuf,
}

/// Pictures that both devices are asked about.
const COMPARED: usize = 64;

/// Measures, and prints one JSON object.
///
/// # Errors
/// The device or the checkpoint cannot be used.
pub fn run(args: &Args) -> anyhow::Result<()> {
    // Before all else that calls libtorch.
    let gpu = GpuStatus::find(args.device, None);
    let choice = Choice { weights: args.weights.clone(), ..Choice::default() };
    let most = args.batches.iter().max().copied().map_or(1, usize::from);
    let wanted = |device, precision| Wanted { device, precision, max_batch: most, buckets: None };
    let loaded = load::load(&choice, &wanted(args.device, args.precision), &gpu)?;
    if !loaded.passes() {
        return Err(Exit::failed(format!("the golden self-test failed: {:?}", loaded.agreement)));
    }
    let side = loaded.golden.geometry.crop;
    let mut engine = loaded.engine;
    // The reference, if this build has it.
    let other = if Use::Cpu.lacks().is_none() { Use::Cpu } else { Use::Native };
    let exact = load::load(&choice, &wanted(other, Some(Precision::Fp32)), &gpu)?;
    let pictures: Vec<_> = (0..COMPARED.max(most)).map(|it| picture(it, side)).collect();
    let batch: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
    let mut reference = exact.engine;
    let want = reference.forward(&batch[..COMPARED])?;
    let agreement = selftest::compare(&engine.forward(&batch[..COMPARED])?, &want)?;
    let mut rows = Vec::new();
    for count in args.batches.iter().map(|it| usize::from(*it)) {
        let time = Duration::from_secs(args.seconds.into());
        let (pictures_a_second, ms) = measure(&mut engine, &batch[..count], time)?;
        rows.push(json!({"batch": count, "pictures_per_second": pictures_a_second, "ms": ms}));
    }
    let report = json!({
        "device": engine.device(),
        "engine": engine.name(),
        "precision": engine.precision().name(),
        "note": engine.note(),
        "compared": COMPARED,
        "compared_with": reference.name(),
        "max_error": agreement.max_error,
        "same_top1": agreement.same_top1,
        "batches": rows,
    });
    writeln!(io::stdout(), "{report:#}")?;
    Ok(())
}

/// Pictures a second, and the median time of a batch in milliseconds.
fn measure(engine: &mut Engine, batch: &[&[u8]], time: Duration) -> anyhow::Result<(f64, f64)> {
    for _ in 0..3 {
        engine.forward(batch)?;
    }
    let started = Instant::now();
    let mut times = Vec::new();
    while started.elapsed() < time || times.is_empty() {
        let one = Instant::now();
        engine.forward(batch)?;
        times.push(one.elapsed().as_secs_f64());
    }
    let rate = (times.len() * batch.len()) as f64 / started.elapsed().as_secs_f64();
    times.sort_by(f64::total_cmp);
    Ok((rate, times[times.len() / 2] * 1e3))
}

/// A picture that is like no other: waves of different lengths.
fn picture(number: usize, side: usize) -> Vec<u8> {
    let wave = |at: usize, length: usize| ((at * 256 / side) * (length + 1) / 2) as u8;
    let pixel = |x, y| {
        [wave(x, number % 7), wave(y, number % 11), wave(x + y, number % 13)]
            .map(|it| it ^ number as u8)
    };
    (0..side).flat_map(|y| (0..side).flat_map(move |x| pixel(x, y))).collect()
}
