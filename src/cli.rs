//! The command line: parse, dispatch, exit code. [`up`] is the only place where the supervisor, the
//! engine and the router meet.

mod bench;
mod client;
mod completions;
mod dashboard;
mod detach;
mod doctor;
mod engine;
mod exit;
mod init;
mod kv;
mod leftovers;
mod listen;
mod logs;
mod orders;
mod others;
mod plan;
mod prepare;
mod ready;
mod router;
mod service;
mod status;
mod stop;
mod topology_args;
mod up;

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

pub use exit::Exit;

use client::{converse, print};

use crate::observe::{self, Console, LogFormat};
use crate::shutdown::{Shutdown, SignalListener};
use crate::supervise::{GuardArgs, guard_main};
use crate::topology::Topology;
use service::Service;
use topology_args::TopologyArgs;

/// Prefill/decode-disaggregated vLLM serving on one machine.
#[derive(Debug, Parser)]
#[command(name = "pegaflow", version, about, after_help = exit::HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start everything that a topology describes and serve it until Ctrl-C; or, with --detach, in the
    /// background.
    Up(detach::UpArgs),
    /// Serve one endpoint in front of vLLM nodes that others started, and start none.
    Router(Box<router::RouterArgs>),
    /// Keep the store alone, for vLLM nodes with pegaflow's shim that others start on this machine.
    Engine(engine::EngineArgs),
    /// Install the runtime and fetch the model that a topology needs, and stop there.
    Prepare(Target),
    /// Show what `up` would run here, and start nothing: GPUs, cores, memory, command lines.
    Plan(plan::PlanArgs),
    /// Show what a running `up` is doing: its nodes, their phases, why one died.
    Status(status::StatusArgs),
    /// Show what the nodes write, or wrote before the end.
    Logs(logs::LogsArgs),
    /// Restart a node of a running `up`, or all of a role, after their requests; also one that was
    /// given up.
    Restart(orders::RestartArgs),
    /// Send a node nothing new; it finishes what it has, and stays up.
    Drain(orders::DrainArgs),
    /// Let a drained node serve again.
    Undrain(orders::UndrainArgs),
    /// Tell a running `up` to finish running requests and end.
    Stop(stop::StopArgs),
    /// Stop, and wait until nothing is left.
    Down(stop::DownArgs),
    /// Look at everything that `up` needs of this machine, and say what to do about what is wrong.
    Doctor(doctor::DoctorArgs),
    /// Look at the KV store of a running `up`, or empty it.
    Kv(kv::KvArgs),
    /// Print where the dashboard of a running `up` is: an address for a browser, with the key that it wants.
    Dashboard(dashboard::DashboardArgs),
    /// Put a load on any OpenAI endpoint, and report TTFT, TPOT and ITL.
    Bench(Box<bench::BenchArgs>),
    /// Write a topology for this machine: its GPUs in pairs, or its CPUs.
    Init(init::InitArgs),
    /// Print a script that completes pegaflow's commands and options in a shell.
    Completions(completions::CompletionsArgs),
    /// Print the JSON schema of a topology file, for editors.
    Schema(SchemaArgs),
    /// The process between pegaflow and one node (internal).
    #[command(name = "__guard", hide = true)]
    Guard(GuardArgs),
    /// What `up --detach` starts (internal).
    #[command(name = detach::COMMAND, hide = true)]
    Detached(Target),
    /// The process that `doctor` measures one GPU with (internal).
    #[command(name = "__probe-gpu", hide = true)]
    ProbeGpu(doctor::ProbeArgs),
}

#[derive(Debug, Args)]
struct SchemaArgs {
    /// Print every key as a table for people instead.
    #[arg(long)]
    markdown: bool,
}

#[derive(Debug, Args)]
struct Target {
    #[command(flatten)]
    topology: TopologyArgs,
    /// How log lines look on stderr.
    #[arg(long, value_enum, default_value_t = LogFormat::Human, env = "PEGAFLOW_LOG_FORMAT")]
    log_format: LogFormat,
}

