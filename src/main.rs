use std::process::ExitCode;

fn main() -> ExitCode {
    pegaflow::cli::main()
}
