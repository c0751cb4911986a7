//! Nodes that others started, watched for as long as requests may go there.

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Exit;
use crate::plan::ExternalNode;
use crate::supervise::{ExternalDeps, watch_external};

/// The watch; ended by [`Watching::stop`], or with the program.
pub struct Watching {
    end: CancellationToken,
    task: JoinHandle<reqwest::Result<()>>,
}

impl Watching {
    pub fn start(nodes: Vec<ExternalNode>, deps: ExternalDeps) -> Self {
        let end = CancellationToken::new();
        let task = tokio::spawn(watch_external(nodes, deps, end.clone()));
        Self { end, task }
    }

    pub async fn stop(self) -> Result<(), Exit> {
        self.end.cancel();
        self.task
            .await
            .map_err(|error| Exit::failed("the watch of the nodes failed", error))?
            .map_err(|error| Exit::failed("cannot look at the nodes", error))
    }
}
