//! `pegaflow kv ...`: looks at the store of a running `pegaflow up`, over its control socket.

use clap::{Args, ValueEnum};

use super::Exit;
use super::client::{Instance, print};
use super::topology_args::TopologyArgs;

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

/// Prints the answer as JSON on stdout.
pub async fn kv(args: KvArgs) -> Result<(), Exit> {
    let instance = Instance::named(args.of.instance()?)?;
    let answer = match args.action {
        Action::Stats => instance.get("/v1/kv").await,
        Action::Namespaces => instance.get("/v1/kv/namespaces").await,
        Action::Inspect => instance.get("/v1/kv/inspect").await,
        Action::Flush => instance.post("/v1/kv/flush").await,
    }?;
    print(format!("{answer:#}\n"))
}
