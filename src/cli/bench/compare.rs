//! `pegaflow bench compare A.toml B.toml`: two topologies on this machine in turn, under the same loads.
//!
//! ```text
//! round 1:  B up ─▶ (what can it do?) ─▶ loads ─▶ B down ─▶ A up ─▶ loads ─▶ A down
//! round 2:  A up ─▶ loads ─▶ A down ─▶ B up ─▶ loads ─▶ B down             and so on in turn
//! ```
//!
//! The instances are started as `pegaflow up --detach` starts them, under names and at ports of their own, so that
//! whatever else runs here is left alone; and ended as `pegaflow down` does, also when this is interrupted.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::anyhow;
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Command;

use super::{OutputArgs, Seat, ShapeArgs, open, run, usage};
use crate::bench::{Capacity, Compared, Comparison, Endpoint, Load, Pace, Report};
use crate::cli::Exit;
use crate::instance;
use crate::topology::{Surroundings, Topology};

/// How much of what the second topology can do is asked of both, where no rate is given.
const SHARES: [f64; 3] = [0.3, 0.5, 0.7];
/// How that is found out: so many requests, so many at a time.
const CAPACITY_REQUESTS: usize = 32;
const CAPACITY_CLIENTS: usize = 8;
/// Before anything is measured: the first requests of an instance are slower.
const WARM_UP: usize = 8;
const MOST_RATES: usize = 16;
/// For a start that is broken off.
const LAST_WORDS: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// The topology that is to be judged
    a: PathBuf,
    /// The one that it is judged by
    b: PathBuf,
    /// Requests of each load and round
    #[arg(long, short = 'n', default_value_t = 150, value_parser = clap::value_parser!(u32).range(1..=crate::bench::MOST as i64))]
    requests: u32,
    /// Requests a second, as Poisson processes: several loads, one after the other. Without it, 30, 50 and 70 % of
    /// what B does with 8 at a time
    #[arg(long, value_name = "PER_SECOND", value_delimiter = ',')]
    rate: Vec<f64>,
    /// How often each topology is started and measured, in turn
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Write a key of both topologies differently, as for `up`
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) async fn compare(seat: Seat, args: CompareArgs) -> Result<(), Exit> {
    if args.rate.len() > MOST_RATES {
        return Err(usage(format!("--rate: at most {MOST_RATES} of them")));
    }
    // All of this before anything is started: it may be wrong.
    let trace = args.shape.trace(args.requests as usize)?;
    let recorded = args.shape.recorded(trace.as_ref())?;
    let mut paces = Vec::new();
    for rate in &args.rate {
        match open(*rate)? {
            pace if rate.is_finite() => paces.push(pace),
            _ => return Err(usage(format!("--rate {rate}: it has to be a number"))),
        }
    }
    if paces.is_empty() {
        paces.extend(recorded);
    }
    let pace = Pace::Closed { clients: 1 };
    let shape = args.shape.load(args.requests as usize, pace, trace)?;
    let sides = [
        Side::new(&args.a, "a", &args.set)?,
        Side::new(&args.b, "b", &args.set)?,
    ];
    let mut bench = Bench {
        comparison: Comparison {
            names: sides.each_ref().map(|side| side.shown.clone()),
            rounds: args.rounds as usize,
            capacity: None,
            loads: Vec::new(),
            interrupted: false,
        },
        seat: &seat,
        args: &args,
        shape,
        paces,
        sides,
    };
    let outcome = bench.rounds().await;
    let stopped = match outcome {
        Err(Exit::Interrupted) => true,
        other => {
            other?;
            false
        }
    };
    let mut comparison = bench.comparison;
    comparison.interrupted = stopped;
    comparison.loads.retain(|load| !load.rounds.is_empty());
    args.output.write(&comparison, &comparison.html())?;
    if stopped {
        return Err(Exit::Interrupted);
    }
    Ok(())
}

/// One of the two topologies.
struct Side {
    file: PathBuf,
    /// What it is called in the report.
    shown: String,
    /// What its instance is called.
    instance: String,
    set: Vec<String>,
}

