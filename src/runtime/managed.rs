//! A virtual environment that pegaflow makes once and keeps in its cache.
//!
//! ```text
//! absent ── lock, discard partials ──▶ <name>.partial-<pid> ── uv venv, uv pip install, probe ──▶
//!    ▲                                        │                       manifest, rename ──▶ complete
//!    └──── killed, cancelled or failed ◀──────┘
//! ```
//!
//! The name is a digest of what was asked for, so another wish gets another environment. A complete
//! one whose interpreter has gone (the system's Python was removed) is made again.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::process::Command;

use super::child::{self, Stream};
use super::lock::FileLock;
use super::{Job, RuntimeError, Surroundings};
use super::{cache, probe, uv};

const INSTALL_LIMIT: Duration = Duration::from_secs(2 * 3600);
const MANIFEST: &str = "pegaflow-runtime.json";
/// Changes when the way of making an environment does.
const RECIPE: &str = "1";

#[derive(Debug, serde::Serialize)]
pub(super) struct Wanted<'a> {
    pub(super) python_version: &'a str,
    pub(super) requirements: &'a [String],
    pub(super) overrides: &'a [String],
}

impl Wanted<'_> {
    fn name(&self) -> String {
        let mut digest = Sha256::new();
        let lists = [self.requirements, self.overrides];
        let counts = lists.map(|list| list.len().to_string());
        let parts = [RECIPE, std::env::consts::ARCH, self.python_version]
            .into_iter()
            .chain(counts.iter().map(String::as_str))
            .chain(lists.iter().copied().flatten().map(String::as_str));
        for part in parts {
            digest.update(part.as_bytes());
            digest.update([0]);
        }
        let digest = cache::hex(&digest.finalize());
        digest.chars().take(16).collect()
    }
}

/// The interpreter of an environment that is complete.
pub(super) fn find(wanted: &Wanted<'_>, surroundings: &Surroundings) -> Option<PathBuf> {
    complete(&directory(wanted, surroundings))
}

fn directory(wanted: &Wanted<'_>, surroundings: &Surroundings) -> PathBuf {
    surroundings.cache.join("runtimes").join(wanted.name())
}

/// The environment's interpreter.
pub(super) async fn prepare(
    wanted: &Wanted<'_>,
    surroundings: &Surroundings,
    job: Job<'_>,
) -> Result<PathBuf, RuntimeError> {
    let dir = directory(wanted, surroundings);
    if let Some(python) = complete(&dir) {
        return Ok(python);
    }
    let lock = dir.with_extension("lock");
    let _lock = FileLock::acquire(&lock, INSTALL_LIMIT, job.cancel, || {
        job.ui
            .note("another pegaflow is installing this runtime; waiting for it");
    })
    .await?;
    if let Some(python) = complete(&dir) {
        return Ok(python);
    }
    let install = Install {
        uv: uv::find_or_fetch(surroundings, job).await?,
        partial: cache::partial_sibling(&dir),
        surroundings,
        job,
    };
    discard(&dir).await?;
    let made = install.make(wanted).await;
    if made.is_err() {
        // Best effort: the next run discards what is left.
        let partial = install.partial.clone();
        let _ = tokio::task::spawn_blocking(move || fs::remove_dir_all(partial)).await;
    }
    made?;
    fs::rename(&install.partial, &dir).map_err(RuntimeError::cache(&dir))?;
    complete(&dir).ok_or(RuntimeError::NoInterpreter { path: dir })
}

/// Written last, so an environment that has it was whole; its Python may have gone since.
fn complete(dir: &Path) -> Option<PathBuf> {
    let python = dir.join("bin/python");
    (dir.join(MANIFEST).is_file() && python.is_file()).then_some(python)
}

/// Gigabytes of small files: not on an async thread.
async fn discard(dir: &Path) -> Result<(), RuntimeError> {
    let dir = dir.to_owned();
    let removal = tokio::task::spawn_blocking(move || {
        cache::discard_partials(&dir).map_err(RuntimeError::cache(&dir))?;
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(RuntimeError::cache(&dir)(error))
            }
            _ => Ok(()),
        }
    });
    removal.await.unwrap_or(Ok(()))
}

