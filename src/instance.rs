//! One running `up`: its name, its private run directory, and the lock that keeps a second one out.
//!
//! ```text
//! $XDG_RUNTIME_DIR/pegaflow/<name>/   or   /tmp/pegaflow-<uid>/<name>/        0700, ours, no link
//!     lock          flock held for life; holds InstanceInfo as JSON
//!     engine.sock, control.sock, shim/
//! $XDG_STATE_HOME/pegaflow/<name>/logs/                                      survives the instance
//!
//! free ── acquire: flock, wipe what a dead one left ──▶ held ── release or drop ──▶ removed
//!  ▲                     │ somebody holds the lock                                     │
//!  │                     └──▶ AlreadyRunning(info)                                     │
//!  └───────────────────────── the kernel drops the lock of a killed holder ◀──────────┘
//! ```

mod find;
mod place;
mod shim;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

pub use find::{all_running, last_logs, logs_of};
pub use place::Places;

const LOCK: &str = "lock";
const CONTROL: &str = "control.sock";
/// A lock may be busy for an instant only: somebody looks at it ([`running`]), or its holder ends.
const TRIES: usize = 10;
const RETRY: Duration = Duration::from_millis(20);

/// What a holder tells about itself; what a second `up`, `status` and `stop` read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    pub pid: u32,
    /// The router's address, once it listens.
    pub url: Option<String>,
    /// The topology file.
    pub topology: PathBuf,
    pub started: SystemTime,
}

impl InstanceInfo {
    /// This process, which does not listen yet.
    pub fn starting(topology: &Path) -> Self {
        Self {
            pid: std::process::id(),
            url: None,
            topology: topology.to_owned(),
            started: SystemTime::now(),
        }
    }
}

/// Why there is no instance.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    #[error("`{name}` is already running{}", describe(.info.as_deref()))]
    AlreadyRunning {
        name: String,
        /// `None` in the instants when it is starting or ending.
        info: Option<Box<InstanceInfo>>,
    },
    #[error(
        "`{name}` is not a usable name: take 1 to 48 of a-z, A-Z, 0-9, `-`, `_` and `.`, not starting with `.`"
    )]
    BadName { name: String },
    #[error("{path} is not safe to use: {problem}; remove it, or set XDG_RUNTIME_DIR")]
    Insecure { path: PathBuf, problem: String },
    #[error("{path} is too long for a socket's address: choose a shorter name or XDG_RUNTIME_DIR")]
    PathTooLong { path: PathBuf },
    #[error("neither HOME nor XDG_STATE_HOME says where logs go: set XDG_STATE_HOME")]
    NoStateDir,
    #[error("cannot use {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

fn describe(info: Option<&InstanceInfo>) -> String {
    let Some(info) = info else {
        return " (it is just starting or ending)".into();
    };
    let url = info.url.as_deref().unwrap_or("not ready yet");
    format!(
        ": pid {}, {url}, {}; stop it with Ctrl-C there, or with `pegaflow down`",
        info.pid,
        info.topology.display()
    )
}

impl InstanceError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// The right to run under a name. Dropping it removes the run directory.
#[derive(Debug)]
pub struct Instance {
    name: String,
    dir: PathBuf,
    logs: PathBuf,
    follows_a_killed_one: bool,
    started: SystemTime,
    /// `None` once released.
    lock: Option<File>,
}

impl Instance {
    /// Takes the name, in the usual places.
    pub fn acquire(name: &str, info: &InstanceInfo) -> Result<Self, InstanceError> {
        Self::acquire_in(&Places::from_env()?, name, info)
    }

