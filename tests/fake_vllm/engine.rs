//! The engine process: schedules prompts, speaks to the store as a scheduler, drives the workers.
//!
//! A prefill leg: open, look up, store, seal at once; the workers compute (`prefill_ms`), write and
//! commit. A decode leg: look up, poll what is pending, let the workers read and verify, compute
//! what was not found.

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use crate::args::Args;
use crate::kv::{self, Found, Key, Scheduler};
use crate::script::{ScriptReader, Stage};
use crate::shm::Segment;
use crate::wire::{
    self, Chunk, FromEngine, FromWorker, Job, Leg, LegKind, Link, Outcome, Task, ToEngine, ToWorker,
};

/// A clean stop takes no longer.
pub const STOP_LIMIT: Duration = Duration::from_secs(2);
/// While requests run, the leader hears this often that engine and workers work.
const BEAT: Duration = Duration::from_millis(50);
/// Chunks that stay pending for longer are a miss.
const PENDING_LIMIT: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Engine {
    args: Args,
    script: ScriptReader,
    scheduler: Option<Scheduler>,
    workers: Workers,
    to_leader: mpsc::Sender<FromEngine>,
    running: Mutex<HashMap<u64, (AbortHandle, String)>>,
}

#[derive(Debug)]
struct Workers {
    senders: Vec<mpsc::Sender<ToWorker>>,
    next: AtomicU64,
    pending: Mutex<HashMap<u64, Transfer>>,
    stopping: AtomicBool,
}

#[derive(Debug)]
struct Transfer {
    left: usize,
    done: Transferred,
    sender: Option<oneshot::Sender<Transferred>>,
}

/// Something for all workers.
#[derive(Debug, Clone)]
struct Work {
    task: Task,
    millis: u64,
    stage: Option<Stage>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Transferred {
    failed: u32,
    wrong: u32,
}

/// The engine's whole life.
pub async fn run(args: Args) -> ExitCode {
    let segment = Segment::create();
    Segment::create_left_behind();
    let mut link = Link::<FromEngine>::to_parent();
    let connected = args.connector && std::env::var_os("PEGAFLOW_KV_SOCKET").is_some();
    let scheduler = if connected {
        Scheduler::connect(&args).await
    } else {
        None
    };
    let (workers, children) = start_workers(&args).await;
    let to_leader = link.sender.clone();
    let script = ScriptReader::default();
    let engine = Arc::new(Engine {
        args,
        script,
        scheduler,
        workers,
        to_leader: to_leader.clone(),
        running: Mutex::default(),
    });
    for (child, worker_link) in children {
        tokio::spawn(watch_worker(engine.clone(), child, worker_link));
    }
    tokio::spawn(beat(engine.clone()));
    let _ = to_leader.send(FromEngine::Ready).await;
    while let Some(message) = link.receive().await {
        match message {
            ToEngine::Run(job) => engine.start(job),
            ToEngine::Finish { id } => engine.finish(id).await,
            ToEngine::Stop => {
                engine.workers.stopping.store(true, Ordering::Relaxed);
                engine.workers.send(|| ToWorker::Stop).await;
                // The workers' removal of their segments is what a clean stop waits for.
                tokio::time::sleep(Duration::from_millis(100)).await;
                drop(segment);
                return ExitCode::SUCCESS;
            }
        }
    }
    // The leader was killed. vLLM's engine does not notice, and neither does this one.
    std::future::pending().await
}

async fn start_workers(args: &Args) -> (Workers, Vec<(Child, Link<ToWorker>)>) {
    let mut children = Vec::new();
    for rank in 0..args.tensor_parallel {
        let (child, mut link) = wire::spawn::<ToWorker>(args, wire::WORKER_ROLE, rank);
        let ready: Option<FromWorker> = link.receive().await;
        assert!(
            matches!(ready, Some(FromWorker::Ready)),
            "worker {rank} did not start"
        );
        children.push((child, link));
    }
    let workers = Workers {
        senders: children
            .iter()
            .map(|(_, link)| link.sender.clone())
            .collect(),
        next: AtomicU64::new(1),
        pending: Mutex::default(),
        stopping: AtomicBool::new(false),
    };
    (workers, children)
}

async fn watch_worker(engine: Arc<Engine>, mut child: Child, mut link: Link<ToWorker>) {
    while let Some(FromWorker::Done { id, failed, wrong }) = link.receive().await {
        engine.workers.done(id, Transferred { failed, wrong });
    }
    let _ = child.wait().await;
    if !engine.workers.stopping.load(Ordering::Relaxed) {
        eprintln!("ERROR: worker proc died unexpectedly, shutting down executor (fake)");
        std::process::exit(1);
    }
}

/// One step after the other, as long as there is something to do.
async fn beat(engine: Arc<Engine>) {
    loop {
        tokio::time::sleep(BEAT).await;
        if engine.running.lock().unwrap().is_empty() {
            continue;
        }
        let step = Work {
            task: Task::Step,
            millis: 0,
            stage: None,
        };
        engine.workers.carry_out(step).await;
        let _ = engine.to_leader.send(FromEngine::Beat).await;
    }
}

impl Workers {
    async fn send(&self, message: impl Fn() -> ToWorker) {
        for sender in &self.senders {
            let _ = sender.send(message()).await;
        }
    }

