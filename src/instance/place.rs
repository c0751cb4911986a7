//! Where an instance lives, and the checks that nobody else can put something there.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::InstanceError;

/// A Unix socket's address holds 107 bytes; this is left for the directory, `/engine.sock` and a
/// per-node name included.
const DIR_BYTES: usize = 75;
const NAME_BYTES: usize = 48;

/// The directories that hold one directory per instance.
#[derive(Debug, Clone)]
pub struct Places {
    /// `$XDG_RUNTIME_DIR/pegaflow` or `/tmp/pegaflow-<uid>`.
    pub run: PathBuf,
    /// `$XDG_STATE_HOME/pegaflow`.
    pub state: PathBuf,
}

impl Places {
    pub fn from_env() -> Result<Self, InstanceError> {
        let uid = nix::unistd::geteuid();
        let shared = PathBuf::from(format!("/tmp/pegaflow-{uid}"));
        let run = dirs::runtime_dir()
            .filter(|dir| {
                // A leftover of another user's session (su, sudo) is not ours to use.
                fs::metadata(dir).is_ok_and(|meta| meta.is_dir() && meta.uid() == uid.as_raw())
            })
            .map(|dir| dir.join("pegaflow"))
            .filter(|dir| dir.as_os_str().len() + 24 < DIR_BYTES)
            .unwrap_or(shared);
        let state = dirs::state_dir().ok_or(InstanceError::NoStateDir)?;
        Ok(Self {
            run,
            state: state.join("pegaflow"),
        })
    }

    /// The instance's run directory; not made.
    pub(super) fn run_dir(&self, name: &str) -> Result<PathBuf, InstanceError> {
        check_name(name)?;
        let path = self.run.join(name);
        if path.as_os_str().len() > DIR_BYTES {
            return Err(InstanceError::PathTooLong { path });
        }
        Ok(path)
    }

    /// The instance's log directory, made private.
    pub(super) fn log_dir(&self, name: &str) -> Result<PathBuf, InstanceError> {
        check_name(name)?;
        let path = self.state.join(name).join("logs");
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(InstanceError::io(&path))?;
        check_private(&path)?;
        Ok(path)
    }
}

pub(super) fn check_name(name: &str) -> Result<(), InstanceError> {
    let known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let fits = (1..=NAME_BYTES).contains(&name.len()) && !name.starts_with('.');
    if fits && name.chars().all(known) {
        Ok(())
    } else {
        Err(InstanceError::BadName {
            name: name.to_owned(),
        })
    }
}

/// Makes the directory and its parent (only these two), and refuses both if another user made them
/// or could write to them.
pub(super) fn private_dir(path: &Path) -> Result<(), InstanceError> {
    for dir in path.parent().into_iter().chain([path]) {
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(InstanceError::io(dir)(error));
            }
            _ => check_private(dir)?,
        }
    }
    Ok(())
}

fn check_private(path: &Path) -> Result<(), InstanceError> {
    // Of the path itself, not of what a link leads to.
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        // Its last holder removed it in this instant; the caller tries again.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(InstanceError::io(path)(error)),
    };
    let problem = if meta.is_symlink() {
        "it is a symbolic link".to_owned()
    } else if !meta.is_dir() {
        "it is not a directory".to_owned()
    } else if meta.uid() != nix::unistd::geteuid().as_raw() {
        format!("it belongs to uid {}", meta.uid())
    } else if meta.mode() & 0o077 != 0 {
        format!(
            "others have access (mode {:o}, expected 700)",
            meta.mode() & 0o777
        )
    } else {
        return Ok(());
    };
    Err(InstanceError::Insecure {
        path: path.to_owned(),
        problem,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for name in ["", ".", "..", ".x", "a/b", "a b", "ä", &"x".repeat(49)] {
            let checked = check_name(name);
            assert!(
                matches!(checked, Err(InstanceError::BadName { .. })),
                "{name}"
            );
        }
        for name in ["a", "1p1d-cpu", "x_y.z", &"x".repeat(48)] {
            assert!(check_name(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn a_path_without_room_for_a_socket_is_refused() {
        let places = |run: String| Places {
            run: run.into(),
            state: "/s".into(),
        };
        let dir = places(format!("/{}", "r".repeat(60))).run_dir(&"n".repeat(13));
        assert!(dir.unwrap().join("engine.sock").as_os_str().len() < 100);
        let dir = places(format!("/{}", "r".repeat(60))).run_dir(&"n".repeat(14));
        assert!(matches!(dir, Err(InstanceError::PathTooLong { .. })));
    }
}
