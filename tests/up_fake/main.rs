//! The whole binary on the scripted fake vLLM: what users and operators see.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod census;
mod cgroups;
mod chaos;
mod commands;
mod compare;
mod cycles;
mod dashboard;
mod detach;
mod ending;
#[path = "../fake_nvml/mod.rs"]
mod fake_nvml;
mod faults;
mod figures;
mod gpu;
mod hangs;
mod helpers;
mod init;
mod interrupted;
mod kills;
mod leaving;
mod models;
mod orders;
mod orphans;
mod others;
mod pid_one;
mod ports;
mod restarts;
mod scarce;
mod scoreboard;
mod secrets;
mod service;
mod serving;
mod starting;
mod store;
#[path = "../support/mod.rs"]
mod support;
mod watch;

use std::time::{Duration, Instant};

use support::HANG;

async fn wait_until(condition: impl AsyncFn() -> bool, what: &str) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < HANG, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