    async fn carry_out(&self, work: Work) -> Transferred {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        let transfer = Transfer {
            left: self.senders.len(),
            done: Transferred::default(),
            sender: Some(sender),
        };
        self.pending.lock().unwrap().insert(id, transfer);
        let message = || ToWorker::Work {
            id,
            task: work.task.clone(),
            millis: work.millis,
            stage: work.stage,
        };
        self.send(message).await;
        receiver.await.unwrap_or(Transferred {
            failed: 1,
            wrong: 0,
        })
    }

    /// The forward pass over a prompt.
    async fn compute(&self, millis: u64) {
        let work = Work {
            task: Task::Step,
            millis,
            stage: Some(Stage::Prefill),
        };
        self.carry_out(work).await;
    }

    fn done(&self, id: u64, part: Transferred) {
        let mut pending = self.pending.lock().unwrap();
        let Some(transfer) = pending.get_mut(&id) else {
            return;
        };
        transfer.left -= 1;
        transfer.done.failed += part.failed;
        transfer.done.wrong += part.wrong;
        if transfer.left == 0 {
            let _ = transfer.sender.take().unwrap().send(transfer.done);
            pending.remove(&id);
        }
    }
}

impl Engine {
    fn start(self: &Arc<Self>, job: Job) {
        let engine = self.clone();
        let (id, request) = (job.id, job.request.clone());
        let task = tokio::spawn(async move {
            let outcome = engine.compute(&job).await;
            let _ = engine
                .to_leader
                .send(FromEngine::Done {
                    id: job.id,
                    outcome,
                })
                .await;
        });
        self.running
            .lock()
            .unwrap()
            .insert(id, (task.abort_handle(), request));
    }

    async fn finish(&self, id: u64) {
        let Some((task, request)) = self.running.lock().unwrap().remove(&id) else {
            return;
        };
        task.abort();
        if let Some(scheduler) = &self.scheduler {
            scheduler.finish(&request).await;
        }
    }

    async fn compute(self: &Arc<Self>, job: &Job) -> Outcome {
        let keys = chunk_keys(&job.tokens, &job.salt, self.args.block_size);
        let outcome = match (&self.scheduler, &job.leg) {
            (Some(scheduler), Some(leg)) if leg.leg == LegKind::Prefill => {
                self.prefill(scheduler, job, leg, &keys).await;
                Outcome::default()
            }
            (Some(scheduler), Some(leg)) if !keys.is_empty() => {
                self.load(scheduler, job, leg, &keys).await
            }
            _ => Outcome::default(),
        };
        let loaded = outcome.hits > 0 && outcome.hits >= (keys.len() * self.args.block_size) as u64;
        if !loaded {
            let millis = self.script.current().prefill_ms;
            self.workers.compute(millis).await;
        }
        outcome
    }

