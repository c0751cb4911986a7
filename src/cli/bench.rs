//! `pegaflow bench [URL]`: a load on any OpenAI endpoint, and what it felt like.

mod compare;

use std::fmt::Display;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use clap::{Args, Subcommand};
use serde::Serialize;

use super::client::print;
use super::{Exit, Seat};
use crate::bench::{
    self, Api, BenchError, Endpoint, Lengths, Load, Pace, Report, Slo, Trace, Wanted,
};
use crate::observe::LogFormat;

/// Where a key is looked for.
const KEY: &str = "OPENAI_API_KEY";
/// The most clients of a closed load.
const MOST_CLIENTS: usize = 4096;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: Option<Kind>,
    #[command(flatten)]
    one: OneArgs,
    /// How log lines look on stderr
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Human, env = "PEGAFLOW_LOG_FORMAT")]
    pub log_format: LogFormat,
}

#[derive(Debug, Subcommand)]
enum Kind {
    /// Start two topologies on this machine in turn, give both the same loads, and print how they compare
    Compare(Box<compare::CompareArgs>),
}

#[derive(Debug, Args)]
struct OneArgs {
    /// Where the OpenAI API is, without /v1. A key for it is taken from OPENAI_API_KEY
    #[arg(default_value = "http://127.0.0.1:8000")]
    url: String,
    /// What to write in `model`; the first that the endpoint names
    #[arg(long)]
    model: Option<String>,
    /// How many requests; without it 100, or all of a trace
    #[arg(long, short = 'n', value_parser = clap::value_parser!(u32).range(1..=bench::MOST as i64))]
    requests: Option<u32>,
    /// Send as many a second, at the random times of a Poisson process, however many are under way; `inf`: all at once
    #[arg(long, value_name = "PER_SECOND", conflicts_with = "concurrency")]
    rate: Option<f64>,
    /// Send as many at a time: each client waits for its answer before it asks again. 8 where there is no --rate, and
    /// no trace that says when
    #[arg(long, short = 'c', value_name = "CLIENTS")]
    concurrency: Option<usize>,
    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What requests look like.
#[derive(Debug, Args)]
struct ShapeArgs {
    /// Which endpoint
    #[arg(long, value_enum, default_value_t = Api::Completions)]
    api: Api,
    /// Tokens of a prompt: 512, or evenly between two: 100-900
    #[arg(long, default_value = "512", value_name = "TOKENS")]
    input: Lengths,
    /// Tokens of an answer, likewise
    #[arg(long, default_value = "128", value_name = "TOKENS")]
    output: Lengths,
    /// How many tokens at their beginning prompts have in common
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    shared_prefix: u32,
    /// How many such beginnings there are
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    prefixes: u32,
    /// How even the random times of --rate are: 1 is a Poisson process, 100 nearly a clock, less than 1 comes in bursts
    #[arg(long, default_value_t = 1.0, value_name = "SHAPE")]
    burstiness: f64,
    /// How many requests make a conversation: each repeats what was said before it
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    turns: u32,
    /// From an answer to the next question of its conversation
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = humantime::parse_duration)]
    think: Duration,
    /// Ask what was recorded in this file: ShareGPT's JSON, Mooncake's JSON lines, or Azure's CSV
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input", "output", "shared_prefix", "prefixes"])]
    trace: Option<PathBuf>,
    /// Of a trace, leave out what has more tokens, prompt and answer together
    #[arg(
        long,
        default_value_t = 1_000_000,
        value_name = "TOKENS",
        requires = "trace"
    )]
    longest: u32,
    /// Send what a trace tells the time of so many times as fast
    #[arg(long, default_value_t = 1.0, value_name = "TIMES", requires = "trace")]
    speed: f64,
    /// The same seed makes the same requests at the same times
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What a good answer keeps, like ttft=500ms,tpot=50ms: counts those that do (goodput)
    #[arg(long, value_name = "LIMITS")]
    slo: Option<Slo>,
    /// For a whole answer
    #[arg(long, default_value = "10m", value_name = "TIME", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Let the model end answers early. Without this `ignore_eos` is sent, which vLLM knows and others may refuse
    #[arg(long)]
    allow_early_end: bool,
}

