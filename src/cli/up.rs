//! `pegaflow up`: the composition root. Here, and only here, the engine, the router and the
//! supervisor are put together.
//!
//! ```text
//! load ─▶ lock ─▶ bind ─▶ preflight ─▶ install ─▶ plan ─▶ run ─▶ drain ─▶ stop nodes ─▶ stop engine
//!                                                          │
//!                                 first start failed ──────┴─▶ (same way down), exit 1
//! ```
//!
//! The way down is the way up in reverse: the router takes nothing new and drains, then the nodes
//! stop, then the engine (whose arena they had mapped), then the run directory goes.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::task::{JoinError, JoinHandle, JoinSet};

use super::leftovers::{end_orphans, host_that_fits};
use super::listen::{self, Credentials};
use super::others::{self, Watching};
use super::prepare::{Run, guard_program, install};
use super::ready;
use super::{Context, Exit};
use crate::control::{About, Control, ControlDeps, Devices};
use crate::dashboard::{Dashboard, DashboardDeps};
use crate::engine::{Engine, EngineConfig};
use crate::fleet::{FleetPublisher, FleetWatch, NodeId, NodeKey, NodeView};
use crate::handoff::HandoffBoard;
use crate::host::{self, GpuWatcher};
use crate::instance::{Instance, InstanceError, InstanceInfo};
use crate::live::Live;
use crate::observe::{Console, GpuCollector, LogFile, NodeCollector};
use crate::plan::{self, Device, ExternalNode, Plan};
use crate::reach::Reaches;
use crate::router::{self, Listeners, RouterDeps, RouterMetrics};
use crate::shutdown::Shutdown;
use crate::supervise::{
    self, CanaryPlan, ExternalDeps, Groups, LogSink, StoreSessions, SupervisorDeps,
    SupervisorMetrics,
};
use crate::topology::{OWN_LOG, Topology};
use crate::traffic::Traffic;

/// How long the engine's thread may take to end once its sessions are gone.
const ENGINE_STOP: Duration = Duration::from_secs(5);
/// For one request of the canary, and no longer than a start may take: while a node keeps it waiting, no other
/// node is examined.
const CANARY_DEADLINE: Duration = Duration::from_secs(120);
/// How long a node waits for a partner before it serves whole requests.
const PARTNER_GRACE: Duration = Duration::from_secs(60);

pub async fn up(cx: Context) -> Result<(), Exit> {
    let topology = cx.load()?;
    let mut info = InstanceInfo::starting(&cx.topology.topology);
    let mut instance = Instance::acquire(&topology.name, &info).map_err(|error| match error {
        InstanceError::AlreadyRunning { .. } => Exit::Running(error.into()),
        _ => Exit::Machine(error.into()),
    })?;
    let own_log = own_log(&cx, &topology, &instance)?;
    end_orphans(&cx, &instance).await?;
    let (listen, metrics) = (topology.router.listen, topology.router.metrics_listen);
    let name = format!("[router] listen = \"{listen}\"");
    let listeners = listen::listen(listen, name, metrics).await?;
    let credentials = Credentials::open(&topology.router)?;
    let reaches = others::reaches(&plan::others(&topology))?;
    info.url = Some(topology.router.url());
    instance
        .set_info(&info)
        .map_err(|error| Exit::Machine(error.into()))?;

    let token = format!("{:032x}", rand::random::<u128>());
    let run_dir = instance.dir().to_owned();
    // Holds the nodes' ports until the end.
    let run = Run::new(&topology, &run_dir, &token)?;
    let groups = Groups::find(topology.supervisor.cgroup, &topology.name, &run_dir)
        .map_err(|error| Exit::Machine(error.into()))?;
    if let Some(groups) = &groups {
        groups.end_leftovers().await;
    }
    // Before the slow part, so that a person does not wait for a download to learn it.
    let host = host_that_fits(&cx, &instance, |host| run.preflight(host)).await?;
    let shim = instance
        .unpack_shim()
        .map_err(|error| Exit::Machine(error.into()))?;
    cx.service.preparing();
    cx.console.underway(instance.name(), &own_log);
    let found = install(&cx, &topology, &shim, Some(instance.dir().to_owned())).await?;
    let launcher = found.runtime.launcher;
    let plan = run.plan(&host, launcher, found.model, found.other_models)?;
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    cx.console.print(&plan.table());

    let node_key = run.node_key.clone();
    let own = Own {
        instance: &instance,
        token,
        node_key,
        groups,
        credentials,
        reaches,
    };
    let outcome = serve(&cx, &plan, listeners, own).await;
    let released = instance.release();
    outcome?;
    released.map_err(|error| Exit::failed("the run directory was not removed", error))
}

/// Where pegaflow's own log is, once it runs apart from any terminal.
fn own_log(cx: &Context, topology: &Topology, instance: &Instance) -> Result<PathBuf, Exit> {
    let path = instance.log_dir().join(format!("{OWN_LOG}.log"));
    if cx.console.is_detached() {
        let limits = &topology.supervisor;
        let file = LogFile::new(path.clone(), limits.log_bytes, limits.log_files)
            .with_stdio()
            .map_err(|error| Exit::failed("cannot leave the terminal", error))?;
        cx.console.log_to(file);
        let version = env!("CARGO_PKG_VERSION");
        let (pid, file) = (std::process::id(), topology.source.file().display());
        tracing::info!("pegaflow {version}, pid {pid}, runs {file} in the background");
    }
    Ok(path)
}

