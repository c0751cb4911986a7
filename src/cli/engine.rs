//! `pegaflow engine`: the store alone, for vLLM nodes with pegaflow's shim that others start on this machine.
//!
//! ```text
//! token, socket ─▶ serve ─▶ (first signal, or it was turned off) ─▶ end, and the socket goes
//! ```
//!
//! Nobody here knows when a node's processes are gone: what a node was copying when it died is free again when its
//! next life, under the same name, connects.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use axum::Router;
use axum::routing::get;
use clap::Args;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::router::{count, duration, size};
use super::{Exit, Seat};
use crate::engine::{Engine, EngineConfig};
use crate::handoff::HandoffBoard;
use crate::observe::LogFormat;
use crate::plan::{ArenaPlan, PoolPlan};
use crate::router::read_private;

/// The variable for the token; instead of a file. Nodes have it under the same name.
const TOKEN: &str = "PEGAFLOW_KV_TOKEN";
/// What is shorter can be tried out.
const LEAST_TOKEN: usize = 8;
/// The smallest store.
const LEAST: usize = 16 << 20;
/// What a store is made of.
const HUGE_PAGE: usize = 2 << 20;
/// Between two looks at whether the store is still on.
const LOOK: Duration = Duration::from_secs(1);
/// How long its thread may take to end.
const STOP: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub struct EngineArgs {
    /// Where nodes connect: PEGAFLOW_KV_SOCKET in their environment. Its directory must be there, and be nobody else's.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Host memory for KV.
    #[arg(long, default_value = "8GiB", value_name = "SIZE", value_parser = size)]
    capacity: usize,
    /// A file with what nodes must say to be let in; PEGAFLOW_KV_TOKEN instead of it will do.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// A hand-off that is open for longer fails.
    #[arg(long, default_value = "60s", value_name = "DURATION", value_parser = duration)]
    handoff_deadline: Duration,
    /// Keep a checksum of everything that is saved, and compare it at every load.
    #[arg(long)]
    verify: bool,
    /// Threads that touch the memory before it is used.
    #[arg(long, default_value = "2", value_name = "N", value_parser = count(0))]
    prefault_threads: usize,
    /// Address and port for /metrics.
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics_listen: Option<SocketAddr>,
    /// How log lines look on stderr.
    #[arg(long, value_enum, default_value_t = LogFormat::Human, env = "PEGAFLOW_LOG_FORMAT")]
    pub log_format: LogFormat,
}

impl EngineArgs {
    fn config(&self) -> Result<EngineConfig, Exit> {
        if self.capacity < LEAST {
            let least = bytesize::ByteSize(LEAST as u64);
            return Err(Exit::Usage(anyhow!("--capacity must be {least} at least")));
        }
        Ok(EngineConfig {
            socket_path: self.socket.clone(),
            token: token(self.token_file.as_deref())?,
            pools: vec![PoolPlan::only(
                (self.capacity - self.capacity % HUGE_PAGE) as u64,
            )],
            arena: ArenaPlan {
                prefault_threads: self.prefault_threads,
                verify: self.verify,
                ..ArenaPlan::default()
            },
            handoff_deadline: self.handoff_deadline,
        })
    }
}

/// What nodes and routers say to be let in: in the file, or in the variable.
pub(super) fn token(file: Option<&Path>) -> Result<String, Exit> {
    let token = match file {
        Some(file) => read_private(file).map_err(|error| {
            let what = format!("cannot read the token in {}", file.display());
            Exit::Machine(anyhow::Error::new(error).context(what))
        })?,
        None => std::env::var(TOKEN).unwrap_or_default(),
    };
    let token = token.trim();
    if token.len() < LEAST_TOKEN {
        return Err(Exit::Usage(anyhow!(
            "the store's token has {LEAST_TOKEN} characters at least: set {TOKEN}, or write --token-file FILE"
        )));
    }
    Ok(token.to_owned())
}

pub async fn engine(seat: Seat, args: EngineArgs) -> Result<(), Exit> {
    let config = args.config()?;
    let mut registry = Registry::default();
    let engine = Engine::start(config, HandoffBoard::default(), &mut registry)
        .map_err(|error| Exit::Machine(error.into()))?;
    let mut helpers = JoinSet::new();
    if let Some(listen) = args.metrics_listen {
        let listener = TcpListener::bind(listen).await.map_err(|error| {
            let what = format!("cannot listen on {listen} for metrics; is another server there?");
            Exit::Machine(anyhow::Error::new(error).context(what))
        })?;
        let figures = figures(Arc::new(registry));
        helpers.spawn(async move { axum::serve(listener, figures).await });
    }
    announce(&seat, &args);
    seat.service.ready(&Default::default());
    let outcome = run(&engine, &seat).await;
    helpers.shutdown().await;
    engine.shutdown(STOP).await;
    outcome
}

/// Until it is told to stop, or the store is turned off by a fault of its own.
async fn run(engine: &Engine, seat: &Seat) -> Result<(), Exit> {
    let end = seat.shutdown.graceful();
    while engine.is_running() {
        tokio::select! {
            () = end.cancelled() => return Ok(()),
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    Err(Exit::Failed(anyhow!(
        "the store is turned off; its log says why"
    )))
}

fn figures(registry: Arc<Registry>) -> Router {
    let answer = async move || {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        ([(http::header::CONTENT_TYPE, kind)], text)
    };
    Router::new().route("/metrics", get(answer))
}

/// On stdout, for the person and for scripts that wait for it.
fn announce(seat: &Seat, args: &EngineArgs) {
    seat.console.flush();
    let mut stdout = std::io::stdout().lock();
    // A closed stdout is no reason to stop serving.
    let _ = writeln!(
        stdout,
        "pegaflow engine listens at {}",
        args.socket.display()
    );
    let _ = stdout.flush();
}
