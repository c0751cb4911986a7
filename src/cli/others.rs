//! Nodes that others started: how they are reached, and the watch for as long as requests may go there.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Exit;
use crate::fleet::NodeKey;
use crate::plan::ExternalNode;
use crate::reach::{NodeTls, Reach, Reaches, Roots};
use crate::router::{read_open, read_private};
use crate::supervise::{ExternalDeps, watch_external};

/// The watch; ended by [`Watching::stop`], or with the program.
pub struct Watching {
    end: CancellationToken,
    task: JoinHandle<()>,
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
            .map_err(|error| Exit::failed("the watch of the nodes failed", error))
    }
}

/// The one API key in a file that no other user may read.
pub fn node_key(file: &Path) -> Result<NodeKey, Exit> {
    let key = read_private(file).map_err(anyhow::Error::new);
    let key = key.and_then(|text| Ok(NodeKey::parse(&text)?));
    key.map_err(|error| {
        let what = format!("cannot use the key of the nodes in {}", file.display());
        Exit::Machine(error.context(what))
    })
}

/// How the nodes are reached. Every file is read once, before anything starts.
pub fn reaches(nodes: &[ExternalNode]) -> Result<Reaches, Exit> {
    let mut known: HashMap<Option<PathBuf>, Roots> = HashMap::new();
    let mut reaches = Vec::new();
    for node in nodes {
        let mut reach = Reach::default();
        if let Some(file) = &node.key_file {
            reach = reach.with_key(&node_key(file)?);
        }
        if node.url.is_https() {
            let roots = match known.get(&node.ca_file) {
                Some(roots) => roots.clone(),
                None => roots(node)?,
            };
            let tls = NodeTls::new(node.url.host(), &node.url.authority(), &roots);
            let tls =
                tls.map_err(|error| Exit::Machine(anyhow!("{} ({}): {error}", node.id, node.url)))?;
            reach = reach.with_tls(tls);
            known.insert(node.ca_file.clone(), roots);
        }
        reaches.push((node.id.clone(), reach));
    }
    Ok(Reaches::new(reaches))
}

/// Who may vouch for the node.
fn roots(node: &ExternalNode) -> Result<Roots, Exit> {
    let (roots, what) = match &node.ca_file {
        Some(file) => (
            read_open(file)
                .map_err(anyhow::Error::new)
                .and_then(|text| Ok(Roots::from_pem(&text)?)),
            format!("cannot use the certificates in {}", file.display()),
        ),
        None => (
            Roots::of_machine().map_err(anyhow::Error::new),
            format!("cannot tell whom to trust for {} ({})", node.id, node.url),
        ),
    };
    roots.map_err(|error| Exit::Machine(error.context(what)))
}
