//! Runs the whole binary on the fake vLLM: a [`Site`] is a private world (directories, PATH,
//! topology, script), a [`Pegaflow`] one run of `pegaflow up` in it.
//!
//! Every process that a site's pegaflow starts inherits [`MARK`], so that leftovers are found
//! whatever became of their parents. Dropping a site kills them all.

pub mod client;
pub mod load;
pub mod processes;
mod run;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

pub use run::Pegaflow;

/// In the environment of every process of a site; the value is the site's directory.
pub const MARK: &str = "PEGAFLOW_TEST_SITE";
/// Long, since the machine that runs the tests may be busy: only hangs reach it.
pub const HANG: Duration = Duration::from_secs(60);
/// What users are promised after a kill -9 of pegaflow.
pub const GONE_LIMIT: Duration = Duration::from_secs(5);

/// A private world for one test.
pub struct Site {
    dir: TempDir,
    pub port: u16,
    extra_env: Vec<(String, String)>,
    /// Every process that was ever seen here.
    seen: RefCell<BTreeSet<u32>>,
    runs: RefCell<u32>,
}

impl Default for Site {
    fn default() -> Self {
        Self::new()
    }
}

impl Site {
    /// Prefill and decode nodes with short timeouts, on the fake vLLM.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("pegaflow-")
            .tempdir()
            .unwrap();
        for name in ["bin", "run", "state", "cache", "home", "model"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        std::os::unix::fs::symlink(fake_vllm(), dir.path().join("bin/vllm")).unwrap();
        fs::write(dir.path().join("model/config.json"), MODEL_CONFIG).unwrap();
        processes::begin();
        let site = Self {
            dir,
            port: free_port(),
            extra_env: Vec::new(),
            seen: RefCell::default(),
            runs: RefCell::default(),
        };
        site.script("{}");
        site.topology(&topology(site.port));
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn env(&mut self, name: &str, value: &str) {
        self.extra_env.push((name.to_owned(), value.to_owned()));
    }

    /// What the fakes do from now on; see `tests/fake_vllm/script.rs`.
    pub fn script(&self, json: &str) {
        serde_json::from_str::<Value>(json).unwrap();
        let draft = self.path("script.json.new");
        fs::write(&draft, json).unwrap();
        fs::rename(draft, self.path("script.json")).unwrap();
    }

    pub fn topology(&self, text: &str) {
        fs::write(self.path("topology.toml"), text).unwrap();
    }

    /// `pegaflow ARGS` in this site's environment.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pegaflow"));
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(args)
            .current_dir(self.dir.path())
            .env(MARK, self.dir.path())
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("HOME", self.path("home"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("PEGAFLOW_CACHE_DIR", self.path("cache"))
            .env("FAKE_VLLM_SCRIPT", self.path("script.json"))
            .env("NO_COLOR", "1")
            .envs(self.extra_env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        command
    }

    /// Starts `pegaflow up topology.toml`; does not wait.
    pub fn up(&self) -> Pegaflow<'_> {
        self.start(self.command(&["up", "topology.toml"]))
    }

    /// Starts `WRAPPER pegaflow up topology.toml`; does not wait.
    pub fn up_under(&self, wrapper: &[&str]) -> Pegaflow<'_> {
        self.start(self.command_under(wrapper, &["up", "topology.toml"]))
    }

    /// `WRAPPER pegaflow ARGS` in this site's environment.
    pub fn command_under(&self, wrapper: &[&str], args: &[&str]) -> Command {
        let inner = self.command(args);
        let mut command = Command::new(wrapper[0]);
        command
            .args(&wrapper[1..])
            .arg(inner.get_program())
            .args(inner.get_args())
            .current_dir(self.dir.path())
            .envs(
                inner
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .stdin(Stdio::null());
        command
    }

    /// Starts it with its output in a file; does not wait.
    pub fn start(&self, mut command: Command) -> Pegaflow<'_> {
        let run = {
            let mut runs = self.runs.borrow_mut();
            *runs += 1;
            *runs
        };
        let log = self.path(&format!("pegaflow-{run}.log"));
        let file = File::create(&log).unwrap();
        let child = command
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Pegaflow {
            site: self,
            child,
            log,
            started: Instant::now(),
        }
    }

    /// Starts it and waits until it is ready.
    pub async fn up_ready(&self) -> Pegaflow<'_> {
        let mut pegaflow = self.up();
        pegaflow.wait_for_log("pegaflow is ready").await;
        self.processes();
        pegaflow
    }

