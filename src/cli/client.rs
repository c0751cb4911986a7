//! Talks to a running `pegaflow up`, over the control socket in its run directory.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;
use clap::Args;
use http::Method;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde_json::Value;

use super::Exit;
use super::topology_args::TopologyArgs;
use crate::instance::{self, InstanceError, InstanceInfo};

/// One question and its answer.
const LIMIT: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(2);

/// Which instance, where another argument is positional.
#[derive(Debug, Args)]
pub struct Named {
    /// The running instance: its name, or its topology file. Not needed where only one runs
    #[arg(long, value_name = "NAME")]
    pub name: Option<PathBuf>,
}

/// Which instance, as the only positional argument.
#[derive(Debug, Args)]
pub struct Which {
    /// The instance: its name, or its topology file. Not needed where only one runs
    #[arg(value_name = "NAME")]
    of: Option<PathBuf>,
    /// The same
    #[arg(long, value_name = "NAME", conflicts_with = "of")]
    name: Option<PathBuf>,
}

impl Which {
    pub fn get(&self) -> Option<&Path> {
        self.of.as_deref().or(self.name.as_deref())
    }
}

/// Runs a command that waits for others: an instance, or helper programs.
pub fn converse<T>(command: impl Future<Output = Result<T, Exit>>) -> Result<T, Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Exit::failed("cannot start the async runtime", error))?;
    let outcome = runtime.block_on(command);
    runtime.shutdown_background();
    outcome
}

/// A running instance.
#[derive(Debug)]
pub struct Instance {
    pub name: String,
    pub info: InstanceInfo,
    socket: PathBuf,
    http: reqwest::Client,
}

impl Instance {
    /// The one that is meant; without a name, the only one.
    pub fn find(of: Option<&Path>) -> Result<Self, Exit> {
        Self::named(match of {
            Some(of) => name_of(of)?,
            None => only_one()?,
        })
    }

    pub fn named(name: String) -> Result<Self, Exit> {
        match instance::running(&name).map_err(machine)? {
            Some(info) => {
                let instance = Self::new(name, info)?;
                match instance.is_running()? {
                    true => Ok(instance),
                    false => Err(not_running(&instance.name)?),
                }
            }
            None => Err(not_running(&name)?),
        }
    }

    fn new(name: String, info: InstanceInfo) -> Result<Self, Exit> {
        let socket = instance::control_socket(&name).map_err(machine)?;
        let http = reqwest::Client::builder()
            .unix_socket(socket.as_path())
            .connect_timeout(CONNECT)
            .build()
            .map_err(|error| Exit::failed("cannot make an HTTP client", error))?;
        Ok(Self {
            name,
            info,
            socket,
            http,
        })
    }

    /// It answers: its nodes are planned. Before that it installs and loads.
    pub fn is_prepared(&self) -> bool {
        self.socket.exists()
    }

    /// It holds its name still.
    pub fn is_running(&self) -> Result<bool, Exit> {
        let is_held = instance::running(&self.name).map_err(machine)?.is_some();
        // The guards of a killed pegaflow hold the name while they remove its run directory.
        Ok(is_held && (self.is_prepared() || is_alive(self.info.pid)))
    }

    pub async fn get(&self, path: &str) -> Result<Value, Exit> {
        self.ask(Method::GET, path).await
    }

    pub async fn post(&self, path: &str) -> Result<Value, Exit> {
        self.ask(Method::POST, path).await
    }

    async fn ask(&self, method: Method, path: &str) -> Result<Value, Exit> {
        let asking = async {
            let reply = self.send(method, path).await?;
            let body = reply.bytes().await.map_err(|error| self.silent(error))?;
            serde_json::from_slice(&body)
                .map_err(|error| Exit::failed("the running pegaflow answers no JSON", error))
        };
        let late = |_| {
            let name = &self.name;
            Exit::NotRunning(anyhow!("`{name}` runs but has not answered in {LIMIT:?}"))
        };
        tokio::time::timeout(LIMIT, asking).await.map_err(late)?
    }

