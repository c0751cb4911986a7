//! A machine to look at that is a directory.

use std::path::Path;

pub(super) struct Machine(tempfile::TempDir);

impl Default for Machine {
    fn default() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
}

impl Machine {
    pub(super) fn root(&self) -> &Path {
        self.0.path()
    }

    pub(super) fn file(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}
