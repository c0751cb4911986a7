//! The topology on the command line: a file, and keys of it written differently for this run.

use std::path::PathBuf;

use anyhow::anyhow;
use clap::Args;

use super::Exit;
use crate::topology::{Surroundings, Topology};

/// What every command takes that is about a topology.
#[derive(Debug, Clone, Args)]
pub struct TopologyArgs {
    /// The topology file, for example configs/1p1d.toml; where an instance is meant that runs, its
    /// name will do.
    pub topology: PathBuf,
    /// Write a key of the topology differently: kv.capacity=16GiB, node.decode.gpus=[1],
    /// node[0].args=["--enforce-eager"]. Can be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl TopologyArgs {
    pub fn load(&self) -> Result<Topology, Exit> {
        Topology::load_with(&self.topology, &Surroundings::process(&self.set))
            .map_err(|error| Exit::Topology(error.into()))
    }

    /// The name of the instance that is meant: a file says it, anything else is one.
    pub fn instance(&self) -> Result<String, Exit> {
        let extension = self.topology.extension();
        let is_file = extension.is_some_and(|extension| extension == "toml");
        match self.topology.to_str() {
            Some(name) if !is_file && self.set.is_empty() => Ok(name.to_owned()),
            Some(name) if !is_file => Err(Exit::Topology(anyhow!(
                "--set changes a topology file, and `{name}` is the name of an instance; leave --set out, \
                 or write the .toml file"
            ))),
            _ => Topology::instance_name(&self.topology, &Surroundings::process(&self.set))
                .map_err(|error| Exit::Topology(error.into())),
        }
    }
}