/// What is this run's alone.
struct Own<'a> {
    instance: &'a Instance,
    /// What nodes show to the engine.
    token: String,
    /// What the nodes want to be shown.
    node_key: NodeKey,
    groups: Option<Groups>,
    credentials: Credentials,
    /// How the nodes of others are reached.
    reaches: Reaches,
}

/// Runs the plan until it is told to stop, and takes everything down again.
async fn serve(cx: &Context, plan: &Plan, listeners: Listeners, own: Own<'_>) -> Result<(), Exit> {
    let Own {
        instance,
        token,
        node_key,
        groups,
        credentials: Credentials { keys, admin, tls },
        reaches,
    } = own;
    listen::take_files(&plan.router);
    let board = HandoffBoard::default();
    let mut registry = Registry::default();
    let metrics = RouterMetrics::register(&mut registry);
    let restarts = SupervisorMetrics::register(&mut registry);
    let engine = start_engine(plan, instance, token, &board, &mut registry)?;
    let own = plan.nodes.iter().map(|node| {
        NodeView::pending(node.id.clone(), node.role, node.addr)
            .in_pool(&node.pool)
            .weighing(node.weight)
            .serving([&node.served_model])
    });
    let others = plan.others.iter().map(ExternalNode::view);
    let fleet = FleetPublisher::new(own.chain(others));
    registry.register_collector(Box::new(NodeCollector(fleet.watch())));

    let mut gpus: Vec<u32> = plan
        .nodes
        .iter()
        .flat_map(|node| node.gpus.clone())
        .collect();
    gpus.sort_unstable();
    gpus.dedup();
    let gpus =
        GpuWatcher::start(gpus).map_err(|error| Exit::failed("cannot watch the GPUs", error))?;
    registry.register_collector(Box::new(GpuCollector(gpus.watch())));

    let traffic = Traffic::default();
    let started = Arc::new(AtomicBool::new(false));
    let others = || plan.others.iter().map(|node| &node.id);
    let known = plan.nodes.iter().map(|node| &node.id);
    let (orders, mut desk) = supervise::orders(known.chain(others()));
    let others = desk.split(others());
    let (key, address) = super::dashboard::key(plan, instance)?;
    let control = ControlDeps {
        about: Arc::new(about(cx, plan, instance)),
        fleet: fleet.watch(),
        traffic: traffic.clone(),
        orders,
        shutdown: cx.shutdown.clone(),
        started: started.clone(),
        gpus: gpus.watch(),
        dashboard: address,
        engine: engine.clone(),
    };
    let live = Live::on();
    let pages = DashboardDeps {
        control: control.clone(),
        live: live.clone(),
        metrics: metrics.clone(),
        key,
    };
    let dashboard = Dashboard::start(pages, cx.shutdown.graceful().clone());
    let control = Control::start(&instance.control_socket(), control)
        .map_err(|error| Exit::Machine(error.into()))?;

    // The nodes stop after the router has drained, so they follow a shutdown of their own.
    let nodes = Shutdown::default();
    let supervisor = SupervisorDeps {
        nodes: plan.nodes.clone(),
        plan: plan.supervisor.clone(),
        canary: canary(plan),
        fleet: fleet.clone(),
        board: board.clone(),
        traffic: traffic.clone(),
        orders: desk,
        log_dir: instance.log_dir().to_owned(),
        run_dir: instance.dir().to_owned(),
        guard_program: guard_program()?,
        console: Arc::new(NodeLines(cx.console.clone())),
        vitals: cx.service.vitals.clone(),
        node_key: Some(node_key.clone()),
        secrets: plan.secrets.clone(),
        metrics: restarts,
        groups,
        store: engine.clone().map(|engine| Arc::new(Sessions(engine)) as _),
    };
    let router = RouterDeps {
        plan: plan.router.clone(),
        fleet: fleet.watch(),
        board,
        traffic,
        keys,
        admin,
        tls,
        node_key: Some(node_key),
        reaches: reaches.clone(),
        metrics,
        registry: Arc::new(registry),
        vitals: cx.service.vitals.clone(),
        live,
        dashboard: Some(dashboard.routes),
    };
    let watch = ExternalDeps {
        health_interval: plan.supervisor.health_interval,
        fleet: fleet.clone(),
        traffic: supervisor.traffic.clone(),
        vitals: cx.service.vitals.clone(),
        reaches,
        orders: others,
    };
    let watching = Watching::start(plan.others.clone(), watch);
    let supervisor = part(cx, supervise::run(supervisor, nodes.clone()));
    let router = part(cx, router::serve(listeners, router, cx.shutdown.clone()));
    let mut helpers = JoinSet::new();
    let (service, told) = (cx.service.clone(), fleet.watch());
    let end = cx.shutdown.graceful().clone();
    helpers.spawn(async move { service.watch(told, end).await });
    helpers.spawn(pass_on_force(cx.shutdown.clone(), nodes.clone()));
    if let Some(engine) = &engine {
        helpers.spawn(forget_the_gone(engine.clone(), fleet.watch()));
    }

    let outcome = ready::watch(cx, plan, fleet.watch(), instance, &started).await;

    cx.shutdown.begin();
    let routed = router.await;
    nodes.begin();
    let supervised = supervisor.await;
    let watched = watching.stop().await;
    helpers.shutdown().await;
    // It ends with the shutdown that has begun.
    let _ = dashboard.sampler.await;
    control.shutdown().await;
    if let Some(engine) = engine.and_then(Arc::into_inner) {
        engine.shutdown(ENGINE_STOP).await;
    }
    // A part that failed ends the rest: its error says more than "interrupted".
    ended("router", routed)?;
    ended("supervisor", supervised)?;
    watched?;
    outcome
}

