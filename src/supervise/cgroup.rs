//! A control group (version 2) for each node, where pegaflow may make some.
//!
//! ```text
//! <own group>/pegaflow-<name>-<hash of the run directory>.<node>     leader and all below it
//! ```
//!
//! With it the kernel ends a tree at one stroke (`cgroup.kill`), also one that forks faster than it can
//! be listed. Without it the guard kills what it finds below itself, until nothing is left.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::geteuid;
use sha2::{Digest, Sha256};

use crate::fleet::NodeId;
use crate::topology::CgroupRequest;

/// What the dead of an earlier run may take to go.
const LEFTOVERS: Duration = Duration::from_secs(5);
const ROUND: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
#[error(
    "[supervisor] cgroup = \"require\": {why}; a systemd unit needs Delegate=yes and a User=, a container a \
     writable /sys/fs/cgroup; or write cgroup = \"auto\""
)]
pub struct CgroupError {
    why: String,
}

/// Where an instance's groups are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups {
    base: PathBuf,
    prefix: String,
}

impl Groups {
    /// `None`: not wanted, or (with `auto`) not possible here.
    pub fn find(
        request: CgroupRequest,
        name: &str,
        run_dir: &Path,
    ) -> Result<Option<Self>, CgroupError> {
        if request == CgroupRequest::Off {
            return Ok(None);
        }
        let digest = Sha256::digest(run_dir.as_os_str().as_bytes());
        let hash: String = digest
            .iter()
            .take(4)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let found = own_group().and_then(|base| {
            let prefix = format!("pegaflow-{name}-{hash}.");
            let groups = Self { base, prefix };
            groups.try_out(request).map(|()| groups)
        });
        match (found, request) {
            (Ok(groups), _) => Ok(Some(groups)),
            (Err(why), CgroupRequest::Require) => Err(CgroupError { why }),
            (Err(why), _) => {
                tracing::debug!("nodes have no control groups of their own: {why}");
                Ok(None)
            }
        }
    }

    pub fn of(&self, node: &NodeId) -> Group {
        Group::at(self.base.join(format!("{}{node}", self.prefix)))
    }

    /// Removes the groups that an earlier run of this instance has left, with whatever is still in them.
    pub async fn end_leftovers(&self) {
        for group in self.existing() {
            let dir = group.0.display();
            if !group.emptied(LEFTOVERS).await {
                tracing::warn!("processes in {dir} survive being killed");
            }
            group.remove();
        }
    }

    fn existing(&self) -> Vec<Group> {
        let entries = fs::read_dir(&self.base).into_iter().flatten().flatten();
        let ours = entries.filter(|entry| {
            let name = entry.file_name();
            name.as_bytes().starts_with(self.prefix.as_bytes())
        });
        ours.map(|entry| Group::at(entry.path())).collect()
    }

    /// Makes one, and takes it away again.
    fn try_out(&self, request: CgroupRequest) -> Result<(), String> {
        // There root may write everywhere, also where systemd takes the groups for its own.
        let managed = geteuid().is_root() && Path::new("/run/systemd/system").exists();
        if managed && request == CgroupRequest::Auto {
            return Err(
                "this is root under systemd; \"require\" uses them all the same".to_owned(),
            );
        }
        let base = self.base.display();
        let group = Group::at(self.base.join(format!("{}try", self.prefix)));
        // Whoever moves a process needs both ends' parent.
        let tried = open(&self.base.join("cgroup.procs")).and_then(|_| group.make());
        let kind = fs::read_to_string(group.0.join("cgroup.type"));
        let can_kill = group.0.join("cgroup.kill").exists();
        group.remove();
        tried.map_err(|error| format!("cannot make a control group in {base}: {error}"))?;
        if !can_kill {
            return Err("the kernel has no cgroup.kill (it came with Linux 5.14)".to_owned());
        }
        match kind {
            Ok(kind) if kind.trim() == "domain" => Ok(()),
            _ => Err(format!("{base} takes threads, and no processes")),
        }
    }
}