/// Where the report goes.
#[derive(Debug, Args)]
struct OutputArgs {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Write the report as JSON to this file as well
    #[arg(long, value_name = "FILE")]
    output_json: Option<PathBuf>,
    /// Write the report as one HTML page with plots to this file as well
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl ShapeArgs {
    /// What was recorded, if that is wanted. `requests`: at most.
    fn trace(&self, requests: usize) -> Result<Option<Arc<Trace>>, Exit> {
        let Some(file) = &self.trace else {
            return Ok(None);
        };
        let (turns, longest) = (self.turns as usize, self.longest);
        let wanted = Wanted {
            requests,
            turns,
            longest,
        };
        let trace = Trace::read(file, wanted).map_err(|error| Exit::Usage(error.into()))?;
        if trace.left_out > 0 {
            let (left_out, name) = (trace.left_out, &trace.name);
            tracing::warn!(
                "{left_out} of {name} left out: too long, or no question with an answer"
            );
        }
        Ok(Some(Arc::new(trace)))
    }

    /// As a trace tells it, if it does.
    fn recorded(&self, trace: Option<&Arc<Trace>>) -> Result<Option<Pace>, Exit> {
        let speed = self.speed;
        if !(speed.is_finite() && speed > 0.0) {
            return Err(usage(format!("--speed {speed}: it has to be above 0")));
        }
        let is_timed = trace.is_some_and(|trace| trace.is_timed);
        Ok(is_timed.then_some(Pace::Recorded { speed }))
    }

    fn load(&self, requests: usize, pace: Pace, trace: Option<Arc<Trace>>) -> Result<Load, Exit> {
        let burstiness = self.burstiness;
        if !(0.01..=1e6).contains(&burstiness) {
            return Err(usage(format!(
                "--burstiness {burstiness}: it has to be from 0.01 to 1000000"
            )));
        }
        if self.shared_prefix > 0 && self.shared_prefix >= self.input.least() {
            let (shared, input) = (self.shared_prefix, self.input);
            return Err(usage(format!(
                "--shared-prefix {shared} leaves nothing of a prompt of --input {input} tokens"
            )));
        }
        Ok(Load {
            requests: trace.as_ref().map_or(requests, |trace| trace.requests()),
            pace,
            input: self.input,
            output: self.output,
            shared_prefix: self.shared_prefix,
            prefixes: self.prefixes as usize,
            burstiness,
            turns: self.turns as usize,
            think: self.think,
            trace,
            seed: self.seed,
        })
    }

    async fn endpoint(&self, url: &str, model: Option<&str>) -> Result<Endpoint, Exit> {
        let key = std::env::var(KEY).ok().filter(|key| !key.is_empty());
        let model = model.map(str::to_owned);
        let found = Endpoint::find(url, key.as_deref(), model, self.api, self.timeout).await;
        let mut endpoint = found.map_err(exit)?;
        endpoint.ignore_eos = !self.allow_early_end;
        Ok(endpoint)
    }
}

impl OneArgs {
    fn load(&self) -> Result<Load, Exit> {
        let all = if self.shape.trace.is_some() {
            bench::MOST
        } else {
            100
        };
        let requests = self.requests.map_or(all, |requests| requests as usize);
        let trace = self.shape.trace(requests)?;
        let recorded = self.shape.recorded(trace.as_ref())?;
        let pace = match (self.rate, self.concurrency, recorded) {
            (Some(rate), ..) => open(rate)?,
            (None, None, Some(recorded)) => recorded,
            (None, None, None) => Pace::Closed { clients: 8 },
            (None, Some(clients @ 1..=MOST_CLIENTS), _) => Pace::Closed { clients },
            (None, Some(clients), _) => {
                let range = format!("from 1 to {MOST_CLIENTS}");
                return Err(usage(format!(
                    "--concurrency {clients}: it has to be {range}"
                )));
            }
        };
        self.shape.load(requests, pace, trace)
    }
}

fn open(rate: f64) -> Result<Pace, Exit> {
    match rate > 0.0 {
        true => Ok(Pace::Open { per_second: rate }),
        false => Err(usage(format!("--rate {rate}: it has to be above 0"))),
    }
}

fn usage(text: String) -> Exit {
    Exit::Usage(anyhow!(text))
}

pub async fn bench(seat: Seat, args: BenchArgs) -> Result<(), Exit> {
    match args.command {
        Some(Kind::Compare(args)) => compare::compare(seat, *args).await,
        None => one(seat, args.one).await,
    }
}

async fn one(seat: Seat, args: OneArgs) -> Result<(), Exit> {
    let load = args.load()?;
    let stop = seat.shutdown.graceful().clone();
    let found = args.shape.endpoint(&args.url, args.model.as_deref());
    let Some(endpoint) = stop.run_until_cancelled(found).await else {
        return Err(Exit::Interrupted);
    };
    let endpoint = endpoint?;
    tracing::info!("{load}; model {} at {}", endpoint.model, args.url);
    let report = run(&seat, &endpoint, &load, args.shape.slo.as_ref()).await?;
    args.output.write(&report, &report.html())?;
    match (report.interrupted, report.ok) {
        (true, _) => Err(Exit::Interrupted),
        (_, 0) => Err(Exit::Failed(anyhow!("no request was answered"))),
        _ => Ok(()),
    }
}

/// One load on one endpoint; a person at a terminal sees how far it is.
async fn run(
    seat: &Seat,
    endpoint: &Endpoint,
    load: &Load,
    slo: Option<&Slo>,
) -> Result<Report, Exit> {
    let is_watched = std::io::stderr().is_terminal();
    let shown = is_watched.then(|| seat.console.progress("requests"));
    let requests = load.requests;
    let told = move |done: usize| {
        if let Some(shown) = &shown {
            shown.set_message(&format!("{done} of {requests}"));
        }
    };
    let report = bench::run(endpoint, load, slo, seat.shutdown.graceful(), told).await;
    report.map_err(exit)
}

impl OutputArgs {
    fn write<R: Serialize + Display>(&self, report: &R, page: &str) -> Result<(), Exit> {
        if let Some(file) = &self.output_json {
            write(file, &json(report)?)?;
        }
        if let Some(file) = &self.html {
            write(file, page)?;
        }
        match self.json {
            true => print(json(report)?),
            false => print(report.to_string()),
        }
    }
}

fn exit(error: BenchError) -> Exit {
    match error {
        BenchError::Unreachable { .. } => Exit::NotRunning(error.into()),
        BenchError::Key | BenchError::NoModel { .. } => Exit::Usage(error.into()),
        BenchError::Refused { .. } | BenchError::TooLong { .. } => Exit::Failed(error.into()),
    }
}

fn json<R: Serialize>(report: &R) -> Result<String, Exit> {
    let text = serde_json::to_string_pretty(report);
    text.map(|text| text + "\n")
        .map_err(|error| Exit::failed("cannot write the report as JSON", error))
}

fn write(file: &Path, text: &str) -> Result<(), Exit> {
    let Err(error) = std::fs::write(file, text) else {
        return Ok(());
    };
    let what = format!("cannot write {}", file.display());
    Err(Exit::Failed(anyhow::Error::new(error).context(what)))
}