    /// A reply whose body may take any time.
    pub async fn stream(&self, path: &str) -> Result<reqwest::Response, Exit> {
        self.send(Method::GET, path).await
    }

    /// Only the head of the reply is here; an error is read whole.
    async fn send(&self, method: Method, path: &str) -> Result<reqwest::Response, Exit> {
        // The host is not used, but HTTP wants one.
        let url = format!("http://pegaflow{path}");
        let request = self.http.request(method, url).send();
        let reply = request.await.map_err(|error| self.silent(error))?;
        let status = reply.status();
        if status.is_success() {
            return Ok(reply);
        }
        let body = reply.bytes().await.map_err(|error| self.silent(error))?;
        let value: Value = serde_json::from_slice(&body).unwrap_or_default();
        let why = match value.get("error").and_then(Value::as_str) {
            Some(why) => why.to_owned(),
            None => format!("it answered {status}"),
        };
        Err(Exit::Failed(anyhow!("{}: {why}", self.name)))
    }

    /// The connection failed or broke.
    pub fn silent(&self, error: reqwest::Error) -> Exit {
        if !self.is_prepared() {
            let (name, pid) = (&self.name, self.info.pid);
            return Exit::NotRunning(anyhow!(
                "`{name}` (pid {pid}) has no nodes yet, or none any more: it is preparing to start \
                 or ending"
            ));
        }
        let mut cause: &dyn std::error::Error = &error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        let cause = cause.to_string();
        let what = format!(
            "`{}` does not answer at {}",
            self.name,
            self.socket.display()
        );
        Exit::NotRunning(anyhow!(cause).context(what))
    }
}

fn is_alive(pid: u32) -> bool {
    let pid = i32::try_from(pid).unwrap_or(i32::MAX);
    kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
}

/// A file says its name; anything else is one.
pub fn name_of(of: &Path) -> Result<String, Exit> {
    let topology = TopologyArgs {
        topology: of.to_owned(),
        set: Vec::new(),
    };
    topology.instance()
}

/// As one segment of a path; a node's name needs no escapes, and anything else is no node's name.
pub fn segment(node: &str) -> String {
    node.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

fn only_one() -> Result<String, Exit> {
    let mut running = instance::all_running().map_err(machine)?;
    match running.len() {
        0 | 1 => running.pop().map(|(name, _)| name).ok_or_else(|| {
            Exit::NotRunning(anyhow!(
                "nothing runs here; start it with `pegaflow up TOPOLOGY`"
            ))
        }),
        _ => {
            let list = running.iter().map(|(name, info)| {
                let url = info.url.as_deref().unwrap_or("not ready yet");
                format!("\n  {name}   pid {}, {url}", info.pid)
            });
            let list: String = list.collect();
            Err(Exit::Usage(anyhow!("several run; name one of them:{list}")))
        }
    }
}

fn not_running(name: &str) -> Result<Exit, Exit> {
    let logs = match instance::logs_of(name).map_err(machine)? {
        Some(dir) => format!(
            "; `pegaflow logs --name {name}` shows why it ended, out of {}",
            dir.display()
        ),
        None => String::new(),
    };
    let what = anyhow!("`{name}` is not running; start it with `pegaflow up`{logs}");
    Ok(Exit::NotRunning(what))
}

pub fn machine(error: InstanceError) -> Exit {
    Exit::Machine(error.into())
}

/// Writes to stdout, at once. A reader who has left ends the command without a word.
pub fn print(text: impl AsRef<[u8]>) -> Result<(), Exit> {
    let mut stdout = io::stdout().lock();
    let written = stdout
        .write_all(text.as_ref())
        .and_then(|()| stdout.flush());
    written.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Exit::ReaderGone,
        _ => Exit::failed("cannot write to stdout", error),
    })
}

/// Says something beside the result.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
