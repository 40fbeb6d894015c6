//! `ghostwatch run`: the daemon.

use std::path::{Path, PathBuf};

use crate::{
    cli::{Exit, find_config},
    config::{
        self,
        plan::{LogFormat, Plan},
        problem::Problems,
    },
    daemon::{self, Options, Reread},
    log,
    secret::Secret,
};

/// What to run.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Streams to classify without a configuration file; labels go to the terminal.
    #[arg(value_name = "URL")]
    urls: Vec<String>,
    /// End when all files have ended and the sinks have their events; exit code 1 if one stays behind or
    /// a file was not classified.
    #[arg(long)]
    once: bool,
    /// Print labels on standard output with a configuration file too.
    #[arg(long)]
    print: bool,
    /// A file with the password of the URLs.
    #[arg(long, value_name = "FILE", requires = "urls")]
    password_file: Option<PathBuf>,
    /// The checkpoint, with URLs.
    #[arg(long, value_name = "FILE", requires = "urls")]
    weights: Option<PathBuf>,
}

/// Runs the daemon until a signal comes.
///
/// # Errors
/// The configuration is wrong, something could not be started, or a stage failed.
pub fn run(args: &Args, config: Option<&Path>, socket: Option<PathBuf>) -> anyhow::Result<()> {
    let options = config::Options::all();
    let wrong = |it: Problems| Exit::wrong(it.to_string());
    let (loaded, reread): (_, Option<Reread>) = if args.urls.is_empty() {
        let path = find_config(config)?;
        let reread = move || config::load(&path, &options).map_err(wrong);
        (reread()?, Some(Box::new(move || Ok(reread()?.plan))))
    } else {
        let password = args.password_file.as_deref().map(password).transpose()?;
        // The default checkpoint need not be there if another is named.
        let files = args.weights.is_none();
        let options = config::Options { files, ..options };
        let loaded = Plan::from_urls(&args.urls, password.as_ref(), Path::new(""), &options);
        let mut loaded = loaded.map_err(wrong)?;
        if let Some(weights) = &args.weights {
            loaded.plan.model.weights = weights.clone();
        }
        (loaded, None)
    };
    let format = match loaded.plan.log.format {
        LogFormat::Auto => log::Format::Auto,
        LogFormat::Text => log::Format::Text,
        LogFormat::Json => log::Format::Json,
    };
    let log = log::init(loaded.plan.log.level, format)?;
    for warning in &loaded.warnings.list {
        tracing::warn!(setting = warning.path, "{}", warning.message);
    }
    let print = args.print || !args.urls.is_empty();
    daemon::run(loaded.plan, Options { once: args.once, print, reread, log, socket })
}

/// The first line of a password file.
fn password(path: &Path) -> anyhow::Result<Secret> {
    let text = std::fs::read_to_string(path)
        .map_err(|it| Exit::wrong(format!("--password-file {}: {it}", path.display())))?;
    Ok(Secret::new(text.lines().next().unwrap_or_default()))
}
