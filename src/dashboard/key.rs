//! The key of an instance's dashboard. It outlives the instance, so that an open page finds the next one.

use std::fmt;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::router::read_private;

const LENGTH: usize = 32;

/// 128 random bits, in hexadecimal. Cheap to clone; never shown by `Debug`.
#[derive(Clone)]
pub struct Key {
    text: Arc<str>,
    digest: [u8; 32],
}

#[derive(Debug, thiserror::Error)]
#[error("cannot keep the dashboard's key in {}", path.display())]
pub struct KeyError {
    pub path: PathBuf,
    pub source: io::Error,
}

impl Key {
    /// The one in this file; a new one where there is none, or one that others could have read.
    pub fn kept_in(path: &Path) -> Result<Self, KeyError> {
        if let Ok(text) = read_private(path)
            && let Some(key) = Self::from(text.trim())
        {
            return Ok(key);
        }
        let text = format!("{:0LENGTH$x}", rand::random::<u128>());
        let key = Self::new(&text);
        replace(path, &text).map_err(|source| KeyError {
            path: path.to_owned(),
            source,
        })?;
        Ok(key)
    }

    fn from(text: &str) -> Option<Self> {
        let is_key = text.len() == LENGTH && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_key.then(|| Self::new(text))
    }

    fn new(text: &str) -> Self {
        Self {
            text: text.into(),
            digest: Sha256::digest(text).into(),
        }
    }

    /// Compares digests: how long that takes says nothing about the key.
    pub fn admits(&self, shown: &str) -> bool {
        self.digest == <[u8; 32]>::from(Sha256::digest(shown))
    }

    /// For the person who may have it, and nobody else.
    pub fn reveal(&self) -> &str {
        &self.text
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// A reader sees the old file or the new one.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let next = path.with_extension(format!("{}.new", std::process::id()));
    let mut options = std::fs::File::options();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&next)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| std::fs::rename(&next, path));
    if written.is_err() {
        // The first error says more.
        let _ = std::fs::remove_file(&next);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_key_is_kept_and_admits_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dashboard.key");
        let first = Key::kept_in(&path).unwrap();
        let again = Key::kept_in(&path).unwrap();
        assert!(first.admits(again.reveal()) && again.admits(first.reveal()));
        for shown in [
            "",
            "0",
            &first.reveal()[1..],
            &format!("{}0", first.reveal()),
        ] {
            assert!(!first.admits(shown), "{shown}");
        }
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!format!("{first:?}").contains(first.reveal()));
    }

    #[test]
    fn a_key_that_others_could_read_or_that_is_none_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dashboard.key");
        let first = Key::kept_in(&path).unwrap();
        let mode = |mode| std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&path, mode(0o644)).unwrap();
        let second = Key::kept_in(&path).unwrap();
        assert!(!second.admits(first.reveal()));
        std::fs::write(&path, "").unwrap();
        let third = Key::kept_in(&path).unwrap();
        assert!(!third.admits("") && !third.admits(second.reveal()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