/// One node's group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group(PathBuf);

impl Group {
    pub fn at(dir: PathBuf) -> Self {
        Self(dir)
    }

    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// Where a process writes "0" to join. A group that is there already is used.
    pub fn make(&self) -> io::Result<File> {
        match fs::create_dir(&self.0) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        open(&self.0.join("cgroup.procs"))
    }

    /// Every process in it, and every one that is just being made. Whoever is not there is not killed.
    pub fn kill(&self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
    }

    /// False: some processes survive.
    async fn emptied(&self, limit: Duration) -> bool {
        let rounds = async {
            while self.is_populated() {
                self.kill();
                tokio::time::sleep(ROUND).await;
            }
        };
        tokio::time::timeout(limit, rounds).await.is_ok()
    }

    fn is_populated(&self) -> bool {
        let events = fs::read_to_string(self.0.join("cgroup.events")).unwrap_or_default();
        events.lines().any(|line| line == "populated 1")
    }

    /// An empty one; one that is not stays.
    pub fn remove(&self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn open(procs: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).open(procs)
}

/// The directory of the group that this process is in.
fn own_group() -> Result<PathBuf, String> {
    let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    locate(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?)
}

fn locate(mounts: &str, membership: &str) -> Result<PathBuf, String> {
    let own = membership.lines().find_map(|line| line.strip_prefix("0::"));
    let own = own.ok_or("the kernel has no control groups of version 2")?;
    let own = Path::new(own);
    // `36 25 0:31 /root /mount/point options - cgroup2 ...`
    let mut found = mounts.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        if right.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = left.split(' ').skip(3);
        Some((Path::new(fields.next()?), Path::new(fields.next()?)))
    });
    let (root, point) = found.next().ok_or("no cgroup2 file system is mounted")?;
    match own.strip_prefix(root) {
        Ok(below) if !below.starts_with("..") => Ok(point.join(below)),
        _ => Err(format!(
            "the own group {} is not below what is mounted on {}",
            own.display(),
            point.display()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNT: &str =
        "36 25 0:31 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";

    fn located(mounts: &str, membership: &str) -> Option<String> {
        let dir = locate(mounts, membership).ok()?;
        Some(dir.display().to_string())
    }

    #[test]
    fn the_own_group_is_found_below_its_mount() {
        let mounts = format!("1 0 8:1 / / rw - ext4 /dev/sda1 rw\n{MOUNT}\n");
        let service = "0::/system.slice/pegaflow.service\n";
        assert_eq!(
            located(&mounts, service).as_deref(),
            Some("/sys/fs/cgroup/system.slice/pegaflow.service")
        );
        let both = "4:memory:/x\n0::/\n";
        assert_eq!(located(&mounts, both).as_deref(), Some("/sys/fs/cgroup/"));
        let part = mounts.replace("0:31 / ", "0:31 /docker/7 ");
        assert_eq!(
            located(&part, "0::/docker/7/a\n").as_deref(),
            Some("/sys/fs/cgroup/a")
        );
    }

    #[test]
    fn a_group_that_cannot_be_seen_is_none() {
        assert_eq!(located("", "0::/\n"), None, "not mounted");
        assert_eq!(located(MOUNT, "4:memory:/x\n"), None, "version 1 only");
        assert_eq!(located(MOUNT, "0::/../other\n"), None, "outside");
        let part = MOUNT.replace("0:31 / ", "0:31 /docker/7 ");
        assert_eq!(located(&part, "0::/docker/8\n"), None, "elsewhere");
    }

    #[test]
    fn instances_of_one_name_have_groups_of_their_own() {
        let groups = |prefix: &str| Groups {
            base: "/base".into(),
            prefix: prefix.into(),
        };
        let group = groups("pegaflow-a-01.").of(&"decode".into());
        assert_eq!(group.dir(), Path::new("/base/pegaflow-a-01.decode"));
        let error = Groups::find(CgroupRequest::Off, "a", Path::new("/run/a"));
        assert_eq!(error.unwrap(), None);
    }
}
