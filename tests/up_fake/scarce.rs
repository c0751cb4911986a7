//! What the machine lacks, or loses while nodes run.

use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use serde_json::Value;

use crate::support::client::{Ending, completion, is_proven};
use crate::support::{HANG, Site, send};

/// Makes a /dev/shm of its own that is tiny and full, and goes on as pegaflow.
const FULL: &str = "mount -t tmpfs -o size=64k,mode=1777 tmpfs /dev/shm \
                    && head -c 65536 /dev/zero > /dev/shm/full && exec \"$@\"";
const ISOLATED: [&str; 6] = ["unshare", "--mount", "--propagation", "private", "sh", "-c"];
/// As in a container without `CAP_SYS_ADMIN`.
const MAY_NOT_MOUNT: [&str; 3] = [
    "setpriv",
    "--bounding-set=-sys_admin",
    "--inh-caps=-sys_admin",
];

fn may_isolate() -> bool {
    let root = geteuid().is_root();
    if !root {
        eprintln!("skipped: a mount namespace needs root");
    }
    root
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_do_not_need_the_machines_dev_shm_where_they_may_have_their_own() {
    if !may_isolate() {
        return;
    }
    let site = Site::new();
    let mut up = site.up_under(&[&ISOLATED[..], &[FULL, "sh"]].concat());
    up.wait_for_log("pegaflow is ready").await;
    site.processes();
    let leader = up.node("decode").await["pid"].as_u64().unwrap();
    send(u32::try_from(leader).unwrap(), Signal::SIGKILL);
    let back = |view: &Value| is_proven(view) && view["restarts"] == 1;
    up.wait_for_node("decode", back).await;
    let answer = up.generate(&completion(1, 100, 8)).await;
    assert_eq!(answer.ending, Ending::Complete);
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_dev_shm_is_told_as_the_reason_and_mended_by_room() {
    if !may_isolate() {
        return;
    }
    let site = Site::new();
    let wrapper = [&ISOLATED[..], &[FULL, "sh"], &MAY_NOT_MOUNT].concat();
    let mut up = site.up_under(&wrapper);
    let status = up.wait(HANG).await;
    assert_eq!(status.code(), Some(1), "no node came up: {}", up.output());
    for node in ["prefill", "decode"] {
        let told = |line: &str| line.contains(node) && line.contains("df /dev/shm");
        assert!(up.output().lines().any(told), "{node}: {}", up.output());
    }
    site.assert_nothing_left(Duration::from_secs(1)).await;

    // The same without the right to mount, and with room.
    let wrapper = [&ISOLATED[..], &["exec \"$@\"", "sh"], &MAY_NOT_MOUNT].concat();
    let mut again = site.up_under(&wrapper);
    again.wait_for_log("pegaflow is ready").await;
    let answer = again.generate(&completion(1, 100, 8)).await;
    assert_eq!(answer.ending, Ending::Complete);
    again.stop().await;
}
