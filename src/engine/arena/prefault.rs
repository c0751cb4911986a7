//! Touches the arena's pages before anybody needs them, beside the start of the nodes.
//!
//! ```text
//! threads ── take the next 64 MiB ── room left? ── map ── populate 4 MiB ── .. ── unmap ─┐
//!    ▲                                  no: end            stop? end                     │
//!    └───────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Why `MADV_POPULATE_WRITE` and not `fallocate`: both report missing memory as an error, where a
//! plain touch would be a SIGBUS (or wake the OOM killer). But `fallocate` holds the file's lock,
//! so threads do not help it; it leaves zeroing to the first save; it asks for no huge pages where
//! the kernel wants them asked for; and on hugetlbfs it knows no NUMA policy. It is what is left
//! on kernels before 5.14, which do not know the other.
//!
//! Nobody waits for this: a worker that comes first gets its page by an ordinary fault. A shortage
//! is looked for before each piece, so that pegaflow gives up while others still get memory.
//! Populating holds this process's `mmap_lock`, hence the small steps: the router lives here too.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use bytesize::ByteSize;
use memmap2::{Advice, MmapRaw};
use nix::fcntl::{FallocateFlags, fallocate};
use tokio_util::sync::CancellationToken;

use super::file::MemoryFile;
use super::sys;
use crate::host::memory_available;
use crate::plan::{NumaPlan, PageKind};

/// What a thread takes at a time. Both are whole huge pages.
const PIECE: u64 = 64 << 20;
/// What is populated between two looks at `stop`: about a millisecond.
const STEP: u64 = 4 << 20;
/// What is left to the rest of the machine.
const RESERVE: u64 = 512 << 20;

/// Why a part of the arena was not pre-faulted.
#[derive(Debug, thiserror::Error)]
enum PrefaultError {
    #[error("{} of memory are left; write a smaller `capacity` in [kv]", ByteSize(*.0))]
    Short(u64),
    #[error("cannot map it: {0}")]
    Map(#[source] io::Error),
    #[error("cannot get its pages: {0}")]
    Populate(#[source] io::Error),
}

/// How many bytes can be had, if that is known.
type Room = dyn Fn() -> Option<u64> + Send + Sync;

/// The threads at work. Dropping it stops and joins them.
#[derive(Debug)]
pub struct Prefault {
    threads: Vec<JoinHandle<()>>,
    work: Arc<Work>,
}

struct Work {
    file: MemoryFile,
    room: Box<Room>,
    stop: CancellationToken,
    /// Where the next piece begins.
    next: AtomicU64,
    done: AtomicU64,
    running: AtomicUsize,
    /// The first.
    failed: Mutex<Option<PrefaultError>>,
    started: Instant,
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work").finish_non_exhaustive()
    }
}

impl Prefault {
    /// Begins, with so many threads; they end early when `stop` is cancelled.
    pub fn start(file: MemoryFile, threads: usize, stop: CancellationToken) -> Self {
        let node = match file.numa {
            NumaPlan::Bind(node) => Some(node),
            _ => None,
        };
        let room: Box<Room> = match file.pages {
            // They were reserved when the file was made.
            PageKind::Huge => Box::new(|| None),
            _ => Box::new(move || memory_available(node)),
        };
        Self::with_room(file, threads, stop, room)
    }

    fn with_room(
        file: MemoryFile,
        threads: usize,
        stop: CancellationToken,
        room: Box<Room>,
    ) -> Self {
        let work = Arc::new(Work {
            file,
            room,
            stop,
            next: AtomicU64::new(0),
            done: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            failed: Mutex::new(None),
            started: Instant::now(),
        });
        // All are counted before one can end, so that only the last one reports.
        let tickets: Vec<Running> = (0..threads).map(|_| Running::new(&work)).collect();
        let spawn = |(number, ticket): (usize, Running)| {
            thread::Builder::new()
                .name(format!("prefault-{number}"))
                .spawn(move || ticket.0.run())
                .inspect_err(|error| tracing::warn!(%error, "cannot start a pre-fault thread"))
                .ok()
        };
        Self {
            threads: tickets.into_iter().enumerate().filter_map(spawn).collect(),
            work,
        }
    }

    /// Bytes that have their pages.
    pub fn bytes(&self) -> u64 {
        self.work.done.load(Ordering::Relaxed)
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a pre-fault thread panicked; the arena is usable all the same");
            }
        }
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        self.work.stop.cancel();
        self.join();
    }
}

/// A thread that is not through; the last one tells how it went.
struct Running(Arc<Work>);

impl Running {
    fn new(work: &Arc<Work>) -> Self {
        work.running.fetch_add(1, Ordering::Relaxed);
        Self(work.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.report();
        }
    }
}

impl Work {
    fn run(&self) {
        sys::step_back();
        while !self.stop.is_cancelled() {
            let offset = self.next.fetch_add(PIECE, Ordering::Relaxed);
            if offset >= self.file.len {
                return;
            }
            if let Err(error) = self.piece(offset, PIECE.min(self.file.len - offset)) {
                // The others would meet the same.
                self.next.store(self.file.len, Ordering::Relaxed);
                let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.get_or_insert(error);
                return;
            }
        }
    }

