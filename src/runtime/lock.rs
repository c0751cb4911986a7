//! A lock between processes (`flock`): held as long as the file is open, gone with its holder.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

const POLL: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    #[error("cannot lock {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is still locked after {} s", .after.as_secs())]
    Deadline { path: PathBuf, after: Duration },
    #[error("cancelled")]
    Cancelled,
}

/// The lock, until it is dropped.
#[derive(Debug)]
pub(crate) struct FileLock {
    file: File,
}

impl FileLock {
    /// Waits for the lock; `waiting` is called once if it is not free. The file stays afterwards:
    /// removing it would let two holders of two files believe that they exclude each other.
    pub(crate) async fn acquire(
        path: &Path,
        limit: Duration,
        cancel: &CancellationToken,
        waiting: impl FnOnce(),
    ) -> Result<Self, LockError> {
        let io_error = |source| LockError::Io {
            path: path.to_owned(),
            source,
        };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_error)?;
        }
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(io_error)?;
        let started = Instant::now();
        let mut waiting = Some(waiting);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self { file }),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(io_error(source)),
            }
            if let Some(tell) = waiting.take() {
                tell();
            }
            if started.elapsed() >= limit {
                return Err(LockError::Deadline {
                    path: path.to_owned(),
                    after: limit,
                });
            }
            tokio::select! {
                () = cancel.cancelled() => return Err(LockError::Cancelled),
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // Not only closed: a child between fork and exec shares the open file for a moment.
        let _ = self.file.unlock();
    }
}
