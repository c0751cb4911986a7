//! The Python packages that the nodes load, embedded in the program.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::Path;

use include_dir::{Dir, DirEntry, include_dir};

static SHIM: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/python-shim");

/// The shim's native copy, from `build.rs`; empty where the target has no shared libraries.
static COPY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pegaflow_copy.so"));

/// Writes the packages (not their tests, nor what tools left between the sources).
pub(super) fn unpack(target: &Path) -> io::Result<()> {
    fs::create_dir_all(target)?;
    for package in SHIM.dirs() {
        let is_package = package
            .path()
            .to_str()
            .is_some_and(|name| name.starts_with("pegaflow_"));
        if is_package {
            unpack_dir(package, target)?;
        }
    }
    if !COPY.is_empty() {
        fs::write(target.join("pegaflow_vllm/pegaflow_copy.so"), COPY)?;
    }
    Ok(())
}

/// What is embedded under this path.
pub(super) fn file(path: &str) -> Option<&'static [u8]> {
    Some(SHIM.get_file(path)?.contents())
}

/// Entries' paths are relative to the root of what was embedded.
fn unpack_dir(dir: &Dir<'_>, target: &Path) -> io::Result<()> {
    fs::create_dir_all(target.join(dir.path()))?;
    for entry in dir.entries() {
        match entry {
            DirEntry::Dir(inner) if inner.path().file_name() != Some(OsStr::new("__pycache__")) => {
                unpack_dir(inner, target)?;
            }
            DirEntry::File(file) if file.path().extension() != Some(OsStr::new("pyc")) => {
                fs::write(target.join(file.path()), file.contents())?;
            }
            DirEntry::Dir(_) | DirEntry::File(_) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packages_come_with_their_native_copy_and_without_its_source() {
        let dir = tempfile::tempdir().unwrap();
        unpack(dir.path()).unwrap();
        let package = dir.path().join("pegaflow_vllm");
        assert!(package.join("copy.py").exists());
        let library = fs::read(package.join("pegaflow_copy.so")).unwrap();
        assert!(library.starts_with(b"\x7fELF"));
        assert!(!dir.path().join("native").exists());
    }
}
