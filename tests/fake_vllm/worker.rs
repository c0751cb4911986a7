//! A worker process: copies KV between itself and the store's arena. Its KV is a function of the
//! chunk's key, so that a reader can tell right bytes from wrong ones.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::args::Args;
use crate::kv::{ROW_BYTES, Worker};
use crate::shm::Segment;
use crate::wire::{Chunk, FromWorker, Link, Task, ToWorker};

/// The worker's whole life.
pub async fn run(args: Args) -> ExitCode {
    let segment = Segment::create();
    let mut link = Link::<FromWorker>::to_parent();
    let connected = args.connector && std::env::var_os("PEGAFLOW_KV_SOCKET").is_some();
    let mut store = if connected {
        Worker::connect(&args).await
    } else {
        None
    };
    let _ = link.sender.send(FromWorker::Ready).await;
    // What takes its time does not keep the rest waiting: prompts are computed side by side.
    let (due, mut ripe) = mpsc::channel(4096);
    loop {
        let message = tokio::select! {
            message = link.receive() => message,
            Some((id, task)) = ripe.recv() => {
                let (failed, wrong) = carry_out(&args, &mut store, task).await;
                let done = FromWorker::Done { id, failed, wrong };
                let _ = link.sender.send(done).await;
                continue;
            }
        };
        match message {
            Some(ToWorker::Work {
                id,
                task,
                millis,
                stage,
            }) => {
                let due = due.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(millis)).await;
                    if let Some(stage) = stage {
                        stage.pass().await;
                    }
                    let _ = due.send((id, task)).await;
                });
            }
            Some(ToWorker::Stop) => {
                drop(segment);
                return ExitCode::SUCCESS;
            }
            None => break,
        }
    }
    // The engine was killed. vLLM's worker notices only when it next reads; this one never does.
    std::future::pending().await
}

/// How many chunks were not there any more, and how many were wrong.
async fn carry_out(args: &Args, store: &mut Option<Worker>, task: Task) -> (u32, u32) {
    let started = Instant::now();
    let Some(store) = store else {
        return (u32::from(!matches!(task, Task::Step)), 0);
    };
    match task {
        Task::Step => (0, 0),
        Task::Write { chunks, corrupt } => {
            for chunk in &chunks {
                store.write(chunk, &content(chunk, args.rank, corrupt));
            }
            store.commit(&chunks, started.elapsed()).await;
            (0, 0)
        }
        Task::Read { chunks, corrupt } => {
            let (mut failed, mut wrong) = (0, 0);
            for chunk in &chunks {
                match store.read(chunk) {
                    None => failed += 1,
                    Some(bytes) if bytes != content(chunk, args.rank, corrupt) => wrong += 1,
                    Some(_) => {}
                }
            }
            let loaded = u32::try_from(chunks.len()).unwrap();
            store.loaded(loaded, failed, started.elapsed()).await;
            (failed, wrong)
        }
    }
}

fn content(chunk: &Chunk, rank: u32, corrupt: bool) -> Vec<u8> {
    let mut hash = Sha256::new();
    hash.update(chunk.key.as_bytes());
    hash.update(rank.to_le_bytes());
    let word: [u8; 32] = hash.finalize().into();
    let mut bytes: Vec<u8> = word.into_iter().cycle().take(ROW_BYTES).collect();
    if corrupt {
        bytes[7] ^= 0xff;
    }
    bytes
}
