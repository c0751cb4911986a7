//! `pegaflow up --detach`: what the launcher says and returns, and what becomes of what it started.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::commands::{status, told};
use crate::helpers::Work;
use crate::support::client::{Ending, completion, generate};
use crate::support::{self, HANG, Pegaflow, Site, processes, send};
use crate::wait_until;

const DETACH: [&str; 3] = ["up", "--detach", "topology.toml"];
const SLOW: &str = r#"{"startup_ms": 60000}"#;
/// From a signal to the end.
const PROMPT: Duration = Duration::from_secs(10);

/// Exit code, stdout and stderr, both read to their end: whoever holds them open makes this hang.
async fn run(command: Command) -> (i32, String, String) {
    let mut command = tokio::process::Command::from(command);
    let output = command.kill_on_drop(true).output();
    let output = tokio::time::timeout(HANG, output).await;
    let Output {
        status,
        stdout,
        stderr,
    } = output.expect("the launcher hangs").unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

async fn launch(site: &Site) -> (i32, String, String) {
    run(site.command(&DETACH)).await
}

/// The topology's name, and where pegaflow's own log is.
fn name_and_log(site: &Site, port: u16) -> (String, PathBuf) {
    let name = format!("test-{port}");
    let logs = site.path("state/pegaflow").join(&name).join("logs");
    (name, logs.join("pegaflow.log"))
}

/// Of the running instance.
async fn pid(site: &Site) -> u32 {
    u32::try_from(status(site).await["pid"].as_u64().unwrap()).unwrap()
}

async fn down(site: &Site) {
    told(site, &["down"]).await;
    site.assert_nothing_left(Duration::from_secs(1)).await;
}

/// The launcher waits for nodes that do not come up; all processes run.
async fn starting(site: &Site) -> Pegaflow<'_> {
    let launcher = site.start(site.command(&DETACH));
    let all = async || site.processes().len() >= 10;
    wait_until(all, "the launcher, pegaflow, and two nodes run").await;
    launcher
}

