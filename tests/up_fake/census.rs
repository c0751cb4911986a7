//! What a running fleet holds of the machine, counted: processes, threads, descriptors, shared memory,
//! ports, files, and what the store and the router say they hold themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::support::client::metric;
use crate::support::{Pegaflow, processes};

/// Connections to nodes that pegaflow may keep between two probes; how many it has at a moment depends
/// on which of its calls to a node were under way together. They are the supervisor's: the router's
/// are closed after seconds.
const IDLE_CONNECTIONS: u64 = 2 * 2;
const CONNECTIONS: &str = "fd: tcp connection";

const SESSIONS: &str = "store: sessions";
const ORPHANS: &str = "processes: orphans";
const ZOMBIES: &str = "processes: zombies";

const GAUGES: [(&str, &str); 9] = [
    (SESSIONS, "pegaflow_engine_sessions{"),
    ("store: slots pending", "pegaflow_engine_slots_pending "),
    ("store: slots leased", "pegaflow_engine_slots_leased "),
    (
        "store: slots quarantined",
        "pegaflow_engine_slots_quarantined ",
    ),
    ("store: slots reserved", "pegaflow_engine_slots_reserved "),
    ("store: slots damaged", "pegaflow_engine_slots_damaged "),
    ("store: hand-offs open", "pegaflow_engine_handoffs_open "),
    ("router: in flight", "pegaflow_router_in_flight "),
    ("router: queued", "pegaflow_router_queued "),
];

/// Figures by name. One that is zero may be missing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census(BTreeMap<String, u64>);

impl Census {
    pub async fn take(up: &Pegaflow<'_>) -> Self {
        let mut census = Self::default();
        let tree = processes::tree(up.pid());
        census.processes(up, &tree);
        census.descriptors(up.pid());
        census.memory(up, &tree);
        census.add("ports: listening", listening(&tree).len());
        census.add("files: logs", files(&up.site.path("state")));
        census.add("files: run directory", files(&up.site.path("run")));
        let metrics = up.get("/metrics").await;
        for (name, gauge) in GAUGES {
            assert!(metrics.contains(gauge), "{gauge} is missing");
            census.add(name, metric(&metrics, gauge) as usize);
        }
        census
    }

    /// What there is more of now than in `baseline`.
    pub fn grown_since(&self, baseline: &Self) -> Vec<String> {
        let allowed = |name: &str| match name {
            CONNECTIONS => baseline.get(name).max(IDLE_CONNECTIONS),
            _ => baseline.get(name),
        };
        let grown = self.0.iter().filter(|(name, now)| **now > allowed(name));
        grown
            .map(|(name, now)| format!("{name}: {} -> {now}", baseline.get(name)))
            .collect()
    }

    /// A table of both.
    pub fn beside(&self, baseline: &Self) -> String {
        let names: BTreeSet<&String> = self.0.keys().chain(baseline.0.keys()).collect();
        let rows = names
            .iter()
            .map(|name| format!("{name:<28} {:>9} {:>9}", baseline.get(name), self.get(name)));
        rows.collect::<Vec<_>>().join("\n")
    }

    /// What is held although nobody wants anything: at rest there is none of it.
    pub fn held(&self) -> Vec<String> {
        let gauges = GAUGES.iter().map(|(name, _)| *name);
        let names = gauges.chain([ORPHANS, ZOMBIES]);
        let held = names.filter(|name| *name != SESSIONS && self.get(name) > 0);
        held.map(|name| format!("{name}: {}", self.get(name)))
            .collect()
    }

    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    fn add(&mut self, name: &str, count: usize) {
        *self.0.entry(name.to_owned()).or_default() += count as u64;
    }

    fn processes(&mut self, up: &Pegaflow<'_>, tree: &BTreeSet<u32>) {
        let marked = up.site.processes();
        self.add("processes: tree", tree.len());
        self.add(ORPHANS, marked.difference(tree).count());
        let zombies = tree.iter().map(|pid| processes::zombies(*pid).len());
        self.add(ZOMBIES, zombies.sum());
        self.add("threads", status(up.pid(), "Threads:") as usize);
    }

    fn descriptors(&mut self, pid: u32) {
        let sockets = sockets();
        for (target, _) in open_files(pid) {
            let kind = match target.split_once(":[") {
                Some(("socket", inode)) => sockets
                    .get(inode.trim_end_matches(']'))
                    .copied()
                    .unwrap_or("other socket"),
                Some(("anon_inode", kind)) => kind.trim_end_matches(']'),
                Some((kind, _)) => kind,
                None if target.starts_with("/memfd:") => "memfd",
                None => "file",
            };
            self.add(&format!("fd: {kind}"), 1);
        }
    }

