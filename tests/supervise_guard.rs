//! The guard alone, spoken to as the supervisor does: whatever its tree does, nothing is left.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod supervise_common;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use supervise_common::{LIMIT, alive, eventually, marker};

struct Guard {
    process: Child,
    socket: BufReader<UnixStream>,
    marker: String,
    run_dir: tempfile::TempDir,
}

impl Guard {
    /// The leader: python, with the marker as `sys.argv[1]`.
    fn start(script: &str) -> Self {
        Self::start_with(script, &["--private-shm"])
    }

    fn start_with(script: &str, flags: &[&str]) -> Self {
        let marker = marker();
        let run_dir = tempfile::tempdir().unwrap();
        std::fs::write(run_dir.path().join("lock"), "").unwrap();
        std::fs::write(run_dir.path().join("engine.sock"), "").unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(LIMIT)).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_pegaflow"))
            .args(["__guard", "--node", "n", "--run-dir"])
            .arg(run_dir.path())
            .args(flags)
            .args(["--", "python3", "-c", script, &marker])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            process,
            socket: BufReader::new(ours),
            marker,
            run_dir,
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.socket.read_line(&mut line).unwrap();
        match line.trim_end().rsplit_once(' ') {
            // The guard's clock is nobody's business here.
            Some((report, _)) if line.starts_with("exited ") => report.to_owned(),
            _ => line.trim_end().to_owned(),
        }
    }

    /// The leader's pid.
    fn spawned(&mut self) -> Pid {
        let line = self.line();
        let pid = line.strip_prefix("spawned ").expect(&line).parse().unwrap();
        Pid::from_raw(pid)
    }

    /// Waits until `count` processes of the tree run, the guard included.
    fn wait_for(&self, count: usize) {
        eventually("the tree is complete", || {
            alive(&self.marker).len() == count
        });
    }

    fn send(&mut self, command: &str) {
        self.socket.get_mut().write_all(command.as_bytes()).unwrap();
    }

    /// Call after `empty`.
    fn assert_gone(mut self) {
        assert_eq!(self.line(), "empty");
        assert!(self.process.wait().unwrap().success());
        assert_eq!(alive(&self.marker), Vec::<i32>::new());
        assert!(self.run_dir.path().join("engine.sock").exists());
    }
}

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
    let policy = |pid| {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/numa_maps")).unwrap();
        maps.split_whitespace()
            .nth(1)
            .unwrap_or_default()
            .to_owned()
    };
    alive(marker).into_iter().map(policy).collect()
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

/// Maps a file in /dev/shm and leaves it there.
const SHM: &str = "import mmap, os, time\n\
    fd = os.open(PATH, os.O_CREAT | os.O_RDWR)\n\
    os.ftruncate(fd, 4096)\n\
    kept = mmap.mmap(fd, 4096)\n\
    open(READY, 'w')\n\
    time.sleep(600)";

/// One whose leader has mapped a file, that file, and the directory that must outlive both.
fn guard_with_shm(flags: &[&str]) -> (Guard, String, tempfile::TempDir) {
    let path = format!("/dev/shm/pegaflow-test-{}", marker());
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    let script = SHM
        .replace("PATH", &format!("{path:?}"))
        .replace("READY", &format!("{:?}", ready.to_str().unwrap()));
    let mut guard = Guard::start_with(&script, flags);
    guard.spawned();
    eventually("the file is mapped", || ready.exists());
    (guard, path, dir)
}

fn shm_is_cleaned(flags: &[&str]) -> bool {
    let (mut guard, path, _dir) = guard_with_shm(flags);
    let shared = Path::new(&path).exists();
    if flags.is_empty() {
        // For whoever outlives the guard.
        let inode = std::fs::metadata(&path).unwrap().ino();
        assert_eq!(guard.line(), format!("shm {inode} {path}"));
    }
    guard.send("kill\n");
    assert!(guard.line().ends_with("signal 9"));
    guard.assert_gone();
    assert!(!Path::new(&path).exists());
    shared
}

#[test]
fn shared_memory_is_removed_by_notes_and_by_a_private_mount() {
    assert!(shm_is_cleaned(&[]));
    // Private where the kernel allows it; clean either way.
    shm_is_cleaned(&["--private-shm"]);
}

/// Three short lives in a row, none of them as long as the guard's own rounds.
#[test]
fn shared_memory_of_a_short_life_is_removed() {
    let path = format!("/dev/shm/pegaflow-test-{}", marker());
    let script = "import mmap, os, time\n\
        for life in range(3):\n\
        \x20   if os.fork() == 0:\n\
        \x20       fd = os.open(f'{PATH}{life}', os.O_CREAT | os.O_RDWR)\n\
        \x20       os.ftruncate(fd, 4096)\n\
        \x20       kept = mmap.mmap(fd, 4096)\n\
        \x20       time.sleep(0.4)\n\
        \x20       os._exit(1)\n\
        \x20   os.wait()\n\
        time.sleep(600)"
        .replace("{PATH}", &path);
    let mut guard = Guard::start_with(&script, &[]);
    guard.spawned();
    for life in 0..3 {
        let line = guard.line();
        assert!(line.ends_with(&format!("{path}{life}")), "{line}");
    }
    guard.send("kill\n");
    assert!(guard.line().ends_with("signal 9"));
    guard.assert_gone();
    for life in 0..3 {
        assert!(!Path::new(&format!("{path}{life}")).exists());
    }
}

/// Inode numbers are counted per file system: one in a private /dev/shm says nothing of ours.
#[test]
fn a_file_of_a_private_mount_with_the_same_inode_keeps_nothing_alive() {
    let (mut guard, path, _dir) = guard_with_shm(&[]);
    let inode = guard.line().split(' ').nth(1).unwrap().to_owned();
    let script = "import mmap, os, sys, time\n\
        while True:\n\
        \x20   fd = os.open('/dev/shm/other', os.O_CREAT | os.O_RDWR)\n\
        \x20   if os.fstat(fd).st_ino >= INODE: break\n\
        \x20   os.close(fd)\n\
        \x20   os.remove('/dev/shm/other')\n\
        os.ftruncate(fd, 4096)\n\
        kept = mmap.mmap(fd, 4096)\n\
        print('same' if os.fstat(fd).st_ino == INODE else 'other', flush=True)\n\
        time.sleep(600)"
        .replace("INODE", &inode);
    let shell = "mount -t tmpfs tmpfs /dev/shm && exec python3 -c \"$0\"";
    let mut other = Command::new("unshare")
        .args(["--mount", "sh", "-c", shell, &script])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(other.stdout.take().unwrap())
        .read_line(&mut said)
        .unwrap();
    if said.trim_end() != "same" {
        eprintln!("not tested: no private mount here, or its inodes are not counted up ({said:?})");
    }
    guard.send("kill\n");
    assert!(guard.line().ends_with("signal 9"));
    guard.assert_gone();
    let left = Path::new(&path).exists();
    other.kill().unwrap();
    other.wait().unwrap();
    assert!(!left, "{said}");
}
