//! A model from the Hugging Face hub, downloaded once before any node starts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;

use super::{ModelError, local};
use crate::runtime::Job;
use crate::runtime::child::{self, Stream};
use crate::topology::ModelFacts;

const SCRIPT: &str = include_str!("hub.py");
/// Hundreds of gigabytes over a slow line; a stalled connection ends in the hub's own timeout.
const LIMIT: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Report {
    Done { path: PathBuf },
    Failed { error: Kind, message: String },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    NoHub,
    Gated,
    NotFound,
    NoNetwork,
    BadToken,
    DiskFull,
    Other,
}

pub(super) async fn resolve(
    id: &str,
    interpreter: Option<&Path>,
    job: Job<'_>,
) -> Result<ModelFacts, ModelError> {
    if is_truthy(env("HF_HUB_OFFLINE").as_deref()) {
        return Ok(find(id)?.unwrap_or_else(|| left_to_vllm(id)));
    }
    let Some(interpreter) = interpreter else {
        job.ui.note(&format!(
            "no Python is known behind this `vllm`: every node downloads {id} by itself"
        ));
        return Ok(left_to_vllm(id));
    };
    job.ui.status(&format!("looking for {id}"));
    let mut command = Command::new(interpreter);
    // HF_TOKEN, HF_HOME, HF_ENDPOINT and the proxy variables pass through.
    command.args(["-c", SCRIPT, id]).current_dir("/");
    let mut on_line = |stream: Stream, line: &str| {
        if stream == Stream::Stderr {
            job.ui.status(line);
        }
    };
    let finished = child::run(command, LIMIT, job, &mut on_line)
        .await
        .map_err(|source| ModelError::child(interpreter, source))?;
    let report = finished
        .last_stdout
        .as_deref()
        .and_then(|line| serde_json::from_str(line).ok());
    match report {
        Some(Report::Done { path }) => snapshot_facts(id, &path),
        Some(Report::Failed {
            error: Kind::NoHub, ..
        }) => {
            job.ui.note(&format!(
                "{} has no huggingface_hub: every node downloads {id} by itself",
                interpreter.display()
            ));
            Ok(left_to_vllm(id))
        }
        Some(Report::Failed { error, message }) => Err(failure(error, message, id)),
        None => Err(ModelError::Download {
            id: id.to_owned(),
            tail: finished.tail,
        }),
    }
}

/// The model in the hub's cache.
pub(super) fn find(id: &str) -> Result<Option<ModelFacts>, ModelError> {
    let cached = hub_cache(&env).and_then(|cache| cached_snapshot(&cache, id));
    cached
        .map(|snapshot| snapshot_facts(id, &snapshot))
        .transpose()
}

fn failure(kind: Kind, message: String, id: &str) -> ModelError {
    let id = id.to_owned();
    let hub = env("HF_ENDPOINT").unwrap_or_else(|| "the Hugging Face hub".into());
    match kind {
        Kind::Gated => ModelError::Gated { id, hub },
        Kind::NotFound => ModelError::NotFound { id, hub },
        Kind::NoNetwork => ModelError::NoNetwork { id, hub },
        Kind::BadToken => ModelError::BadToken { id, hub },
        Kind::DiskFull => ModelError::DiskFull { id },
        Kind::NoHub | Kind::Other => ModelError::Download { id, tail: message },
    }
}

/// vLLM gets the id unchanged; nothing is known about its config.
fn left_to_vllm(id: &str) -> ModelFacts {
    ModelFacts {
        load_from: id.to_owned(),
        identity: id.to_owned(),
        config: None,
        weights: None,
    }
}

