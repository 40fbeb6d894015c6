//! Arguments -> command -> exit code.

use std::process::ExitCode;

use clap::Parser as _;
use ghostwatch::cli;

fn main() -> ExitCode {
    cli::run(cli::Cli::parse())
}
