//! `pegaflow dashboard`: where the dashboard of a running instance is; and what `up` needs for it.

use std::net::IpAddr;
use std::sync::Arc;

use anyhow::anyhow;
use clap::Args;
use serde::Deserialize;

use super::Exit;
use super::client::{Instance, Which, print};
use crate::dashboard::Key;
use crate::instance;
use crate::plan::Plan;

/// In the instance's state directory.
const KEY_FILE: &str = "dashboard.key";

#[derive(Debug, Args)]
pub struct DashboardArgs {
    #[command(flatten)]
    which: Which,
}

#[derive(Deserialize)]
struct Answer {
    url: String,
}

pub async fn dashboard(args: DashboardArgs) -> Result<(), Exit> {
    let instance = Instance::find(args.which.get())?;
    let answer = instance.get("/v1/dashboard").await?;
    let answer: Answer = serde_json::from_value(answer)
        .map_err(|error| Exit::Failed(anyhow!("`{}` has no dashboard: {error}", instance.name)))?;
    print(answer.url + "\n")
}

/// The instance's key, and the address that has it, for a browser on this machine.
pub fn key(plan: &Plan, instance: &instance::Instance) -> Result<(Key, Arc<str>), Exit> {
    let file = instance.state_dir().join(KEY_FILE);
    let key = Key::kept_in(&file).map_err(|error| Exit::Machine(error.into()))?;
    let router = &plan.router;
    let (scheme, mut listen) = match (router.metrics_listen, &router.tls) {
        (Some(listen), _) => ("http", listen),
        (None, Some(_)) => ("https", router.listen),
        (None, None) => ("http", router.listen),
    };
    if listen.ip().is_unspecified() {
        listen.set_ip(match listen.ip() {
            IpAddr::V4(_) => IpAddr::from([127, 0, 0, 1]),
            IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    let address = format!("{scheme}://{listen}/dashboard/#key={}", key.reveal());
    Ok((key, address.into()))
}
