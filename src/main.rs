//! Arguments -> command -> exit code.

use clap::Parser as _;
use ghostwatch::{cli, process};

fn main() {
    process::bound_heaps();
    process::end(cli::run(cli::Cli::parse()))
}