    /// Shared memory: of each /dev/shm that some process of the tree sees, and without a name.
    fn memory(&mut self, up: &Pegaflow<'_>, tree: &BTreeSet<u32>) {
        let own = fs::read_link("/proc/self/ns/mnt").unwrap();
        let mut spaces = BTreeMap::new();
        for pid in tree {
            if let Ok(space) = fs::read_link(format!("/proc/{pid}/ns/mnt")) {
                spaces.entry(space).or_insert(*pid);
            }
        }
        spaces.remove(&own);
        self.add("shm: namespaces", spaces.len());
        let private = spaces.values().flat_map(|pid| {
            let dir = format!("/proc/{pid}/root/dev/shm");
            fs::read_dir(dir).into_iter().flatten().flatten()
        });
        let mut sizes: Vec<u64> = private
            .filter_map(|entry| Some(entry.metadata().ok()?.len()))
            .collect();
        // The machine's own is shared with strangers: only what fakes of this site have made counts.
        let shared = up.site.shm();
        sizes.extend(shared.iter().filter_map(|name| {
            let file = fs::metadata(Path::new("/dev/shm").join(name)).ok()?;
            Some(file.len())
        }));
        self.add("shm: files", sizes.len());
        self.add("shm: KiB", sizes.iter().sum::<u64>() as usize / 1024);
        let memfds: BTreeSet<u64> = tree.iter().flat_map(|pid| memfds(*pid)).collect();
        self.add("shm: memfds", memfds.len());
    }
}

/// Memory of one process in KiB.
#[derive(Debug, Clone, Copy)]
pub struct Resident {
    pub all: u64,
    /// Without files and shared memory.
    pub own: u64,
}

impl Resident {
    pub fn of(pid: u32) -> Self {
        Self {
            all: status(pid, "VmRSS:"),
            own: status(pid, "RssAnon:"),
        }
    }
}

fn status(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let number = line.unwrap().split_whitespace().next();
    number.unwrap().parse().unwrap()
}

/// What the descriptors of a process point to, and their inodes.
fn open_files(pid: u32) -> Vec<(String, u64)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    let paths = entries.flatten().map(|entry| entry.path());
    // Some are closed meanwhile.
    paths
        .filter_map(|path| {
            let target = fs::read_link(&path).ok()?;
            let inode = fs::metadata(&path).map_or(0, |file| file.ino());
            Some((target.to_string_lossy().into_owned(), inode))
        })
        .collect()
}

fn memfds(pid: u32) -> Vec<u64> {
    let open = open_files(pid).into_iter();
    let open = open.filter_map(|(target, inode)| target.starts_with("/memfd:").then_some(inode));
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mapped = maps.lines().filter(|line| line.contains(" /memfd:"));
    let mapped = mapped.filter_map(|line| line.split_whitespace().nth(4)?.parse().ok());
    open.chain(mapped).collect()
}

/// Every socket of this network namespace by inode, with its kind.
fn sockets() -> BTreeMap<String, &'static str> {
    let mut found = BTreeMap::new();
    for table in ["tcp", "tcp6"] {
        for (inode, state) in tcp(table) {
            let kind = match state.as_str() {
                "0A" => "tcp listener",
                "08" => "tcp that the peer has closed",
                _ => CONNECTIONS.trim_start_matches("fd: "),
            };
            found.insert(inode, kind);
        }
    }
    let unix = fs::read_to_string("/proc/net/unix").unwrap();
    for line in unix.lines().skip(1) {
        if let Some(inode) = line.split_whitespace().nth(6) {
            found.insert(inode.to_owned(), "unix socket");
        }
    }
    found
}

/// Inode and state.
fn tcp(table: &str) -> Vec<(String, String)> {
    let text = fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
    let rows = text.lines().skip(1);
    rows.filter_map(|row| {
        let fields: Vec<&str> = row.split_whitespace().collect();
        Some(((*fields.get(9)?).to_owned(), (*fields.get(3)?).to_owned()))
    })
    .collect()
}

/// Listening TCP sockets of these processes.
fn listening(tree: &BTreeSet<u32>) -> BTreeSet<String> {
    let listeners: BTreeSet<String> = ["tcp", "tcp6"]
        .into_iter()
        .flat_map(tcp)
        .filter_map(|(inode, state)| (state == "0A").then_some(inode))
        .collect();
    let open = tree.iter().flat_map(|pid| open_files(*pid));
    let inodes = open.filter_map(|(target, _)| {
        let inode = target.strip_prefix("socket:[")?.strip_suffix(']')?;
        Some(inode.to_owned())
    });
    inodes.filter(|inode| listeners.contains(inode)).collect()
}

fn files(dir: &PathBuf) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(&entry.path()),
            _ => 1,
        })
        .sum()
}
