//! The API server process: starts the engine, serves HTTP, stops or dies as vLLM's does.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::args::Args;
use crate::script::{FailKind, Script, ScriptReader, Stage};
use crate::shm::Segment;
use crate::wire::{self, FromEngine, Job, Link, Outcome, ToEngine};
use crate::{api, engine};

/// From the engine's death to the API server's own exit.
const EXIT_AFTER_ENGINE: Duration = Duration::from_millis(5500);

/// Engine and workers that have not been heard of for so long stand still. The engine's `BEAT` is shorter.
const STALE: Duration = Duration::from_millis(300);

/// What every request handler shares.
#[derive(Debug)]
pub struct Server {
    pub args: Args,
    pub argv: Vec<String>,
    pub script: ScriptReader,
    pub engine: Engine,
    pub counters: Counters,
    /// As many as requests may run at a time; who waits is served in order.
    pub slots: Arc<Semaphore>,
}

/// Shown at `/metrics`.
#[derive(Debug, Default)]
pub struct Counters {
    pub running: AtomicU64,
    pub waiting: AtomicU64,
    pub requests: AtomicU64,
    pub prompt_tokens: AtomicU64,
    pub generated_tokens: AtomicU64,
    pub external_queries: AtomicU64,
    pub external_hits: AtomicU64,
    /// Requests whose client went away before the last token.
    pub aborted: AtomicU64,
    /// Requests by leg: `prefill`, `decode`, `whole`.
    pub legs: Mutex<BTreeMap<&'static str, u64>>,
}

/// The engine process as the API server sees it.
#[derive(Debug)]
pub struct Engine {
    sender: mpsc::Sender<ToEngine>,
    pending: Mutex<HashMap<u64, oneshot::Sender<Outcome>>>,
    next: AtomicU64,
    /// When engine and workers were last heard of.
    beat: watch::Sender<Instant>,
    dead: CancellationToken,
}

/// The engine process is gone.
#[derive(Debug)]
pub struct EngineDead;

/// A prompt in the engine; ends there on drop.
#[derive(Debug)]
pub struct Running {
    id: u64,
    server: Arc<Server>,
}

impl Server {
    /// Waits for a place among the running requests.
    pub async fn admit(self: &Arc<Self>) -> Result<Slot, EngineDead> {
        let waiting = Counted::new(self, |counters| &counters.waiting);
        let permit = tokio::select! {
            permit = self.slots.clone().acquire_owned() => permit.map_err(|_| EngineDead)?,
            () = self.engine.dead.cancelled() => return Err(EngineDead),
        };
        drop(waiting);
        Ok(Slot {
            _running: Counted::new(self, |counters| &counters.running),
            _permit: permit,
        })
    }

    /// Runs a prompt up to its first token.
    pub async fn run(self: &Arc<Self>, mut job: Job) -> Result<(Running, Outcome), EngineDead> {
        let id = self.engine.next.fetch_add(1, Ordering::Relaxed);
        job.id = id;
        let (sender, receiver) = oneshot::channel();
        self.engine.pending.lock().unwrap().insert(id, sender);
        let running = Running {
            id,
            server: self.clone(),
        };
        if self.engine.sender.send(ToEngine::Run(job)).await.is_err() {
            return Err(EngineDead);
        }
        tokio::select! {
            outcome = receiver => outcome.map(|outcome| (running, outcome)).map_err(|_| EngineDead),
            () = self.engine.dead.cancelled() => Err(EngineDead),
        }
    }

    /// Waits until engine and workers work, or are dead.
    pub async fn working(&self) {
        let mut beat = self.engine.beat.subscribe();
        tokio::select! {
            _ = beat.wait_for(|at| at.elapsed() < STALE) => {}
            () = self.engine.dead.cancelled() => {}
        }
    }

    pub fn is_dead(&self) -> bool {
        self.engine.dead.is_cancelled()
    }
}

/// A running request's place.
#[derive(Debug)]
pub struct Slot {
    _running: Counted,
    _permit: OwnedSemaphorePermit,
}

/// One more in a gauge, for as long as it lives.
#[derive(Debug)]
struct Counted {
    server: Arc<Server>,
    gauge: fn(&Counters) -> &AtomicU64,
}

impl Counted {
    fn new(server: &Arc<Server>, gauge: fn(&Counters) -> &AtomicU64) -> Self {
        gauge(&server.counters).fetch_add(1, Ordering::Relaxed);
        let server = server.clone();
        Self { server, gauge }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        (self.gauge)(&self.server.counters).fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let engine = &self.server.engine;
        engine.pending.lock().unwrap().remove(&self.id);
        let _ = engine.sender.try_send(ToEngine::Finish { id: self.id });
    }
}

