//! `ghostwatch classify`: pictures, videos and folders, once, with no journal and no daemon.

use std::{
    fs,
    io::{self, IsTerminal as _, Write},
    mem,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::{
    cli::{Exit, text},
    frame::Picture,
    infer::{
        Model as _,
        device::GpuStatus,
        load::{self, Choice, Loaded},
        wanted::{Use, Wanted},
    },
    ledger::Stream,
    postprocess::{Ranked, top},
    preprocess::{Preprocessor, image},
    source::{Next, Opener as _, Spec, gst::GstOpener},
};

/// What to classify, and how.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Pictures (PNG, JPEG), videos, folders or stream URLs.
    #[arg(required = true, value_name = "PATH|URL")]
    inputs: Vec<String>,
    /// Labels per picture.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    top: u16,
    /// How results are printed.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Take every N-th frame of a video.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    every: u32,
    /// auto, cpu, native or cuda:N.
    #[arg(long, default_value = "auto")]
    device: Use,
    /// The checkpoint.
    #[arg(long, default_value = "weights/ghostnet-1x-demo.safetensors", value_name = "FILE")]
    weights: PathBuf,
    /// Its label file [default: imagenet_classes.txt beside it].
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq)]
enum Format {
    /// For people.
    Table,
    /// One event-shaped JSON object per picture.
    Ndjson,
}

/// Pictures that go through the network together.
const BATCH: usize = 16;

