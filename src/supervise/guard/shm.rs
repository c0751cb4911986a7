//! The tree's shared memory files, which vLLM leaves behind even after a clean stop.
//!
//! Best is a `/dev/shm` of the tree's own, in a mount namespace that dies with it. Where the
//! kernel refuses that, the guard notes what its living tree maps, because nobody can tell whose
//! a file was once the tree is dead. It looks now and then, and at once when a file appears: a
//! process that dies right after it made one must not leave it, or a crash loop fills /dev/shm.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::unistd::{Pid, geteuid};

use super::processes;

const SHM: &str = "/dev/shm";

#[derive(Debug)]
pub enum Shm {
    /// Goes away with the last process of the namespace.
    Private,
    Noted(Notes),
}

#[derive(Debug)]
pub struct Notes {
    /// Inodes that were there before the tree was.
    before: BTreeSet<u64>,
    /// What the tree has mapped since.
    owned: BTreeMap<PathBuf, u64>,
    /// Readable when a file has appeared; none where the user's instances are used up.
    appeared: Option<Inotify>,
}

impl Shm {
    pub fn prepare(private: bool) -> Self {
        if private && isolate().is_ok() {
            return Self::Private;
        }
        let before = fs::read_dir(SHM)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.metadata().ok())
            .map(|metadata| metadata.ino())
            .collect();
        Self::Noted(Notes {
            before,
            owned: BTreeMap::new(),
            appeared: watch_dir().ok(),
        })
    }

    /// [`Shm::note`] must be called now and then while the tree lives.
    pub fn wants_notes(&self) -> bool {
        matches!(self, Self::Noted(_))
    }

    /// Readable when somebody has made a file.
    pub fn appeared(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Private => None,
            Self::Noted(notes) => notes.appeared.as_ref().map(AsFd::as_fd),
        }
    }

    /// True when somebody has made a file since the last call.
    pub fn take_appeared(&self) -> bool {
        let Self::Noted(notes) = self else {
            return false;
        };
        let mut any = false;
        while notes
            .appeared
            .as_ref()
            .is_some_and(|appeared| appeared.read_events().is_ok())
        {
            any = true;
        }
        any
    }

    /// What the tree has come to map since the last call.
    pub fn note(&mut self, tree: &[Pid]) -> Vec<(PathBuf, u64)> {
        let Self::Noted(notes) = self else {
            return vec![];
        };
        let mut new = vec![];
        for (path, inode) in tree.iter().flat_map(|pid| mapped_by(*pid)) {
            if !notes.before.contains(&inode)
                && notes.owned.insert(path.clone(), inode) != Some(inode)
            {
                new.push((path, inode));
            }
        }
        new
    }

    /// Call when the tree is empty. Files that somebody else maps by now stay.
    pub fn remove_owned(&mut self) {
        if let Self::Noted(notes) = self {
            remove(std::mem::take(&mut notes.owned));
        }
    }
}

fn watch_dir() -> Result<Inotify, Errno> {
    let appeared = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    appeared.add_watch(SHM, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)?;
    Ok(appeared)
}

/// Removes files of a dead tree, unless somebody else maps them by now.
pub fn remove(owned: BTreeMap<PathBuf, u64>) {
    if owned.is_empty() {
        return;
    }
    let mut mapped = vec![];
    for process in processes::all() {
        let files = mapped_by(process.pid).into_iter();
        mapped.extend(files.map(|(path, inode)| (process.pid, path, inode)));
    }
    for (path, inode) in owned {
        let Ok(file) = fs::symlink_metadata(&path) else {
            continue;
        };
        let ours = file.is_file() && file.ino() == inode && file.uid() == geteuid().as_raw();
        let in_use = mapped.iter().any(|(pid, path, other)| {
            *other == inode && !is_on_another_device(*pid, path, file.dev())
        });
        if ours && !in_use {
            let _ = fs::remove_file(&path);
        }
    }
}

/// A private /dev/shm counts its inodes from one again, so their numbers meet those of the machine's.
fn is_on_another_device(pid: Pid, path: &Path, device: u64) -> bool {
    let path = format!("/proc/{pid}/root{}", path.display());
    fs::symlink_metadata(path).is_ok_and(|file| file.dev() != device)
}

fn isolate() -> Result<(), Errno> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Slave, not private: what the host unmounts must not stay busy in here.
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, slave, None::<&str>)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), SHM, Some("tmpfs"), flags, Some("mode=1777"))
}

/// Files in /dev/shm that a process maps, and their inodes.
pub fn mapped_by(pid: Pid) -> Vec<(PathBuf, u64)> {
    let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    String::from_utf8_lossy(&maps)
        .lines()
        .filter_map(parse_mapping)
        .collect()
}

/// `address perms offset dev inode   /dev/shm/name`
fn parse_mapping(line: &str) -> Option<(PathBuf, u64)> {
    let start = line.find("/dev/shm/")?;
    let (fields, path) = line.split_at_checked(start)?;
    if path.ends_with(" (deleted)") {
        return None;
    }
    let inode = fields.split_ascii_whitespace().nth(4)?.parse().ok()?;
    Some((Path::new(path).to_owned(), inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_parsed_and_deleted_files_skipped() {
        let line = "7f00-7f10 rw-s 00000000 00:1a 4711           /dev/shm/psm_1 x";
        let parsed = parse_mapping(line).unwrap();
        assert_eq!(parsed, (PathBuf::from("/dev/shm/psm_1 x"), 4711));
        assert_eq!(parse_mapping(&format!("{line} (deleted)")), None);
        assert_eq!(
            parse_mapping("7f00-7f10 r--p 0 00:1a 12 /usr/lib/libc.so"),
            None
        );
    }
}
