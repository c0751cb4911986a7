//! The guard alone, spoken to as the supervisor does: whatever its tree does, nothing is left.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod supervise_common;

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use supervise_common::guard::Guard;
use supervise_common::{LIMIT, alive, eventually};

const SLEEP: &str = "import time; time.sleep(600)";
const CHILD: &str = "import subprocess, sys, time\n\
    again = [sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]]\n";

fn with_child(rest: &str) -> String {
    format!("{CHILD}{rest}\ntime.sleep(600)")
}

#[test]
fn the_leader_exits_and_its_setsid_grandchild_dies_with_it() {
    let script = format!(
        "{CHILD}child = subprocess.Popen(again, start_new_session=True)\n\
         sys.stdin.read(); time.sleep(0.5); sys.exit(7)"
    );
    let mut guard = Guard::start(&script);
    let leader = guard.spawned();
    assert_eq!(guard.line(), format!("exited {leader} code 7"));
    guard.assert_gone();
}

#[test]
fn a_double_forked_daemon_is_found() {
    let daemon = "import os\n\
        if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        subprocess.run(again)\n    os._exit(0)";
    let mut guard = Guard::start(&with_child(daemon));
    guard.spawned();
    // Guard, leader, the daemon and its child; what was between has exited.
    guard.wait_for(4);
    guard.send("kill\n");
    let line = guard.line();
    assert!(line.ends_with("signal 9"), "{line}");
    guard.assert_gone();
}

#[test]
fn a_leader_that_is_killed_is_seen_at_once() {
    let mut guard = Guard::start(&with_child("subprocess.Popen(again)"));
    let leader = guard.spawned();
    guard.wait_for(3);
    let killed = Instant::now();
    kill(leader, Signal::SIGKILL).unwrap();
    assert_eq!(guard.line(), format!("exited {leader} signal 9"));
    assert!(killed.elapsed() < Duration::from_secs(2));
    guard.assert_gone();
}

#[test]
fn term_goes_to_the_leader_only_and_kill_follows_the_grace() {
    let dir = tempfile::tempdir().unwrap();
    let (ready, termed) = (dir.path().join("ready"), dir.path().join("termed"));
    let child = dir.path().join("child.py");
    let text = format!(
        "import signal, time\n\
         signal.signal(15, lambda *_: open({termed:?}, 'w'))\n\
         open({ready:?}, 'w')\n\
         while True: time.sleep(1)"
    );
    std::fs::write(&child, text).unwrap();
    let script = with_child(&format!(
        "import signal\n\
         signal.signal(15, signal.SIG_IGN)\n\
         subprocess.Popen([sys.executable, {child:?}, sys.argv[1]])"
    ));
    let mut guard = Guard::start(&script);
    guard.spawned();
    eventually("the child's handler is installed", || ready.exists());
    let started = Instant::now();
    guard.send("stop 700\n");
    let line = guard.line();
    assert!(line.ends_with("signal 9"), "{line}");
    assert!(started.elapsed() >= Duration::from_millis(700));
    guard.assert_gone();
    assert!(!termed.exists());
}

#[test]
fn a_leader_that_heeds_term_is_not_killed() {
    let script = "import signal, sys, time\n\
        signal.signal(15, lambda *_: sys.exit(3))\n\
        print('ready', file=open(sys.argv[1], 'w'))\ntime.sleep(600)";
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    let script = script.replace("sys.argv[1]", &format!("{:?}", ready.to_str().unwrap()));
    let mut guard = Guard::start(&script);
    let leader = guard.spawned();
    eventually("the handler is installed", || ready.exists());
    guard.send("stop 20000\n");
    assert_eq!(guard.line(), format!("exited {leader} code 3"));
    guard.assert_gone();
}

#[test]
fn stopped_processes_die_too() {
    let mut guard = Guard::start(&with_child("subprocess.Popen(again)"));
    let leader = guard.spawned();
    guard.wait_for(3);
    kill(leader, Signal::SIGSTOP).unwrap();
    let state = format!("/proc/{leader}/stat");
    eventually("the leader is stopped", || {
        std::fs::read_to_string(&state).unwrap().contains(") T ")
    });
    guard.send("stop 200\n");
    let line = guard.line();
    assert!(line.ends_with("signal 9"), "{line}");
    guard.assert_gone();
}

/// A leader that dies while a child of its is stopped.
#[test]
fn a_stopped_child_dies_with_its_leader() {
    let mut guard = Guard::start(&with_child(
        "import os, signal\nos.kill(subprocess.Popen(again).pid, signal.SIGSTOP)",
    ));
    let leader = guard.spawned();
    guard.wait_for(3);
    kill(leader, Signal::SIGKILL).unwrap();
    assert_eq!(guard.line(), format!("exited {leader} signal 9"));
    guard.assert_gone();
}

/// Orphans that end are reaped at once; children that their parent does not wait for, with it.
#[test]
fn a_storm_of_zombies_leaves_none() {
    let storm = "import os\n\
        for turn in range(300):\n    if os.fork() == 0:\n        os._exit(0)\n\
        for turn in range(300):\n    if os.fork() == 0:\n        os.fork()\n        os._exit(0)\n\
        subprocess.Popen(again)";
    let mut guard = Guard::start(&with_child(storm));
    let leader = guard.spawned();
    guard.wait_for(3);
    let zombies = |parent: i32| {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let stats =
            entries.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
        let state = format!(") Z {parent} ");
        stats.filter(|stat| stat.contains(&state)).count()
    };
    let own = i32::try_from(guard.process.id()).unwrap();
    eventually("the leader has its zombies", || {
        zombies(leader.as_raw()) == 600
    });
    eventually("the guard has reaped the orphans", || zombies(own) == 0);
    guard.send("kill\n");
    assert!(guard.line().ends_with("signal 9"));
    guard.assert_gone();
    assert_eq!(zombies(own) + zombies(leader.as_raw()), 0);
}

