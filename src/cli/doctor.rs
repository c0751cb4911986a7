//! `pegaflow doctor`: looks at everything that a topology needs of this machine, and says what to do.

mod finding;
mod machine;
mod probes;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;
use clap::Args;
use serde_json::json;

use super::client::{converse, print};
use super::prepare::{Run, guard_program, tempdir};
use super::topology_args::TopologyArgs;
use super::{Exit, plan};
use crate::host::{self, HostSnapshot};
use crate::runtime::{Guarding, Job, NoProgress, cache_root};
use crate::shutdown::{Shutdown, SignalListener};
use crate::topology::{RuntimeSettings, Topology};
use crate::{instance, runtime};

use finding::Finding;
use finding::Status::{Failed, NotChecked};
use machine::{Room, Wanted};
pub use probes::{ProbeArgs, probe_main};

const GIB: u64 = 1 << 30;
/// How long the measurement of one GPU may take where nobody says otherwise.
const GPU_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// What is to run here; without it, what most topologies need is looked at
    topology: Option<PathBuf>,
    /// Write a key of the topology differently, as for `up`
    #[arg(long, value_name = "KEY=VALUE", requires = "topology")]
    set: Vec<String>,
    /// How long the measurement of one GPU may take
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    gpu_limit: Duration,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn doctor(args: DoctorArgs) -> Result<(), Exit> {
    let json = args.json;
    let topology = args.topology.map(|topology| TopologyArgs {
        topology,
        set: args.set,
    });
    let topology = topology.as_ref().map(TopologyArgs::load).transpose()?;
    let limit = args.gpu_limit;
    let findings = converse(with_children(async |job| {
        findings(topology.as_ref(), limit, job).await
    }))?;
    let failed = findings.iter().filter(|finding| finding.failed()).count();
    print(if json {
        format!("{:#}\n", json!({ "failed": failed, "findings": findings }))
    } else {
        finding::text(&findings)
    })?;
    match failed {
        0 => Ok(()),
        _ => Err(Exit::Machine(anyhow!(
            "{failed} of {} checks failed",
            findings.len()
        ))),
    }
}

