//! Arguments -> command -> exit code.

use std::process::ExitCode;

use clap::Parser as _;
use ghostwatch::{cli, heap};

fn main() -> ExitCode {
    heap::bound();
    cli::run(cli::Cli::parse())
}
