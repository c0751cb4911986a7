//! Processes and shared memory, as `/proc` and `/dev/shm` show them.

use std::collections::BTreeSet;
use std::fs;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

/// All processes with `entry` in their environment. Zombies have none.
pub fn with_environment(entry: &str) -> BTreeSet<u32> {
    all()
        .filter(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|byte| *byte == 0)
                .any(|item| item == entry.as_bytes())
        })
        .collect()
}

/// A variable of a process's environment.
pub fn variable(pid: u32, name: &str) -> Option<String> {
    let environment = fs::read_to_string(format!("/proc/{pid}/environ")).ok()?;
    let mut items = environment.split('\0');
    items.find_map(|item| Some(item.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
}

fn all() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The parent, while the process lives.
pub fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// Living children, zombies excluded.
pub fn children(pid: u32) -> Vec<u32> {
    all()
        .filter(|child| parent(*child) == Some(pid) && is_alive(*child))
        .collect()
}

/// Dead children that nobody has waited for.
pub fn zombies(pid: u32) -> Vec<u32> {
    all()
        .filter(|child| parent(*child) == Some(pid) && !is_alive(*child))
        .collect()
}

/// The process and everything below it.
pub fn tree(pid: u32) -> BTreeSet<u32> {
    let mut found = BTreeSet::from([pid]);
    let mut open = vec![pid];
    while let Some(next) = open.pop() {
        let fresh: Vec<u32> = children(next)
            .into_iter()
            .filter(|child| found.insert(*child))
            .collect();
        open.extend(fresh);
    }
    found
}

/// Exists and is not a zombie.
pub fn is_alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().next());
    state.is_some_and(|state| state != "Z" && state != "X")
}

/// For messages.
pub fn describe(pid: u32) -> String {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    format!("{pid} (parent {:?}): {command}", parent(pid))
}

/// When the first of these tests began; less a second, since files have a coarse clock.
static BEGUN: LazyLock<SystemTime> = LazyLock::new(|| SystemTime::now() - Duration::from_secs(1));

/// Before the first fake is started.
pub fn begin() {
    LazyLock::force(&BEGUN);
}

/// Shared-memory files that fakes with these pids have made. Pids are used again: what was there before these tests
/// is of others.
pub fn shm_of(pids: &BTreeSet<u32>) -> Vec<String> {
    let entries = fs::read_dir("/dev/shm").unwrap().flatten();
    let made = |entry: &fs::DirEntry| entry.metadata()?.modified();
    let entries = entries.filter(|entry| made(entry).is_ok_and(|made| made >= *BEGUN));
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter(|name| {
            let rest = name
                .strip_prefix("psm_fake_")
                .or_else(|| name.strip_prefix("vllm_dist_fake_"));
            let pid = rest.and_then(|rest| rest.split('-').next()?.parse().ok());
            pid.is_some_and(|pid: u32| pids.contains(&pid))
        })
        .collect()
}
