//! How many processes the kernel has killed for want of memory, as far as that can be seen from here.
//!
//! ```text
//! cgroup v2: memory.events of our own group ─┐
//! cgroup v1: memory.oom_control              ├─ the first that has a line `oom_kill N`
//! the whole machine: /proc/vmstat            ┘
//! ```
//!
//! None of them names the victim, so a count that has just risen while a node died is what there is
//! to know; a death long after is none of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// From the kill of an engine to its API server's own end.
const RECENT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct OomWatch {
    file: Option<PathBuf>,
    count: u64,
    rose: Option<Instant>,
}

impl OomWatch {
    /// `root`: where `/proc` and `/sys` are, for tests.
    pub fn new(root: &Path) -> Self {
        let file = candidates(root)
            .into_iter()
            .find(|file| count(file).is_some());
        let count = file.as_deref().and_then(count).unwrap_or(0);
        Self {
            file,
            count,
            rose: None,
        }
    }

    /// Call now and then.
    pub fn observe(&mut self, now: Instant) {
        let Some(count) = self.file.as_deref().and_then(count) else {
            return;
        };
        if count > self.count {
            self.rose = Some(now);
        }
        self.count = count;
    }

    /// The kernel has just killed somebody.
    pub fn is_recent(&mut self, now: Instant) -> bool {
        self.observe(now);
        self.rose
            .is_some_and(|rose| now.saturating_duration_since(rose) < RECENT)
    }
}

fn candidates(root: &Path) -> Vec<PathBuf> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let sys = root.join("sys/fs/cgroup");
    let mut found = vec![];
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (mount, name) = match controllers {
            "" => (sys.clone(), "memory.events"),
            "memory" => (sys.join("memory"), "memory.oom_control"),
            _ => continue,
        };
        // In a container the path is the host's, and the mount is the group itself.
        found.push(mount.join(path.trim_start_matches('/')).join(name));
        found.push(mount.join(name));
    }
    found.push(root.join("proc/vmstat"));
    found
}

fn count(file: &Path) -> Option<u64> {
    fs::read_to_string(file)
        .ok()?
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn a_count_that_rose_is_recent_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(root, "proc/self/cgroup", "0::/a/b\n");
        write(root, "proc/vmstat", "oom_kill 100\n");
        let events = "sys/fs/cgroup/a/b/memory.events";
        write(root, events, "oom 4\noom_kill 3\noom_group_kill 0\n");
        let mut watch = OomWatch::new(root);
        let now = Instant::now();
        assert!(!watch.is_recent(now), "it was there before");
        write(root, events, "oom 5\noom_kill 4\n");
        assert!(watch.is_recent(now));
        assert!(watch.is_recent(now + RECENT / 2));
        assert!(!watch.is_recent(now + RECENT));
    }

    #[test]
    fn the_nearest_count_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert_eq!(OomWatch::new(root).file, None);
        write(root, "proc/vmstat", "nr_free 1\noom_kill 7\n");
        assert_eq!(OomWatch::new(root).count, 7);
        write(root, "proc/self/cgroup", "4:memory:/host/path\n0::/\n");
        write(
            root,
            "sys/fs/cgroup/memory/memory.oom_control",
            "under_oom 0\noom_kill 2\n",
        );
        assert_eq!(OomWatch::new(root).count, 2);
    }
}