/// Runs the program and says how it ended.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Guard(args) => guard_main(args),
        Command::Up(args) if args.detach => detach::launch(&args),
        Command::Up(args) => run(&args.target, here(args.target.log_format), up::up),
        Command::Detached(target) => run(&target, apart(&target), up::up),
        Command::Router(args) => {
            let format = args.log_format;
            seated(here(format), |seat| router::router(seat, *args))
        }
        Command::Engine(args) => {
            let format = args.log_format;
            seated(here(format), |seat| engine::engine(seat, args))
        }
        Command::Bench(args) => {
            let format = args.log_format;
            seated(here(format), |seat| bench::bench(seat, *args))
        }
        Command::Prepare(target) => run(&target, here(target.log_format), prepare::prepare),
        Command::Status(args) => ended(converse(status::status(args))),
        Command::Logs(args) => ended(converse(logs::logs(args))),
        Command::Restart(args) => ended(converse(orders::restart(args))),
        Command::Drain(args) => ended(converse(orders::drain(args))),
        Command::Undrain(args) => ended(converse(orders::undrain(args))),
        Command::Stop(args) => ended(converse(stop::stop(args))),
        Command::Down(args) => ended(converse(stop::down(args))),
        Command::Dashboard(args) => ended(converse(dashboard::dashboard(args))),
        Command::Kv(args) => ended(converse(kv::kv(args))),
        Command::Plan(args) => ended(plan::plan(&args)),
        Command::Doctor(args) => ended(doctor::doctor(args)),
        Command::ProbeGpu(args) => doctor::probe_main(&args),
        Command::Init(args) => ended(init::init(&args)),
        Command::Completions(args) => ended(print(completions::script(&args, Cli::command()))),
        Command::Schema(args) => ended(print(match args.markdown {
            true => crate::topology::reference(),
            false => format!("{:#}\n", crate::topology::schema()),
        })),
    }
}

/// Whether pegaflow takes this command line, which begins with the program's name; for tests of what the documentation
/// shows. Runs nothing.
pub fn try_parse(words: impl IntoIterator<Item = String>) -> Result<(), clap::Error> {
    Cli::try_parse_from(words).map(drop)
}

/// The end of a command that has no console.
fn ended(outcome: Result<(), Exit>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(exit) => {
            exit.report();
            exit.code()
        }
    }
}

/// What a command that goes on for a while has at hand.
struct Seat {
    console: Console,
    shutdown: Shutdown,
    service: Arc<Service>,
}

/// The same, and a topology.
struct Context {
    topology: TopologyArgs,
    console: Console,
    shutdown: Shutdown,
    service: Arc<Service>,
}

impl Context {
    /// Reads the topology. What its variables gave is not shown from here on.
    fn load(&self) -> Result<Topology, Exit> {
        let topology = self.topology.load()?;
        self.console.hide(&topology.secrets);
        Ok(topology)
    }
}

/// A console at the terminal.
fn here(format: LogFormat) -> anyhow::Result<Console> {
    Ok(observe::init(format)?)
}

/// One of a process that nobody sees.
fn apart(target: &Target) -> anyhow::Result<Console> {
    let launcher = detach::leave()?;
    Ok(observe::init_detached(target.log_format, launcher)?)
}

fn run<F>(
    target: &Target,
    console: anyhow::Result<Console>,
    command: impl FnOnce(Context) -> F,
) -> ExitCode
where
    F: Future<Output = Result<(), Exit>>,
{
    seated(console, |seat| {
        command(Context {
            topology: target.topology.clone(),
            console: seat.console,
            shutdown: seat.shutdown,
            service: seat.service,
        })
    })
}

fn seated<F>(console: anyhow::Result<Console>, command: impl FnOnce(Seat) -> F) -> ExitCode
where
    F: Future<Output = Result<(), Exit>>,
{
    let console = match console {
        Ok(console) => console,
        Err(error) => {
            // Nothing to log with yet.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = start(&console, command);
    let code = match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(exit) => {
            console.error(&format!("error: {exit}"));
            exit.code()
        }
    };
    console.flush();
    code
}

fn start<F>(console: &Console, command: impl FnOnce(Seat) -> F) -> Result<(), Exit>
where
    F: Future<Output = Result<(), Exit>>,
{
    let shutdown = Shutdown::default();
    let _signals = SignalListener::install(shutdown.clone())
        .map_err(|error| Exit::failed("cannot listen for signals", error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Exit::failed("cannot start the async runtime", error))?;
    let seat = Seat {
        console: console.clone(),
        shutdown,
        service: Arc::new(Service::from_env()),
    };
    let outcome = runtime.block_on(command(seat));
    // Whatever still runs lost its owner: do not wait for it.
    runtime.shutdown_background();
    outcome
}
