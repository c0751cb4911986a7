//! `pegaflow init`: a topology for this machine, with comments for the person who will change it.

mod template;

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use clap::Args;

use super::{Exit, print};
use crate::host::{HostSnapshot, NvmlStatus};
use crate::runtime;
use crate::topology::Topology;
use template::Sketch;

/// Readable by all, as other configuration: secrets belong into variables.
const MODE: u32 = 0o644;

#[derive(Debug, Args)]
pub struct InitArgs {
    /// A Hugging Face id like Qwen/Qwen3-8B, a directory, or builtin:tiny.
    #[arg(long)]
    model: Option<String>,
    /// GPUs (or groups of cores) that one node takes.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    tensor_parallel: u32,
    /// The file to write; - for stdout.
    #[arg(long, short, value_name = "FILE", default_value = "topology.toml")]
    output: PathBuf,
    /// Replace the file if it is there.
    #[arg(long)]
    force: bool,
}

/// Writes the file and says on stdout what is in it and how it goes on.
pub fn init(args: &InitArgs) -> Result<(), Exit> {
    let to_stdout = args.output == Path::new("-");
    if !to_stdout && !args.force && args.output.symlink_metadata().is_ok() {
        return Err(there_already(&args.output));
    }
    let host = HostSnapshot::take().map_err(|error| Exit::Machine(error.into()))?;
    let sketch = Sketch {
        host: &host,
        model: args
            .model
            .as_deref()
            .map(|model| model_from(model, &args.output)),
        tensor_parallel: args.tensor_parallel,
        vllm: runtime::vllm_on_path(),
    };
    let draft = sketch.draft();
    // What is wrong now is wrong with the arguments: the rest is ours.
    Topology::parse(&draft.text, &args.output).map_err(|error| Exit::Topology(error.into()))?;
    if let NvmlStatus::Missing(why) | NvmlStatus::Failed(why) = &host.nvml {
        note(&format!("no GPU here ({why}): this is a topology for CPUs"));
    }
    draft.notes.iter().for_each(|text| note(text));
    if to_stdout {
        return print(&draft.text);
    }
    write(&args.output, &draft.text, args.force).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => there_already(&args.output),
        _ => {
            Exit::Failed(anyhow!(error).context(format!("cannot write {}", args.output.display())))
        }
    })?;
    let file = args.output.display();
    print(format!(
        "{file}: {}\nNext: pegaflow up {file}\n",
        draft.summary
    ))
}

fn note(text: &str) {
    // A closed stderr is no reason to write nothing.
    let _ = writeln!(io::stderr(), "note: {text}");
}

fn there_already(file: &Path) -> Exit {
    Exit::Failed(anyhow!(
        "{} is there already; --force replaces it, --output FILE writes another",
        file.display()
    ))
}

/// A directory is meant from here, but the file's relative paths start from its own directory.
fn model_from(model: &str, output: &Path) -> String {
    let beside = output
        .parent()
        .is_none_or(|parent| parent == Path::new("") || parent == Path::new("."));
    match std::path::absolute(model) {
        Ok(path) if model.starts_with('.') && !beside => path.to_string_lossy().into_owned(),
        _ => model.to_owned(),
    }
}

/// All or nothing: a file that was there is replaced in one step, and keeps its permissions.
fn write(file: &Path, text: &str, force: bool) -> io::Result<()> {
    let create = |path: &Path, mode| {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(mode).open(path)
    };
    if !force {
        return create(file, MODE)?.write_all(text.as_bytes());
    }
    // Behind a link, so that the link stays.
    let target = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    let mut draft = target.clone().into_os_string();
    draft.push(format!(".{}.new", std::process::id()));
    let draft = PathBuf::from(draft);
    let written = create(&draft, MODE).and_then(|mut new| {
        if let Ok(old) = fs::metadata(&target) {
            new.set_permissions(fs::Permissions::from_mode(old.permissions().mode() & 0o777))?;
        }
        new.write_all(text.as_bytes())?;
        fs::rename(&draft, &target)
    });
    if written.is_err() {
        // The error of the write says more than one of this.
        let _ = fs::remove_file(&draft);
    }
    written
}
