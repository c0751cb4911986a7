//! `pegaflow kv ...`: looks at the store of a running `pegaflow up`, over its control socket.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use http::Method;
use serde_json::Value;

use super::Exit;
use super::topology_args::TopologyArgs;
use crate::instance::{self, InstanceError};

const LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub struct KvArgs {
    action: Action,
    #[command(flatten)]
    of: TopologyArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Action {
    /// Figures: slots, hits and misses, bytes saved and loaded, hand-offs
    Stats,
    /// What makes stored KV interchangeable, and which nodes share it
    Namespaces,
    /// Sessions, the oldest leases, the hand-offs under way
    Inspect,
    /// Evict every chunk that no request holds
    Flush,
}

impl Action {
    fn request(self) -> (Method, &'static str) {
        match self {
            Self::Stats => (Method::GET, "/v1/kv"),
            Self::Namespaces => (Method::GET, "/v1/kv/namespaces"),
            Self::Inspect => (Method::GET, "/v1/kv/inspect"),
            Self::Flush => (Method::POST, "/v1/kv/flush"),
        }
    }
}

/// Prints the answer as JSON on stdout.
pub fn kv(args: &KvArgs) -> Result<(), Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Exit::failed("cannot start the async runtime", error))?;
    runtime.block_on(answer(args))
}

async fn answer(args: &KvArgs) -> Result<(), Exit> {
    let name = args.of.instance()?;
    let socket = control_socket(&name)?;
    let (method, path) = args.action.request();
    let answer = ask(&socket, method, path).await?;
    let text = serde_json::to_string_pretty(&answer)
        .map_err(|error| Exit::failed("cannot show the answer", error))?;
    writeln!(std::io::stdout(), "{text}")
        .map_err(|error| Exit::failed("cannot write to stdout", error))
}

fn control_socket(name: &str) -> Result<PathBuf, Exit> {
    let failed = |error: InstanceError| Exit::Machine(error.into());
    if instance::running(name).map_err(failed)?.is_none() {
        let what = anyhow!("`{name}` is not running; start it with `pegaflow up`");
        return Err(Exit::Failed(what));
    }
    instance::control_socket(name).map_err(failed)
}

async fn ask(socket: &Path, method: Method, path: &str) -> Result<Value, Exit> {
    let failed = |error| Exit::failed("the running pegaflow does not answer", error);
    let client = reqwest::Client::builder()
        .unix_socket(socket)
        .timeout(LIMIT)
        .build()
        .map_err(failed)?;
    // The host is not used, but HTTP wants one.
    let url = format!("http://pegaflow{path}");
    let answer = client.request(method, url).send().await.map_err(failed)?;
    let status = answer.status();
    let body = answer.bytes().await.map_err(failed)?;
    let value: Value = serde_json::from_slice(&body)
        .map_err(|error| Exit::failed("the running pegaflow answers no JSON", error))?;
    if status.is_success() {
        return Ok(value);
    }
    let why = value
        .get("error")
        .and_then(Value::as_str)
        .unwrap_or_default();
    Err(Exit::Failed(anyhow!("{status}: {why}")))
}
