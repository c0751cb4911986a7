//! What pegaflow would have removed, had it not been killed.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use super::super::orphans::end_orphans;

/// Beside the time that the guard's own tree has taken, users are promised five seconds.
const ORPHANS: Duration = Duration::from_secs(2);
const LOCK: &str = "lock";

/// Ends what nobody else can, and removes a dead pegaflow's run directory, unless a new pegaflow or another guard has its lock.
/// A directory without a lock file is not ours and stays.
pub fn remove_run_dir(dir: &Path) {
    let path = dir.join(LOCK);
    let Ok(file) = OpenOptions::new().read(true).write(true).open(&path) else {
        return;
    };
    let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        return;
    };
    let (Ok(named), Ok(locked)) = (fs::symlink_metadata(&path), lock.metadata()) else {
        return;
    };
    // Whoever removed the directory before us may have been followed by a new owner.
    if (named.dev(), named.ino()) != (locked.dev(), locked.ino()) {
        return;
    }
    // Of nodes whose guards were killed with pegaflow. What is stuck is left to the next `up`.
    let _ = end_orphans(dir, ORPHANS);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name() == LOCK {
            continue;
        }
        let path = entry.path();
        let removed = match entry.file_type() {
            Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
            _ => fs::remove_file(&path),
        };
        if let Err(error) = removed {
            eprintln!("pegaflow guard: cannot remove {}: {error}", path.display());
        }
    }
    // The lock goes last: until then nobody else may move in.
    let _ = fs::remove_file(&path);
    let _ = fs::remove_dir(dir);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(LOCK), "").unwrap();
        fs::create_dir(dir.path().join("shim")).unwrap();
        fs::write(dir.path().join("shim/a.py"), "x").unwrap();
        dir
    }

    #[test]
    fn a_free_run_directory_goes() {
        let dir = run_dir();
        remove_run_dir(dir.path());
        assert!(!dir.path().exists());
    }

    #[test]
    fn an_owned_run_directory_stays() {
        let dir = run_dir();
        let file = fs::File::open(dir.path().join(LOCK)).unwrap();
        let owner = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
        remove_run_dir(dir.path());
        assert!(dir.path().join("shim/a.py").exists());
        drop(owner);
    }

    #[test]
    fn a_directory_without_a_lock_stays() {
        let dir = run_dir();
        fs::remove_file(dir.path().join(LOCK)).unwrap();
        remove_run_dir(dir.path());
        assert!(dir.path().join("shim/a.py").exists());
    }
}