/// The leader's whole life.
pub async fn run(args: Args, argv: Vec<String>) -> ExitCode {
    println!("INFO 01-01 00:00:00 [api_server.py:1] vLLM API server version 0.32.0 (fake)");
    let mut term = signal(SignalKind::terminate()).unwrap();
    let mut int = signal(SignalKind::interrupt()).unwrap();
    let reader = ScriptReader::default();
    let script = reader.current();
    if let Some(message) = &script.fatal_start {
        eprintln!("usage: vllm serve [model_tag] [options]\nvllm: error: {message}");
        return ExitCode::from(2);
    }
    let segment = Segment::create();
    let (mut child, mut link) = wire::spawn::<ToEngine>(&args, wire::ENGINE_ROLE, 0);
    let sender = link.sender.clone();
    let started = tokio::select! {
        started = start(&script, &mut link) => started,
        () = stop_signal(&mut term, &mut int) => {
            drop(segment);
            return stop(&sender, &mut child).await;
        }
    };
    if !started {
        eprintln!("RuntimeError: Engine core initialization failed. (fake)");
        drop(segment);
        let _ = stop(&sender, &mut child).await;
        return ExitCode::FAILURE;
    }
    let server = Arc::new(Server {
        engine: Engine {
            sender: sender.clone(),
            pending: Mutex::default(),
            next: AtomicU64::new(1),
            beat: watch::Sender::new(Instant::now()),
            dead: CancellationToken::new(),
        },
        slots: Arc::new(Semaphore::new(args.max_num_seqs)),
        args,
        argv,
        script: reader,
        counters: Counters::default(),
    });
    tokio::spawn(listen_to_engine(server.clone(), link));
    let Ok(listener) = Port::bind(&server) else {
        eprintln!("OSError: [Errno 98] Address already in use (fake)");
        drop(segment);
        let _ = stop(&sender, &mut child).await;
        return ExitCode::FAILURE;
    };
    println!("INFO:     Application startup complete.");
    let http =
        tokio::spawn(async move { axum::serve(listener, api::routes(server.clone())).await });
    let code = tokio::select! {
        () = stop_signal(&mut term, &mut int) => {
            println!("INFO:     Shutting down");
            stop(&sender, &mut child).await
        }
        _ = child.wait() => {
            println!("ERROR: engine core died unexpectedly (fake)");
            tokio::time::sleep(EXIT_AFTER_ENGINE).await;
            ExitCode::FAILURE
        }
    };
    http.abort();
    drop(segment);
    code
}

async fn start(script: &Script, link: &mut Link<ToEngine>) -> bool {
    for percent in [0, 50, 100] {
        println!("INFO Loading safetensors checkpoint shards: {percent}% Completed (fake)");
        tokio::time::sleep(Duration::from_millis(script.startup_ms) / 3).await;
    }
    Stage::Start.pass().await;
    if script.crash_start {
        eprintln!(
            "Traceback (most recent call last):\nRuntimeError: scripted crash at start (fake)"
        );
        return false;
    }
    matches!(link.receive().await, Some(FromEngine::Ready))
}

async fn stop_signal(
    term: &mut tokio::signal::unix::Signal,
    int: &mut tokio::signal::unix::Signal,
) {
    loop {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        if ScriptReader::default().current().ignore_term {
            println!("INFO: SIGTERM ignored (fake)");
            continue;
        }
        return;
    }
}

async fn stop(sender: &mpsc::Sender<ToEngine>, child: &mut Child) -> ExitCode {
    let _ = sender.try_send(ToEngine::Stop);
    let _ = tokio::time::timeout(engine::STOP_LIMIT, child.wait()).await;
    ExitCode::SUCCESS
}

async fn listen_to_engine(server: Arc<Server>, mut link: Link<ToEngine>) {
    while let Some(message) = link.receive().await {
        server.engine.beat.send_replace(Instant::now());
        if let FromEngine::Done { id, outcome } = message {
            let waiting = server.engine.pending.lock().unwrap().remove(&id);
            if let Some(waiting) = waiting {
                let counters = &server.counters;
                counters
                    .external_queries
                    .fetch_add(outcome.queries, Ordering::Relaxed);
                counters
                    .external_hits
                    .fetch_add(outcome.hits, Ordering::Relaxed);
                let _ = waiting.send(outcome);
            }
        }
    }
    server.engine.dead.cancel();
}

/// The API's port, which closes while the script says `refuse`.
struct Port {
    server: Arc<Server>,
    addr: SocketAddr,
    listener: Option<TcpListener>,
}

impl Port {
    fn bind(server: &Arc<Server>) -> std::io::Result<Self> {
        let host: std::net::IpAddr = server.args.host.parse().unwrap();
        let addr = SocketAddr::from((host, server.args.port));
        let listener = Some(listen(addr)?);
        Ok(Self {
            server: server.clone(),
            addr,
            listener,
        })
    }

    fn refused(&self) -> bool {
        let fail = self.server.script.current().fail;
        fail.is_some_and(|fail| fail.kind == FailKind::Refuse)
    }
}

fn listen(addr: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(1024)
}

impl axum::serve::Listener for Port {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            if self.refused() {
                self.listener = None;
            } else if self.listener.is_none() {
                self.listener = listen(self.addr).ok();
            }
            let tick = tokio::time::sleep(Duration::from_millis(20));
            match &self.listener {
                None => tick.await,
                Some(listener) => tokio::select! {
                    accepted = listener.accept() => match accepted {
                        Ok((stream, peer)) if !self.refused() => return (stream, peer),
                        _ => {}
                    },
                    () = tick => {}
                },
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        Ok(self.addr)
    }
}