/// Classifies everything. One input that cannot be read does not keep the others from being
/// classified.
///
/// # Errors
/// The network cannot be loaded, or some inputs could not be read; each was named on stderr.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let choice =
        Choice { weights: args.weights.clone(), labels: args.labels.clone(), ..Choice::default() };
    let wanted = Wanted { device: args.device, precision: None, max_batch: BATCH, buckets: None };
    let gpu = GpuStatus::find(args.device, None);
    let loaded = load::load(&choice, &wanted, &gpu)?;
    if !loaded.passes() {
        bail!("the golden self-test failed: {:?}", loaded.agreement);
    }
    let mut inputs = Vec::new();
    for input in &args.inputs {
        expand(input, &mut inputs)?;
    }
    let bar = if io::stderr().is_terminal() && !io::stdout().is_terminal() || 1 < inputs.len() {
        ProgressBar::new(inputs.len() as u64).with_style(
            ProgressStyle::with_template("{pos}/{len} {wide_bar} {msg} {eta}")
                .expect("the template is well formed"),
        )
    } else {
        ProgressBar::hidden()
    };
    let mut failed = 0;
    let mut classifier = Classifier::new(args, loaded);
    for input in &inputs {
        bar.set_message(text::escape(input));
        if let Err(error) = classifier.input(input) {
            if error.chain().any(|it| it.is::<io::Error>() && is_output(it)) {
                return Err(error);
            }
            bar.suspend(|| eprintln!("ghostwatch: {}: {error:#}", text::escape(input)));
            failed += 1;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if 0 < failed {
        return Err(Exit::failed(format!(
            "{failed} of {} inputs could not be classified",
            inputs.len()
        )));
    }
    Ok(())
}

/// Whether an error came from our own output.
fn is_output(error: &(dyn std::error::Error + 'static)) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|it| it.kind() == io::ErrorKind::BrokenPipe)
}

/// The files in a folder, in the order of their names, folders within it too; anything else as it
/// is.
fn expand(input: &str, into: &mut Vec<String>) -> anyhow::Result<()> {
    if !Path::new(input).is_dir() {
        into.push(input.to_owned());
        return Ok(());
    }
    let entries = fs::read_dir(input).with_context(|| format!("reading folder {input}"))?;
    let mut paths: Vec<PathBuf> =
        entries.map(|it| it.map(|it| it.path())).collect::<Result<_, _>>()?;
    paths.sort();
    for path in paths {
        let Some(path) = path.to_str() else {
            bail!("{} is not UTF-8", path.display());
        };
        expand(path, into)?;
    }
    Ok(())
}

/// The network with what belongs to one run of it.
struct Classifier<'a> {
    args: &'a Args,
    loaded: Loaded,
    preprocessor: Preprocessor,
    /// Inputs of the batch that fills.
    pixels: Vec<Vec<u8>>,
    /// What each of them is: its name in the output.
    about: Vec<About>,
}

/// One picture of the output.
struct About {
    input: String,
    /// `None` for a picture file.
    frame: Option<u64>,
    pts_ns: u64,
    size: (usize, usize),
}

impl<'a> Classifier<'a> {
    fn new(args: &'a Args, loaded: Loaded) -> Classifier<'a> {
        let preprocessor = Preprocessor::new(loaded.golden.geometry);
        Classifier { args, loaded, preprocessor, pixels: Vec::new(), about: Vec::new() }
    }

    fn input(&mut self, input: &str) -> anyhow::Result<()> {
        let picture = match fs::read(input) {
            Ok(bytes) => match image::decode(&bytes) {
                Ok(picture) => Some(picture),
                Err(image::ImageError::Unknown) => None,
                Err(error) => return Err(error.into()),
            },
            Err(error) if input.contains(':') => {
                tracing::debug!(%error, "no such file; taken as a URL");
                None
            }
            Err(error) => return Err(error.into()),
        };
        match picture {
            Some(picture) => {
                let size = (picture.width, picture.height);
                let about = About { input: input.to_owned(), frame: None, pts_ns: 0, size };
                self.add(&Picture::from(picture), about)?;
                self.flush()
            }
            None => self.video(input),
        }
    }

    fn video(&mut self, input: &str) -> anyhow::Result<()> {
        let mut opener = GstOpener::new(Spec::parse(input)?, Arc::new(Stream::new("classify")))?;
        let mut source = opener.open()?;
        let mut frame = 0;
        loop {
            let next = match source.next() {
                Ok(next) => next,
                Err(error) => {
                    // What came before it broke is still good.
                    self.flush()?;
                    return Err(error.into());
                }
            };
            match next {
                Next::Idle => {}
                Next::Eos => return self.flush(),
                Next::Picture(decoded) => {
                    if frame % u64::from(self.args.every) == 0 {
                        let size = (decoded.picture.width, decoded.picture.height);
                        let pts_ns = decoded.pts.map_or(0, |it| it.as_nanos() as u64);
                        let input = text::escape(input);
                        let about = About { input, frame: Some(frame), pts_ns, size };
                        self.add(&decoded.picture, about)?;
                    }
                    frame += 1;
                }
            }
        }
    }

    fn add(&mut self, picture: &Picture, about: About) -> anyhow::Result<()> {
        let mut pixels = vec![0; self.loaded.golden.geometry.bytes()];
        self.preprocessor.run(picture, &mut pixels)?;
        self.pixels.push(pixels);
        self.about.push(about);
        if self.pixels.len() == BATCH { self.flush() } else { Ok(()) }
    }

    /// Runs what is waiting and prints it.
    fn flush(&mut self) -> anyhow::Result<()> {
        if self.pixels.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        // Taken before anything can fail: a later batch must not meet the rest of this one.
        let (pixels, about) = (mem::take(&mut self.pixels), mem::take(&mut self.about));
        let batch: Vec<&[u8]> = pixels.iter().map(Vec::as_slice).collect();
        let logits = self.loaded.engine.forward(&batch)?;
        tracing::debug!(pictures = batch.len(), took = ?start.elapsed(), "batch");
        let mut out = io::stdout().lock();
        for (about, logits) in about.into_iter().zip(logits) {
            let best = top(&logits, usize::from(self.args.top))?;
            match self.args.format {
                Format::Table => table(&mut out, &about, &best, &self.loaded)?,
                Format::Ndjson => ndjson(&mut out, &about, &best, &self.loaded)?,
            }
        }
        Ok(out.flush()?)
    }
}

fn table(out: &mut impl Write, about: &About, best: &[Ranked], loaded: &Loaded) -> io::Result<()> {
    match about.frame {
        None => writeln!(out, "{}", about.input)?,
        Some(frame) => writeln!(out, "{} frame {frame}", about.input)?,
    }
    for it in best {
        let label = &loaded.labels.entries[it.label_id as usize];
        writeln!(out, "  {:6.2} %  {:4}  {}", it.confidence * 100.0, it.label_id, label.name)?;
    }
    Ok(())
}

fn ndjson(out: &mut impl Write, about: &About, best: &[Ranked], loaded: &Loaded) -> io::Result<()> {
    let label = |(rank, it): (u32, &Ranked)| {
        let label = &loaded.labels.entries[it.label_id as usize];
        let confidence = (f64::from(it.confidence) * 1e6).round() / 1e6;
        match &label.wnid {
            Some(wnid) => json!({"rank": rank, "label_id": it.label_id, "wnid": wnid,
                "label": label.name, "confidence": confidence}),
            None => json!({"rank": rank, "label_id": it.label_id, "label": label.name,
                "confidence": confidence}),
        }
    };
    let mut data = json!({
        "input": about.input,
        "width": about.size.0,
        "height": about.size.1,
        "model": {
            "name": loaded.model,
            "weights": format!("sha256:{}", &loaded.sha256[..12]),
            "labels": loaded.label_set,
            "precision": loaded.engine.precision().name(),
        },
        "device": loaded.engine.device(),
        "top": (1..).zip(best).map(label).collect::<Vec<_>>(),
    });
    if let Some(frame) = about.frame {
        data["frame"] = frame.into();
        data["pts_ns"] = about.pts_ns.into();
    }
    writeln!(out, "{}", json!({"type": "io.ghostwatch.classify.v1", "data": data}))
}
