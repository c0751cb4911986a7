//! `pegaflow logs`: what the nodes wrote, through the control API, or out of their files when the
//! instance is gone.

use std::path::Path;

use anyhow::anyhow;
use clap::Args;

use super::Exit;
use super::client::{Instance, Named, machine, name_of, note, print, segment};
use crate::control::LogFeed;
use crate::instance;
use crate::observe;
use crate::topology::OWN_LOG;

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The node; without it, all nodes, each line with its node's name. `pegaflow`: the log of a
    /// detached pegaflow itself
    node: Option<String>,
    #[command(flatten)]
    which: Named,
    /// Go on with what is written from now on, until the instance ends
    #[arg(short, long)]
    follow: bool,
    /// How many of the last lines of each node
    #[arg(short = 'n', long, default_value_t = 100)]
    lines: usize,
}

pub async fn logs(args: LogsArgs) -> Result<(), Exit> {
    let name = args.which.name.as_deref();
    let error = match open(&args, name).await {
        Ok((instance, reply)) => return pass_on(&instance, reply).await,
        Err(Exit::NotRunning(error)) => error,
        Err(exit) => return Err(exit),
    };
    let name = name.map(name_of).transpose()?;
    from_files(&args, name).map_err(|exit| match exit {
        Exit::NotRunning(files) => Exit::NotRunning(error.context(files)),
        other => other,
    })
}

async fn open(args: &LogsArgs, name: Option<&Path>) -> Result<(Instance, reqwest::Response), Exit> {
    let instance = Instance::find(name)?;
    let (lines, follow) = (args.lines, args.follow);
    let node = args.node.as_deref().map(segment).unwrap_or_default();
    let slash = if args.node.is_some() { "/" } else { "" };
    let path = format!("/v1/logs{slash}{node}?lines={lines}&follow={follow}");
    let reply = instance.stream(&path).await?;
    Ok((instance, reply))
}

async fn pass_on(instance: &Instance, mut reply: reqwest::Response) -> Result<(), Exit> {
    while let Some(text) = reply.chunk().await.map_err(|e| instance.silent(e))? {
        print(&text)?;
    }
    Ok(())
}

fn from_files(args: &LogsArgs, name: Option<String>) -> Result<(), Exit> {
    let found = match name {
        Some(name) => instance::logs_of(&name)
            .map_err(machine)?
            .map(|dir| (name, dir)),
        None => instance::last_logs().map_err(machine)?,
    };
    let Some((name, dir)) = found else {
        return Err(Exit::NotRunning(anyhow!("there are no logs")));
    };
    let failed = |error| Exit::failed("cannot read the logs", error);
    let nodes = observe::logs_in(&dir).map_err(failed)?;
    let own = match nodes.iter().any(|node| node == OWN_LOG) {
        true => format!("; `pegaflow logs {OWN_LOG}` is its own of when it ran in the background"),
        false => String::new(),
    };
    let dir_shown = dir.display();
    note(&format!(
        "{name} has no nodes now; its logs are in {dir_shown}{own}"
    ));
    let nodes = match &args.node {
        None => nodes.into_iter().filter(|node| node != OWN_LOG).collect(),
        Some(node) if nodes.contains(node) => vec![node.clone()],
        Some(node) => {
            let nodes = nodes.join(", ");
            return Err(Exit::Failed(anyhow!(
                "`{name}` has no log of `{node}`; it has logs of: {nodes}"
            )));
        }
    };
    let (_, text) = LogFeed::open(&dir, &nodes, args.lines).map_err(failed)?;
    print(&text)
}
