//! Two `up`s of one name exclude each other; a dead one leaves nothing that matters.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;

use pegaflow::instance::{Instance, InstanceError, InstanceInfo, Places, running_in};

fn places(dir: &Path) -> Places {
    Places {
        run: dir.join("run"),
        state: dir.join("state"),
    }
}

fn info() -> InstanceInfo {
    InstanceInfo::starting(Path::new("x.toml"))
}

fn acquire(places: &Places) -> Result<Instance, InstanceError> {
    Instance::acquire_in(places, "x", &info())
}

#[test]
fn a_second_one_learns_about_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(dir.path());
    assert_eq!(running_in(&places, "x").unwrap(), None);
    let mut first = acquire(&places).unwrap();
    let ready = InstanceInfo {
        url: Some("http://127.0.0.1:8000".into()),
        ..info()
    };
    first.set_info(&ready).unwrap();
    assert_eq!(running_in(&places, "x").unwrap(), Some(ready.clone()));
    let Err(InstanceError::AlreadyRunning { info: seen, .. }) = acquire(&places) else {
        panic!("two instances of one name");
    };
    assert_eq!(seen.as_deref(), Some(&ready));
    // Shorter than before: nothing of the old text may stay.
    let short = info();
    first.set_info(&short).unwrap();
    assert_eq!(running_in(&places, "x").unwrap(), Some(short));

    Instance::acquire_in(&places, "y", &info()).unwrap();
    let (run, logs) = (first.dir().to_owned(), first.log_dir().to_owned());
    for private in [&run, &logs] {
        let mode = fs::metadata(private).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{}", private.display());
    }
    drop(first);
    assert!(!run.exists());
    assert!(logs.is_dir());
    assert_eq!(running_in(&places, "x").unwrap(), None);
    acquire(&places).unwrap();
}

/// Run by the tests below in a process of its own; does nothing otherwise.
#[test]
fn child_process() {
    let Some(dir) = std::env::var_os("PEGAFLOW_TEST_INSTANCE") else {
        return;
    };
    let instance = acquire(&places(Path::new(&dir))).unwrap();
    fs::write(instance.dir().join("engine.sock"), "left behind").unwrap();
    fs::create_dir_all(instance.dir().join("shim/deep")).unwrap();
    eprintln!("acquired");
    loop {
        std::thread::park();
    }
}

fn other_process(dir: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_process", "--nocapture"])
        .env("PEGAFLOW_TEST_INSTANCE", dir)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let acquired = lines.map_while(Result::ok).any(|line| line == "acquired");
    assert!(acquired, "the other process did not get the instance");
    child
}

#[test]
fn a_killed_process_frees_the_name_and_its_leftovers_are_wiped() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(dir.path());
    let mut child = other_process(dir.path());
    let Err(InstanceError::AlreadyRunning { info: seen, .. }) = acquire(&places) else {
        panic!("two processes hold one name");
    };
    assert_eq!(seen.unwrap().pid, child.id());
    child.kill().unwrap();
    child.wait().unwrap();

    assert_eq!(running_in(&places, "x").unwrap(), None);
    let instance = acquire(&places).unwrap();
    let names: Vec<_> = fs::read_dir(instance.dir())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["lock"]);
}

#[test]
fn never_two_holders_while_many_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(dir.path());
    let barrier = Barrier::new(4);
    let held: usize = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    let mut held = 0;
                    for _ in 0..50 {
                        match acquire(&places) {
                            Ok(instance) => {
                                // Fails if another one is inside.
                                let mark = instance.dir().join("mark");
                                fs::File::create_new(&mark).unwrap();
                                held += 1;
                            }
                            Err(InstanceError::AlreadyRunning { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                    held
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .sum()
    });
    assert!(held >= 4);
    acquire(&places).unwrap();
}

#[test]
fn what_another_user_may_have_prepared_is_refused() {
    let refused = |places: &Places| {
        assert!(matches!(
            acquire(places),
            Err(InstanceError::Insecure { .. })
        ));
    };
    // The parent is a link.
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    fs::create_dir(&target).unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o700)).unwrap();
    let places = places(dir.path());
    symlink(&target, &places.run).unwrap();
    refused(&places);
    fs::remove_file(&places.run).unwrap();

    // The instance's own directory is a link.
    fs::create_dir(&places.run).unwrap();
    fs::set_permissions(&places.run, fs::Permissions::from_mode(0o700)).unwrap();
    symlink(&target, places.run.join("x")).unwrap();
    refused(&places);
    fs::remove_file(places.run.join("x")).unwrap();

    // Others may write into it.
    fs::set_permissions(&places.run, fs::Permissions::from_mode(0o777)).unwrap();
    refused(&places);
    fs::set_permissions(&places.run, fs::Permissions::from_mode(0o700)).unwrap();

    // The lock is a link: what it leads to must not be written.
    let victim = dir.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let inner = places.run.join("x");
    fs::create_dir(&inner).unwrap();
    fs::set_permissions(&inner, fs::Permissions::from_mode(0o700)).unwrap();
    symlink(&victim, inner.join("lock")).unwrap();
    assert!(matches!(acquire(&places), Err(InstanceError::Io { .. })));
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    fs::remove_file(inner.join("lock")).unwrap();

    // A leftover that is a link is removed, not followed.
    symlink(&target, inner.join("shim")).unwrap();
    fs::write(target.join("file"), "precious").unwrap();
    acquire(&places).unwrap();
    assert!(target.join("file").is_file());
}

#[test]
fn the_shim_is_unpacked_without_tests_and_leftovers() {
    let dir = tempfile::tempdir().unwrap();
    let instance = acquire(&places(dir.path())).unwrap();
    let shim = instance.unpack_shim().unwrap();
    assert!(shim.starts_with(instance.dir()));
    assert_eq!(
        fs::read(shim.join("pegaflow_tools/tiny_model.py")).unwrap(),
        fs::read(
            Path::new(env!("CARGO_MANIFEST_DIR")).join("python-shim/pegaflow_tools/tiny_model.py")
        )
        .unwrap()
    );
    for entry in fs::read_dir(&shim).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            name.starts_with("pegaflow_"),
            "{name} does not belong to a node"
        );
    }
    instance.unpack_shim().unwrap();
}
