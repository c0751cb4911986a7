//! The fault matrix: every process of a fleet gets every deadly or stopping signal at every moment of a
//! node's life, on the fake vLLM. Clients are answered or told, the fleet is whole again, and nothing is
//! left.
//!
//! CI plays the cells below. All of them, with the table of docs/reliability.md:
//! `cargo test --test up_matrix -- --ignored --nocapture`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod aftermath;
mod cell;
mod run;
mod scene;
#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "shared with the other tests of the binary")]
mod support;

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use Signal::{SIGKILL as KILL, SIGSEGV as SEGV, SIGSTOP as STOP, SIGTERM as TERM};
use cell::Cell;
use cell::Moment::{Decode, Draining, Idle, Load, Prefill, Restarting, Save, Starting, WarmUp};
use cell::Target::{Engine, Guard, Leader, Supervisor, Worker};
use cell::{Moment, Target};

/// Cells wait more than they work.
const SIDE_BY_SIDE: usize = 4;

fn cells(of: &[(Target, Signal, Moment)]) {
    let cells: Vec<Cell> = of
        .iter()
        .map(|&(target, signal, moment)| Cell {
            target,
            signal,
            moment,
        })
        .collect();
    let limit = Duration::from_secs(600);
    run::check(&run::play(&cells, SIDE_BY_SIDE, limit));
}

#[test]
fn a_first_start_survives_everything() {
    cells(&[
        (Leader, STOP, Starting),
        (Worker, STOP, WarmUp),
        (Engine, KILL, Starting),
        (Guard, SEGV, Starting),
        (Supervisor, TERM, Starting),
        (Leader, SEGV, WarmUp),
        (Guard, TERM, WarmUp),
        (Supervisor, KILL, WarmUp),
    ]);
}

#[test]
fn prompts_survive_everything() {
    cells(&[
        (Engine, STOP, Prefill),
        (Leader, TERM, Prefill),
        (Guard, KILL, Prefill),
        (Leader, STOP, Save),
        (Worker, KILL, Save),
        (Engine, TERM, Load),
        (Worker, SEGV, Load),
        (Supervisor, SEGV, Load),
    ]);
}

#[test]
fn answers_and_restarts_survive_everything() {
    cells(&[
        (Guard, STOP, Decode),
        (Guard, SEGV, Idle),
        (Worker, STOP, Idle),
        (Leader, KILL, Decode),
        (Supervisor, STOP, Decode),
        (Supervisor, TERM, Decode),
        (Worker, TERM, Draining),
        (Supervisor, STOP, Draining),
        (Engine, SEGV, Restarting),
        (Guard, KILL, Restarting),
    ]);
}

#[test]
#[ignore = "five minutes; prints the table of docs/reliability.md"]
fn the_whole_matrix() {
    let started = Instant::now();
    let outcomes = run::play(&Cell::all(), SIDE_BY_SIDE, Duration::from_secs(3600));
    println!("{}", run::table(&outcomes));
    println!("{} cells in {:?}", outcomes.len(), started.elapsed());
    run::check(&outcomes);
}