    async fn prefill(self: &Arc<Self>, scheduler: &Scheduler, job: &Job, leg: &Leg, keys: &[Key]) {
        let chunks = u32::try_from(keys.len()).unwrap();
        scheduler.open(&job.request, &leg.handoff, chunks).await;
        if !keys.is_empty() {
            let found = scheduler.lookup(&job.request, &leg.handoff, keys).await;
            if !found.is_some_and(|found| found.iter().all(|found| matches!(found, Found::Hit(_))))
            {
                self.save(scheduler, job, leg, keys).await;
            }
        }
        scheduler.seal(&leg.handoff).await;
    }

    async fn save(self: &Arc<Self>, scheduler: &Scheduler, job: &Job, leg: &Leg, keys: &[Key]) {
        let Some(granted) = scheduler.store(&job.request, &leg.handoff, keys).await else {
            return;
        };
        let chunks: Vec<Chunk> = granted
            .into_iter()
            .map(|(index, slot)| kv::chunk(slot, &keys[index]))
            .collect();
        if chunks.is_empty() {
            return;
        }
        let engine = self.clone();
        // Not part of the request: an aborted request's forward pass ends as well.
        tokio::spawn(async move {
            let script = engine.script.current();
            engine.workers.compute(script.prefill_ms).await;
            let work = Work {
                task: Task::Write {
                    chunks,
                    corrupt: script.corrupt_kv,
                },
                millis: script.save_ms,
                stage: Some(Stage::Save),
            };
            engine.workers.carry_out(work).await;
        });
    }

    async fn load(&self, scheduler: &Scheduler, job: &Job, leg: &Leg, keys: &[Key]) -> Outcome {
        let queries = job.tokens.len() as u64;
        let started = Instant::now();
        let mut found = scheduler
            .lookup(&job.request, &leg.handoff, keys)
            .await
            .unwrap_or_default();
        while found.contains(&Found::Pending) && started.elapsed() < PENDING_LIMIT {
            tokio::time::sleep(Duration::from_millis(2)).await;
            found = scheduler
                .lookup(&job.request, &leg.handoff, keys)
                .await
                .unwrap_or_default();
        }
        let chunks: Vec<Chunk> = found
            .iter()
            .zip(keys)
            .map_while(|(found, key)| match found {
                Found::Hit(slot) => Some(kv::chunk(*slot, key)),
                Found::Miss | Found::Pending => None,
            })
            .collect();
        if chunks.is_empty() {
            return Outcome {
                queries,
                ..Outcome::default()
            };
        }
        let script = self.script.current();
        let tokens = chunks.len() * self.args.block_size;
        let work = Work {
            task: Task::Read {
                chunks,
                corrupt: script.corrupt_kv,
            },
            millis: script.load_ms,
            stage: Some(Stage::Load),
        };
        let done = self.workers.carry_out(work).await;
        scheduler.release(&job.request).await;
        let hits = if done.failed == 0 { tokens } else { 0 };
        Outcome {
            queries,
            hits: hits as u64,
            wrong: done.wrong > 0,
        }
    }
}

/// A key per full block: a chain of hashes, as vLLM's, and KV group 0.
fn chunk_keys(tokens: &[u32], salt: &str, block_size: usize) -> Vec<Key> {
    let mut parent: [u8; 32] = Sha256::digest(salt.as_bytes()).into();
    tokens
        .chunks_exact(block_size)
        .map(|block| {
            let mut hash = Sha256::new();
            hash.update(parent);
            for id in block {
                hash.update(id.to_le_bytes());
            }
            parent = hash.finalize().into();
            let mut key = [0; 36];
            key[..32].copy_from_slice(&parent);
            key
        })
        .collect()
}
