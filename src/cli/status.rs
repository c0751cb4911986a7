//! `pegaflow status`: one look, or one after the other.

mod table;

use std::io::IsTerminal as _;
use std::time::{Duration, SystemTime};

use clap::Args;
use console::Term;
use serde_json::Value;

use super::Exit;
use super::client::{Instance, Which, print};
use crate::control::{State, Status, rfc3339, seconds};

#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    which: Which,
    /// Look again and again, until Ctrl-C or the end of the instance
    #[arg(short, long)]
    watch: bool,
    /// From one look to the next
    #[arg(long, value_name = "TIME", default_value = "1s", requires = "watch",
          value_parser = humantime::parse_duration)]
    interval: Duration,
    /// One JSON object a look, each on one line with --watch
    #[arg(long)]
    json: bool,
}

pub async fn status(args: StatusArgs) -> Result<(), Exit> {
    let instance = Instance::find(args.which.get())?;
    let screen = Term::stdout();
    let redraws = args.watch && !args.json && screen.is_term();
    loop {
        let look = fetch(&instance).await?;
        let text = match (args.json, args.watch) {
            (true, true) => format!("{look}\n"),
            (true, false) => format!("{look:#}\n"),
            (false, _) => table::render(&read(look)?, layout(&screen)),
        };
        if redraws {
            // A screen that cannot be cleared is scrolled.
            let _ = screen.clear_screen();
        }
        print(text)?;
        if !args.watch {
            return Ok(());
        }
        tokio::time::sleep(args.interval).await;
    }
}

/// What a running instance says, or what can be said of one that does not answer yet.
pub async fn fetch(instance: &Instance) -> Result<Value, Exit> {
    if instance.is_prepared() {
        return instance.get("/v1/status").await;
    }
    if !instance.is_running()? {
        let error = anyhow::anyhow!("`{}` has ended", instance.name);
        return Err(Exit::NotRunning(error));
    }
    let info = &instance.info;
    let status = Status {
        name: instance.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: info.pid,
        state: State::Preparing,
        url: info.url.clone(),
        model: None,
        topology: std::path::absolute(&info.topology).unwrap_or_else(|_| info.topology.clone()),
        logs: None,
        started: rfc3339(info.started),
        uptime_seconds: seconds(info.started, SystemTime::now()),
        nodes: Vec::new(),
        gpus: Vec::new(),
    };
    serde_json::to_value(status).map_err(|error| Exit::failed("cannot show the status", error))
}

pub fn read(look: Value) -> Result<Status, Exit> {
    serde_json::from_value(look).map_err(|error| {
        let what = "the running pegaflow is of another version; --json shows what it says";
        Exit::failed(what, error)
    })
}

fn layout(screen: &Term) -> table::Layout {
    let is_terminal = std::io::stdout().is_terminal();
    table::Layout {
        width: is_terminal.then(|| usize::from(screen.size().1)),
        colour: console::colors_enabled(),
    }
}