#[test]
fn the_whole_tree_stays_on_its_cores() {
    let script = with_child("subprocess.Popen(again, start_new_session=True)");
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let core = (0..CpuSet::count())
        .rev()
        .find(|&core| allowed.is_set(core).unwrap())
        .unwrap();
    let mut guard = Guard::start_with(&script, &["--cpus", &core.to_string()]);
    guard.spawned();
    guard.wait_for(3);
    let mut expected = CpuSet::new();
    expected.set(core).unwrap();
    let mut seen = 0;
    for pid in alive(&guard.marker) {
        match sched_getaffinity(Pid::from_raw(pid)) {
            // One that only started another one, and has ended since.
            Err(Errno::ESRCH) => continue,
            allowed => assert_eq!(allowed.unwrap(), expected, "process {pid}"),
        }
        seen += 1;
    }
    assert!(seen >= 2, "the tree is more than {seen} processes");
    guard.send("kill\n");
    assert!(guard.line().ends_with("signal 9"));
    guard.assert_gone();
}

/// How the memory of each process of the tree is placed: the second word of its numa_maps.
fn memory_policies(marker: &str) -> Vec<String> {
    let policy = |pid| match std::fs::read_to_string(format!("/proc/{pid}/numa_maps")) {
        Ok(maps) => Some(maps.split_whitespace().nth(1)?.to_owned()),
        // One that only started another one, and has ended since.
        Err(_) if !Path::new(&format!("/proc/{pid}")).exists() => None,
        Err(error) => panic!("process {pid}: {error}"),
    };
    alive(marker).into_iter().filter_map(policy).collect()
}

#[test]
fn the_whole_tree_takes_memory_from_its_numa_node_first() {
    let script = with_child("subprocess.Popen(again, start_new_session=True)");
    let mut guard = Guard::start_with(&script, &["--numa", "0"]);
    guard.spawned();
    guard.wait_for(3);
    let policies = memory_policies(&guard.marker);
    assert!(policies.len() >= 2, "{policies:?}");
    assert!(
        policies.iter().all(|policy| policy == "prefer:0"),
        "{policies:?}"
    );
    guard.send("kill\n");
    assert!(guard.line().ends_with("signal 9"));
    guard.assert_gone();
}

/// Slower memory is no reason not to start.
#[test]
fn a_numa_node_that_is_not_there_does_not_prevent_the_start() {
    for nodes in ["900", "5000"] {
        let mut guard = Guard::start_with("import time; time.sleep(60)", &["--numa", nodes]);
        guard.spawned();
        guard.wait_for(2);
        let policies = memory_policies(&guard.marker);
        assert!(
            policies.iter().all(|policy| policy == "default"),
            "{policies:?}"
        );
        guard.send("kill\n");
        assert!(guard.line().ends_with("signal 9"));
        guard.assert_gone();
    }
}

#[test]
fn cores_that_are_not_there_are_reported() {
    let mut guard = Guard::start_with("pass", &["--cpus", "1000"]);
    let line = guard.line();
    assert!(
        line.starts_with("failed ") && line.contains("1000"),
        "{line}"
    );
    assert_eq!(guard.line(), "empty");
}

#[test]
fn a_program_that_is_not_there_is_reported() {
    let run_dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    let mut process = Command::new(env!("CARGO_BIN_EXE_pegaflow"))
        .args(["__guard", "--node", "n", "--run-dir"])
        .arg(run_dir.path())
        .args(["--", "no-such-program-anywhere"])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(ours).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("failed "));
    assert_eq!(lines.next().unwrap().unwrap(), "empty");
    process.wait().unwrap();
}

#[test]
fn when_pegaflow_dies_the_tree_and_the_run_directory_go_within_five_seconds() {
    let script = with_child(
        "import signal\nsignal.signal(15, signal.SIG_IGN)\n\
         subprocess.Popen(again, start_new_session=True)",
    );
    let mut guard = Guard::start(&script);
    guard.spawned();
    guard.wait_for(3);
    let Guard {
        mut process,
        socket,
        marker,
        run_dir,
    } = guard;
    let died = Instant::now();
    drop(socket);
    assert!(process.wait().unwrap().success());
    assert!(
        died.elapsed() < Duration::from_secs(5),
        "{:?}",
        died.elapsed()
    );
    assert_eq!(alive(&marker), Vec::<i32>::new());
    assert!(!run_dir.path().exists());
}

#[test]
fn a_new_owner_keeps_the_run_directory() {
    let mut guard = Guard::start(SLEEP);
    guard.spawned();
    let lock = std::fs::File::open(guard.run_dir.path().join("lock")).unwrap();
    lock.try_lock().unwrap();
    let Guard {
        mut process,
        socket,
        run_dir,
        ..
    } = guard;
    drop(socket);
    process.wait().unwrap();
    assert!(run_dir.path().join("engine.sock").exists());
}

#[test]
fn the_leader_dies_with_its_guard() {
    let mut guard = Guard::start(SLEEP);
    guard.spawned();
    guard.wait_for(2);
    guard.process.kill().unwrap();
    guard.process.wait().unwrap();
    let marker = guard.marker.clone();
    eventually("the leader is gone", || alive(&marker).is_empty());
}
