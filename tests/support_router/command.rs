//! A `pegaflow router` process, in front of fake nodes.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Got, soon};

/// A running router; killed when dropped.
pub struct RouterProcess {
    child: Child,
    pub url: String,
    pub http: reqwest::Client,
}

/// `pegaflow router` with these flags, on a port that was free a moment ago.
pub fn router_command(flags: &[&str]) -> (Command, u16) {
    let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = probe.local_addr().unwrap().port();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow"));
    command
        .args(["router", "--health-interval", "100ms", "--port"])
        .arg(port.to_string())
        .args(flags)
        .stdin(Stdio::null())
        .env("NO_COLOR", "1");
    (command, port)
}

impl RouterProcess {
    /// Returns when it listens. What it logs goes to the test's own stderr.
    pub async fn start(flags: &[&str]) -> Self {
        let (command, port) = router_command(flags);
        Self::launch(command, port).await
    }

    pub async fn launch(mut command: Command, port: u16) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let listens = tokio::task::spawn_blocking(move || {
            let mut lines = stdout.lines();
            let first = lines.next().and_then(Result::ok).unwrap_or_default();
            // Read on, so that it never writes to a closed pipe.
            std::thread::spawn(move || lines.for_each(drop));
            first
        });
        let first = soon("the router to listen", listens).await.unwrap();
        let url = format!("http://127.0.0.1:{port}");
        assert!(first.ends_with(&url), "{first}");
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { child, url, http }
    }

    /// And every node that is named so is in this phase.
    pub async fn started(flags: &[&str], nodes: &[&str]) -> Self {
        let router = Self::start(flags).await;
        for node in nodes {
            router.phase_is(node, "ready").await;
        }
        router
    }

    pub async fn get(&self, path: &str) -> Got {
        self.send(self.http.get(format!("{}{path}", self.url)))
            .await
    }

    pub fn post(&self, path: &str, body: &Value) -> reqwest::RequestBuilder {
        let url = format!("{}{path}", self.url);
        self.http
            .post(url)
            .header("content-type", "application/json")
            .body(body.to_string())
    }

    pub async fn complete(&self, body: &Value) -> Got {
        self.send(self.post("/v1/completions", body)).await
    }

    pub async fn send(&self, request: reqwest::RequestBuilder) -> Got {
        soon("a response", async {
            let response = request.send().await.unwrap();
            Got {
                status: response.status().as_u16(),
                headers: response.headers().clone(),
                text: response.text().await.unwrap(),
            }
        })
        .await
    }

    pub async fn node(&self, name: &str) -> Value {
        self.get("/status").await.json()["fleet"]["nodes"][name].clone()
    }

    pub async fn phase_is(&self, name: &str, phase: &str) {
        soon("a phase", async {
            while self.node(name).await["phase"] != phase {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    /// The value of the first sample whose line starts so; 0 where there is none.
    pub async fn sample(&self, start: &str) -> f64 {
        let text = self.get("/metrics").await.text;
        let line = text.lines().find(|line| line.starts_with(start));
        line.map_or(0.0, |line| {
            line.rsplit(' ').next().unwrap().parse().unwrap()
        })
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(pid, signal).unwrap();
    }

    /// Waits for the end, and says the exit code.
    pub async fn ended(&mut self) -> Option<i32> {
        soon("the router to end", async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return status.code();
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
    }

    pub async fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        assert_eq!(self.ended().await, Some(0));
    }
}

impl Drop for RouterProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
