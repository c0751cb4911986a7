//! From a topology file to a machine that can run it: the runtime installed, the model at hand.

use std::path::{Path, PathBuf};

use anyhow::anyhow;

use super::others::node_key;
use super::{Context, Exit};
use crate::fleet::NodeKey;
use crate::host::{self, HostSnapshot, PortRanges};
use crate::instance;
use crate::model;
use crate::plan::{Plan, PlanInputs};
use crate::runtime::{self, Guarding, Job, Runtime};
use crate::topology::{self, Launcher, ModelFacts, ModelRef, Problem, Topology, write_problems};

/// `pegaflow prepare`: does the slow, once-only part of `up`, and prints where things are.
pub async fn prepare(cx: Context) -> Result<(), Exit> {
    let topology = cx.load()?;
    let shim = tempdir(&topology.name)?;
    let outcome = async {
        instance::unpack_shim(&shim).map_err(|e| Exit::Failed(e.into()))?;
        install(&cx, &topology, &shim, None).await
    }
    .await;
    // A leftover in the temporary directory harms nobody.
    let _ = std::fs::remove_dir_all(&shim);
    let Installed {
        runtime,
        model,
        other_models,
    } = outcome?;
    if let Some(interpreter) = &runtime.interpreter {
        println!("interpreter {}", interpreter.display());
    }
    println!("model {}", model.load_from);
    for (_, model) in other_models {
        println!("model {}", model.load_from);
    }
    Ok(())
}

/// A directory that nobody else has.
pub fn tempdir(name: &str) -> Result<PathBuf, Exit> {
    let name = format!("pegaflow-{name}-{:016x}", rand::random::<u64>());
    let dir = std::env::temp_dir().join(name);
    std::fs::create_dir(&dir).map_err(|e| Exit::failed("cannot make a temporary directory", e))?;
    Ok(dir)
}

/// What `prepare` and `up` both need before anything runs.
pub struct Installed {
    pub runtime: Runtime,
    pub model: ModelFacts,
    pub other_models: Vec<(ModelRef, ModelFacts)>,
}

/// Installs the runtime and fetches the model, both of which are no-ops when done before.
/// Nothing of it outlives this process; `run_dir` goes with it if it is killed.
pub async fn install(
    cx: &Context,
    topology: &Topology,
    shim: &Path,
    run_dir: Option<PathBuf>,
) -> Result<Installed, Exit> {
    let cancel = cx.shutdown.graceful();
    let program = guard_program()?;
    let guard = &Guarding { program, run_dir };
    let interrupted = |error: anyhow::Error| {
        if cancel.is_cancelled() {
            Exit::Interrupted
        } else {
            Exit::Machine(error)
        }
    };
    let ui = cx.console.progress("runtime");
    let runtime = runtime::prepare(
        &topology.runtime,
        Job {
            ui: &ui,
            cancel,
            guard,
        },
    )
    .await
    .map_err(|error| interrupted(error.into()))?;
    drop(ui);
    tracing::info!("runtime: {}", runtime.description);
    let resolve = async |model: &ModelRef| {
        let ui = cx.console.progress("model");
        let job = Job {
            ui: &ui,
            cancel,
            guard,
        };
        let facts = model::resolve(model, &runtime, shim, job)
            .await
            .map_err(|error| interrupted(error.into()))?;
        drop(ui);
        tracing::info!("model: {}", facts.load_from);
        Ok::<_, Exit>(facts)
    };
    let model = resolve(&topology.model).await?;
    let mut other_models = Vec::new();
    for other in topology.other_models() {
        other_models.push((other.clone(), resolve(other).await?));
    }
    Ok(Installed {
        runtime,
        model,
        other_models,
    })
}

/// pegaflow itself, to be started again as a guard.
pub fn guard_program() -> Result<PathBuf, Exit> {
    std::env::current_exe()
        .map_err(|error| Exit::failed("cannot find pegaflow's own program", error))
}

/// What is shorter can be tried out, and would not be hidden in logs.
const LEAST_KEY: usize = 8;

/// The key of our own nodes, where a person chose it.
fn chosen(file: &Path) -> Result<NodeKey, Exit> {
    let key = node_key(file)?;
    match key.reveal().len() {
        LEAST_KEY.. => Ok(key),
        _ => Err(Exit::Machine(anyhow!(
            "the key of the nodes in {} is too short; write {LEAST_KEY} characters at least (`openssl rand -hex 24` makes \
             some)",
            file.display()
        ))),
    }
}

/// Nodes can listen on addresses of this machine alone.
fn own_addresses(topology: &Topology) -> Result<(), Exit> {
    let nodes = topology.nodes.iter().enumerate();
    let strange = nodes.filter_map(|(index, node)| {
        let host = Some(node.host).filter(|host| !host::is_own(*host))?;
        let key = format!("node[{index}].host");
        Some(Problem {
            place: topology.place(&key),
            key,
            kind: format!("{host} is no address of this machine; write one of those that `ip -brief address` shows"),
        })
    });
    match strange.collect::<Vec<_>>() {
        problems if problems.is_empty() => Ok(()),
        problems => Err(Exit::Machine(anyhow!(write_problems(
            topology.source.file(),
            &problems
        )))),
    }
}

/// The secrets, the paths and the ports of one run.
pub struct Run<'a> {
    topology: &'a Topology,
    run_dir: &'a Path,
    token: &'a str,
    pub node_key: NodeKey,
    ports: PortRanges,
}

impl<'a> Run<'a> {
    pub fn new(topology: &'a Topology, run_dir: &'a Path, token: &'a str) -> Result<Self, Exit> {
        let node_key = match &topology.supervisor.node_key_file {
            Some(file) => chosen(file)?,
            None => NodeKey::random(),
        };
        own_addresses(topology)?;
        let count = Plan::ports_needed(topology);
        let ports = host::claim_ports(count, &topology.fixed_ports())
            .map_err(|error| Exit::Machine(error.into()))?;
        Ok(Self {
            topology,
            run_dir,
            token,
            node_key,
            ports,
        })
    }

    /// What would be wrong whatever the runtime and the model turn out to be: no GPU, no cores.
    pub fn preflight(&self, host: &HostSnapshot) -> Result<(), Exit> {
        let model = ModelFacts {
            load_from: String::new(),
            identity: String::new(),
            config: None,
            weights: None,
        };
        self.plan(host, Launcher::Vllm("vllm".into()), model, Vec::new())
            .map(|_| ())
    }

    pub fn plan(
        &self,
        host: &HostSnapshot,
        launcher: Launcher,
        model: ModelFacts,
        other_models: Vec<(ModelRef, ModelFacts)>,
    ) -> Result<Plan, Exit> {
        let inputs = PlanInputs {
            launcher,
            model,
            other_models,
            ports: self.ports.firsts().to_vec(),
            engine_socket: instance::engine_socket(self.run_dir),
            shim_dir: instance::shim_dir(self.run_dir),
            kv_token: self.token.into(),
            node_key: self.node_key.clone(),
            run_id: format!("{:016x}", rand::random::<u64>()),
            inherited_pythonpath: std::env::var("PYTHONPATH").ok(),
            cpu_config: topology::cpu_sibling(self.topology.source.file()),
        };
        Plan::make(self.topology, host, &inputs).map_err(|error| {
            if error.lacks_machine() {
                Exit::Machine(error.into())
            } else {
                Exit::Topology(error.into())
            }
        })
    }
}
