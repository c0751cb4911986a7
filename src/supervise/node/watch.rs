//! What the actor sees, turned into the machine's events.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use crate::fleet::Phase;

use super::super::child::{Incarnation, Status};
use super::super::guard::{processes, shm};
use super::super::obituary::{self, End, Exit};
use super::super::probe::NodeClient;
use super::super::state::{Event, Probe};
use super::super::sweep;
use super::{Finding, NodeActor, Verdict};

/// It means a look at every process of the machine.
const WEIGH_AGAIN: Duration = Duration::from_secs(1);
const SWEEP_LIMIT: Duration = Duration::from_secs(10);

/// With `root`, the guard of a node that starts, an answer counts only if it is the node's own.
pub(super) async fn probe(client: NodeClient, addr: SocketAddr, root: Option<Pid>) -> Probe {
    let probe = client.health(addr).await;
    let (Probe::Healthy, Some(root)) = (probe, root) else {
        return probe;
    };
    let looking = tokio::task::spawn_blocking(move || processes::listens_below(root, addr));
    match looking.await {
        Ok(Some(false)) => Probe::Stranger,
        _ => Probe::Healthy,
    }
}

impl NodeActor {
    pub(super) fn reported(&mut self, status: Status) -> Option<Event> {
        match status {
            Status::Spawned(pid) => {
                self.pid = Some(pid);
                self.timing.spawned(Instant::now());
                None
            }
            Status::SpawnFailed(why) => {
                let program = self.plan.argv.first().map_or("", String::as_str);
                Some(Event::SpawnFailed(format!("cannot run {program}: {why}")))
            }
            Status::Exited { exit, ago } => {
                self.timing.seen(ago);
                Some(self.exited(exit))
            }
            // `next` keeps them.
            Status::Shm(..) => None,
            Status::Empty => {
                if let Some(life) = self.life.take() {
                    self.burial.spawn(life.finish());
                }
                None
            }
            Status::Lost => {
                if let Some(mut life) = self.life.take() {
                    life.kill_guard();
                    let node = self.plan.id.clone();
                    self.burial.spawn(async move {
                        let (shm, group) = (life.take_shm(), life.take_group());
                        if let Some(group) = &group {
                            group.kill();
                        }
                        let tail = life.finish().await;
                        while !sweep::sweep(SWEEP_LIMIT).await {
                            tracing::error!("node {node}: processes survive being killed");
                        }
                        shm::remove(shm);
                        if let Some(group) = group {
                            group.remove();
                        }
                        tail
                    });
                }
                (self.end.is_none()).then(|| self.exited(Exit::GuardLost))
            }
        }
    }

    fn exited(&mut self, exit: Exit) -> Event {
        let end = End {
            exit,
            out_of_memory: self.oom.is_recent(Instant::now()),
        };
        self.end = Some(end);
        self.pid = None;
        self.calls.abort_all();
        Event::Exited(end.describe())
    }

    pub(super) fn buried(&mut self, tail: Vec<String>) -> Event {
        self.calls.abort_all();
        self.pid = None;
        self.reaped = self.incarnation;
        let obituary = self.end.take().map(|end| obituary::write(end, &tail));
        Event::Reaped(obituary)
    }

    pub(super) fn judged(&mut self, verdict: Verdict) -> Option<Event> {
        if verdict.incarnation != self.incarnation {
            return None;
        }
        Some(match verdict.finding {
            Finding::Proven => Event::Proven,
            Finding::Vouched => Event::Vouched,
            Finding::Unpaired => Event::Unpaired,
            Finding::Refused(why) => Event::Refused(why),
        })
    }

    pub(super) fn tick(&mut self) -> Event {
        let now = Instant::now();
        self.oom.observe(now);
        if self.machine.phase() == Phase::Starting && now >= self.weighed + WEIGH_AGAIN {
            self.weighed = now;
            self.weigh();
        }
        let bytes = self.life.as_ref().map_or(0, Incarnation::log_bytes);
        if bytes <= self.log_bytes {
            return Event::Tick;
        }
        self.log_bytes = bytes;
        self.queue.push_back(Event::Tick);
        Event::LogGrew
    }

    fn weigh(&mut self) {
        let Some(root) = self.life.as_ref().and_then(Incarnation::root) else {
            return;
        };
        self.calls
            .spawn_blocking(move || Event::Memory(processes::memory_below(root)));
    }
}
