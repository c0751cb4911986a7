//! Which bytes the nodes load: a [`ModelRef`] turned into something on this machine, with an identity
//! that differs when the weights differ.
//!
//! ```text
//! builtin:tiny     generated once into the cache ──┐
//! a directory      ─────────────────────────────────┴─▶ fingerprint of its files
//! owner/name       downloaded once before the nodes start ─▶ owner/name@commit
//!                    └─ no Python that could: left to vLLM ─▶ owner/name
//! ```

mod builtin;
mod hub;
mod local;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::runtime::child::ChildError;
use crate::runtime::lock::LockError;
use crate::runtime::{Job, Runtime, cache_root};
use crate::topology::{ModelFacts, ModelRef};

/// Why the model could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(
        "the model directory {path} does not exist (neither is it a Hugging Face id, owner/name)"
    )]
    NoDirectory { path: PathBuf },
    #[error(
        "{path} has no config.json: a model directory holds config.json, a tokenizer and weights"
    )]
    NoConfig { path: PathBuf },
    #[error("{path} is not JSON: {source}")]
    BadConfig {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("cannot read the model file {path}: {source}")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error(
        "builtin:tiny is generated with the runtime's Python, and none is known behind this `vllm`: \
         give [runtime] `python`, or a managed runtime"
    )]
    NoInterpreter,
    #[error("builtin:tiny could not be generated:\n{tail}")]
    Generate { tail: String },
    #[error("{path} in the cache is not usable (PEGAFLOW_CACHE_DIR moves the cache): {source}")]
    Cache { path: PathBuf, source: io::Error },
    #[error("neither HOME nor PEGAFLOW_CACHE_DIR says where the cache is: set PEGAFLOW_CACHE_DIR")]
    NoCacheDir,
    #[error(
        "there is no model {id} on {hub}, or it is private and HF_TOKEN is missing or has no access"
    )]
    NotFound { id: String, hub: String },
    #[error(
        "{id} is gated: accept its terms on its page at {hub}, then set HF_TOKEN to a token that may \
         read it"
    )]
    Gated { id: String, hub: String },
    #[error("{hub} refused the token in HF_TOKEN for {id}")]
    BadToken { id: String, hub: String },
    #[error(
        "{hub} could not be reached to download {id}, and it is not in the cache: check HTTPS_PROXY \
         and HF_ENDPOINT, or give a local directory"
    )]
    NoNetwork { id: String, hub: String },
    #[error("the disk filled up while {id} was downloaded (HF_HOME moves the download)")]
    DiskFull { id: String },
    #[error("{id} could not be downloaded:\n{tail}")]
    Download { id: String, tail: String },
    #[error("the lock {path} was not free after {} s: another pegaflow holds it", .after.as_secs())]
    Locked { path: PathBuf, after: Duration },
    #[error("cannot run {program}")]
    Child {
        program: PathBuf,
        source: ChildError,
    },
    #[error("stopped before the model was ready")]
    Cancelled,
}

impl From<LockError> for ModelError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Io { path, source } => Self::Cache { path, source },
            LockError::Deadline { path, after } => Self::Locked { path, after },
            LockError::Cancelled => Self::Cancelled,
        }
    }
}

impl ModelError {
    fn child(program: &Path, source: ChildError) -> Self {
        match source {
            ChildError::Cancelled => Self::Cancelled,
            source => Self::Child {
                program: program.to_owned(),
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

/// Makes the model available and says what it is. `shim_dir` is the unpacked Python package
/// ([`crate::instance::Instance::unpack_shim`]). Idempotent; a second call is quick.
pub async fn resolve(
    model: &ModelRef,
    runtime: &Runtime,
    shim_dir: &Path,
    job: Job<'_>,
) -> Result<ModelFacts, ModelError> {
    match model {
        ModelRef::BuiltinTiny => {
            let cache = cache_root().ok_or(ModelError::NoCacheDir)?;
            let interpreter = runtime
                .interpreter
                .as_deref()
                .ok_or(ModelError::NoInterpreter)?;
            builtin_tiny(interpreter, shim_dir, &cache, job).await
        }
        ModelRef::Path(dir) => local_directory(dir).await,
        ModelRef::HuggingFace(id) => hub::resolve(id, runtime.interpreter.as_deref(), job).await,
    }
}

/// What [`resolve`] would end with, without running or downloading anything; `None`: the model is not
/// here yet.
pub fn find(model: &ModelRef) -> Result<Option<ModelFacts>, ModelError> {
    match model {
        ModelRef::BuiltinTiny => {
            let cache = cache_root().ok_or(ModelError::NoCacheDir)?;
            builtin::cached(&cache)
                .map(|dir| local::facts(&dir))
                .transpose()
        }
        ModelRef::Path(dir) => local::facts(dir).map(Some),
        ModelRef::HuggingFace(id) => hub::find(id),
    }
}

/// `builtin:tiny` in a cache of the caller's choice.
pub async fn builtin_tiny(
    interpreter: &Path,
    shim_dir: &Path,
    cache: &Path,
    job: Job<'_>,
) -> Result<ModelFacts, ModelError> {
    let dir = builtin::generate(interpreter, shim_dir, cache, job).await?;
    local_directory(&dir).await
}

async fn local_directory(dir: &Path) -> Result<ModelFacts, ModelError> {
    let dir = dir.to_owned();
    let unreadable = dir.clone();
    // Hundreds of weight files on a slow disk: not on an async thread.
    tokio::task::spawn_blocking(move || local::facts(&dir))
        .await
        .map_err(|join| ModelError::Unreadable {
            path: unreadable,
            source: io::Error::other(join),
        })?
}
