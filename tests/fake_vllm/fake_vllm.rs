//! `fake-vllm`: a scripted stand-in for vLLM's API server, for tests of the whole pegaflow binary.
//!
//! It has the real one's process tree and ways to die:
//!
//! ```text
//! leader (HTTP) ──socket──▶ engine (scheduler session) ──socket──▶ worker 0..TP (worker sessions)
//!   killed: engine and workers live on     killed: leader answers 503, exits after 5.5 s
//! ```
//!
//! All of them take part in every prompt and every answer: where one stands still, nothing goes on.
//!
//! Every process leaves a `/dev/shm/psm_fake_<pid>` behind when it is killed. Tokens are a pure
//! function of the prompt, so an answer through prefill and decode can be compared with a whole
//! one; the KV bytes are a pure function of the chunk key, are written to and read from the real
//! store, and a wrong byte changes the answer. `script.rs` lists what tests can make it do.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod api;
mod args;
mod engine;
mod generation;
mod kv;
mod leader;
mod script;
mod shm;
mod tokens;
mod wire;
mod worker;

use std::process::ExitCode;
use std::time::Duration;

/// No fake outlives this, whatever happened to the test that started it.
const MAX_LIFE: Duration = Duration::from_secs(1200);

fn main() -> ExitCode {
    std::thread::spawn(|| {
        std::thread::sleep(MAX_LIFE);
        std::process::exit(99);
    });
    let argv: Vec<String> = std::env::args().skip(1).collect();
    if argv
        .iter()
        .any(|arg| arg == "--version" || arg == "-V" || arg == "-c")
    {
        println!("0.32.0");
        return ExitCode::SUCCESS;
    }
    let args = args::Args::parse(&argv);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        match argv.first().map(String::as_str) {
            Some(wire::ENGINE_ROLE) => engine::run(args).await,
            Some(wire::WORKER_ROLE) => worker::run(args).await,
            _ => leader::run(args, argv).await,
        }
    })
}
