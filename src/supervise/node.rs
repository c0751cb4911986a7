//! One node's actor: the hands of the machine in `state.rs`.
//!
//! It waits for whatever comes first (shutdown, the guard's report, a verdict of the canary, the
//! end of an HTTP call, the clock), lets the machine decide, publishes, and then acts. It never
//! waits for anything slow itself: HTTP calls and the burial of a dead incarnation are tasks.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::sleep_until;

use crate::fleet::{FleetPublisher, NodeId, Phase};
use crate::notify::Beat;
use crate::plan::{NodePlan, SupervisorPlan};
use crate::shutdown::Shutdown;
use crate::topology::Secrets;
use crate::traffic::Traffic;

use super::cgroup::Groups;
use super::child::{Incarnation, SpawnSpec, Status, log_path};
use super::clock::Clock;
use super::gate::{Baseline, Gate, Look, StoreSessions};
use super::logs::{LogSink, LogTarget};
use super::metrics::{SupervisorMetrics, Timing};
use super::obituary::End;
use super::oom::OomWatch;
use super::orders::Order;
use super::probe::NodeClient;
use super::state::{Action, Event, Machine, Refusal};

mod publish;
mod stop;
mod watch;

use publish::Published;
use stop::StopSignals;

/// The machine has its own, shorter idea of how long a warm-up may take.
const WARM_UP_CALL: Duration = Duration::from_secs(600);

/// What all actors share.
pub struct Shared {
    pub plan: SupervisorPlan,
    pub client: NodeClient,
    pub fleet: FleetPublisher,
    pub traffic: Traffic,
    pub log_dir: PathBuf,
    pub run_dir: PathBuf,
    pub guard_program: PathBuf,
    pub console: Arc<dyn LogSink>,
    pub secrets: Secrets,
    pub store: Option<Arc<dyn StoreSessions>>,
    pub groups: Option<Groups>,
    pub metrics: SupervisorMetrics,
}

/// Where others speak to an actor.
pub struct Inbox {
    pub verdicts: mpsc::Receiver<Verdict>,
    pub orders: mpsc::Receiver<Order>,
}

/// What the canary found, for the incarnation it looked at.
#[derive(Debug, Clone)]
pub struct Verdict {
    pub incarnation: u64,
    pub finding: Finding,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    Proven,
    Vouched,
    Unpaired,
    Refused(String),
}

/// How the actor ended.
#[derive(Debug)]
pub enum Ended {
    Clean,
    LeftBehind(NodeId),
}

pub struct NodeActor {
    shared: Arc<Shared>,
    plan: NodePlan,
    inbox: Inbox,
    /// Who waits until the command that comes next is done.
    ordered: Option<oneshot::Sender<Result<(), Refusal>>>,
    beat: Beat,
    machine: Machine,
    clock: Clock,
    life: Option<Incarnation>,
    end: Option<End>,
    oom: OomWatch,
    incarnation: u64,
    reaped: u64,
    pid: Option<u32>,
    log_bytes: u64,
    /// When the tree's memory was last asked for.
    weighed: Instant,
    /// The use of its GPUs, before the last spawn and at the last look.
    baseline: Option<Baseline>,
    looked: Option<Look>,
    looks: JoinSet<Look>,
    /// HTTP calls to the incarnation; aborted with it.
    calls: JoinSet<Event>,
    /// Ends with the last lines of the log, once no process is left.
    burial: JoinSet<Vec<String>>,
    queue: VecDeque<Event>,
    published: Option<Published>,
    timing: Timing,
}

impl NodeActor {
    pub fn new(shared: Arc<Shared>, plan: NodePlan, inbox: Inbox, beat: Beat) -> Self {
        let now = Instant::now();
        let machine = Machine::new(shared.plan.clone(), plan.role, now);
        let timing = Timing::new(shared.metrics.clone());
        Self {
            shared,
            plan,
            inbox,
            ordered: None,
            beat,
            machine,
            clock: Clock::new(now),
            life: None,
            end: None,
            oom: OomWatch::new(Path::new("/")),
            incarnation: 0,
            reaped: 0,
            pid: None,
            log_bytes: 0,
            weighed: now,
            baseline: None,
            looked: None,
            looks: JoinSet::new(),
            calls: JoinSet::new(),
            burial: JoinSet::new(),
            queue: VecDeque::new(),
            published: None,
            timing,
        }
    }

    /// Runs until the shutdown has ended the node for good.
    pub async fn run(mut self, shutdown: Shutdown) -> Ended {
        let mut stop = StopSignals::new(shutdown);
        while !self.machine.is_stopped() {
            let event = match self.queue.pop_front() {
                Some(event) => event,
                None => self.wait(&mut stop).await,
            };
            let now = self.clock.read(Instant::now());
            let actions = self.machine.step(event, now);
            if actions.contains(&Action::Spawn) {
                self.incarnation += 1;
            }
            self.publish();
            self.beat.mark();
            if let Some(reply) = self.ordered.take() {
                // Whoever asked may have left.
                let _ = reply.send(Ok(()));
            }
            for action in actions {
                self.act(action).await;
            }
        }
        self.calls.shutdown().await;
        if self.reaped == self.incarnation {
            return Ended::Clean;
        }
        Ended::LeftBehind(self.plan.id)
    }

