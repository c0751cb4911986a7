//! Signals and `kill -9` before the fleet is ready: during the runtime's install, the model's
//! download, and the nodes' start. Nothing is left, and the next `up` works first time.

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::helpers::Work;
use crate::support::client::{Ending, completion};
use crate::support::{GONE_LIMIT, HANG, Site, processes};
use crate::wait_until;

/// From a signal to the end of pegaflow.
const PROMPT: Duration = Duration::from_secs(5);

/// Environments in the cache, and how many of them are half-made.
fn environments(site: &Site) -> (usize, usize) {
    let Ok(entries) = fs::read_dir(site.path("cache/runtimes")) else {
        return (0, 0);
    };
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let (partial, whole): (Vec<_>, Vec<_>) = names
        .filter(|name| !name.ends_with(".lock"))
        .partition(|name| name.contains(".partial-"));
    (whole.len(), partial.len())
}

async fn interrupt(work: Work, signal: Signal) {
    let site = work.site();
    site.hang();
    let mut up = site.up();
    wait_until(async || site.path("stuck").exists(), "the helper hangs").await;
    let running = site.processes();
    assert!(running.len() >= 3, "pegaflow, the helper, its child");
    let nodes = running
        .iter()
        .filter(|pid| processes::describe(**pid).contains("--node prefill"));
    assert_eq!(nodes.count(), 0, "a node runs already");
    assert!(!site.shm().is_empty(), "the child's file is not seen");
    if work == Work::Install {
        assert_eq!(environments(&site), (0, 1));
    }

    up.signal(signal);
    let status = up.wait(PROMPT).await;
    if signal == Signal::SIGKILL {
        site.assert_nothing_left(GONE_LIMIT).await;
    } else {
        assert_eq!(status.code(), Some(130), "130: stopped before it was ready");
        site.assert_nothing_left(Duration::from_secs(1)).await;
    }

    site.go_on();
    let again = site.up_ready().await;
    let answer = again.generate(&completion(1, 100, 4)).await;
    assert_eq!(answer.ending, Ending::Complete);
    again.stop().await;
    if work == Work::Install {
        assert_eq!(environments(&site), (1, 0), "(whole, half-made)");
    }
}

macro_rules! interrupt_tests {
    ($($name:ident: $work:ident, $signal:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            interrupt(Work::$work, Signal::$signal).await;
        }
    )*};
}

interrupt_tests! {
    ctrl_c_during_the_install_ends_clean: Install, SIGINT;
    sigterm_during_the_install_ends_clean: Install, SIGTERM;
    kill_9_during_the_install_leaves_nothing: Install, SIGKILL;
    ctrl_c_during_the_download_ends_clean: Download, SIGINT;
    sigterm_during_the_download_ends_clean: Download, SIGTERM;
    kill_9_during_the_download_leaves_nothing: Download, SIGKILL;
}

async fn interrupt_the_start(signal: Signal) {
    let site = Site::new();
    site.script(r#"{"startup_ms": 60000}"#);
    let mut up = site.up();
    wait_until(async || site.processes().len() >= 9, "all processes run").await;
    up.signal(signal);
    let status = up.wait(PROMPT).await;
    assert_eq!(status.code(), Some(130), "130: stopped before it was ready");
    site.assert_nothing_left(Duration::from_secs(1)).await;

    site.script("{}");
    let again = site.up_ready().await;
    let answer = again.generate(&completion(1, 100, 4)).await;
    assert_eq!(answer.ending, Ending::Complete);
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_while_models_load_ends_clean() {
    interrupt_the_start(Signal::SIGINT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_while_models_load_ends_clean() {
    interrupt_the_start(Signal::SIGTERM).await;
}

/// The worst case: processes that ignore TERM, in the middle of their start.
#[tokio::test(flavor = "multi_thread")]
async fn kill_9_while_models_load_leaves_nothing() {
    let site = Site::new();
    site.script(r#"{"ignore_term": true, "startup_ms": 60000}"#);
    let mut up = site.up();
    wait_until(async || site.processes().len() >= 9, "all processes run").await;
    up.signal(Signal::SIGKILL);
    up.wait(HANG).await;
    site.assert_nothing_left(GONE_LIMIT).await;
}
