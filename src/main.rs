use std::process::ExitCode;

use clap::Parser;
use pegaflow::supervise::{GuardArgs, guard_main};

#[derive(Debug, Parser)]
enum Cli {
    #[command(name = "__guard", hide = true)]
    Guard(GuardArgs),
}

fn main() -> ExitCode {
    match Cli::parse() {
        Cli::Guard(args) => guard_main(args),
    }
}