impl Side {
    fn new(file: &Path, letter: &str, set: &[String]) -> Result<Self, Exit> {
        let instance = format!("bench-{letter}-{}", std::process::id());
        let mut set = set.to_vec();
        set.push(format!("name={instance:?}"));
        let topology = Topology::load_with(file, &Surroundings::process(&set))
            .map_err(|error| Exit::Topology(error.into()))?;
        if topology.router.tls.is_some() {
            let file = file.display();
            return Err(usage(format!(
                "{file}: its router speaks TLS, which bench does not; leave [router.tls] out"
            )));
        }
        let shown = file.file_stem().unwrap_or(file.as_os_str());
        Ok(Self {
            file: file.to_owned(),
            shown: shown.to_string_lossy().into_owned(),
            instance,
            set,
        })
    }
}

struct Bench<'a> {
    seat: &'a Seat,
    args: &'a CompareArgs,
    sides: [Side; 2],
    /// Of every load; it has no pace of its own.
    shape: Load,
    /// One load each; none until they are known.
    paces: Vec<Pace>,
    comparison: Comparison,
}

impl Bench<'_> {
    async fn rounds(&mut self) -> Result<(), Exit> {
        for round in 0..self.comparison.rounds {
            let order = if round % 2 == 0 { [1, 0] } else { [0, 1] };
            let mut reports = [Vec::new(), Vec::new()];
            for place in order {
                let Some(side) = self.sides.get(place) else {
                    continue;
                };
                let shown = &side.shown;
                tracing::info!("round {} of {}: {shown}", round + 1, self.comparison.rounds);
                let found = self.on(place).await?;
                if let Some(slot) = reports.get_mut(place) {
                    *slot = found;
                }
            }
            let [first, second] = reports;
            for (number, pair) in first.into_iter().zip(second).enumerate() {
                if self.comparison.loads.len() <= number {
                    let (rate, rounds) = (self.rate(number), Vec::new());
                    self.comparison.loads.push(Compared { rate, rounds });
                }
                if let Some(load) = self.comparison.loads.get_mut(number) {
                    load.rounds.push(pair.into());
                }
            }
        }
        Ok(())
    }

    /// All loads on one side, which runs for as long as that takes.
    async fn on(&mut self, place: usize) -> Result<Vec<Report>, Exit> {
        let Some(side) = self.sides.get(place) else {
            return Ok(Vec::new());
        };
        let (file, instance) = (side.file.clone(), side.instance.clone());
        let url = up(self.seat, &file, &side.set).await;
        let outcome = match url {
            Ok(url) => self.loads(&url).await,
            Err(exit) => Err(exit),
        };
        let ended = down(&instance).await;
        let reports = outcome?;
        ended?;
        Ok(reports)
    }

    async fn loads(&mut self, url: &str) -> Result<Vec<Report>, Exit> {
        let stop = self.seat.shutdown.graceful().clone();
        let shape = &self.args.shape;
        let endpoint = stop.run_until_cancelled(shape.endpoint(url, None)).await;
        let endpoint = endpoint.ok_or(Exit::Interrupted)??;
        // Other prompts than those that are measured: the store holds none of those yet.
        let warm_up = self.load(WARM_UP, Pace::Closed { clients: 2 }, 1);
        self.measured(&endpoint, &warm_up).await?;
        if self.paces.is_empty() {
            self.find_rates(&endpoint).await?;
        }
        let mut reports = Vec::new();
        for (number, pace) in self.paces.iter().enumerate() {
            // Each load has prompts of its own, the same for both sides and in every round.
            let salt = 1_000 * (number as u64 + 1);
            let load = self.load(self.shape.requests, *pace, salt);
            reports.push(self.measured(&endpoint, &load).await?);
        }
        Ok(reports)
    }

    /// Like those that are measured. Of a trace the recorded ones are measured only.
    fn load(&self, requests: usize, pace: Pace, salt: u64) -> Load {
        Load {
            requests,
            pace,
            trace: match requests == self.shape.requests {
                true => self.shape.trace.clone(),
                false => None,
            },
            seed: self.shape.seed.wrapping_add(salt),
            ..self.shape.clone()
        }
    }

    /// Requests a second, on average.
    fn rate(&self, number: usize) -> f64 {
        match self.paces.get(number) {
            Some(Pace::Open { per_second }) => *per_second,
            Some(Pace::Recorded { speed }) => {
                let trace = self.shape.trace.as_ref();
                let seconds = trace.map_or(0.0, |trace| trace.lasts().as_secs_f64());
                self.shape.requests as f64 * speed / seconds.max(1e-9)
            }
            _ => 0.0,
        }
    }

    /// What the first one that runs can do, which is the second topology.
    async fn find_rates(&mut self, endpoint: &Endpoint) -> Result<(), Exit> {
        let pace = Pace::Closed {
            clients: CAPACITY_CLIENTS,
        };
        let load = self.load(CAPACITY_REQUESTS, pace, 2);
        let report = self.measured(endpoint, &load).await?;
        let most = report.requests_per_second;
        self.comparison.capacity = Some(Capacity {
            requests_per_second: most,
            clients: CAPACITY_CLIENTS,
        });
        let pace = |share| Pace::Open {
            per_second: two_digits(share * most),
        };
        self.paces = SHARES.map(pace).to_vec();
        Ok(())
    }

    async fn measured(&self, endpoint: &Endpoint, load: &Load) -> Result<Report, Exit> {
        let report = run(self.seat, endpoint, load, self.args.shape.slo.as_ref()).await?;
        let Report { ttft, itl, .. } = &report;
        tracing::info!(
            "{load}: {} answers, TTFT mean {:.1} ms, ITL p99 {:.1} ms",
            report.ok,
            ttft.mean,
            itl.p99
        );
        match (report.interrupted, report.ok) {
            (true, _) => Err(Exit::Interrupted),
            (_, 0) => Err(Exit::Failed(anyhow!(
                "no request of this load was answered: {load}"
            ))),
            _ => Ok(report),
        }
    }
}