/// Does it with children of its own, until a signal comes.
async fn with_children<T>(work: impl AsyncFnOnce(Job<'_>) -> Result<T, Exit>) -> Result<T, Exit> {
    let shutdown = Shutdown::default();
    let _signals = SignalListener::install(shutdown.clone())
        .map_err(|error| Exit::failed("cannot listen for signals", error))?;
    let guard = Guarding {
        program: guard_program()?,
        run_dir: None,
    };
    let done = work(Job {
        ui: &NoProgress,
        cancel: shutdown.graceful(),
        guard: &guard,
    });
    let done = done.await;
    match shutdown.graceful().is_cancelled() {
        true => Err(Exit::Interrupted),
        false => done,
    }
}

async fn findings(
    topology: Option<&Topology>,
    gpu_limit: Duration,
    job: Job<'_>,
) -> Result<Vec<Finding>, Exit> {
    let (host, mut all) = match host::look_within(plan::LOOK_LIMIT) {
        Ok(host) => {
            let wanted = Wanted::of(topology, &host);
            let mut all = vec![machine::driver(&host, wanted)];
            all.extend(machine::gpus(&host));
            all.push(machine::hugepages(&host, wanted));
            all.push(machine::memlock(&host, wanted));
            (host, all)
        }
        Err(error) => {
            let remedy = "see whether nvidia-smi answers; reboot if it does not";
            let found = Finding::new("driver", Failed(remedy.to_owned()), error.to_string());
            (HostSnapshot::default(), vec![found])
        }
    };
    all.push(machine::shm(host::space(Path::new("/dev/shm"))));
    for room in rooms(topology) {
        all.push(room.judge(host::space(&room.path)));
    }
    all.push(ports(topology));
    if let Some(topology) = topology
        && !host.cpus.is_empty()
    {
        all.push(fits(topology, &host));
    }
    all.push(vllm(topology, job).await?);
    if host.gpus.is_empty() {
        let remedy = "run this on the machine that has the GPUs";
        let what = "not checked: no GPU";
        all.push(Finding::new("copy", NotChecked(remedy.to_owned()), what));
    }
    for gpu in host.gpus.iter().filter(|gpu| !gpu.mig) {
        all.push(probes::gpu(gpu, &host, gpu_limit, job).await);
    }
    Ok(all)
}

/// Measures the GPUs with these indices, one after the other: they share the memory's bandwidth.
pub async fn probe(
    host: &HostSnapshot,
    chosen: &BTreeSet<u32>,
) -> Result<Vec<(u32, Finding)>, Exit> {
    with_children(async |job| {
        let mut found = Vec::new();
        let gpus = host.gpus.iter().filter(|gpu| chosen.contains(&gpu.index));
        for gpu in gpus.filter(|gpu| !gpu.mig) {
            found.push((gpu.index, probes::gpu(gpu, host, GPU_LIMIT, job).await));
        }
        Ok(found)
    })
    .await
}

fn rooms(topology: Option<&Topology>) -> Vec<Room> {
    let managed = topology
        .is_some_and(|topology| matches!(topology.runtime, RuntimeSettings::Managed { .. }));
    let cache = cache_root().map(|path| Room {
        check: "disk: cache",
        path,
        least: GIB,
        // A managed runtime, and a small model.
        good: if managed { 10 * GIB } else { 2 * GIB },
        remedy: "make room, or move the cache with PEGAFLOW_CACHE_DIR",
    });
    let logs = instance::Places::from_env().ok().map(|places| Room {
        check: "disk: logs",
        path: places.state,
        least: GIB / 4,
        good: GIB,
        remedy: "make room, or move the logs with XDG_STATE_HOME",
    });
    cache.into_iter().chain(logs).collect()
}

/// Whether the router's port, and enough for nodes, can be had.
fn ports(topology: Option<&Topology>) -> Finding {
    const CHECK: &str = "ports";
    let runs = |topology: &Topology| matches!(instance::running(&topology.name), Ok(Some(_)));
    if topology.is_some_and(runs) {
        return Finding::ok(CHECK, "in use by the `up` of this topology, which runs");
    }
    let listen = topology.map(|topology| topology.router.listen);
    if let Some(listen) = listen
        && let Err(error) = std::net::TcpListener::bind(listen)
    {
        let remedy =
            "end what listens there (`ss -ltnp` names it), or write another [router] listen";
        let what = format!("cannot listen on {listen}: {error}");
        return Finding::new(CHECK, Failed(remedy.to_owned()), what);
    }
    let (count, avoid) = topology.map_or((2, Vec::new()), |topology| {
        (
            crate::plan::Plan::ports_needed(topology),
            topology.fixed_ports(),
        )
    });
    match host::claim_ports(count, &avoid) {
        Ok(_) => {
            let of = listen.map_or_else(String::new, |listen| format!("{listen} and "));
            Finding::ok(CHECK, format!("{of}ranges for {count} nodes are free"))
        }
        Err(error) => {
            let remedy = "end what holds so many ports of 127.0.0.1 (`ss -ltnp`)";
            Finding::new(CHECK, Failed(remedy.to_owned()), error.to_string())
        }
    }
}

/// Whether a plan can be made of it.
fn fits(topology: &Topology, host: &HostSnapshot) -> Finding {
    const CHECK: &str = "topology";
    let run_dir = match instance::run_dir(&topology.name) {
        Ok(run_dir) => run_dir,
        Err(error) => {
            let remedy = "set what the message names";
            return Finding::new(CHECK, Failed(remedy.to_owned()), error.to_string());
        }
    };
    let run = Run::new(topology, &run_dir, "");
    match run.and_then(|run| run.preflight(host)) {
        Ok(()) => Finding::ok(CHECK, "fits this machine; `pegaflow plan` shows how"),
        Err(exit) => {
            let remedy = "the text says what to change, for each problem";
            Finding::new(CHECK, Failed(remedy.to_owned()), exit.to_string())
        }
    }
}

async fn vllm(topology: Option<&Topology>, job: Job<'_>) -> Result<Finding, Exit> {
    const CHECK: &str = "vllm";
    let settings = topology.map_or(&RuntimeSettings::Path, |topology| &topology.runtime);
    let runtime = match runtime::find(settings) {
        Ok(Some(runtime)) => runtime,
        Ok(None) => {
            let remedy = "`pegaflow prepare` installs it".to_owned();
            let what = "the managed runtime is not installed yet";
            return Ok(Finding::new(CHECK, NotChecked(remedy), what));
        }
        Err(error) => {
            let remedy = "what the text says".to_owned();
            let status = match topology {
                Some(_) => Failed(remedy),
                // Without a topology nobody has said where it is.
                None => NotChecked("name the topology: pegaflow doctor TOPOLOGY".to_owned()),
            };
            return Ok(Finding::new(CHECK, status, error.to_string()));
        }
    };
    let shim = tempdir("doctor")?;
    let found = match instance::unpack_shim(&shim) {
        Ok(()) => probes::vllm(&runtime, &shim, job).await,
        Err(error) => {
            let remedy = "make room in the temporary directory (TMPDIR)";
            Finding::new(CHECK, Failed(remedy.to_owned()), error.to_string())
        }
    };
    // A leftover in the temporary directory harms nobody.
    let _ = std::fs::remove_dir_all(&shim);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_somebody_has_is_told() {
        let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = holder.local_addr().unwrap();
        let text = format!(
            "device = \"cpu\"\nmodel = \"o/n\"\n[router]\nlisten = \"{listen}\"\n[[node]]\nrole = \"unified\"\n"
        );
        let topology = Topology::parse(&text, Path::new("t.toml")).unwrap();
        assert!(ports(Some(&topology)).failed());
        drop(holder);
        assert!(!ports(Some(&topology)).failed());
        assert!(!ports(None).failed());
        // Looking at ports takes none.
        assert!(std::net::TcpListener::bind(listen).is_ok());
    }
}
