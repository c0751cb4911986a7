//! `pegaflow restart`, `drain` and `undrain`: tell nodes of a running instance, and wait for the effect.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::Args;

use super::Exit;
use super::client::{Instance, Named, note, segment};
use super::status::{fetch, read};
use crate::control::{Accepted, NodeStatus, Status};

const LOOK: Duration = Duration::from_millis(100);

/// Whom a command is for.
#[derive(Debug, Args)]
struct Target {
    /// A node, or a role: prefill, decode, unified. A node's name wins over a role's
    #[arg(value_name = "NODE|ROLE")]
    target: String,
    #[command(flatten)]
    which: Named,
}

#[derive(Debug, Args)]
pub struct RestartArgs {
    #[command(flatten)]
    target: Target,
    /// One node after the other, each when the one before is ready again
    #[arg(long)]
    rolling: bool,
    /// How long running requests may take; then they break off. Default: [router] drain_timeout
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    limit: Option<Duration>,
    /// Give up waiting for a node to be ready after this; it goes on starting
    #[arg(long, value_name = "TIME", default_value = "30m", value_parser = humantime::parse_duration)]
    wait: Duration,
    /// Return when the nodes have been told
    #[arg(long, conflicts_with_all = ["rolling", "wait"])]
    no_wait: bool,
}

#[derive(Debug, Args)]
pub struct DrainArgs {
    #[command(flatten)]
    target: Target,
    /// Also the last ready node of its role
    #[arg(long)]
    force: bool,
    /// Give up waiting for running requests after this; they go on, and the drain holds
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration)]
    wait: Duration,
}

#[derive(Debug, Args)]
pub struct UndrainArgs {
    #[command(flatten)]
    target: Target,
}

pub async fn restart(args: RestartArgs) -> Result<(), Exit> {
    let instance = Instance::find(args.target.which.name.as_deref())?;
    let query = match args.limit {
        Some(limit) => format!("?limit={}ms", limit.as_millis()),
        None => String::new(),
    };
    let mut told = vec![args.target.target.clone()];
    if args.rolling {
        told = rolling(&look(&instance).await?, told);
    }
    let last = told.len();
    for (index, target) in told.iter().enumerate() {
        let accepted = tell(&instance, target, &format!("restart{query}")).await?;
        if args.no_wait {
            return Ok(());
        }
        restarted(&instance, &accepted, args.wait)
            .await
            .map_err(|exit| {
                let rest = told.get(index + 1..last).unwrap_or_default();
                match exit {
                    Exit::Failed(error) if !rest.is_empty() => {
                        Exit::Failed(anyhow!("{error:#}; left as they are: {}", rest.join(", ")))
                    }
                    exit => exit,
                }
            })?;
    }
    Ok(())
}

/// The nodes that are meant, one by one: first those that serve nothing now.
fn rolling(status: &Status, target: Vec<String>) -> Vec<String> {
    let named = |node: &&NodeStatus| target.contains(&node.name);
    let of_role = |node: &&NodeStatus| target.contains(&node.role.to_string());
    let mut nodes: Vec<_> = status.nodes.iter().filter(named).collect();
    if nodes.is_empty() {
        nodes = status.nodes.iter().filter(of_role).collect();
    }
    nodes.sort_by_key(|node| node.phase == "ready");
    if nodes.is_empty() {
        // The instance says what there is.
        return target;
    }
    nodes.iter().map(|node| node.name.clone()).collect()
}