    async fn wait(&mut self, stop: &mut StopSignals) -> Event {
        loop {
            let event = tokio::select! {
                biased;
                event = stop.next() => Some(event),
                status = next_status(&mut self.life) => self.reported(status),
                Some(verdict) = self.inbox.verdicts.recv() => self.judged(verdict),
                Some(order) = self.inbox.orders.recv() => self.told(order),
                () = self.shared.traffic.drained(&self.plan.id), if self.machine.awaits_idle() => {
                    Some(Event::Idle)
                }
                Some(call) = self.calls.join_next() => call.ok(),
                Some(Ok(look)) = self.looks.join_next() => Some(self.looked(look)),
                Some(tail) = self.burial.join_next() => Some(self.buried(tail.unwrap_or_default())),
                () = sleep_until(self.clock.next_look(self.machine.deadline()).into()) => Some(self.tick()),
                () = self.beat.tick() => continue,
            };
            match event {
                Some(event) => return event,
                None => self.publish(),
            }
        }
    }

    fn told(&mut self, order: Order) -> Option<Event> {
        if let Err(refusal) = self.machine.accepts() {
            let _ = order.reply.send(Err(refusal));
            return None;
        }
        self.ordered = Some(order.reply);
        Some(Event::Command(order.command))
    }

    async fn act(&mut self, action: Action) {
        let addr = self.plan.addr;
        match action {
            Action::CheckGate => self.look(),
            Action::Spawn => self.spawn(),
            Action::Probe => {
                let client = self.shared.client.clone();
                // Once is enough: who listens keeps the port.
                let starting = self.machine.phase() == Phase::Starting;
                let root = self.life.as_ref().filter(|_| starting);
                let root = root.and_then(Incarnation::root);
                self.calls
                    .spawn(async move { Event::Probe(watch::probe(client, addr, root).await) });
            }
            Action::Pulse => {
                let client = self.shared.client.clone();
                self.calls
                    .spawn(async move { Event::Pulse(client.pulse(addr).await) });
            }
            Action::Canary => {
                let (shared, model) = (self.shared.clone(), self.plan.served_model.clone());
                self.calls.spawn(async move {
                    let limit = shared.plan.hang_timeout;
                    Event::Canary(shared.client.canary(addr, &model, limit).await)
                });
            }
            Action::WarmUp => {
                let (shared, id) = (self.shared.clone(), self.plan.id.clone());
                let model = self.plan.served_model.clone();
                self.calls.spawn(async move {
                    let warmth = shared.client.warm_up(addr, &model, WARM_UP_CALL).await;
                    // Its adapters are known to it alone.
                    if let Some(models) = shared.client.models(addr).await
                        && models.contains(&model)
                    {
                        shared.fleet.update(&id, |node| node.models = models.into());
                    }
                    Event::Warm(warmth)
                });
            }
            Action::Stop(grace) => {
                self.calls.abort_all();
                if let Some(life) = &self.life {
                    life.stop(grace).await;
                }
            }
            Action::Kill => {
                self.calls.abort_all();
                if let Some(life) = &self.life {
                    life.kill().await;
                }
            }
            Action::KillGuard => {
                if let Some(life) = &mut self.life {
                    life.kill_guard();
                }
            }
        }
    }

    fn look(&mut self) {
        let gate = Gate {
            node: self.plan.id.clone(),
            addr: self.plan.addr,
            gpus: self.plan.gpus.clone(),
            incarnation: self.incarnation,
            baseline: self.baseline.clone(),
            store: self.shared.store.clone(),
        };
        self.looks.abort_all();
        self.looks = JoinSet::new();
        if gate.is_slow() {
            self.looks.spawn(gate.look_in_time());
        } else {
            let event = self.looked(gate.look());
            self.queue.push_back(event);
        }
    }

    fn looked(&mut self, look: Look) -> Event {
        let obstacle = look.obstacle.clone();
        let told = self
            .looked
            .as_ref()
            .is_some_and(|last| last.obstacle.is_some());
        if let (Some(what), false) = (&obstacle, told) {
            tracing::info!(node = %self.plan.id, "waits before its start: {what}");
        }
        self.looked = Some(look);
        Event::Gate(obstacle)
    }

    fn spawn(&mut self) {
        self.timing.spawning(Instant::now());
        let look = self.looked.take();
        if let Some(what) = look.as_ref().and_then(|look| look.obstacle.as_ref()) {
            tracing::warn!(node = %self.plan.id, "is started although {what}");
        }
        self.baseline = look.map(|look| look.baseline);
        self.calls.abort_all();
        self.calls = JoinSet::new();
        self.end = None;
        self.log_bytes = 0;
        self.weighed = Instant::now();
        let mut env = self.plan.env.clone();
        env.insert("PEGAFLOW_NODE".into(), self.plan.id.to_string());
        env.insert("PEGAFLOW_INCARNATION".into(), self.incarnation.to_string());
        let spec = SpawnSpec {
            guard_program: &self.shared.guard_program,
            run_dir: &self.shared.run_dir,
            argv: &self.plan.argv,
            env,
            cpus: &self.plan.cpus,
            numa: &self.plan.numa,
            group: self.shared.groups.as_ref().map(|all| all.of(&self.plan.id)),
            log: LogTarget {
                node: self.plan.id.clone(),
                path: log_path(&self.shared.log_dir, &self.plan.id),
                max_bytes: self.shared.plan.log_bytes,
                max_files: self.shared.plan.log_files,
                console: self.shared.console.clone(),
                secrets: self.shared.secrets.clone(),
            },
        };
        match Incarnation::spawn(spec) {
            Ok(life) => self.life = Some(life),
            Err(error) => {
                let program = self.shared.guard_program.display();
                let why = format!("cannot start the guard {program}: {error}");
                self.reaped = self.incarnation;
                self.queue.push_back(Event::Exited(why));
                self.queue.push_back(Event::Reaped(None));
            }
        }
    }
}

async fn next_status(life: &mut Option<Incarnation>) -> Status {
    match life {
        Some(life) => life.next().await,
        None => std::future::pending().await,
    }
}