    /// Every living process of this site.
    pub fn processes(&self) -> BTreeSet<u32> {
        let mark = format!("{MARK}={}", self.dir.path().display());
        let alive = processes::with_environment(&mark);
        self.seen.borrow_mut().extend(&alive);
        alive
    }

    /// Shared-memory files of processes that were seen here.
    pub fn shm(&self) -> Vec<String> {
        processes::shm_of(&self.seen.borrow())
    }

    /// What is left of run directories, locks included.
    pub fn run_dirs(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path("run/pegaflow"));
        let entries = entries.into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Waits until nothing of the site is left, and says what is when the limit is over.
    pub async fn assert_nothing_left(&self, limit: Duration) {
        let started = Instant::now();
        loop {
            let left = (self.processes(), self.shm(), self.run_dirs());
            if left.0.is_empty() && left.1.is_empty() && left.2.is_empty() {
                return;
            }
            if started.elapsed() > limit {
                let names: Vec<_> = left.0.iter().map(|pid| processes::describe(*pid)).collect();
                panic!(
                    "left after {limit:?}: {names:#?}, {:?}, {:?}",
                    left.1, left.2
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.dump_logs();
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let alive = self.processes();
            if alive.is_empty() || Instant::now() > deadline {
                break;
            }
            for pid in alive {
                send(pid, Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        for name in self.shm() {
            let _ = fs::remove_file(Path::new("/dev/shm").join(name));
        }
    }
}

impl Site {
    fn dump_logs(&self) {
        let mut files = Vec::new();
        for place in [self.path("state"), self.path("run"), self.path("home")] {
            walk(&place, &mut files);
        }
        // A log may be a device, where a test wants writing to fail.
        files.retain(|file| file.is_file() && file.extension().is_some_and(|kind| kind == "log"));
        let runs = (1..=*self.runs.borrow()).map(|run| self.path(&format!("pegaflow-{run}.log")));
        for file in runs.chain(files) {
            let text = fs::read_to_string(&file).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(80)..].join("\n");
            eprintln!("---- {}\n{tail}", file.display());
        }
    }
}

/// Sends a signal; a process that is gone already is no error.
pub fn send(pid: u32, signal: Signal) {
    let _ = kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal);
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

fn fake_vllm() -> PathBuf {
    let target = Path::new(env!("CARGO_BIN_EXE_pegaflow")).parent().unwrap();
    let fake = target.join("examples/fake-vllm");
    assert!(
        fake.exists(),
        "{} is missing: cargo build --examples",
        fake.display()
    );
    fake
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), files);
        } else {
            files.push(entry.path());
        }
    }
}

const MODEL_CONFIG: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 2048,
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 40960, "torch_dtype": "bfloat16"
}"#;

/// The topology of most tests.
pub fn topology(port: u16) -> String {
    format!(
        r#"
name = "test-{port}"
device = "cpu"
model = "./model"
served_model_name = "tiny"
block_size = 32

[runtime]
kind = "path"

[kv]
capacity = "64MiB"

[router]
listen = "127.0.0.1:{port}"
connect_timeout = "2s"
first_byte_timeout = "10s"
chunk_timeout = "5s"
handoff_timeout = "5s"
queue_timeout = "30s"
drain_timeout = "2s"

[supervisor]
start_timeout = "30s"
health_interval = "200ms"
hang_timeout = "10s"
stop_grace = "2s"
backoff_first = "200ms"
backoff_max = "1s"
crash_limit = 4
crash_window = "60s"

[[node]]
name = "prefill"
role = "prefill"

[[node]]
name = "decode"
role = "decode"
"#
    )
}
