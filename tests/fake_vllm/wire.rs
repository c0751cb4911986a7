//! JSON lines between leader, engine and workers. A child's end of the socket is its stdin, so its
//! end of file is the parent's death.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::process::Stdio;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use crate::args::Args;
use crate::script::Stage;

pub const ENGINE_ROLE: &str = "fake-engine";
pub const WORKER_ROLE: &str = "fake-worker";

/// Leader to engine.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToEngine {
    Run(Job),
    /// Generation ended or its client is gone.
    Finish {
        id: u64,
    },
    Stop,
}

/// One prompt.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    pub id: u64,
    pub request: String,
    pub tokens: Vec<u32>,
    pub salt: String,
    pub leg: Option<Leg>,
}

/// `kv_transfer_params.pegaflow` of a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Leg {
    pub handoff: String,
    pub leg: LegKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LegKind {
    Prefill,
    Decode,
}

/// Engine to leader.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromEngine {
    Ready,
    /// While requests run: engine and workers have made a step.
    Beat,
    /// The prompt is computed or loaded.
    Done {
        id: u64,
        outcome: Outcome,
    },
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Tokens asked for and found in the store.
    pub queries: u64,
    pub hits: u64,
    /// Loaded KV was not what it should be.
    pub wrong: bool,
}

/// Engine to worker.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToWorker {
    Work {
        id: u64,
        task: Task,
        /// How long it takes.
        millis: u64,
        /// Where it may be held.
        stage: Option<Stage>,
    },
    Stop,
}

/// What a worker does. Keys are in hex.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Task {
    /// The model is executed.
    Step,
    Write {
        chunks: Vec<Chunk>,
        corrupt: bool,
    },
    Read {
        chunks: Vec<Chunk>,
        corrupt: bool,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Chunk {
    pub slot: u32,
    pub generation: u32,
    pub key: String,
}

/// Worker to engine.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromWorker {
    Ready,
    /// `failed`: chunks that were not there any more. `wrong`: chunks with other bytes.
    Done {
        id: u64,
        failed: u32,
        wrong: u32,
    },
}

/// One end of a link.
#[derive(Debug)]
pub struct Link<Out> {
    pub sender: mpsc::Sender<Out>,
    lines: Lines<BufReader<OwnedReadHalf>>,
}

impl<Out: Serialize + Send + 'static> Link<Out> {
    fn new(stream: StdStream) -> Self {
        stream.set_nonblocking(true).unwrap();
        let (read, mut write) = UnixStream::from_std(stream).unwrap().into_split();
        let (sender, mut receiver) = mpsc::channel::<Out>(4096);
        tokio::spawn(async move {
            while let Some(message) = receiver.recv().await {
                let mut line = serde_json::to_vec(&message).unwrap();
                line.push(b'\n');
                if write.write_all(&line).await.is_err() {
                    break;
                }
            }
        });
        Self {
            sender,
            lines: BufReader::new(read).lines(),
        }
    }

    /// The link of a child process to its parent.
    pub fn to_parent() -> Self {
        let fd: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
        Self::new(StdStream::from(fd))
    }

    /// The next message; none when the other side is gone.
    pub async fn receive<In: DeserializeOwned>(&mut self) -> Option<In> {
        let line = self.lines.next_line().await.ok()??;
        Some(serde_json::from_str(&line).unwrap())
    }
}

/// Starts this program again in another role.
pub fn spawn<Out: Serialize + Send + 'static>(
    args: &Args,
    role: &str,
    rank: u32,
) -> (Child, Link<Out>) {
    let (ours, theirs) = StdStream::pair().unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(args.for_child(role, rank))
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    (child, Link::new(ours))
}
