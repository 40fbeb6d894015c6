//! `ghostwatch weights`: fetch, import, inspect and verify checkpoints.

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use crate::{
    cli::Exit,
    infer::{
        device::{GpuStatus, Network},
        engine::Engine,
        load::{self, Choice},
        plan::{self, Config},
        selftest::Reference,
        wanted::{Precision, Use, Wanted},
        weights::{
            self, Checkpoint,
            fetch::{self, BLOB_ID, FetchError, Published, URL},
        },
    },
};

/// What to do with checkpoints.
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Download the published checkpoint, verify and convert it.
    Fetch {
        /// A mirror of the published file.
        #[arg(long, default_value = URL)]
        url: String,
        /// Where the converted checkpoint goes.
        #[arg(long, default_value = "weights/ghostnet-1x.safetensors", value_name = "FILE")]
        to: PathBuf,
        /// The git blob id that the download must have, for a mirror of another release.
        #[arg(long, default_value = BLOB_ID, hide = true)]
        blob_id: String,
    },
    /// Convert a checkpoint that was downloaded already: .pth or .safetensors.
    Import {
        /// The file.
        file: PathBuf,
        /// Where the converted checkpoint goes.
        #[arg(long, default_value = "weights/ghostnet-1x.safetensors", value_name = "FILE")]
        to: PathBuf,
        /// Accept a file that is not the published one, under this name; it is marked `other`.
        #[arg(long)]
        name: Option<String>,
    },
    /// Print the tensors and metadata of a checkpoint.
    Inspect {
        /// The file.
        file: PathBuf,
    },
    /// Prove that a checkpoint loads and gives its stored reference logits.
    Verify {
        /// The file.
        file: PathBuf,
        /// Its label file [default: imagenet_classes.txt beside it].
        #[arg(long, value_name = "FILE")]
        labels: Option<PathBuf>,
    },
}

/// Runs the subcommand.
///
/// # Errors
/// The file or download is refused, with the reason.
pub fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Fetch { url, to, blob_id } => {
            let bar = fetch::bar();
            let published = Published { url, blob_id };
            let got = fetch::fetch(published, to, &bar, &finish);
            bar.finish_and_clear();
            done(&got.map_err(refused)?, to)
        }
        Command::Import { file, to, name } => {
            let got = fetch::import(file, to, BLOB_ID, name.as_deref(), &finish);
            done(&got.map_err(refused)?, to)
        }
        Command::Inspect { file } => inspect(file),
        Command::Verify { file, labels } => verify(file, labels.clone()),
    }
}

/// A file that is no good is the user's to correct; a network that fails is not.
fn refused(error: FetchError) -> anyhow::Error {
    match error {
        FetchError::WrongBytes { .. } | FetchError::Weights(_) | FetchError::Refused { .. } => {
            Exit::wrong(format!("{:#}", anyhow::Error::from(error)))
        }
        other => other.into(),
    }
}

fn done(checkpoint: &Checkpoint, to: &Path) -> anyhow::Result<()> {
    let metadata = &checkpoint.metadata;
    writeln!(
        io::stdout(),
        "{}: {} with {} classes, resize {}, input {}, sha256 {}",
        to.display(),
        metadata.arch,
        metadata.num_classes,
        metadata.resize,
        metadata.input,
        checkpoint.sha256
    )?;
    Ok(())
}

/// Checks that a converted checkpoint fits the network, and stores what it answers.
fn finish(checkpoint: &mut Checkpoint) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let config = Config { classes: checkpoint.metadata.num_classes, ..Config::PUBLISHED };
    weights::check(checkpoint, &plan::expected(&config))?;
    let network = Network {
        config,
        tensors: &checkpoint.tensors,
        side: checkpoint.metadata.input,
        mean: checkpoint.metadata.mean,
        std: checkpoint.metadata.std,
    };
    let mut engine = Engine::start(&network, &cpu(), &GpuStatus::Absent)?;
    checkpoint.metadata.reference = Some(Reference::of(&mut engine, checkpoint.metadata.input)?);
    Ok(())
}

/// As the daemon computes it where there is no GPU.
fn cpu() -> Wanted {
    Wanted { device: Use::Auto, precision: Some(Precision::Fp32), max_batch: 4, buckets: None }
}

fn inspect(file: &Path) -> anyhow::Result<()> {
    let checkpoint =
        weights::read(file).map_err(|it| Exit::wrong(format!("{:#}", anyhow::Error::from(it))))?;
    let mut out = io::stdout().lock();
    writeln!(out, "sha256 {}", checkpoint.sha256)?;
    for (key, value) in checkpoint.metadata.strings() {
        // Reference logits are thousands of numbers.
        let shown: String = value.chars().take(120).collect();
        let rest = if shown.len() < value.len() { "…" } else { "" };
        writeln!(out, "{key} = {}{rest}", shown.escape_debug())?;
    }
    let values: usize = checkpoint.tensors.values().map(|it| it.data.len()).sum();
    for (name, tensor) in &checkpoint.tensors {
        writeln!(out, "{} {:?}", name.escape_debug(), tensor.shape)?;
    }
    writeln!(out, "{} tensors, {values} values", checkpoint.tensors.len())?;
    Ok(())
}

fn verify(file: &Path, labels: Option<PathBuf>) -> anyhow::Result<()> {
    let choice = Choice { weights: file.to_owned(), labels, ..Choice::default() };
    let loaded = load::load(&choice, &cpu(), &GpuStatus::Absent)?;
    let agreement = loaded.agreement;
    let line = format!(
        "{}: {} of {} first labels as {} gave them, largest error {:.1e} (allowed {:.0e})",
        file.display(),
        agreement.same_top1,
        agreement.pictures,
        loaded.golden.reference.by,
        agreement.max_error,
        loaded.engine.allowed_error()
    );
    if !loaded.passes() {
        return Err(Exit::wrong(line));
    }
    writeln!(io::stdout(), "{line}")?;
    Ok(())
}
