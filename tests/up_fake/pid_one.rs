//! pegaflow as the first process of a container.

use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::geteuid;

use crate::support::client::{Ending, completion, is_proven};
use crate::support::{HANG, Site, processes, send};
use crate::wait_until;

const ORPHANS: usize = 40;

#[tokio::test(flavor = "multi_thread")]
async fn as_pid_1_it_reaps_what_it_inherits_and_ends_on_a_signal() {
    if !geteuid().is_root() {
        eprintln!("skipped: a pid namespace needs root");
        return;
    }
    let site = Site::new();
    let mut up = site.up_under(&["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]);
    up.wait_for_log("pegaflow is ready").await;
    site.processes();
    let first = processes::children(up.pid())[0];
    let status = std::fs::read_to_string(format!("/proc/{first}/status")).unwrap();
    let inside = status.lines().find(|line| line.starts_with("NSpid:"));
    assert!(inside.unwrap().ends_with("\t1"), "not pid 1: {inside:?}");

    // What `docker exec` may leave: processes whose parent is gone when they end.
    let orphans = format!("for i in $(seq {ORPHANS}); do (sleep 0.5 &) ; done");
    let target = first.to_string();
    let entered = Command::new("nsenter")
        .args([
            "--target", &target, "--pid", "--mount", "sh", "-c", &orphans,
        ])
        .status();
    assert!(entered.unwrap().success());
    let adopted = |pid: &u32| processes::describe(*pid).contains("sleep 0.5");
    let count = || {
        processes::children(first)
            .iter()
            .filter(|pid| adopted(pid))
            .count()
    };
    assert!(count() > 0, "nothing was inherited");
    wait_until(
        async || count() == 0 && processes::zombies(first).is_empty(),
        "all are reaped",
    )
    .await;

    // A guard that is killed leaves its tree to pid 1.
    let guards = processes::children(first);
    assert_eq!(guards.len(), 2, "one guard for each node");
    send(guards[0], Signal::SIGKILL);
    wait_until(
        async || {
            let mut restarts = 0;
            for node in ["prefill", "decode"] {
                let view = up.node(node).await;
                restarts += view["restarts"].as_u64().unwrap() * u64::from(is_proven(&view));
            }
            restarts == 1
        },
        "the node returned",
    )
    .await;
    wait_until(
        async || processes::zombies(first).is_empty(),
        "its tree is reaped",
    )
    .await;
    let answer = up.generate(&completion(1, 100, 8)).await;
    assert_eq!(answer.ending, Ending::Complete);

    site.processes();
    send(first, Signal::SIGTERM);
    assert_eq!(up.wait(HANG).await.code(), Some(0));
    site.assert_nothing_left(Duration::from_secs(1)).await;
}
