//! Helper programs under their guard: their lines, their end, and that nothing of them is left.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use pegaflow::runtime::child::{ChildError, Finished, Stream, run};
use pegaflow::runtime::{Guarding, Job, NoProgress};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(30);

fn shell(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    command
}

fn guarding() -> Guarding {
    Guarding {
        program: env!("CARGO_BIN_EXE_pegaflow").into(),
        run_dir: None,
    }
}

fn job<'a>(guard: &'a Guarding, cancel: &'a CancellationToken) -> Job<'a> {
    Job {
        ui: &NoProgress,
        cancel,
        guard,
    }
}

async fn run_shell(
    script: &str,
    limit: Duration,
    cancel: &CancellationToken,
    on_line: &mut (dyn FnMut(Stream, &str) + Send),
) -> Result<Finished, ChildError> {
    run(shell(script), limit, job(&guarding(), cancel), on_line).await
}

/// Also as a zombie: the guard reaps all that is its own.
fn exists(pid: &str) -> bool {
    Path::new("/proc").join(pid).exists()
}

#[tokio::test]
async fn lines_status_and_tail() {
    let mut seen = Vec::new();
    let script = "i=0; while [ $i -lt 30 ]; do echo line $i; i=$((i+1)); done; \
                  printf 'a\\rb\\n' >&2; exit 7";
    let token = CancellationToken::new();
    let finished = run_shell(script, LIMIT, &token, &mut |stream, line| {
        seen.push((stream, line.to_owned()));
    })
    .await
    .unwrap();
    assert_eq!(finished.status.code(), Some(7));
    assert_eq!(finished.last_stdout.as_deref(), Some("line 29"));
    assert_eq!(finished.tail.lines().count(), 20);
    assert_eq!(seen.len(), 32);
    assert!(seen.contains(&(Stream::Stderr, "a".into())));
}

#[tokio::test]
async fn a_signal_is_seen_as_one_and_a_missing_program_as_not_started() {
    let token = CancellationToken::new();
    let killed = run_shell("kill -9 $$", LIMIT, &token, &mut |_, _| {}).await;
    assert_eq!(killed.unwrap().status.signal(), Some(9));

    let guard = guarding();
    let command = Command::new("/no/such/program");
    let missing = run(command, LIMIT, job(&guard, &token), &mut |_, _| {}).await;
    assert!(matches!(missing, Err(ChildError::Spawn(_))));
}

/// The environment and the directory are the program's, not only the guard's.
#[tokio::test]
async fn environment_and_directory_arrive() {
    let token = CancellationToken::new();
    let guard = guarding();
    let mut command = shell("echo $ONE ${HOME-none} $(pwd)");
    command.env("ONE", "1").env_remove("HOME").current_dir("/");
    let finished = run(command, LIMIT, job(&guard, &token), &mut |_, _| {}).await;
    assert_eq!(finished.unwrap().last_stdout.as_deref(), Some("1 none /"));
}

#[tokio::test]
async fn a_daemon_that_holds_the_pipe_neither_holds_us_nor_lives_on() {
    let token = CancellationToken::new();
    let script = "setsid sleep 600 & echo $!; exit 0";
    let finished = run_shell(script, LIMIT, &token, &mut |_, _| {})
        .await
        .unwrap();
    assert!(finished.status.success());
    assert!(!exists(&finished.last_stdout.unwrap()));
}

#[tokio::test]
async fn cancelling_kills_the_tree_before_it_returns() {
    let token = CancellationToken::new();
    let pid = Mutex::new(String::new());
    let script = "trap '' TERM INT; setsid sleep 600 & echo $!; wait";
    let result = run_shell(script, LIMIT, &token, &mut |_, line| {
        line.clone_into(&mut pid.lock().unwrap());
        token.cancel();
    })
    .await;
    assert!(matches!(result, Err(ChildError::Cancelled)));
    assert!(!exists(&pid.lock().unwrap()));
}

#[tokio::test]
async fn the_tree_dies_with_a_dropped_future() {
    let token = CancellationToken::new();
    let (sender, mut pids) = tokio::sync::mpsc::channel(1);
    let mut tell = move |_, line: &str| sender.try_send(line.to_owned()).unwrap();
    let work = run_shell("sleep 600 & echo $!; wait", LIMIT, &token, &mut tell);
    let pid = tokio::select! {
        _ = work => panic!("it ended by itself"),
        pid = pids.recv() => pid.unwrap(),
    };
    let gone = async {
        while exists(&pid) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, gone)
        .await
        .expect("the grandchild lives on");
}

#[tokio::test]
async fn the_deadline_keeps_the_last_lines() {
    let token = CancellationToken::new();
    let limit = Duration::from_secs(1);
    let result = run_shell("echo still here; sleep 600", limit, &token, &mut |_, _| {}).await;
    assert!(matches!(result, Err(ChildError::Deadline { tail, .. }) if tail == "still here"));
}
