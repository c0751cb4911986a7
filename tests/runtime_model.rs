//! Models on a scripted machine. The builtin model is generated for real in
//! python-shim/tests/test_tiny_model.py.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use pegaflow::model::{self, ModelError};
use pegaflow::runtime::{Guarding, Job, NoProgress, Runtime};
use pegaflow::topology::{Launcher, ModelFacts, ModelRef};
use tokio_util::sync::CancellationToken;

fn shim() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("python-shim")
}

fn runtime(interpreter: Option<&Path>) -> Runtime {
    Runtime {
        launcher: Launcher::Vllm("vllm".into()),
        interpreter: interpreter.map(Path::to_owned),
        description: String::new(),
    }
}

fn guarding() -> Guarding {
    Guarding {
        program: env!("CARGO_BIN_EXE_pegaflow").into(),
        run_dir: None,
    }
}

async fn resolve(model: &ModelRef, interpreter: Option<&Path>) -> Result<ModelFacts, ModelError> {
    let job = Job {
        ui: &NoProgress,
        cancel: &CancellationToken::new(),
        guard: &guarding(),
    };
    model::resolve(model, &runtime(interpreter), &shim(), job).await
}

/// A Python that does what the shell script says.
fn python(dir: &Path, script: &str) -> PathBuf {
    let path = dir.join("python");
    fs::write(&path, format!("#!/bin/sh\n{script}")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn a_directory_is_its_own_model() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), r#"{"model_type":"x"}"#).unwrap();
    let model = ModelRef::Path(dir.path().to_owned());
    let facts = resolve(&model, None).await.unwrap();
    assert_eq!(facts.load_from, dir.path().to_str().unwrap());
    assert_eq!(facts.config.unwrap()["model_type"], "x");
}

#[tokio::test]
async fn the_builtin_model_needs_a_python() {
    let result = resolve(&ModelRef::BuiltinTiny, None).await;
    assert!(matches!(result, Err(ModelError::NoInterpreter)));
}

#[tokio::test]
async fn the_builtin_model_is_generated_once_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let guard = guarding();
    let make = async |python: &Path| {
        let job = Job {
            ui: &NoProgress,
            cancel: &CancellationToken::new(),
            guard: &guard,
        };
        model::builtin_tiny(python, &shim(), &cache, job).await
    };

    let half = python(
        dir.path(),
        "mkdir -p $2; echo '{}' > $2/config.json; echo why >&2; exit 1",
    );
    let Err(ModelError::Generate { tail }) = make(&half).await else {
        panic!("half a model was accepted");
    };
    assert_eq!(tail, "why");

    let script = "mkdir -p $2; echo '{}' > $2/config.json; echo x > $2/model.safetensors; \
                  [ \"$HF_HUB_OFFLINE\" = 1 ] || exit 1; echo made >> $(dirname $0)/calls";
    let good = python(dir.path(), script);
    let one = make(&good).await.unwrap();
    let two = make(&good).await.unwrap();
    assert_eq!(one, two);
    assert!(
        Path::new(&one.load_from)
            .join("model.safetensors")
            .is_file()
    );
    let calls = fs::read_to_string(dir.path().join("calls")).unwrap();
    assert_eq!(calls.lines().count(), 1);
}

#[tokio::test]
async fn a_hub_model_is_downloaded_by_the_runtimes_python() {
    if std::env::var_os("HF_HUB_OFFLINE").is_some() {
        // This process cannot change its environment safely; another one starts without it.
        let test = "a_hub_model_is_downloaded_by_the_runtimes_python";
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test])
            .env_remove("HF_HUB_OFFLINE")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("models--o--n/snapshots/c0ffee");
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(snapshot.join("config.json"), r#"{"model_type":"x"}"#).unwrap();
    let model = ModelRef::HuggingFace("o/n".into());
    let ask = async |python: Option<&Path>| resolve(&model, python).await;

    let script = format!(
        "[ \"$3\" = o/n ] || exit 1; printf '10%%\\r90%%\\r' >&2; echo '{{\"path\": \"{}\"}}'",
        snapshot.display()
    );
    let facts = ask(Some(&python(dir.path(), &script))).await.unwrap();
    assert_eq!(facts.load_from, snapshot.to_str().unwrap());
    assert_eq!(facts.identity, "o/n@c0ffee");
    assert!(facts.config.is_some());

    let fail = |kind: &str| format!("echo '{{\"error\": \"{kind}\", \"message\": \"m\"}}'; exit 3");
    let gated = ask(Some(&python(dir.path(), &fail("gated")))).await;
    assert!(matches!(gated, Err(ModelError::Gated { .. })));
    let missing = ask(Some(&python(dir.path(), &fail("not_found")))).await;
    assert!(matches!(missing, Err(ModelError::NotFound { .. })));
    let crashed = ask(Some(&python(dir.path(), "echo boom >&2; exit 1"))).await;
    assert!(matches!(crashed, Err(ModelError::Download { tail, .. }) if tail == "boom"));

    // Nobody here can download: vLLM gets the id.
    let without_hub = python(dir.path(), &fail("no_hub"));
    for left in [ask(None).await, ask(Some(&without_hub)).await] {
        let facts = left.unwrap();
        assert_eq!((facts.load_from.as_str(), facts.config), ("o/n", None));
    }
}

#[tokio::test]
async fn offline_means_no_download() {
    if std::env::var_os("HF_HUB_OFFLINE").is_none_or(|value| value != "1") {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "offline_means_no_download"])
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HUB_CACHE", "/nowhere")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let never = python(dir.path(), "touch $(dirname $0)/called; exit 1");
    let model = ModelRef::HuggingFace("o/not-cached".into());
    let facts = resolve(&model, Some(&never)).await.unwrap();
    assert_eq!(facts.load_from, "o/not-cached");
    assert!(!dir.path().join("called").exists());
}
