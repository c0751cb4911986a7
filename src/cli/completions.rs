//! `pegaflow completions SHELL`.

use clap::{Args, Command};
use clap_complete::{Shell, generate};

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Whose script: `source <(pegaflow completions bash)`, `pegaflow completions fish | source`, ...
    shell: Shell,
}

/// What the shell is to read. Internal commands are not in it.
pub fn script(args: &CompletionsArgs, whole: Command) -> String {
    let shown = whole
        .get_subcommands()
        .filter(|command| !command.is_hide_set());
    let mut command = Command::new("pegaflow")
        .about(whole.get_about().cloned().unwrap_or_default())
        .version(env!("CARGO_PKG_VERSION"))
        .subcommands(shown.cloned());
    let mut script = Vec::new();
    generate(args.shell, &mut command, "pegaflow", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}
