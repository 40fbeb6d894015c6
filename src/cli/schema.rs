//! `ghostwatch schema`, `completions` and `man`: what other programs read about this one.

use std::io::{self, Write as _};

use clap::CommandFactory as _;

use crate::{cli::Cli, config, event};

/// Which schema.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Of what.
    #[arg(value_enum)]
    of: Of,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Of {
    /// The configuration file.
    Config,
    /// The events.
    Event,
}

/// Prints a JSON Schema.
///
/// # Errors
/// Standard output cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let schema = match args.of {
        Of::Config => config::schema::json(),
        Of::Event => event::schema(),
    };
    writeln!(io::stdout(), "{schema:#}")?;
    Ok(())
}

/// Prints a completion script.
///
/// # Errors
/// Standard output cannot be written.
pub fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "ghostwatch", &mut script);
    io::stdout().write_all(&script)?;
    Ok(())
}

/// Prints the manual page.
///
/// # Errors
/// Standard output cannot be written.
pub fn man() -> anyhow::Result<()> {
    clap_mangen::Man::new(Cli::command()).render(&mut io::stdout())?;
    Ok(())
}