/// `.../models--owner--name/snapshots/<commit>`: the commit says which bytes these are.
fn snapshot_facts(id: &str, snapshot: &Path) -> Result<ModelFacts, ModelError> {
    let (config, _) = local::config(snapshot)?;
    let commit = snapshot.file_name().unwrap_or_default().to_string_lossy();
    Ok(ModelFacts {
        load_from: snapshot.to_string_lossy().into_owned(),
        identity: format!("{id}@{commit}"),
        config: Some(config),
        weights: local::weight_bytes(snapshot),
    })
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// As huggingface_hub reads its switches.
fn is_truthy(value: Option<&str>) -> bool {
    value.is_some_and(|value| {
        ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
    })
}

/// Where huggingface_hub keeps models.
fn hub_cache(env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let below = |name: &str, rest: &str| env(name).map(|dir| Path::new(&dir).join(rest));
    env("HF_HUB_CACHE")
        .map(PathBuf::from)
        .or_else(|| below("HF_HOME", "hub"))
        .or_else(|| below("XDG_CACHE_HOME", "huggingface/hub"))
        .or_else(|| below("HOME", ".cache/huggingface/hub"))
}

fn cached_snapshot(cache: &Path, id: &str) -> Option<PathBuf> {
    let model = cache.join(format!("models--{}", id.replace('/', "--")));
    let commit = std::fs::read_to_string(model.join("refs/main")).ok()?;
    let snapshot = model.join("snapshots").join(commit.trim());
    snapshot.join("config.json").is_file().then_some(snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_cache_is_where_the_hub_puts_it() {
        let look = |set: &[(&str, &str)]| {
            let set: std::collections::BTreeMap<String, String> = set
                .iter()
                .map(|(name, value)| ((*name).into(), (*value).into()))
                .collect();
            hub_cache(&|name| set.get(name).cloned())
        };
        let home = ("HOME", "/h");
        let cases: [(&[_], _); 5] = [
            (
                &[home, ("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")],
                Some("/c"),
            ),
            (&[home, ("HF_HOME", "/f")], Some("/f/hub")),
            (
                &[home, ("XDG_CACHE_HOME", "/x")],
                Some("/x/huggingface/hub"),
            ),
            (&[home], Some("/h/.cache/huggingface/hub")),
            (&[], None),
        ];
        for (set, expected) in cases {
            assert_eq!(look(set), expected.map(PathBuf::from), "{set:?}");
        }
    }

    #[test]
    fn a_cached_snapshot_is_the_one_of_main() {
        let cache = tempfile::tempdir().unwrap();
        assert_eq!(cached_snapshot(cache.path(), "o/n"), None);
        let model = cache.path().join("models--o--n");
        fs::create_dir_all(model.join("snapshots/abc")).unwrap();
        fs::create_dir_all(model.join("refs")).unwrap();
        fs::write(model.join("refs/main"), "abc").unwrap();
        assert_eq!(cached_snapshot(cache.path(), "o/n"), None, "no config yet");
        fs::write(model.join("snapshots/abc/config.json"), r#"{"a":1}"#).unwrap();
        let snapshot = cached_snapshot(cache.path(), "o/n").unwrap();
        let facts = snapshot_facts("o/n", &snapshot).unwrap();
        assert_eq!(facts.identity, "o/n@abc");
        assert_eq!(facts.config, Some(serde_json::json!({"a": 1})));
    }

    #[test]
    fn the_script_speaks_in_known_kinds() {
        let mut kinds = 0;
        for kind in SCRIPT.split("error=\"").skip(1) {
            let kind = kind.split('"').next().unwrap();
            let line = format!(r#"{{"error": "{kind}", "message": "m"}}"#);
            let report: Report = serde_json::from_str(&line).unwrap();
            assert!(matches!(report, Report::Failed { .. }), "{kind}");
            kinds += 1;
        }
        assert!(kinds >= 7);
        let done: Report = serde_json::from_str(r#"{"path": "/a"}"#).unwrap();
        assert!(matches!(done, Report::Done { .. }));
    }

    #[test]
    fn switches_are_read_as_the_hub_reads_them() {
        assert!(is_truthy(Some("1")) && is_truthy(Some("TRUE")) && is_truthy(Some("Yes")));
        assert!(!is_truthy(None) && !is_truthy(Some("0")) && !is_truthy(Some("")));
    }
}
