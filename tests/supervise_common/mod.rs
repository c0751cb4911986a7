//! Finding processes by a marker in their arguments.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod guard;

use std::time::{Duration, Instant};

/// Generous: the machine may be busy.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Unlike any other in this machine.
pub fn marker() -> String {
    format!("marker-{:032x}", rand::random::<u128>())
}

/// Living processes (no zombies) with `marker` in their arguments.
pub fn alive(marker: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        // Empty for a zombie.
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&arguments).contains(marker)
    })
    .collect()
}

/// The state of other processes can only be polled.
pub fn eventually(what: &str, condition: impl Fn() -> bool) -> Duration {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < LIMIT, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    started.elapsed()
}
