//! `pegaflow engine`, as a process of its own: nodes that others started hand off through it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_engine;
mod support_router;

use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pegaflow::engine::client::Client;
use pegaflow::engine::protocol::SessionKind;
use serde_json::{Value, json};
use support_router::command::{RouterProcess, router_command};
use support_router::{HANG, soon, write_private};

const TOKEN: &str = "token-of-tests";

/// A process of the test's own; killed when dropped, with its children.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), signal).unwrap();
    }

    async fn ended(&mut self) -> Option<i32> {
        soon("an end", async {
            loop {
                if let Some(status) = self.0.try_wait().unwrap() {
                    return status.code();
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
    }
}

/// The processes of a group.
fn group(id: i32) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap();
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let group = |pid: &i32| nix::unistd::getpgid(Some(Pid::from_raw(*pid)));
    pids.filter(|pid| group(pid) == Ok(Pid::from_raw(id)))
        .collect()
}

impl Drop for Process {
    fn drop(&mut self) {
        // The fake nodes lead a group each, and leave their shared memory behind when they are killed.
        if let Ok(id) = i32::try_from(self.0.id()) {
            let members = group(id);
            let _ = nix::sys::signal::killpg(Pid::from_raw(id), Signal::SIGKILL);
            for pid in members {
                let names = [
                    format!("psm_fake_{pid}"),
                    format!("vllm_dist_fake_{pid}-cpushm"),
                ];
                for name in names {
                    let _ = std::fs::remove_file(Path::new("/dev/shm").join(name));
                }
            }
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(socket: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow"));
    command
        .args(["engine", "--capacity", "64MiB", "--socket"])
        .arg(socket)
        .args(flags)
        .stdin(Stdio::null())
        .env_remove("PEGAFLOW_KV_TOKEN")
        .env("NO_COLOR", "1");
    command
}

async fn start(mut command: Command) -> Process {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let first = tokio::task::spawn_blocking(move || stdout.lines().next().and_then(Result::ok));
    let first = soon("the engine to listen", first).await.unwrap();
    assert!(
        first
            .unwrap_or_default()
            .starts_with("pegaflow engine listens at ")
    );
    Process(child)
}

fn hello(token: &str) -> pegaflow::engine::protocol::Hello {
    pegaflow::engine::protocol::Hello {
        token: token.to_owned(),
        ..support_engine::hello("p", SessionKind::Scheduler)
    }
}

#[tokio::test]
async fn it_lets_in_who_knows_the_token_and_leaves_no_socket() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, file) = (folder.path().join("s"), folder.path().join("token"));
    write_private(&file, &format!("{TOKEN}\n"));
    let flags = ["--token-file", file.to_str().unwrap()];
    let mut engine = start(command(&socket, &flags)).await;
    assert!(Client::connect(&socket, hello(TOKEN), HANG).is_ok());
    assert!(Client::connect(&socket, hello("another-token"), HANG).is_err());

    let second = command(&socket, &flags).output().unwrap();
    assert_eq!(second.status.code(), Some(4), "{second:?}");
    let arguments = std::fs::read(format!("/proc/{}/cmdline", engine.0.id())).unwrap();
    assert!(!String::from_utf8_lossy(&arguments).contains(TOKEN));
    engine.signal(Signal::SIGTERM);
    assert_eq!(engine.ended().await, Some(0));
    assert!(!socket.exists());
}

#[tokio::test]
async fn what_makes_no_store_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, file) = (folder.path().join("s"), folder.path().join("token"));
    std::fs::write(&file, TOKEN).unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    for (flags, code) in [
        (&[][..], 2),
        (&["--token-file", file.to_str().unwrap()], 4),
        (&["--capacity", "1MiB"], 2),
        (&["--handoff-deadline", "0s"], 2),
    ] {
        let output = command(&socket, flags).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {output:?}");
    }
    assert!(UnixStream::connect(&socket).is_err());
}

/// A fake vLLM with a connector, as somebody else would start it.
fn node(socket: &Path, name: &str) -> (Process, String) {
    scripted_node(socket, name, "{}")
}

/// What `script` says beside it is in the fake's `script.rs`.
fn scripted_node(socket: &Path, name: &str, script: &str) -> (Process, String) {
    use std::os::unix::process::CommandExt as _;
    let program = Path::new(env!("CARGO_BIN_EXE_pegaflow")).parent().unwrap();
    let program = program.join("examples/fake-vllm");
    assert!(program.exists(), "cargo build --examples");
    let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = probe.local_addr().unwrap().port();
    drop(probe);
    let file = socket.with_extension(format!("{name}.json"));
    std::fs::write(&file, script).unwrap();
    let child = Command::new(program)
        .args([
            "serve",
            "m",
            "--served-model-name",
            "tiny",
            "--block-size",
            "32",
        ])
        .args(["--kv-transfer-config", "{}", "--port"])
        .arg(port.to_string())
        .env("PEGAFLOW_KV_SOCKET", socket)
        .env("PEGAFLOW_KV_TOKEN", TOKEN)
        .env("PEGAFLOW_NODE", name)
        .env("FAKE_VLLM_SCRIPT", file)
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    (Process(child), format!("http://127.0.0.1:{port}"))
}

/// Tokens that a node found in the store.
async fn hits(node: &str) -> f64 {
    let metrics = reqwest::get(format!("{node}/metrics")).await.unwrap();
    let text = metrics.text().await.unwrap();
    let mut lines = text.lines();
    let line = lines.find(|line| line.starts_with("vllm:external_prefix_cache_hits_total{"));
    line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
}

fn prompt(seed: u32) -> Value {
    let prompt: Vec<u32> = (0..100).map(|id| (id * 31 + 7 + seed) % 1000).collect();
    json!({"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0})
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_others_hand_off_through_it_behind_the_router_alone() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let mut alone = command(&socket, &[]);
    alone.env("PEGAFLOW_KV_TOKEN", TOKEN);
    let _engine = start(alone).await;
    let ((_p, p), (_d, d)) = (node(&socket, "p"), node(&socket, "d"));
    let flags = ["--prefill", &p, "--decode", &d];
    let router = RouterProcess::started(&flags, &["prefill", "decode"]).await;
    let body = prompt(0);
    let got = router.complete(&body).await;
    assert_eq!(got.status, 200, "{}", got.text);
    assert_eq!(
        hits(&d).await,
        96.0,
        "decode loads the three full blocks that prefill saved"
    );
    let alone = reqwest::Client::new()
        .post(format!("{d}/v1/completions"))
        .body(body.to_string());
    let alone: Value =
        serde_json::from_str(&alone.send().await.unwrap().text().await.unwrap()).unwrap();
    assert_eq!(
        got.json()["choices"][0]["text"],
        alone["choices"][0]["text"]
    );
    router.stop().await;
}

/// Prefill answers long before its KV is saved: only the store can say when that is. Without a store the
/// answers come all the same, and the next one is found.
#[tokio::test(flavor = "multi_thread")]
async fn the_router_alone_hears_from_it_when_kv_is_ready() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, file) = (folder.path().join("s"), folder.path().join("token"));
    write_private(&file, TOKEN);
    let flags = ["--token-file", file.to_str().unwrap()];
    let mut engine = start(command(&socket, &flags)).await;
    let (_p, p) = scripted_node(&socket, "p", r#"{"save_ms": 300}"#);
    let (_d, d) = node(&socket, "d");
    let at = ["--engine", socket.to_str().unwrap()];
    let flags = [&["--prefill", &p, "--decode", &d], &at[..], &flags[..]].concat();
    let router = RouterProcess::started(&flags, &["prefill", "decode"]).await;
    let connected = "pegaflow_router_engine_connected ";
    let becomes = async |value: f64| {
        soon("the router's word of the store", async {
            while router.sample(connected).await != value {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    };
    let down = "pegaflow_router_fallbacks_total{reason=\"engine_down\"}";
    becomes(1.0).await;
    let got = router.complete(&prompt(1)).await;
    assert_eq!(got.status, 200, "{}", got.text);
    assert_eq!((hits(&d).await, router.sample(down).await), (96.0, 0.0));

    engine.signal(Signal::SIGKILL);
    engine.ended().await;
    becomes(0.0).await;
    let got = router.complete(&prompt(2)).await;
    assert_eq!(got.status, 200, "{}", got.text);
    assert_eq!((hits(&d).await, router.sample(down).await), (96.0, 1.0));

    let flags = ["--token-file", file.to_str().unwrap()];
    let _engine = start(command(&socket, &flags)).await;
    becomes(1.0).await;
    // These fakes do not come back to it, so nothing is handed off; but it is asked again.
    assert_eq!(router.complete(&prompt(3)).await.status, 200);
    assert_eq!(router.sample(down).await, 1.0);
    let unopened = "pegaflow_router_fallbacks_total{reason=\"not_opened\"}";
    assert_eq!(router.sample(unopened).await, 1.0);
    router.stop().await;
}

#[tokio::test]
async fn the_router_alone_does_not_start_without_the_stores_token() {
    let flags = [
        "--prefill",
        "http://127.0.0.1:1",
        "--decode",
        "http://127.0.0.1:2",
    ];
    let (mut command, _) = router_command(&[&flags[..], &["--engine", "s"]].concat());
    let output = command.env_remove("PEGAFLOW_KV_TOKEN").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("PEGAFLOW_KV_TOKEN") && said.contains("--token-file"),
        "{said}"
    );
}
