//! The command line: one file per subcommand, all the same shape.

pub mod advice;
pub mod check;
pub mod classify;
pub mod doctor;
pub mod events;
pub mod probe;
pub mod run;
pub mod schema;
pub mod speed;
pub mod streams;
pub mod tail;
pub mod text;
pub mod weights;

use std::path::{Path, PathBuf};

use crate::{
    config::{self, plan::Plan},
    journal::JournalError,
};

/// Classifies camera streams: GhostNet labels for every frame, durable and measured.
#[derive(clap::Parser, Debug)]
#[command(name = "ghostwatch", version, max_term_width = 100)]
pub struct Cli {
    /// The configuration file [default: ./config.yaml, then /etc/ghostwatch/config.yaml]
    #[arg(long, global = true, env = "GHOSTWATCH_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The socket on which the daemon takes orders [default: beside the journal, or
    /// /run/ghostwatch/api.sock under systemd]
    #[arg(long, global = true, env = "GHOSTWATCH_SOCKET", value_name = "FILE")]
    pub socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Run the daemon; with URLs it needs no configuration file and prints labels.
    Run(run::Args),
    /// Validate the configuration, all of it at once, and say what it will cost.
    Check(check::Args),
    /// Classify pictures, videos and folders, once.
    Classify(classify::Args),
    /// Print events from the journal.
    Tail(tail::Args),
    /// Show what each stream is doing; restart, disable and enable one.
    Streams(streams::Args),
    /// Look at the journal, verify it, copy it, and send from it again.
    Events(events::Args),
    /// Fetch, import, inspect and verify checkpoints.
    #[command(subcommand)]
    Weights(weights::Command),
    /// Look at everything that the daemon needs, and say what is missing.
    Doctor(doctor::Args),
    /// Measure the network on its device, by batch size, and compare it with the CPU.
    Speed(speed::Args),
    /// Print the JSON Schema of the configuration or of the events.
    Schema(schema::Args),
    /// Print the completion script of a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
}

/// Exit codes of every subcommand.
pub(crate) mod code {
    /// All went well.
    pub(crate) const OK: u8 = 0;
    /// Failed at run time; a drain past its deadline too.
    pub(crate) const FAILED: u8 = 1;
    /// Usage, configuration or weights file wrong.
    pub(crate) const WRONG: u8 = 2;
    /// A probed stream failed.
    pub(crate) const PROBE: u8 = 3;
    /// The journal is damaged or too new.
    pub(crate) const JOURNAL: u8 = 4;
    /// A second signal.
    pub(crate) const SIGNAL: i32 = 130;
}

/// An error that has an exit code of its own.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Exit {
    code: u8,
    message: String,
}

impl Exit {
    /// Failed at run time.
    pub fn failed(message: impl Into<String>) -> anyhow::Error {
        Exit { code: code::FAILED, message: message.into() }.into()
    }

    /// Usage, configuration or weights file wrong.
    pub fn wrong(message: impl Into<String>) -> anyhow::Error {
        Exit { code: code::WRONG, message: message.into() }.into()
    }

    /// The journal is damaged or too new.
    pub fn journal(message: impl Into<String>) -> anyhow::Error {
        Exit { code: code::JOURNAL, message: message.into() }.into()
    }
}

/// Runs the command; errors go to stderr, the whole chain once.
pub fn run(cli: Cli) -> u8 {
    let config = cli.config.as_deref();
    let result = match cli.command {
        Command::Run(args) => run::run(&args, config, cli.socket),
        Command::Check(args) => return check::run(&args, config),
        Command::Classify(args) => classify::run(&args),
        Command::Tail(args) => journal_path(config).and_then(|it| tail::run(&args, &it)),
        Command::Streams(args) => {
            let (socket, insist) = (cli.socket.as_deref(), config.is_some());
            plan(config).and_then(|it| streams::run(&args, &it, socket, insist))
        }
        Command::Events(args) => events::run(&args, config),
        Command::Weights(command) => weights::run(&command),
        Command::Doctor(args) => return doctor::run(&args, config),
        Command::Speed(args) => speed::run(&args),
        Command::Schema(args) => schema::run(&args),
        Command::Completions { shell } => schema::completions(shell),
        Command::Man => schema::man(),
    };
    match result {
        Ok(()) => code::OK,
        Err(error) if is_closed_pipe(&error) => code::OK,
        Err(error) => {
            eprintln!("ghostwatch: {error:#}");
            let exit = error.chain().find_map(|it| it.downcast_ref::<Exit>().map(|it| it.code));
            let journal = || {
                error
                    .chain()
                    .find_map(|it| it.downcast_ref::<JournalError>())
                    .map(JournalError::exit_code)
            };
            exit.or_else(journal).unwrap_or(code::FAILED)
        }
    }
}

/// `ghostwatch tail | head` is no failure.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|it| it.downcast_ref::<std::io::Error>());
    io.is_some_and(|it| it.kind() == std::io::ErrorKind::BrokenPipe)
}

/// The file that is used when none is named.
///
/// # Errors
/// There is none.
pub fn find_config(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(named) = named {
        return Ok(named.to_owned());
    }
    let known = ["config.yaml", "/etc/ghostwatch/config.yaml"];
    known.iter().map(PathBuf::from).find(|it| it.exists()).ok_or_else(|| {
        Exit::wrong("no configuration: neither ./config.yaml nor /etc/ghostwatch/config.yaml is there; name one with --config")
    })
}

/// The journal that the configuration names; without a configuration, the default one.
fn journal_path(config: Option<&Path>) -> anyhow::Result<PathBuf> {
    Ok(plan(config)?.journal.path)
}

/// What is configured; without a configuration, the defaults.
fn plan(config: Option<&Path>) -> anyhow::Result<Plan> {
    let options = config::Options::alone();
    let loaded = match find_config(config) {
        Ok(path) => config::load(&path, &options),
        Err(error) if config.is_some() => return Err(error),
        Err(_) => Plan::from_urls(&[], None, Path::new(""), &options),
    };
    Ok(loaded.map_err(|it| Exit::wrong(it.to_string()))?.plan)
}