fn start_engine(
    plan: &Plan,
    instance: &Instance,
    token: String,
    board: &HandoffBoard,
    registry: &mut Registry,
) -> Result<Option<Arc<Engine>>, Exit> {
    if !plan.kv.enabled {
        return Ok(None);
    }
    if let Some(note) = &plan.kv.page_note {
        tracing::info!("{note}");
    }
    // The nodes inherit it, and register the arena with their GPUs.
    if plan.device == Device::Cuda
        && let Err(error) = host::raise_memlock()
    {
        tracing::warn!(%error, "cannot raise the limit of lockable memory (ulimit -l)");
    }
    let config = EngineConfig {
        socket_path: instance.engine_socket(),
        token,
        pools: plan.kv.pools.clone(),
        arena: plan.kv.arena.clone(),
        handoff_deadline: plan.kv.handoff_deadline,
    };
    let engine = Engine::start(config, board.clone(), registry)
        .map_err(|error| Exit::Machine(error.into()))?;
    Ok(Some(Arc::new(engine)))
}

fn about(cx: &Context, plan: &Plan, instance: &Instance) -> About {
    let devices = plan.nodes.iter().map(|node| {
        let (gpus, cpus) = (node.gpus.clone(), node.cpus.clone());
        (node.id.clone(), Devices { gpus, cpus })
    });
    let file = &cx.topology.topology;
    About {
        name: plan.name.clone(),
        url: plan.router.url(),
        model: Vec::from_iter(plan.served_names()).join(", "),
        topology: std::path::absolute(file).unwrap_or_else(|_| file.clone()),
        logs: instance.log_dir().to_owned(),
        has_own_log: cx.console.is_detached(),
        started: instance.started(),
        drain_timeout: plan.router.drain_timeout,
        devices: devices.collect::<BTreeMap<_, _>>(),
    }
}

fn canary(plan: &Plan) -> CanaryPlan {
    CanaryPlan {
        connector: plan.router.connector,
        block_size: plan.model.block_size,
        tolerance: plan.kv.canary_logprob_tolerance,
        deadline: CANARY_DEADLINE.min(plan.supervisor.start_timeout),
        partner_grace: PARTNER_GRACE,
    }
}

/// Spawns a part that lasts as long as the fleet. If it ends on its own, everything ends.
fn part<E: Send + 'static>(
    cx: &Context,
    run: impl Future<Output = Result<(), E>> + Send + 'static,
) -> JoinHandle<Result<(), E>> {
    let end = cx.shutdown.graceful().clone().drop_guard();
    tokio::spawn(async move {
        let _end = end;
        run.await
    })
}

fn ended<E>(name: &str, result: Result<Result<(), E>, JoinError>) -> Result<(), Exit>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let error = match result {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => anyhow::Error::new(error),
        Err(panic) => anyhow::Error::new(panic),
    };
    Err(Exit::Failed(error.context(format!("the {name} failed"))))
}

/// The nodes' output on pegaflow's console.
struct NodeLines(Console);

impl LogSink for NodeLines {
    fn line(&self, node: &NodeId, line: &str) {
        self.0.node_line(node.as_str(), line);
    }
}

/// The store's sessions, for who wants to start a node's next life.
struct Sessions(Arc<Engine>);

impl StoreSessions for Sessions {
    fn is_closed(&self, node: &NodeId, incarnation: u64) -> bool {
        !self.0.is_connected(node, incarnation)
    }
}

/// Tells the engine which incarnations have no process left, so that their slots can be reused.
async fn forget_the_gone(engine: Arc<Engine>, mut fleet: FleetWatch) {
    let mut told: HashMap<NodeId, u64> = HashMap::new();
    loop {
        let now = fleet.latest();
        for node in now.nodes() {
            if told.get(&node.id).copied().unwrap_or(0) < node.reaped {
                engine.incarnation_gone(&node.id, node.reaped);
                told.insert(node.id.clone(), node.reaped);
            }
        }
        if fleet.changed().await.is_err() {
            return;
        }
    }
}

async fn pass_on_force(from: Shutdown, to: Shutdown) {
    from.forced().cancelled().await;
    to.begin();
    to.advance();
}