    fn piece(&self, offset: u64, len: u64) -> Result<(), PrefaultError> {
        if let Some(left) = (self.room)().filter(|left| *left < len + RESERVE) {
            return Err(PrefaultError::Short(left));
        }
        let mapping = self
            .file
            .map_placed(offset, len)
            .map_err(PrefaultError::Map)?;
        let mut at = 0;
        while at < len && !self.stop.is_cancelled() {
            let step = STEP.min(len - at);
            self.populate(&mapping, offset, at..at + step)
                .map_err(PrefaultError::Populate)?;
            self.done.fetch_add(step, Ordering::Relaxed);
            at += step;
        }
        Ok(())
    }

    fn populate(
        &self,
        mapping: &MmapRaw,
        offset: u64,
        part: std::ops::Range<u64>,
    ) -> io::Result<()> {
        let at = usize::try_from(part.start).map_err(io::Error::other)?;
        let len = usize::try_from(part.end - part.start).map_err(io::Error::other)?;
        match mapping.advise_range(Advice::PopulateWrite, at, len) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                let start = libc::off_t::try_from(offset + part.start).map_err(io::Error::other)?;
                let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
                let mode = FallocateFlags::empty();
                Ok(fallocate(&self.file.file, mode, start, len)?)
            }
            done => done,
        }
    }

    fn report(&self) {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        let done = self.done.load(Ordering::Relaxed);
        let took = self.started.elapsed();
        let (done, all) = (ByteSize(done), ByteSize(self.file.len));
        match &*failed {
            Some(error) => tracing::warn!(
                "the arena was pre-faulted up to {done} of {all}; nodes may run out of memory when \
                 they use the rest: {error}"
            ),
            None if self.stop.is_cancelled() => {
                tracing::debug!("pre-faulting the arena was stopped at {done} of {all}");
            }
            None => tracing::info!("the arena's {all} were pre-faulted in {took:.1?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::plan::ArenaPlan;

    fn file(len: u64) -> MemoryFile {
        MemoryFile::create(len, &ArenaPlan::default()).unwrap()
    }

    /// Bytes of the file that have pages.
    fn resident(file: &MemoryFile) -> u64 {
        file.file.metadata().unwrap().blocks() * 512
    }

    fn error(prefault: &Prefault) -> Option<PrefaultError> {
        prefault.work.failed.lock().unwrap().take()
    }

    #[test]
    fn every_page_is_there_afterwards_and_what_was_written_stays() {
        let file = file(PIECE + 3 * STEP + 4096);
        let mapping = file.map(0, file.len).unwrap();
        assert_eq!(resident(&file), 0);
        std::os::unix::fs::FileExt::write_all_at(&file.file, b"kept", PIECE - 2).unwrap();
        let stop = CancellationToken::new();
        let mut prefault = Prefault::start(file.share().unwrap(), 2, stop);
        prefault.join();
        assert!(error(&prefault).is_none());
        assert_eq!(prefault.bytes(), file.len);
        // More where the kernel rounds up to huge pages by itself.
        assert!(resident(&file) >= file.len);
        let mut kept = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&file.file, &mut kept, PIECE - 2).unwrap();
        assert_eq!(&kept, b"kept");
        drop(mapping);
    }

    #[test]
    fn it_stops_in_the_middle_when_told_to() {
        let file = file(16 * PIECE);
        let stop = CancellationToken::new();
        let stopping = stop.clone();
        let looked = AtomicUsize::new(0);
        let room = Box::new(move || {
            if looked.fetch_add(1, Ordering::Relaxed) == 1 {
                stopping.cancel();
            }
            None
        });
        let mut prefault = Prefault::with_room(file.share().unwrap(), 1, stop, room);
        prefault.join();
        assert_eq!((prefault.bytes(), resident(&file)), (PIECE, PIECE));
        assert!(error(&prefault).is_none());
    }

    #[test]
    fn dropping_it_ends_its_threads() {
        let (begun, wait) = mpsc::channel();
        let room = Box::new(move || {
            let _ = begun.send(());
            None
        });
        let file = file(1 << 30);
        let stop = CancellationToken::new();
        let prefault = Prefault::with_room(file.share().unwrap(), 2, stop.clone(), room);
        wait.recv_timeout(Duration::from_secs(10)).unwrap();
        let work = Arc::downgrade(&prefault.work);
        drop(prefault);
        assert!(stop.is_cancelled() && work.upgrade().is_none());
    }

    #[test]
    fn it_gives_up_before_the_memory_is_gone() {
        let file = file(4 * PIECE);
        let left = AtomicU64::new(2 * PIECE + RESERVE);
        let room = Box::new(move || Some(left.fetch_sub(PIECE, Ordering::Relaxed)));
        let stop = CancellationToken::new();
        let mut prefault = Prefault::with_room(file.share().unwrap(), 1, stop, room);
        prefault.join();
        assert_eq!((prefault.bytes(), resident(&file)), (2 * PIECE, 2 * PIECE));
        assert!(matches!(error(&prefault), Some(PrefaultError::Short(left)) if left == RESERVE));
    }

    #[test]
    fn without_threads_nothing_is_touched() {
        let file = file(PIECE);
        let prefault = Prefault::start(file.share().unwrap(), 0, CancellationToken::new());
        assert_eq!((prefault.bytes(), resident(&file)), (0, 0));
    }
}
