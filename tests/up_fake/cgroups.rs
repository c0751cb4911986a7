//! Control groups of nodes: as `require` where this machine lets pegaflow make some, and the refusal where not.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::kills::{Victim, pid_of};
use crate::support::client::{Ending, completion, is_proven};
use crate::support::{self, HANG, Pegaflow, Site, processes, send};
use crate::wait_until;

fn require() -> Site {
    let site = Site::new();
    let require = "[supervisor]\ncgroup = \"require\"";
    let topology = support::topology(site.port).replace("[supervisor]", require);
    site.topology(&topology);
    site
}

/// Where groups of version 2 are mounted, if some can be made below this process's own.
fn base() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mount = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    let mount = Path::new(mount.split(' ').nth(1)?);
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let base = mount.join(own);
    // Tests run side by side, in one process or several.
    static TRIALS: AtomicUsize = AtomicUsize::new(0);
    let number = TRIALS.fetch_add(1, Ordering::Relaxed);
    let trial = base.join(format!("test-{}-{number}", std::process::id()));
    let made = fs::create_dir(&trial).is_ok();
    let kills = trial.join("cgroup.kill").exists();
    let _ = fs::remove_dir(&trial);
    (made && kills).then_some(base)
}

/// The groups of this site's nodes.
fn groups(base: &Path, site: &Site) -> Vec<PathBuf> {
    let prefix = format!("pegaflow-test-{}-", site.port);
    let entries = fs::read_dir(base).unwrap().flatten();
    let ours = entries.filter(|entry| entry.file_name().to_str().unwrap().starts_with(&prefix));
    ours.map(|entry| entry.path()).collect()
}

async fn leader(up: &Pegaflow<'_>, node: &str) -> u32 {
    let view = up.wait_for_node(node, is_proven).await;
    u32::try_from(view["pid"].as_u64().unwrap()).unwrap()
}

async fn refused() {
    let site = require();
    let mut up = site.up();
    let status = up.wait(HANG).await;
    assert_eq!(status.code(), Some(4), "{}", up.output());
    let output = up.output();
    assert!(output.contains("cgroup = \"require\": "), "{output}");
    assert!(output.contains("Delegate=yes"), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_life_of_a_node_is_in_its_group_and_the_group_goes_with_the_node() {
    let Some(base) = base() else {
        return refused().await;
    };
    let site = require();
    let up = site.up_ready().await;
    assert_eq!(groups(&base, &site).len(), 2);
    for victim in [Victim::Leader, Victim::Guard] {
        let leader = leader(&up, "decode").await;
        for pid in processes::tree(leader) {
            let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
            let own = group.lines().find(|line| line.starts_with("0::")).unwrap();
            assert!(own.ends_with(".decode"), "{own}");
        }
        let tree = processes::tree(leader);
        site.processes();
        send(pid_of(victim, leader), Signal::SIGKILL);
        let back = |view: &serde_json::Value| {
            is_proven(view) && view["pid"].as_u64() != Some(leader.into())
        };
        up.wait_for_node("decode", back).await;
        assert!(!tree.iter().any(|pid| processes::is_alive(*pid)));
        assert_eq!(groups(&base, &site).len(), 2);
    }
    up.stop().await;
    assert_eq!(groups(&base, &site), [] as [PathBuf; 0]);
}

/// Nobody is left to remove the groups then; the next `up` does.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_when_guards_and_pegaflow_are_killed_together_ends_with_the_next_up() {
    let Some(base) = base() else {
        return refused().await;
    };
    let site = require();
    let mut up = site.up_ready().await;
    let mut victims = vec![up.pid()];
    for node in ["prefill", "decode"] {
        victims.push(pid_of(Victim::Guard, leader(&up, node).await));
    }
    let old = site.processes();
    // None of them sees another one die.
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        victims.iter().for_each(|pid| send(*pid, signal));
    }
    up.wait(HANG).await;
    let gone = async || victims.iter().all(|pid| !processes::is_alive(*pid));
    wait_until(gone, "pegaflow and its guards are gone").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let left = old.iter().filter(|pid| processes::is_alive(**pid)).count();
    assert!(
        left >= 2,
        "{left} processes are left; the test is about them"
    );

    let again = site.up_ready().await;
    assert_eq!(groups(&base, &site).len(), 2);
    let alive = old.iter().filter(|pid| processes::is_alive(**pid));
    let alive: Vec<_> = alive.map(|pid| processes::describe(*pid)).collect();
    assert_eq!(alive, [] as [String; 0]);
    let answer = again.generate(&completion(1, 100, 4)).await;
    assert_eq!(answer.ending, Ending::Complete);
    again.stop().await;
    assert_eq!(groups(&base, &site), [] as [PathBuf; 0]);
}
