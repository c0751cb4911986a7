//! What `/proc` knows about processes and their parents.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;

use nix::unistd::{Pid, SysconfVar, sysconf};

/// One line of `/proc/<pid>/stat`, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub pid: Pid,
    pub parent: Pid,
    pub session: Pid,
    pub zombie: bool,
}

/// Every process that can be seen now.
pub fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(read)
        .collect()
}

/// Neither gone nor a zombie.
pub fn is_alive(pid: i32) -> bool {
    read(pid).is_some_and(|process| !process.zombie)
}

fn read(pid: i32) -> Option<Process> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse(pid, &String::from_utf8_lossy(&stat))
}

/// The name in parentheses may hold anything, parentheses included: fields count from the last.
fn parse(pid: i32, stat: &str) -> Option<Process> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let _group = fields.next()?;
    let session = fields.next()?.parse().ok()?;
    Some(Process {
        pid: Pid::from_raw(pid),
        parent: Pid::from_raw(parent),
        session: Pid::from_raw(session),
        zombie: matches!(state, "Z" | "X"),
    })
}

/// Bytes of memory that everything below `root` has, shared pages once for each.
pub fn memory_below(root: Pid) -> u64 {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    let page = page
        .and_then(|size| u64::try_from(size).ok())
        .unwrap_or(4096);
    let pages = descendants(root).into_iter().filter_map(|pid| {
        let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
        statm.split(' ').nth(1)?.parse::<u64>().ok()
    });
    pages.sum::<u64>().saturating_mul(page)
}

/// Everything below `root`, without it.
pub fn descendants(root: Pid) -> Vec<Pid> {
    below(&all(), [root])
}

/// Everything below `roots` in `processes`, without them.
pub fn below(processes: &[Process], roots: impl IntoIterator<Item = Pid>) -> Vec<Pid> {
    let mut children: BTreeMap<Pid, Vec<Pid>> = BTreeMap::new();
    for process in processes {
        children
            .entry(process.parent)
            .or_default()
            .push(process.pid);
    }
    let mut found = BTreeSet::new();
    let mut open: Vec<Pid> = roots.into_iter().collect();
    while let Some(parent) = open.pop() {
        for child in children.get(&parent).into_iter().flatten() {
            // A listing is no snapshot: a pid may be seen twice, under two parents.
            if found.insert(*child) {
                open.push(*child);
            }
        }
    }
    found.into_iter().collect()
}

/// Whether a process below `root` is the one that listens at `addr`. `None`: it cannot be told.
pub fn listens_below(root: Pid, addr: SocketAddr) -> Option<bool> {
    let table = fs::read_to_string("/proc/net/tcp").ok()?;
    let sockets = listening(&table, addr.port());
    if sockets.is_empty() {
        return None;
    }
    let mut known = true;
    for pid in descendants(root) {
        match fs::read_dir(format!("/proc/{pid}/fd")) {
            Ok(entries) => {
                let mut targets = entries
                    .flatten()
                    .filter_map(|entry| fs::read_link(entry.path()).ok());
                if targets.any(|target| {
                    sockets
                        .iter()
                        .any(|socket| target.as_os_str() == socket.as_str())
                }) {
                    return Some(true);
                }
            }
            // It may have ended meanwhile, or be another user's.
            Err(_) => known = false,
        }
    }
    known.then_some(false)
}

/// The listening sockets of a port in `/proc/net/tcp`, as links in `/proc/<pid>/fd` name them.
fn listening(table: &str, port: u16) -> Vec<String> {
    let port = format!(":{port:04X}");
    let rows = table.lines().skip(1).filter_map(|row| {
        let mut fields = row.split_ascii_whitespace();
        let local = fields.nth(1)?;
        let state = fields.nth(1)?;
        let inode = fields.nth(5)?;
        (local.ends_with(&port) && state == "0A").then(|| format!("socket:[{inode}]"))
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, parent: i32) -> Process {
        Process {
            pid: Pid::from_raw(pid),
            parent: Pid::from_raw(parent),
            session: Pid::from_raw(1),
            zombie: false,
        }
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let parsed = parse(7, "7 (a) Z 9 (b)) S 3 4 5 0 -1").unwrap();
        assert_eq!(parsed.parent, Pid::from_raw(3));
        assert_eq!(parsed.session, Pid::from_raw(5));
        assert!(!parsed.zombie);
        assert!(parse(7, "7 (x) Z 1 1 1 0").unwrap().zombie);
        assert_eq!(parse(7, "7 (x"), None);
    }

    #[test]
    fn listeners_are_found_by_port_and_state() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:2710 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0
   1: 0100007F:2710 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 20
   2: 0100007F:2711 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0 100 0";
        assert_eq!(listening(table, 10_000), ["socket:[4711]"]);
        assert!(listening(table, 80).is_empty());
    }

    #[test]
    fn descendants_are_found_at_any_depth_and_loops_end() {
        let list = [
            process(2, 1),
            process(3, 2),
            process(4, 3),
            process(5, 1),
            process(6, 7),
            process(7, 6),
        ];
        let found = below(&list, [Pid::from_raw(2)]);
        assert_eq!(found, [Pid::from_raw(3), Pid::from_raw(4)]);
        assert_eq!(below(&list, [Pid::from_raw(6)]).len(), 2);
    }
}
