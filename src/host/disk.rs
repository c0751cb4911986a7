//! Room in file systems.

use std::io;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

/// A file system's size and what an ordinary user may still write, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    pub total: u64,
    pub free: u64,
}

/// Of the file system that a path lies on, or will lie on when it is made.
pub fn space(path: &Path) -> io::Result<Space> {
    let existing = existing(path);
    let found = statvfs(&existing)?;
    let unit = found.fragment_size();
    Ok(Space {
        total: found.blocks().saturating_mul(unit),
        free: found.blocks_available().saturating_mul(unit),
    })
}

fn existing(path: &Path) -> PathBuf {
    let mut ancestors = path.ancestors();
    let found = ancestors.find(|ancestor| ancestor.exists());
    found.unwrap_or(Path::new("/")).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_made_yet_lies_where_its_parent_is() {
        let dir = tempfile::tempdir().unwrap();
        let here = space(dir.path()).unwrap();
        assert!(here.total > 0 && here.free <= here.total);
        let later = dir.path().join("a/b/c");
        assert_eq!(existing(&later), dir.path());
        assert_eq!(space(&later).unwrap().total, here.total);
    }
}
