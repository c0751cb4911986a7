//! `pegaflow status`: one look, or one after the other.

mod screen;
mod table;

use std::time::{Duration, SystemTime};

use clap::Args;
use console::Term;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use super::Exit;
use super::client::{Instance, Which, print};
use crate::control::{State, Status, rfc3339, seconds};
use screen::Screen;

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
    if !args.watch {
        let look = fetch(&instance).await?;
        return print(match args.json {
            true => format!("{look:#}\n"),
            false => table::render(&read(look)?, layout()),
        });
    }
    tokio::select! {
        outcome = watch(&instance, &args) => outcome,
        // Between two looks, so that the terminal is left as it was.
        stopped = signalled() => {
            stopped.map_err(|error| Exit::failed("cannot listen for signals", error))
        }
    }
}

async fn watch(instance: &Instance, args: &StatusArgs) -> Result<(), Exit> {
    let mut screen = Screen::of_stdout().filter(|_| !args.json);
    let mut gap = "";
    loop {
        let look = fetch(instance).await?;
        print(match (&mut screen, args.json) {
            (_, true) => format!("{look}\n"),
            (Some(screen), _) => screen.frame(&table::render(&read(look)?, layout())),
            (None, _) => format!("{gap}{}", table::render(&read(look)?, layout())),
        })?;
        gap = "\n";
        tokio::time::sleep(args.interval).await;
    }
}

async fn signalled() -> std::io::Result<()> {
    let mut ended = signal(SignalKind::terminate())?;
    let mut hung_up = signal(SignalKind::hangup())?;
    tokio::select! {
        pressed = tokio::signal::ctrl_c() => return pressed,
        _ = ended.recv() => {}
        _ = hung_up.recv() => {}
    }
    Ok(())
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

fn layout() -> table::Layout {
    let screen = Term::stdout();
    table::Layout {
        width: screen.is_term().then(|| usize::from(screen.size().1)),
        colour: console::colors_enabled(),
    }
}
