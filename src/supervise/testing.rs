//! What several test modules need.

use std::time::Duration;

use crate::plan::SupervisorPlan;
use crate::topology::CgroupRequest;

pub fn plan() -> SupervisorPlan {
    SupervisorPlan {
        start_timeout: Duration::from_secs(900),
        health_interval: Duration::from_secs(1),
        hang_timeout: Duration::from_secs(120),
        idle_canary: Some(Duration::from_secs(30)),
        stop_grace: Duration::from_secs(10),
        backoff_first: Duration::from_secs(5),
        backoff_max: Duration::from_secs(120),
        crash_limit: 5,
        crash_window: Duration::from_secs(1800),
        log_bytes: 1 << 20,
        log_files: 5,
        cgroup: CgroupRequest::Off,
        node_key_file: None,
    }
}
