//! `pegaflow router --engine`: the store that `pegaflow engine` runs says when a prompt's KV is ready.

use std::path::PathBuf;

use clap::Args;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::task::JoinSet;

use crate::cli::Exit;
use crate::cli::engine::token;
use crate::engine::remote::{self, RemoteEngine};
use crate::handoff::HandoffBoard;

#[derive(Debug, Args)]
pub(super) struct StoreArgs {
    /// The socket of `pegaflow engine` on this machine, through which the nodes share KV: it says when a prompt's KV
    /// is ready.
    #[arg(long, value_name = "SOCKET", conflicts_with = "kv_ready")]
    engine: Option<PathBuf>,
    /// A file with the engine's token; PEGAFLOW_KV_TOKEN instead of it will do.
    #[arg(long, value_name = "FILE", requires = "engine")]
    token_file: Option<PathBuf>,
}

impl StoreArgs {
    pub(super) fn is_given(&self) -> bool {
        self.engine.is_some()
    }

    /// Which store; an error for one without a token.
    pub(super) fn remote(&self) -> Result<Option<RemoteEngine>, Exit> {
        let Some(socket_path) = self.engine.clone() else {
            return Ok(None);
        };
        let token = token(self.token_file.as_deref())?;
        Ok(Some(RemoteEngine { socket_path, token }))
    }
}

/// Connects the board to the store, until the tasks are ended.
pub(super) fn follow(
    engine: RemoteEngine,
    board: HandoffBoard,
    registry: &mut Registry,
    tasks: &mut JoinSet<()>,
) {
    let connected = Gauge::default();
    registry.register(
        "pegaflow_router_engine_connected",
        "1 while the store of --engine answers; 0: decode nodes compute prompts",
        connected.clone(),
    );
    tasks.spawn(remote::follow(engine, board, connected));
}
