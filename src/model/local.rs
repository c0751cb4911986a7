//! A model directory, and the fingerprint of what is in it.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::ModelError;
use crate::runtime::hex;
use crate::topology::ModelFacts;

const WEIGHTS: [&str; 5] = ["safetensors", "bin", "pt", "pth", "gguf"];
/// Of each weight file's beginning and end. Reading terabytes would cost more than it proves: a
/// safetensors file begins with its tensors' names and shapes.
const SAMPLE: u64 = 64 * 1024;

/// The directory as a model: it must hold a `config.json`.
pub(super) fn facts(dir: &Path) -> Result<ModelFacts, ModelError> {
    if !dir.is_dir() {
        return Err(ModelError::NoDirectory {
            path: dir.to_owned(),
        });
    }
    let (config, bytes) = config(dir)?;
    let mut digest = Sha256::new();
    part(&mut digest, b"config.json", &bytes);
    for name in weight_files(dir)? {
        let path = dir.join(&name);
        sample(&path, name.as_bytes(), &mut digest)
            .map_err(|source| ModelError::Unreadable { path, source })?;
    }
    Ok(ModelFacts {
        load_from: dir.to_string_lossy().into_owned(),
        identity: format!("sha256:{}", hex(&digest.finalize())),
        config: Some(config),
        weights: weight_bytes(dir),
    })
}

/// What vLLM would read: the safetensors where there are any, and not Mistral's second copy of them.
pub(super) fn weight_bytes(dir: &Path) -> Option<u64> {
    let names = weight_files(dir).ok()?;
    let second = |name: &&String| name.starts_with("consolidated");
    let safe: Vec<&String> = names
        .iter()
        .filter(|name| name.ends_with("safetensors"))
        .collect();
    let first: Vec<&String> = safe.iter().copied().filter(|name| !second(name)).collect();
    let read = match (first.is_empty(), safe.is_empty()) {
        (false, _) => first,
        (true, false) => safe,
        (true, true) => names.iter().collect(),
    };
    read.into_iter()
        .map(|name| Some(fs::metadata(dir.join(name)).ok()?.len()))
        .sum()
}

pub(super) fn config(dir: &Path) -> Result<(serde_json::Value, Vec<u8>), ModelError> {
    let path = dir.join("config.json");
    let bytes = fs::read(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => ModelError::NoConfig {
            path: dir.to_owned(),
        },
        _ => ModelError::Unreadable {
            path: path.clone(),
            source,
        },
    })?;
    let config =
        serde_json::from_slice(&bytes).map_err(|source| ModelError::BadConfig { path, source })?;
    Ok((config, bytes))
}

/// Sorted, so that the fingerprint does not depend on the file system.
fn weight_files(dir: &Path) -> Result<Vec<String>, ModelError> {
    let unreadable = |source| ModelError::Unreadable {
        path: dir.to_owned(),
        source,
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let is_weights = path
            .extension()
            .and_then(|extension| extension.to_str())
            .is_some_and(|extension| WEIGHTS.contains(&extension));
        // Follows the links of a Hugging Face snapshot.
        if is_weights && path.is_file() {
            names.extend(
                path.file_name()
                    .map(|name| name.to_string_lossy().into_owned()),
            );
        }
    }
    names.sort();
    Ok(names)
}

fn sample(path: &Path, name: &[u8], digest: &mut Sha256) -> io::Result<()> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    part(digest, name, &size.to_le_bytes());
    let mut bytes = Vec::new();
    file.by_ref().take(SAMPLE).read_to_end(&mut bytes)?;
    file.seek(SeekFrom::Start(size.saturating_sub(SAMPLE)))?;
    file.take(SAMPLE).read_to_end(&mut bytes)?;
    part(digest, b"", &bytes);
    Ok(())
}

/// With lengths, so that no two lists of parts look alike.
fn part(digest: &mut Sha256, name: &[u8], value: &[u8]) {
    for bytes in [name, value] {
        digest.update((bytes.len() as u64).to_le_bytes());
        digest.update(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(weights: &[u8]) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), r#"{"model_type":"x"}"#).unwrap();
        fs::write(dir.path().join("a.safetensors"), weights).unwrap();
        let identity = facts(dir.path()).unwrap().identity;
        (dir, identity)
    }

    #[test]
    fn the_identity_follows_the_weights_and_the_config_only() {
        let big = vec![7u8; 300_000];
        let (dir, original) = model(&big);
        assert_eq!(model(&big).1, original, "the place does not matter");
        fs::write(dir.path().join("README.md"), "words").unwrap();
        assert_eq!(facts(dir.path()).unwrap().identity, original);

        let mut changed = Vec::new();
        for edit in [0, 299_999] {
            let mut other = big.clone();
            other[edit] = 8;
            changed.push(model(&other).1);
        }
        changed.push(model(&vec![7u8; 300_001]).1);
        fs::write(dir.path().join("b.safetensors"), "").unwrap();
        changed.push(facts(dir.path()).unwrap().identity);
        fs::write(dir.path().join("config.json"), r#"{"model_type":"y"}"#).unwrap();
        changed.push(facts(dir.path()).unwrap().identity);
        changed.push(original);
        let distinct: std::collections::BTreeSet<_> = changed.iter().collect();
        assert_eq!(distinct.len(), changed.len());
    }

    #[test]
    fn weights_are_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: usize| {
            fs::write(dir.path().join(name), vec![0; bytes]).unwrap();
            weight_bytes(dir.path())
        };
        assert_eq!(weight_bytes(dir.path()), Some(0));
        assert_eq!(file("pytorch_model.bin", 7), Some(7));
        assert_eq!(file("consolidated.safetensors", 10), Some(10));
        assert_eq!(file("model-1.safetensors", 4), Some(4));
        assert_eq!(file("model-2.safetensors", 5), Some(9));
    }

    #[test]
    fn what_is_not_a_model_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let missing = facts(&dir.path().join("missing"));
        assert!(matches!(missing, Err(ModelError::NoDirectory { .. })));
        assert!(matches!(
            facts(dir.path()),
            Err(ModelError::NoConfig { .. })
        ));
        fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(matches!(
            facts(dir.path()),
            Err(ModelError::BadConfig { .. })
        ));
    }
}
