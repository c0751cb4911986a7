//! A worker process: copies KV between itself and the store's arena. Its KV is a function of the
//! chunk's key, so that a reader can tell right bytes from wrong ones.

use std::process::ExitCode;
use std::time::Instant;

use sha2::{Digest, Sha256};

use crate::args::Args;
use crate::kv::{ROW_BYTES, Worker};
use crate::shm::Segment;
use crate::wire::{Chunk, FromWorker, Link, ToWorker};

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
    while let Some(message) = link.receive().await {
        let started = Instant::now();
        let (id, failed, wrong) = match message {
            ToWorker::Stop => {
                drop(segment);
                return ExitCode::SUCCESS;
            }
            ToWorker::Write {
                id,
                chunks,
                corrupt,
            } => {
                let Some(store) = &mut store else { continue };
                for chunk in &chunks {
                    store.write(chunk, &content(chunk, args.rank, corrupt));
                }
                store.commit(&chunks, started.elapsed()).await;
                (id, 0, 0)
            }
            ToWorker::Read {
                id,
                chunks,
                corrupt,
            } => {
                let Some(store) = &mut store else { continue };
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
                (id, failed, wrong)
            }
        };
        let _ = link
            .sender
            .send(FromWorker::Done { id, failed, wrong })
            .await;
    }
    // The engine was killed. vLLM's worker notices only when it next reads; this one never does.
    std::future::pending().await
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
