//! The cache's places, and the two tools by which something in it appears whole or not at all.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// `PEGAFLOW_CACHE_DIR`, or `pegaflow` in the user's cache directory.
pub fn cache_root() -> Option<PathBuf> {
    match std::env::var_os("PEGAFLOW_CACHE_DIR") {
        Some(dir) if !dir.is_empty() => std::path::absolute(dir).ok(),
        _ => dirs::cache_dir().map(|dir| dir.join("pegaflow")),
    }
}

/// Where this process makes `path` before it renames it.
pub(crate) fn partial_sibling(path: &Path) -> PathBuf {
    let mut name = prefix_of_partials(path);
    name.push(std::process::id().to_string());
    path.with_file_name(name)
}

/// Removes what interrupted runs left of `path`. Call it under the lock of `path` only.
pub(crate) fn discard_partials(path: &Path) -> io::Result<()> {
    let prefix = prefix_of_partials(path);
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name();
        if name
            .as_encoded_bytes()
            .starts_with(prefix.as_encoded_bytes())
        {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn prefix_of_partials(path: &Path) -> OsString {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial-");
    name
}

/// Lowercase hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_partials_of_this_path_are_discarded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc");
        for name in ["abc", "abc.partial-1", "abc.partial-77", "abcd.partial-1"] {
            fs::create_dir_all(dir.path().join(name).join("deep")).unwrap();
        }
        discard_partials(&path).unwrap();
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["abc", "abcd.partial-1"]);
    }

    #[test]
    fn hex_is_lowercase_and_padded() {
        assert_eq!(hex(&[0, 10, 255]), "000aff");
    }
}