pub async fn drain(args: DrainArgs) -> Result<(), Exit> {
    let instance = Instance::find(args.target.which.name.as_deref())?;
    let force = args.force;
    let accepted = tell(
        &instance,
        &args.target.target,
        &format!("drain?force={force}"),
    )
    .await?;
    let started = Instant::now();
    let mut shown = BTreeMap::new();
    loop {
        let status = look(&instance).await?;
        let nodes = of(&status, &accepted);
        show(&nodes, &mut shown);
        let busy: Vec<_> = nodes.iter().filter(|node| node.in_flight > 0).collect();
        if busy.is_empty() {
            return Ok(());
        }
        if started.elapsed() >= args.wait {
            let busy: Vec<_> = busy
                .iter()
                .map(|node| format!("{} ({} running)", node.name, node.in_flight))
                .collect();
            return Err(Exit::Failed(anyhow!(
                "not idle in {}: {}; they get nothing new, and go on",
                humantime::format_duration(args.wait),
                busy.join(", ")
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

pub async fn undrain(args: UndrainArgs) -> Result<(), Exit> {
    let instance = Instance::find(args.target.which.name.as_deref())?;
    let accepted = tell(&instance, &args.target.target, "undrain").await?;
    let status = look(&instance).await?;
    show(&of(&status, &accepted), &mut BTreeMap::new());
    Ok(())
}

async fn tell(instance: &Instance, target: &str, what: &str) -> Result<Accepted, Exit> {
    let path = format!("/v1/nodes/{}/{what}", segment(target));
    let answer = instance.post(&path).await?;
    let accepted: Accepted = serde_json::from_value(answer)
        .map_err(|error| Exit::failed("the running pegaflow is of another version", error))?;
    for text in &accepted.notes {
        note(text);
    }
    Ok(accepted)
}

async fn look(instance: &Instance) -> Result<Status, Exit> {
    read(fetch(instance).await?)
}

fn of<'s>(status: &'s Status, accepted: &Accepted) -> Vec<&'s NodeStatus> {
    let is_meant = |node: &&NodeStatus| accepted.nodes.iter().any(|it| it.name == node.name);
    status.nodes.iter().filter(is_meant).collect()
}

/// Says what has changed.
fn show(nodes: &[&NodeStatus], shown: &mut BTreeMap<String, String>) {
    for node in nodes {
        let text = match (node.phase.as_str(), node.in_flight) {
            ("draining", 0) => "drained".to_owned(),
            ("draining", 1) => "draining, 1 request runs".to_owned(),
            ("draining", many) => format!("draining, {many} requests run"),
            (phase, _) => phase.to_owned(),
        };
        if shown.insert(node.name.clone(), text.clone()).as_ref() != Some(&text) {
            note(&format!("{}: {text}", node.name));
        }
    }
}

/// Waits until all of them have come back.
async fn restarted(instance: &Instance, accepted: &Accepted, wait: Duration) -> Result<(), Exit> {
    let started = Instant::now();
    let mut shown = BTreeMap::new();
    loop {
        let status = look(instance).await?;
        let nodes = of(&status, accepted);
        show(&nodes, &mut shown);
        if let Some(dead) = nodes.iter().find(|node| is_given_up(node)) {
            return Err(Exit::Failed(anyhow!(
                "{} did not come back: {}, {}; `pegaflow logs {}` has the rest",
                dead.name,
                dead.phase,
                dead.reason.as_deref().unwrap_or("no reason known"),
                dead.name
            )));
        }
        let left: Vec<_> = accepted
            .nodes
            .iter()
            .filter(|before| {
                let now = nodes.iter().find(|node| node.name == before.name);
                !now.is_some_and(|now| is_back(now) && now.incarnation > before.incarnation)
            })
            .map(|node| node.name.as_str())
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        if started.elapsed() >= wait {
            return Err(Exit::Failed(anyhow!(
                "not ready after {}: {}; they go on starting, see `pegaflow status`",
                humantime::format_duration(wait),
                left.join(", ")
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// A drained node comes back drained.
fn is_back(node: &NodeStatus) -> bool {
    matches!(node.phase.as_str(), "ready" | "draining")
}

fn is_given_up(node: &NodeStatus) -> bool {
    matches!(node.phase.as_str(), "crash_loop" | "failed" | "stopped")
}