/// A rate that can be given again with `--rate`.
fn two_digits(rate: f64) -> f64 {
    let power = 10_f64.powf(rate.log10().floor() - 1.0);
    match power.is_normal() {
        // Divided, since 0.1 is no binary fraction.
        true if power < 1.0 => (rate / power).round() / (1.0 / power).round(),
        true => (rate / power).round() * power,
        false => rate,
    }
}

/// `pegaflow up --detach`; returns where it serves. What it says on the way is for the person, too.
async fn up(seat: &Seat, file: &Path, set: &[String]) -> Result<String, Exit> {
    let listen = free_address()?;
    let mut command = pegaflow()?;
    command.args(["up", "--detach"]).arg(file);
    for set in set.iter().chain([&format!("router.listen=\"{listen}\"")]) {
        command.arg("--set").arg(set);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command
        .spawn()
        .map_err(|error| Exit::failed("cannot start pegaflow", error))?;
    let ended = seat
        .shutdown
        .graceful()
        .run_until_cancelled(child.wait())
        .await;
    let Some(status) = ended else {
        // It ends what it has started when it is told; a terminal has told it already.
        if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = tokio::time::timeout(LAST_WORDS, child.wait()).await;
        return Err(Exit::Interrupted);
    };
    let status = status.map_err(|error| Exit::failed("cannot wait for pegaflow", error))?;
    match status.success() {
        true => Ok(format!("http://{listen}")),
        false => {
            let file = file.display();
            Err(Exit::Failed(anyhow!("{file} did not come up ({status})")))
        }
    }
}

/// `pegaflow down`, if anything is left.
async fn down(instance: &str) -> Result<(), Exit> {
    let failed = |error: String| {
        Exit::Failed(anyhow!(
            "`{instance}` may still run: {error}; `pegaflow down {instance} --force` ends it"
        ))
    };
    match instance::running(instance) {
        Ok(None) => return Ok(()),
        Ok(Some(_)) => {}
        Err(error) => return Err(failed(error.to_string())),
    }
    let mut command = pegaflow()?;
    command.args(["down", instance, "--wait", "2m"]);
    command.stdin(Stdio::null()).stderr(Stdio::null());
    // A Ctrl-C at the terminal is for this process; the end of the instance goes on.
    command.process_group(0);
    let status = command
        .status()
        .await
        .map_err(|error| failed(error.to_string()))?;
    match status.success() {
        true => Ok(()),
        false => Err(failed(format!("`pegaflow down` ended with {status}"))),
    }
}

fn pegaflow() -> Result<Command, Exit> {
    let program = std::env::current_exe()
        .map_err(|error| Exit::failed("cannot find pegaflow's own program", error))?;
    Ok(Command::new(program))
}

/// Nobody listens there now.
fn free_address() -> Result<SocketAddr, Exit> {
    let found = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|it| it.local_addr());
    found.map_err(|error| Exit::failed("cannot find a free port", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_short() {
        for (rate, short) in [
            (1.2345, 1.2),
            (0.0456, 0.046),
            (123.4, 120.0),
            (0.999, 1.0),
            (7.0, 7.0),
        ] {
            assert_eq!(two_digits(rate), short, "{rate}");
        }
        assert_eq!(two_digits(0.0), 0.0);
    }
}
