//! From a weights file to a network that has proved on the device that it computes what it should.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::{
    cli::Exit,
    infer::{
        device::{GpuStatus, Network},
        engine::Engine,
        plan::{self, Config},
        selftest::{Agreement, Golden, Reference},
        wanted::Wanted,
        weights::{
            self, Checkpoint,
            labels::Labels,
            metadata::{ARCH, Metadata},
        },
    },
    preprocess::Geometry,
};

/// Which network, and what it is to be used with.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// The checkpoint.
    pub weights: PathBuf,
    /// The label file; `None` for the one beside the checkpoint.
    pub labels: Option<PathBuf>,
    /// Instead of what the checkpoint says: the short side after the resize.
    pub resize: Option<usize>,
    /// Instead of what the checkpoint says: the side of the centre crop.
    pub input: Option<usize>,
    /// Instead of what the checkpoint says: subtracted from each channel.
    pub mean: Option<[f32; 3]>,
    /// Instead of what the checkpoint says: divides each channel.
    pub std: Option<[f32; 3]>,
}

/// A network that is ready.
pub struct Loaded {
    /// The network on its device; further lanes come from it.
    pub engine: Engine,
    /// How a picture becomes its input, and what it should answer.
    pub golden: Golden,
    /// The names of its classes.
    pub labels: Labels,
    /// Names the list of labels.
    pub label_set: String,
    /// The checkpoint's hash, in hex.
    pub sha256: String,
    /// The architecture's name.
    pub model: String,
    /// Whether this is the checkpoint that ships with ghostwatch.
    pub demonstration: bool,
    /// How its answers compare with the reference.
    pub agreement: Agreement,
}

/// The label file that ships with ghostwatch; looked for beside the checkpoint.
pub const IMAGENET_LABELS: &str = "imagenet_classes.txt";

/// Reads the checkpoint and checks it against the network it is for.
///
/// # Errors
/// The file is refused; the message names what does not fit.
pub fn checkpoint(path: &Path) -> anyhow::Result<(Checkpoint, Config)> {
    let checkpoint =
        weights::read(path).map_err(|it| Exit::wrong(format!("{:#}", anyhow::Error::from(it))))?;
    let metadata = &checkpoint.metadata;
    if metadata.arch != ARCH {
        return Err(Exit::wrong(format!(
            "{}: the architecture is {:?}, this version knows {ARCH}",
            path.display(),
            metadata.arch
        )));
    }
    let config = Config { classes: metadata.num_classes, ..Config::PUBLISHED };
    weights::check(&checkpoint, &plan::expected(&config))
        .map_err(|it| Exit::wrong(format!("{}: {it}", path.display())))?;
    Ok((checkpoint, config))
}

/// Loads a network, puts it on the device and runs the golden self-test.
///
/// # Errors
/// A file is refused, the device cannot be used, or the self-test failed.
pub fn load(choice: &Choice, wanted: &Wanted, gpu: &GpuStatus) -> anyhow::Result<Loaded> {
    let (checkpoint, config) = checkpoint(&choice.weights)?;
    let metadata = overridden(checkpoint.metadata, choice);
    let geometry = Geometry { resize: metadata.resize, crop: metadata.input };
    if !geometry.is_valid() {
        return Err(Exit::wrong(format!(
            "model: resize {} and input {} do not fit: needed is 1 <= input <= resize <= 4096",
            metadata.resize, metadata.input
        )));
    }
    let beside = choice.weights.with_file_name(IMAGENET_LABELS);
    let path = choice.labels.clone().unwrap_or(beside);
    let labels = Labels::read(&path, config.classes)
        .map_err(|it| Exit::wrong(format!("{:#}", anyhow::Error::from(it))))?;
    let label_set = match config.classes {
        1000 => "imagenet-1k".to_owned(),
        _ => path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
    };
    let network = Network {
        config,
        tensors: &checkpoint.tensors,
        side: metadata.input,
        mean: metadata.mean,
        std: metadata.std,
    };
    let mut engine = Engine::start(&network, wanted, gpu)?;
    let reference = match metadata.reference {
        Some(reference) => reference,
        // A checkpoint without reference answers is compared with what it answers now: later
        // rounds of the self-test then find a device that has gone wrong.
        None => Reference::of(&mut engine, metadata.input)?,
    };
    let golden = Golden { geometry, reference, allowed_error: engine.allowed_error() };
    let agreement = golden.run(&mut engine).context("the golden self-test could not run")?;
    Ok(Loaded {
        golden,
        engine,
        labels,
        label_set,
        sha256: checkpoint.sha256,
        model: ARCH.to_owned(),
        demonstration: metadata.provenance.contains_key("trained_on"),
        agreement,
    })
}

/// What the checkpoint says, with what the user says instead. Reference answers hold only for the
/// checkpoint's own input.
fn overridden(mut metadata: Metadata, choice: &Choice) -> Metadata {
    let own = metadata.clone();
    metadata.resize = choice.resize.unwrap_or(own.resize);
    metadata.input = choice.input.unwrap_or(own.input);
    metadata.mean = choice.mean.unwrap_or(own.mean);
    metadata.std = choice.std.unwrap_or(own.std);
    let same = (own.input, own.mean, own.std) == (metadata.input, metadata.mean, metadata.std);
    metadata.reference = own.reference.filter(|_| same);
    metadata
}

impl Loaded {
    /// Whether the answers agree with the reference well enough for the precision.
    pub fn passes(&self) -> bool {
        self.golden.passes(&self.agreement)
    }
}
