//! `pegaflow plan`: what `up` would run here, without starting, installing or downloading anything.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::client::converse;
use super::doctor;
use super::prepare::Run;
use super::topology_args::TopologyArgs;
use super::{Exit, print};
use crate::plan::{PlanErrors, Report};
use crate::topology::{Launcher, ModelFacts, ModelRef, Problem, TopologyErrors};
use crate::{host, instance, model, runtime};

/// Drivers that sleep take seconds; longer is a fault.
pub const LOOK_LIMIT: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    topology: TopologyArgs,
    /// Measure each chosen GPU's way to the store's memory, as `doctor` does (seconds per GPU)
    #[arg(long)]
    probe: bool,
    /// Print JSON, also for what stands against it
    #[arg(long)]
    json: bool,
}

pub fn plan(args: &PlanArgs) -> Result<(), Exit> {
    let outcome = report(&args.topology, args.probe);
    if !args.json {
        return print(outcome?.text());
    }
    match outcome {
        Ok(report) => {
            let text = serde_json::to_string_pretty(&report)
                .map_err(|error| Exit::failed("cannot write the plan as JSON", error))?;
            print(format!("{text}\n"))
        }
        Err(exit) => {
            print(format!("{:#}\n", refusal(&exit)))?;
            Err(exit)
        }
    }
}

fn report(args: &TopologyArgs, probe: bool) -> Result<Report, Exit> {
    let topology = args.load()?;
    let machine = |error: anyhow::Error| Exit::Machine(error);
    let run_dir = instance::run_dir(&topology.name).map_err(|error| machine(error.into()))?;
    let run = Run::new(&topology, &run_dir, "")?;
    let host = host::look_within(LOOK_LIMIT).map_err(|error| machine(error.into()))?;
    run.preflight(&host)?;
    let mut notes = Vec::new();
    let launcher = match runtime::find(&topology.runtime).map_err(|error| machine(error.into()))? {
        Some(runtime) => runtime.launcher,
        None => {
            notes.push("the runtime is not installed yet; `pegaflow prepare` does that");
            Launcher::Python(PathBuf::from("python"))
        }
    };
    let mut is_absent = false;
    let mut find = |model: &ModelRef| {
        let found = model::find(model).map_err(|error| machine(error.into()))?;
        is_absent |= found.is_none();
        Ok::<_, Exit>(found.unwrap_or_else(|| absent(model)))
    };
    let model = find(&topology.model)?;
    let others = topology.other_models().into_iter();
    let others = others
        .map(|model| Ok((model.clone(), find(model)?)))
        .collect::<Result<Vec<_>, Exit>>()?;
    if is_absent {
        notes.push(
            "the model is not here yet, so that its memory is not known; `pegaflow prepare` fetches it",
        );
    }
    let plan = run.plan(&host, launcher, model, others)?;
    let mut report = Report::new(&plan, &host, &topology.secrets);
    notes.into_iter().for_each(|note| report.warn(note));
    if probe {
        let chosen = plan.nodes.iter().flat_map(|node| node.gpus.iter().copied());
        let chosen: BTreeSet<u32> = chosen.collect();
        for (gpu, found) in converse(doctor::probe(&host, &chosen))? {
            report.probed(gpu, found.what.clone());
            if let Some(remedy) = found.status.remedy() {
                report.warn(format!("GPU {gpu}: {} -> {remedy}", found.what));
            }
        }
    }
    Ok(report)
}

/// What is known of a model that is not here.
fn absent(model: &ModelRef) -> ModelFacts {
    let name = match model {
        ModelRef::BuiltinTiny => "builtin:tiny".to_owned(),
        ModelRef::Path(path) => path.to_string_lossy().into_owned(),
        ModelRef::HuggingFace(id) => id.clone(),
    };
    ModelFacts {
        load_from: name.clone(),
        identity: name,
        config: None,
        weights: None,
    }
}

/// Why there is no plan, for a program.
fn refusal(exit: &Exit) -> Value {
    let (code, message) = (exit.number(), exit.to_string());
    let error = exit.error();
    let problems = error
        .and_then(|error| error.downcast_ref::<PlanErrors>())
        .map(|errors| problems(&errors.problems))
        .or_else(|| match error?.downcast_ref::<TopologyErrors>()? {
            TopologyErrors::Invalid { problems: all, .. } => Some(problems(all)),
            TopologyErrors::Read { .. } => None,
        });
    json!({ "error": {
        "exit_code": code,
        "message": message,
        "problems": problems.unwrap_or_default(),
    }})
}

fn problems<K: std::fmt::Display>(problems: &[Problem<K>]) -> Vec<Value> {
    let problem = |problem: &Problem<K>| {
        json!({
            // Of the file, or of a --set argument.
            "argument": problem.place.argument,
            "line": problem.place.line,
            "column": problem.place.column,
            "key": problem.key,
            "message": problem.kind.to_string(),
        })
    };
    problems.iter().map(problem).collect()
}
