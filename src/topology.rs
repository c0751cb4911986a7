//! The topology: what a person wrote in the TOML file.

use std::path::PathBuf;

/// Where the nodes compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    Cuda,
    Cpu,
}

/// Which Python and vLLM serve the nodes (`[runtime]`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuntimeSettings {
    /// The `vllm` program found on PATH.
    Path,
    /// An interpreter, or the directory of a virtual environment; absolute, or relative to the
    /// working directory (already joined to the topology file's directory).
    Python(PathBuf),
    /// A virtual environment that pegaflow makes and keeps in its cache.
    Managed {
        /// As `uv venv --python` takes it, like `3.11`.
        python_version: String,
        /// Requirement specifiers to install, at least one.
        requirements: Vec<String>,
        /// Requirement specifiers that replace what the requirements ask for.
        overrides: Vec<String>,
    },
}

/// How a vLLM API server is started: what `[runtime]` became on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Launcher {
    /// The `vllm` program: `vllm serve MODEL ...`.
    Vllm(PathBuf),
    /// An interpreter: `python -m vllm.entrypoints.openai.api_server --model MODEL ...`.
    Python(PathBuf),
}

/// Which model all nodes serve (`model`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelRef {
    /// `builtin:tiny`: a small seeded random model that pegaflow generates.
    BuiltinTiny,
    /// A directory, already joined to the topology file's directory.
    Path(PathBuf),
    /// A Hugging Face id, `owner/name`.
    HuggingFace(String),
}

/// The model as it was found on this machine.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelFacts {
    /// What vLLM gets as its model: a directory or a Hugging Face id.
    pub load_from: String,
    /// Differs when the weights differ (a revision, or a fingerprint of the files).
    pub identity: String,
    /// The model's `config.json`, where it could be read.
    pub config: Option<serde_json::Value>,
}
