//! The nodes of `pegaflow router`, and how they are reached.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::anyhow;
use clap::Args;

use crate::cli::Exit;
use crate::fleet::{DEFAULT_POOL, Role};
use crate::plan::ExternalNode;
use crate::topology::NodeUrl;

#[derive(Debug, Args)]
pub(super) struct NodeArgs {
    /// Nodes that compute prompts, like http://10.0.0.7:8000, or https://. Can be given several times.
    #[arg(long, num_args = 1.., value_name = "URL")]
    prefill: Vec<NodeUrl>,
    /// Nodes that load a prompt's KV and generate. Can be given several times.
    #[arg(long, num_args = 1.., value_name = "URL")]
    decode: Vec<NodeUrl>,
    /// Nodes that do everything for themselves. Can be given several times.
    #[arg(long, num_args = 1.., value_name = "URL")]
    unified: Vec<NodeUrl>,
    /// A file with the API key that all these nodes ask for, which no other user may read. Without it the client's own
    /// goes there.
    #[arg(long, value_name = "FILE")]
    node_key_file: Option<PathBuf>,
    /// A file with the certificates, in PEM, of who vouches for https:// nodes. Without it whom this machine trusts.
    #[arg(long, value_name = "FILE")]
    node_ca_file: Option<PathBuf>,
}

impl NodeArgs {
    /// Named like replicas in a topology.
    pub(super) fn nodes(&self) -> Result<Vec<ExternalNode>, Exit> {
        let groups = [
            (Role::Prefill, &self.prefill),
            (Role::Decode, &self.decode),
            (Role::Unified, &self.unified),
        ];
        let mut nodes = Vec::new();
        let mut roles = BTreeMap::new();
        for (role, urls) in groups {
            for (index, url) in urls.iter().enumerate() {
                if let Some(other) = roles.insert(url, role) {
                    return Err(Exit::Usage(anyhow!(
                        "{url} is given twice (--{other} and --{role}); a node has one role"
                    )));
                }
                let id = match urls.len() {
                    1 => role.to_string(),
                    _ => format!("{role}-{index}"),
                };
                nodes.push(ExternalNode {
                    id: id.as_str().into(),
                    role,
                    pool: DEFAULT_POOL.to_owned(),
                    weight: 1,
                    url: url.clone(),
                    key_file: self.node_key_file.clone(),
                    ca_file: self.node_ca_file.clone(),
                });
            }
        }
        if self.node_ca_file.is_some() && !nodes.iter().any(|node| node.url.is_https()) {
            return Err(Exit::Usage(anyhow!(
                "--node-ca-file is for https:// nodes, and none is given; leave it out"
            )));
        }
        let lacks = match (self.prefill.is_empty(), self.decode.is_empty()) {
            (true, true) if self.unified.is_empty() => {
                "no node is given: write --prefill URL and --decode URL, or --unified URL"
            }
            (true, false) => "--decode needs --prefill beside it (or write --unified)",
            (false, true) => "--prefill needs --decode beside it (or write --unified)",
            _ => return Ok(nodes),
        };
        Err(Exit::Usage(anyhow!(lacks)))
    }
}
