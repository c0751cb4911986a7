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
use support_router::command::RouterProcess;
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

impl Drop for Process {
    fn drop(&mut self) {
        // The fake nodes lead a group each.
        if let Ok(id) = i32::try_from(self.0.id()) {
            let _ = nix::sys::signal::killpg(Pid::from_raw(id), Signal::SIGKILL);
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
    use std::os::unix::process::CommandExt as _;
    let program = Path::new(env!("CARGO_BIN_EXE_pegaflow")).parent().unwrap();
    let program = program.join("examples/fake-vllm");
    assert!(program.exists(), "cargo build --examples");
    let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = probe.local_addr().unwrap().port();
    drop(probe);
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
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    (Process(child), format!("http://127.0.0.1:{port}"))
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
    let prompt: Vec<u32> = (0..100).map(|id| id * 31 + 7).collect();
    let body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0});
    let figure = async || {
        let text = reqwest::get(format!("{d}/metrics"))
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with("vllm:external_prefix_cache_hits_total{"));
        line.unwrap()
            .rsplit(' ')
            .next()
            .unwrap()
            .parse::<f64>()
            .unwrap()
    };
    let got = router.complete(&body).await;
    assert_eq!(got.status, 200, "{}", got.text);
    assert_eq!(
        figure().await,
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
