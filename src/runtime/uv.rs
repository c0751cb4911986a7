//! The `uv` program: the one on PATH, or one fetched once by pip into the cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use super::child::{self, Finished};
use super::lock::FileLock;
use super::{Job, RuntimeError, Surroundings};
use super::{cache, create_dir, search};

const PROBE_LIMIT: Duration = Duration::from_secs(30);
const FETCH_LIMIT: Duration = Duration::from_secs(900);

/// What an activated environment or a project around the working directory would change.
const UNWANTED: [&str; 8] = [
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "PYTHONPATH",
    "PYTHONHOME",
    "UV_SYSTEM_PYTHON",
    "UV_PYTHON",
    "UV_PROJECT",
    "UV_PROJECT_ENVIRONMENT",
];

/// A command with our PATH and without the caller's Python environment. Proxy, `UV_*` and `PIP_*`
/// variables pass through.
pub(super) fn command(program: &Path, surroundings: &Surroundings) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", &surroundings.path);
    for name in UNWANTED {
        command.env_remove(name);
    }
    command
}

/// A `uv` that runs.
pub(super) async fn find_or_fetch(
    surroundings: &Surroundings,
    job: Job<'_>,
) -> Result<PathBuf, RuntimeError> {
    if let Some(uv) = search::find("uv", &surroundings.path) {
        // A shim of a version manager may be there without a uv behind it.
        if runs(&uv, surroundings, job).await? {
            return Ok(uv);
        }
        job.ui.note(&format!(
            "{} does not run; fetching another uv",
            uv.display()
        ));
    }
    let home = surroundings.cache.join("uv");
    let uv = home.join("bin/uv");
    if search::is_executable(&uv) && runs(&uv, surroundings, job).await? {
        return Ok(uv);
    }
    let _lock = FileLock::acquire(
        &home.with_extension("lock"),
        FETCH_LIMIT,
        job.cancel,
        || {
            job.ui
                .status("another pegaflow is fetching uv; waiting for it");
        },
    )
    .await?;
    if search::is_executable(&uv) && runs(&uv, surroundings, job).await? {
        return Ok(uv);
    }
    fetch(&home, surroundings, job).await?;
    Ok(uv)
}

async fn runs(uv: &Path, surroundings: &Surroundings, job: Job<'_>) -> Result<bool, RuntimeError> {
    let mut command = command(uv, surroundings);
    command.arg("--version");
    match child::run(command, PROBE_LIMIT, job, &mut |_, _| {}).await {
        Ok(finished) => Ok(finished.status.success()),
        Err(child::ChildError::Cancelled) => Err(RuntimeError::Cancelled),
        Err(_) => Ok(false),
    }
}

/// By `pip --target`, and if this Python has no pip of its own, by the pip of a new venv. The
/// program is a plain binary: it survives the rename.
async fn fetch(home: &Path, surroundings: &Surroundings, job: Job<'_>) -> Result<(), RuntimeError> {
    let python = search::find("python3", &surroundings.path).ok_or_else(|| RuntimeError::NoUv {
        tail: "there is no python3 on PATH".into(),
    })?;
    create_dir(&surroundings.cache)?;
    cache::discard_partials(home).map_err(RuntimeError::cache(home))?;
    let partial = cache::partial_sibling(home);
    job.ui.status("fetching uv with pip");
    let step = async |program: &Path, args: &[&str]| -> Result<Finished, RuntimeError> {
        let mut command = command(program, surroundings);
        command
            .args(args)
            .arg(&partial)
            .current_dir(&surroundings.cache);
        if args.contains(&"pip") {
            command.arg("uv");
        }
        child::run(command, FETCH_LIMIT, job, &mut |_, line| {
            job.ui.status(line)
        })
        .await
        .map_err(|source| RuntimeError::child(program, source))
    };
    let mut finished = step(&python, &["-m", "pip", "install", "--target"]).await?;
    if !finished.status.success() {
        let first = finished.tail;
        finished = step(&python, &["-m", "venv", "--clear"]).await?;
        if finished.status.success() {
            let inner = partial.join("bin/python");
            finished = step(&inner, &["-m", "pip", "install", "--prefix"]).await?;
        }
        finished.tail = format!("{first}\n{}", finished.tail);
    }
    if !finished.status.success() || !search::is_executable(&partial.join("bin/uv")) {
        let _ = fs::remove_dir_all(&partial);
        return Err(RuntimeError::NoUv {
            tail: finished.tail,
        });
    }
    if home.exists() {
        fs::remove_dir_all(home).map_err(RuntimeError::cache(home))?;
    }
    fs::rename(&partial, home).map_err(RuntimeError::cache(home))
}