    /// [`Instance::acquire`] in places of the caller's choice.
    pub fn acquire_in(
        places: &Places,
        name: &str,
        info: &InstanceInfo,
    ) -> Result<Self, InstanceError> {
        let dir = places.run_dir(name)?;
        let logs = places.log_dir(name)?;
        let mut holder = None;
        for _ in 0..TRIES {
            place::private_dir(&dir)?;
            match try_lock(&dir)? {
                Attempt::Held(mut lock) => {
                    // Whoever ends in good order takes the file along.
                    let follows_a_killed_one = read_info(&mut lock).is_some();
                    let mut instance = Self {
                        name: name.to_owned(),
                        dir,
                        logs,
                        follows_a_killed_one,
                        started: info.started,
                        lock: Some(lock),
                    };
                    wipe(&instance.dir)?;
                    instance.set_info(info)?;
                    return Ok(instance);
                }
                Attempt::Busy(info) => holder = info.map(Box::new),
                Attempt::Vanished => {}
            }
            std::thread::sleep(RETRY);
        }
        Err(InstanceError::AlreadyRunning {
            name: name.to_owned(),
            info: holder,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn started(&self) -> SystemTime {
        self.started
    }

    /// The last one under this name left its run directory behind.
    pub fn follows_a_killed_one(&self) -> bool {
        self.follows_a_killed_one
    }

    /// Private, and short enough for a socket in it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Private; survives the instance. Logs are below it.
    pub fn state_dir(&self) -> &Path {
        self.logs.parent().unwrap_or(&self.logs)
    }

    /// Private; survives the instance.
    pub fn log_dir(&self) -> &Path {
        &self.logs
    }

    /// Replaces what others read about this instance.
    pub fn set_info(&mut self, info: &InstanceInfo) -> Result<(), InstanceError> {
        let path = self.dir.join(LOCK);
        let Some(lock) = &mut self.lock else {
            return Ok(());
        };
        let text = serde_json::to_vec(info).map_err(io::Error::other);
        text.and_then(|text| {
            lock.rewind()?;
            lock.write_all(&text)?;
            // After the write: a reader sees old or new text, or both, never none.
            lock.set_len(text.len() as u64)
        })
        .map_err(InstanceError::io(&path))
    }

    /// Where PegaEngine listens.
    pub fn engine_socket(&self) -> PathBuf {
        engine_socket(&self.dir)
    }

    /// Where the control API listens.
    pub fn control_socket(&self) -> PathBuf {
        self.dir.join(CONTROL)
    }

    /// Where [`Instance::unpack_shim`] writes: the nodes' PYTHONPATH.
    pub fn shim_dir(&self) -> PathBuf {
        shim_dir(&self.dir)
    }

    /// Writes the embedded Python packages to [`Instance::shim_dir`].
    pub fn unpack_shim(&self) -> Result<PathBuf, InstanceError> {
        let target = self.shim_dir();
        unpack_shim(&target)?;
        Ok(target)
    }

    /// Removes the run directory and gives up the name. Does nothing the second time.
    pub fn release(&mut self) -> Result<(), InstanceError> {
        let Some(lock) = self.lock.take() else {
            return Ok(());
        };
        let path = self.dir.join(LOCK);
        let removed =
            wipe(&self.dir).and_then(|()| fs::remove_file(&path).map_err(InstanceError::io(&path)));
        // Fails, rightly, if somebody has made a new lock in it in this instant.
        let _ = fs::remove_dir(&self.dir);
        // Not only closed: a child between fork and exec shares the open file for a moment.
        let _ = lock.unlock();
        removed
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::warn!("the run directory was not removed: {error}");
        }
    }
}

/// [`Instance::engine_socket`] of the one that has this run directory.
pub fn engine_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("engine.sock")
}

/// [`Instance::shim_dir`] of the one that has this run directory.
pub fn shim_dir(run_dir: &Path) -> PathBuf {
    run_dir.join("shim")
}

/// A file of the embedded Python packages.
pub fn shim_file(path: &str) -> Option<&'static [u8]> {
    shim::file(path)
}

/// The run directory that an instance of this name would have; it is not made.
pub fn run_dir(name: &str) -> Result<PathBuf, InstanceError> {
    Places::from_env()?.run_dir(name)
}

/// Writes the embedded Python packages into a directory of the caller's choice.
pub fn unpack_shim(target: &Path) -> Result<(), InstanceError> {
    shim::unpack(target).map_err(InstanceError::io(target))
}

/// Who runs under a name, if anybody does; for `status`, `stop` and the like. Changes nothing.
pub fn running(name: &str) -> Result<Option<InstanceInfo>, InstanceError> {
    running_in(&Places::from_env()?, name)
}

/// [`running`] in places of the caller's choice.
pub fn running_in(places: &Places, name: &str) -> Result<Option<InstanceInfo>, InstanceError> {
    let path = places.run_dir(name)?.join(LOCK);
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(InstanceError::io(&path)(error)),
    };
    // Shared: two lookers do not take each other for a holder.
    match file.try_lock_shared() {
        Ok(()) => {
            let _ = file.unlock();
            Ok(None)
        }
        Err(TryLockError::WouldBlock) => Ok(read_info(&mut file)),
        Err(TryLockError::Error(error)) => Err(InstanceError::io(&path)(error)),
    }
}

/// Where the instance of this name answers to whoever operates it.
pub fn control_socket(name: &str) -> Result<PathBuf, InstanceError> {
    Ok(Places::from_env()?.run_dir(name)?.join(CONTROL))
}

enum Attempt {
    Held(File),
    Busy(Option<InstanceInfo>),
    /// The directory or the file was removed by its last holder meanwhile.
    Vanished,
}

fn try_lock(dir: &Path) -> Result<Attempt, InstanceError> {
    let path = dir.join(LOCK);
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path);
    let mut file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Attempt::Vanished),
        Err(error) => return Err(InstanceError::io(&path)(error)),
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(Attempt::Busy(read_info(&mut file))),
        Err(TryLockError::Error(error)) => return Err(InstanceError::io(&path)(error)),
    }
    // The file that we locked may have lost its name between open and lock.
    let held = file.metadata().map_err(InstanceError::io(&path))?;
    let same = fs::symlink_metadata(&path)
        .is_ok_and(|named| (named.dev(), named.ino()) == (held.dev(), held.ino()));
    Ok(if same {
        Attempt::Held(file)
    } else {
        Attempt::Vanished
    })
}

fn read_info(file: &mut File) -> Option<InstanceInfo> {
    let mut text = Vec::new();
    file.take(64 * 1024).read_to_end(&mut text).ok()?;
    serde_json::Deserializer::from_slice(&text)
        .into_iter()
        .next()?
        .ok()
}

/// Everything but the lock.
fn wipe(dir: &Path) -> Result<(), InstanceError> {
    for entry in fs::read_dir(dir).map_err(InstanceError::io(dir))? {
        let entry = entry.map_err(InstanceError::io(dir))?;
        if entry.file_name() == LOCK {
            continue;
        }
        let path = entry.path();
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let removed = if is_dir {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(InstanceError::io(&path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}