#[tokio::test(flavor = "multi_thread")]
async fn it_serves_without_its_launcher_and_down_ends_it() {
    let site = Site::new();
    // A file of the shell's that is nobody's business.
    let shell = ["sh", "-c", "exec 7> held; exec \"$@\"", "sh"];
    let (code, stdout, stderr) = run(site.command_under(&shell, &DETACH)).await;
    assert_eq!(code, 0, "{stderr}");
    let (name, log) = name_and_log(&site, site.port);
    let down_hint = format!("pegaflow down {name}");
    for text in ["pegaflow is ready", "PID", "curl ", &down_hint] {
        assert!(stdout.contains(text), "{text:?} in {stdout}");
    }
    for node in ["prefill", "decode"] {
        for text in [
            format!("{node}: "),
            format!("node={node} phase=\"starting\""),
        ] {
            assert!(stderr.contains(&text), "{text} in {stderr}");
        }
    }
    assert!(!stderr.contains("[decode]"), "nodes are quiet: {stderr}");

    let pid = pid(&site).await;
    assert_eq!(status(&site).await["state"], "ready");
    assert!(stdout.contains(&format!("pid {pid}")), "{stdout}");
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    assert_eq!(fields[3], pid.to_string(), "a session of its own");
    assert_eq!(fields[4], "0", "no terminal");
    let open = |pid: u32, fd: &str| fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
    assert_eq!(open(pid, "0"), PathBuf::from("/dev/null"));
    for fd in ["1", "2"] {
        assert_eq!(open(pid, fd), log);
    }
    for pid in site.processes() {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let mut files = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
        assert!(!files.any(|file| file.ends_with("held")), "it is held");
    }

    let base = format!("http://127.0.0.1:{}", site.port);
    let answer = generate(&base, &completion(1, 100, 4)).await;
    assert_eq!(answer.ending, Ending::Complete);
    let mode = fs::metadata(&log).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let own = told(&site, &["logs", "pegaflow"]).await;
    assert!(own.contains("pegaflow is ready"), "{own}");
    assert!(!own.contains("[decode]"), "nodes have their own: {own}");
    let all = told(&site, &["logs", "-n", "1000"]).await;
    for source in ["[pegaflow] ", "[prefill] ", "[decode] "] {
        assert!(all.contains(source), "{source:?} in {all}");
    }
    down(&site).await;
    assert!(!processes::is_alive(pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_told_as_in_the_foreground() {
    let foreground = |site: &Site| run(site.command(&["up", "topology.toml"]));
    let reason = |stderr: &str| {
        let at = stderr.rfind("error: ").expect("no reason");
        let log = stderr.rfind("pegaflow's own log").unwrap_or(stderr.len());
        stderr[at..log].to_owned()
    };
    // A node's last words, and where it says more.
    let site = Site::new();
    site.script(r#"{"fatal_start": "the weights are torn"}"#);
    let (code, _, there) = foreground(&site).await;
    assert_eq!(code, 1, "{there}");
    let (code, stdout, here) = launch(&site).await;
    assert_eq!((code, stdout.as_str()), (1, ""), "{here}");
    assert_eq!(reason(&here), reason(&there));
    let last_word = |line: &str| line.starts_with('[') && line.contains("the weights are torn");
    assert!(here.lines().any(last_word), "{here}");
    let (_, log) = name_and_log(&site, site.port);
    assert!(here.contains(log.to_str().unwrap()), "{here}");
    let logged = fs::read_to_string(log).unwrap();
    assert!(logged.contains(reason(&here).trim_end()), "{logged}");
    site.assert_nothing_left(Duration::from_secs(1)).await;

    // The address is taken.
    site.script("{}");
    let taken = TcpListener::bind(("127.0.0.1", site.port)).unwrap();
    let (there, here) = (foreground(&site).await, launch(&site).await);
    assert_eq!((there.0, here.0), (4, 4), "{}", here.2);
    assert_eq!(reason(&here.2), reason(&there.2));
    drop(taken);

    // The topology is wrong, or is not there.
    site.topology(&support::topology(site.port).replace("role", "rule"));
    for _ in 0..2 {
        let (there, here) = (foreground(&site).await, launch(&site).await);
        assert_eq!((there.0, here.0), (3, 3), "{}", here.2);
        assert_eq!(reason(&here.2), reason(&there.2));
        let _ = fs::remove_file(site.path("topology.toml"));
    }
    site.assert_nothing_left(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_launched_at_once_one_serves_and_one_says_that_it_runs() {
    let site = Site::new();
    let (first, second) = tokio::join!(launch(&site), launch(&site));
    let mut both = [first, second];
    both.sort_by_key(|it| it.0);
    let [serves, refused] = both;
    assert_eq!((serves.0, refused.0), (0, 5), "{}", refused.2);
    assert!(refused.2.contains("already running"), "{}", refused.2);
    // Also when it is ready; and the one that runs takes no notice.
    let (code, _, stderr) = launch(&site).await;
    assert_eq!(code, 5);
    let pid = pid(&site).await;
    assert!(stderr.contains(&format!("pid {pid}")), "{stderr}");
    let (_, log) = name_and_log(&site, site.port);
    let own = fs::read_to_string(log).unwrap();
    assert!(!own.contains("already running"), "{own}");
    down(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_to_the_launcher_stops_what_it_started() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let site = Site::new();
        site.script(SLOW);
        let mut launcher = starting(&site).await;
        launcher.signal(signal);
        let status = launcher.wait(PROMPT).await;
        assert_eq!(status.code(), Some(130), "130: stopped before it was ready");
        let output = launcher.output();
        assert!(output.contains("error: interrupted before"), "{output}");
        site.assert_nothing_left(Duration::from_secs(1)).await;
    }
}

/// Long before there are nodes: the launcher shows how far it is, and Ctrl-C ends it.
#[tokio::test(flavor = "multi_thread")]
async fn a_download_is_shown_and_can_be_interrupted() {
    let site = Work::Download.site();
    site.hang();
    let mut launcher = site.start(site.command(&DETACH));
    launcher.wait_for_log("model: looking for owner/name").await;
    wait_until(async || site.path("stuck").exists(), "the helper hangs").await;
    assert_eq!(status(&site).await["state"], "preparing");
    launcher.signal(Signal::SIGINT);
    assert_eq!(launcher.wait(PROMPT).await.code(), Some(130));
    site.assert_nothing_left(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_json_every_line_is_an_object_here_and_in_the_log() {
    let site = Site::new();
    let json = ["up", "-d", "--log-format", "json", "topology.toml"];
    let (code, stdout, stderr) = run(site.command(&json)).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("pegaflow is ready"), "{stdout}");
    assert!(!stderr.is_empty());
    for line in stderr.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        assert!(line.is_object(), "{line}");
    }
    let (_, log) = name_and_log(&site, site.port);
    let own = fs::read_to_string(log).unwrap();
    assert!(own.contains("pegaflow is ready"), "{own}");
    for line in own.lines() {
        serde_json::from_str::<Value>(line).unwrap_or_else(|_| panic!("{line}"));
    }
    down(&site).await;
    // Of an instance that has ended, pegaflow's own words are to be found too.
    let output = site.command(&["logs"]).output().unwrap();
    let hint = String::from_utf8(output.stderr).unwrap();
    assert!(hint.contains("pegaflow logs pegaflow"), "{hint}");
    assert!(
        told(&site, &["logs", "pegaflow"])
            .await
            .contains("is ready")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_to_the_launcher_forces_the_end() {
    let site = Site::new();
    let topology = support::topology(site.port);
    site.topology(&topology.replace("stop_grace = \"2s\"", "stop_grace = \"120s\""));
    site.script(r#"{"startup_ms": 60000, "ignore_term": true}"#);
    let mut launcher = starting(&site).await;
    launcher.signal(Signal::SIGINT);
    launcher.wait_for_log("once more to force").await;
    launcher.signal(Signal::SIGINT);
    let status = launcher.wait(PROMPT).await;
    assert_eq!(status.code(), Some(130));
    site.assert_nothing_left(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_launcher_leaves_the_start_to_itself() {
    let site = Site::new();
    site.script(r#"{"startup_ms": 3000}"#);
    let mut launcher = starting(&site).await;
    launcher.signal(Signal::SIGKILL);
    launcher.wait(HANG).await;
    let ready = async || status(&site).await["state"] == "ready";
    wait_until(ready, "the fleet is ready without a launcher").await;
    down(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pegaflow_that_is_killed_while_it_starts_is_reported() {
    let site = Site::new();
    site.script(SLOW);
    let mut launcher = starting(&site).await;
    send(pid(&site).await, Signal::SIGKILL);
    let status = launcher.wait(PROMPT).await;
    assert_eq!(
        status.code(),
        Some(137),
        "as a shell says of the foreground"
    );
    let output = launcher.output();
    assert!(output.contains("SIGKILL"), "{output}");
    site.assert_nothing_left(support::GONE_LIMIT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_has_to_wait_for_the_start() {
    let site = Site::new();
    site.script(SLOW);
    let (name, _) = name_and_log(&site, site.port);
    let (code, stdout, stderr) =
        run(site.command(&["up", "-d", "--no-wait", "topology.toml"])).await;
    assert_eq!((code, stdout.as_str()), (0, ""), "{stderr}");
    assert!(
        stderr.contains(&format!("pegaflow status {name}")),
        "{stderr}"
    );
    let state = status(&site).await["state"].clone();
    assert!(["preparing", "starting"].map(Value::from).contains(&state));
    down(&site).await;

    let wait = ["up", "-d", "--wait", "500ms", "topology.toml"];
    let (code, _, stderr) = run(site.command(&wait)).await;
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("the start goes on"), "{stderr}");
    told(&site, &["status"]).await;
    down(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_run_side_by_side_by_name() {
    let site = Site::new();
    assert_eq!(launch(&site).await.0, 0);
    let second = support::free_port();
    site.topology(&support::topology(second));
    assert_eq!(launch(&site).await.0, 0);
    for port in [site.port, second] {
        let (name, log) = name_and_log(&site, port);
        let text = told(&site, &["status", "--json", &name]).await;
        let status: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(status["state"], "ready");
        assert!(log.exists());
        told(&site, &["down", &name]).await;
    }
    site.assert_nothing_left(Duration::from_secs(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn its_log_is_bounded_and_private() {
    let site = Site::new();
    let limits = "[supervisor]\nlog_bytes = \"1MiB\"\nlog_files = 2";
    site.topology(&support::topology(site.port).replace("[supervisor]", limits));
    let (_, log) = name_and_log(&site, site.port);
    let logs = log.parent().unwrap();
    let mut private = fs::DirBuilder::new();
    private.recursive(true).mode(0o700).create(logs).unwrap();
    // What earlier runs left: nearly full, and more files than are kept.
    fs::write(&log, "x".repeat((1 << 20) - 100)).unwrap();
    for number in 1..=4 {
        let old = logs.join(format!("pegaflow.log.{number}"));
        fs::write(old, number.to_string()).unwrap();
    }
    let (code, _, stderr) = launch(&site).await;
    assert_eq!(code, 0, "{stderr}");
    let names = fs::read_dir(logs).unwrap().flatten();
    let names = names.map(|file| file.file_name().into_string().unwrap());
    let mut own: Vec<_> = names.filter(|name| name.starts_with("pegaflow")).collect();
    own.sort();
    assert_eq!(own, ["pegaflow.log", "pegaflow.log.1", "pegaflow.log.2"]);
    let rotated = fs::read(logs.join("pegaflow.log.1")).unwrap();
    assert!((1 << 20..(1 << 20) + 4096).contains(&rotated.len()));
    assert_eq!(fs::read(logs.join("pegaflow.log.2")).unwrap(), b"1");
    let current = fs::read_to_string(&log).unwrap();
    assert!(current.contains("pegaflow is ready"), "{current}");
    let mode = fs::metadata(&log).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let pid = pid(&site).await;
    let stderr = fs::read_link(format!("/proc/{pid}/fd/2")).unwrap();
    assert_eq!(stderr, log, "standard error follows the rotation");
    down(&site).await;
}