struct Install<'a> {
    uv: PathBuf,
    partial: PathBuf,
    surroundings: &'a Surroundings,
    job: Job<'a>,
}

impl Install<'_> {
    async fn make(&self, wanted: &Wanted<'_>) -> Result<(), RuntimeError> {
        let total = wanted.requirements.join(" ");
        self.job.ui.note(&format!(
            "making a Python environment for {total} in {} (once; can take some minutes)",
            self.partial.display()
        ));
        // Relocatable, because it is renamed when it is whole.
        let mut venv = self.command();
        venv.args(["venv", "--no-project", "--relocatable", "--python"])
            .args([wanted.python_version, "--"])
            .arg(&self.partial);
        self.run("uv venv", venv).await?;

        let python = self.partial.join("bin/python");
        let mut install = self.command();
        install.args(["pip", "install", "--python"]).arg(&python);
        if !wanted.overrides.is_empty() {
            let file = self.partial.join("pegaflow-overrides.txt");
            write(&file, &format!("{}\n", wanted.overrides.join("\n")))?;
            install.arg("--override").arg(&file);
        }
        install.arg("--").args(wanted.requirements);
        self.run("uv pip install", install).await?;

        self.job.ui.status("checking the new environment");
        probe(&python, self.job).await?;
        let manifest = serde_json::to_string_pretty(wanted).unwrap_or_default();
        write(&self.partial.join(MANIFEST), &manifest)
    }

    fn command(&self) -> Command {
        let mut command = uv::command(&self.uv, self.surroundings);
        // Not the working directory: uv would read a project's settings there.
        command.current_dir(&self.surroundings.cache);
        command
    }

    async fn run(&self, step: &str, command: Command) -> Result<(), RuntimeError> {
        self.job.ui.status(step);
        let mut on_line = |_: Stream, line: &str| self.job.ui.status(line.trim());
        let finished = child::run(command, INSTALL_LIMIT, self.job, &mut on_line)
            .await
            .map_err(|source| RuntimeError::child(&self.uv, source))?;
        if finished.status.success() {
            return Ok(());
        }
        Err(RuntimeError::Install {
            step: step.to_owned(),
            hint: hint(&finished.tail),
            tail: finished.tail,
        })
    }
}

fn write(path: &Path, text: &str) -> Result<(), RuntimeError> {
    let written = fs::File::create(path).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(RuntimeError::cache(path))
}

/// What uv's words usually mean for a person.
fn hint(tail: &str) -> &'static str {
    let says = |words: &[&str]| words.iter().any(|word| tail.contains(word));
    if says(&["No space left", "os error 28"]) {
        " (the disk is full: a vLLM environment takes 6 to 12 GB; PEGAFLOW_CACHE_DIR moves it)"
    } else if says(&[
        "dns error",
        "Failed to fetch",
        "error sending request",
        "timed out",
    ]) {
        " (no network? HTTPS_PROXY, UV_INDEX_URL and the like are passed on to uv)"
    } else if says(&["No interpreter found"]) {
        " (no such Python here, and uv could not download it)"
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_wish_gets_another_environment() {
        let (a, b) = (vec!["a".to_owned()], vec!["b".to_owned()]);
        let name = |python_version, requirements: &[String], overrides: &[String]| {
            Wanted {
                python_version,
                requirements,
                overrides,
            }
            .name()
        };
        let both = [a.clone(), b.clone()].concat();
        let names = [
            name("3.11", &a, &b),
            name("3.12", &a, &b),
            name("3.11", &b, &a),
            name("3.11", &both, &[]),
            name("3.11", &a, &[]),
        ];
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
        assert_eq!(names[0], name("3.11", &a, &b));
        assert_eq!(names[0].len(), 16);
    }
}
