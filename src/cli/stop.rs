//! `pegaflow stop` and `pegaflow down`: end a running instance, without or with waiting for it.

use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::Args;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Exit;
use super::client::{Instance, Which, note};

const LOOK: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
pub struct StopArgs {
    #[command(flatten)]
    which: Which,
    /// Kill everything now; running requests break off
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub struct DownArgs {
    #[command(flatten)]
    stop: StopArgs,
    /// Give up waiting after this; it goes on stopping
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    wait: Duration,
}

/// Returns when the instance has been told.
pub async fn stop(args: StopArgs) -> Result<(), Exit> {
    let instance = Instance::find(args.which.get())?;
    tell(&instance, args.force).await?;
    note(&format!("{} is stopping", instance.name));
    Ok(())
}

/// Returns when nothing of the instance is left.
pub async fn down(args: DownArgs) -> Result<(), Exit> {
    let instance = Instance::find(args.stop.which.get())?;
    tell(&instance, args.stop.force).await?;
    let started = Instant::now();
    while instance.is_running()? {
        if started.elapsed() >= args.wait {
            let (name, pid) = (&instance.name, instance.info.pid);
            let waited = humantime::format_duration(args.wait);
            return Err(Exit::Failed(anyhow!(
                "`{name}` (pid {pid}) has not ended in {waited}; it goes on stopping, and \
                 `pegaflow down {name} --force` does not wait for requests"
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
    note(&format!("{} has stopped", instance.name));
    Ok(())
}

async fn tell(instance: &Instance, force: bool) -> Result<(), Exit> {
    if instance.is_prepared() {
        let path = if force {
            "/v1/stop?force=true"
        } else {
            "/v1/stop"
        };
        return instance.post(path).await.map(|_| ());
    }
    // It still installs or loads: only a signal reaches it. Its lock is held, so the pid is its own.
    let pid = i32::try_from(instance.info.pid).unwrap_or(i32::MAX);
    match kill(Pid::from_raw(pid), Signal::SIGTERM) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(Exit::failed("cannot signal the running pegaflow", error)),
    }
}
