//! The whole supervisor over real processes: deaths, restarts, giving up, and stopping.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod supervise_common;

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;

use pegaflow::fleet::{FleetPublisher, NodeId, NodeView, Phase, Role};
use pegaflow::handoff::HandoffBoard;
use pegaflow::notify::Vitals;
use pegaflow::plan::{NodePlan, SupervisorPlan};
use pegaflow::shutdown::Shutdown;
use pegaflow::supervise::{
    self, CanaryPlan, LogSink, OrderDesk, SupervisorDeps, SupervisorError, SupervisorMetrics,
};
use pegaflow::topology::{CgroupRequest, Secrets};
use pegaflow::traffic::Traffic;

use supervise_common::{LIMIT, alive, eventually, marker};

struct Quiet;

impl LogSink for Quiet {
    fn line(&self, _: &NodeId, _: &str) {}
}

struct Supervised {
    fleet: FleetPublisher,
    shutdown: Shutdown,
    task: JoinHandle<Result<(), SupervisorError>>,
    dir: tempfile::TempDir,
    marker: String,
}

fn quick() -> SupervisorPlan {
    SupervisorPlan {
        start_timeout: Duration::from_secs(60),
        health_interval: Duration::from_millis(50),
        hang_timeout: Duration::from_secs(30),
        idle_canary: Some(Duration::from_secs(30)),
        stop_grace: Duration::from_secs(1),
        backoff_first: Duration::from_millis(50),
        backoff_max: Duration::from_millis(200),
        crash_limit: 3,
        crash_window: Duration::from_secs(600),
        log_bytes: 1 << 20,
        log_files: 5,
        cgroup: CgroupRequest::Off,
        node_key_file: None,
    }
}

fn free_addr() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

impl Supervised {
    fn start(mode: &str, plan: SupervisorPlan) -> Self {
        Self::start_at(mode, plan, free_addr())
    }

    fn start_at(mode: &str, plan: SupervisorPlan, addr: SocketAddr) -> Self {
        Self::start_under(mode, plan, addr, env!("CARGO_BIN_EXE_pegaflow").as_ref())
    }

    fn start_under(mode: &str, plan: SupervisorPlan, addr: SocketAddr, guard: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let marker = marker();
        let script = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/supervise_common/node.py"
        );
        let port = addr.port().to_string();
        let path = dir.path().to_str().unwrap();
        let argv = ["python3", script, &port, &marker, mode, path].map(str::to_owned);
        let node = NodePlan {
            served_model: "m".into(),
            id: "n".into(),
            role: Role::Unified,
            pool: "default".into(),
            weight: 1,
            addr,
            gpus: vec![],
            cpus: vec![],
            numa: vec![],
            tensor_parallel: 1,
            memory: None,
            argv: argv.to_vec(),
            env: Default::default(),
        };
        let fleet = FleetPublisher::new([NodeView::pending("n".into(), Role::Unified, addr)]);
        let shutdown = Shutdown::default();
        let deps = SupervisorDeps {
            node_key: None,
            nodes: vec![node],
            plan,
            canary: CanaryPlan {
                connector: pegaflow::topology::Connector::Pegaflow,
                block_size: 32,
                tolerance: 0.0,
                deadline: LIMIT,
                partner_grace: LIMIT,
            },
            fleet: fleet.clone(),
            board: HandoffBoard::default(),
            traffic: Traffic::default(),
            orders: OrderDesk::default(),
            log_dir: dir.path().join("logs"),
            run_dir: dir.path().to_owned(),
            guard_program: guard.to_owned(),
            console: Arc::new(Quiet),
            secrets: Secrets::default(),
            metrics: SupervisorMetrics::register(&mut Registry::default()),
            store: None,
            groups: None,
            vitals: Vitals::default(),
        };
        let task = tokio::spawn(supervise::run(deps, shutdown.clone()));
        Self {
            fleet,
            shutdown,
            task,
            dir,
            marker,
        }
    }

    async fn until(&self, what: &str, condition: impl Fn(&NodeView) -> bool) -> NodeView {
        let mut watch = self.fleet.watch();
        let wanted = watch.wait_for(|fleet| condition(fleet.node(&"n".into()).unwrap()));
        match tokio::time::timeout(LIMIT, wanted).await {
            Ok(fleet) => fleet.unwrap().node(&"n".into()).unwrap().clone(),
            Err(_) => panic!("never {what}: {:?}", self.fleet.snapshot()),
        }
    }

    async fn ready(&self, incarnation: u64) -> NodeView {
        self.until("ready", |node| {
            node.is_ready() && node.incarnation == incarnation
        })
        .await
    }

    /// The guard's pid: the leader's parent.
    fn guard_of(&self, node: &NodeView) -> Pid {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", node.pid.unwrap())).unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        Pid::from_raw(fields.split(' ').nth(1).unwrap().parse().unwrap())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("logs/n.log")).unwrap()
    }

    async fn stop(self) {
        self.shutdown.advance();
        self.ended().await;
    }

    async fn ended(self) {
        tokio::time::timeout(LIMIT, self.task)
            .await
            .expect("the supervisor does not end")
            .unwrap()
            .unwrap();
        assert_eq!(alive(&self.marker), Vec::<i32>::new());
        let snapshot = self.fleet.snapshot();
        let node = snapshot.node(&"n".into()).unwrap();
        assert_eq!(node.phase, Phase::Stopped);
        assert_eq!(node.reaped, node.incarnation);
    }
}

fn leader(node: &NodeView) -> Pid {
    Pid::from_raw(i32::try_from(node.pid.unwrap()).unwrap())
}

#[tokio::test]
async fn a_killed_leader_is_seen_and_replaced_and_the_end_is_clean() {
    let up = Supervised::start("serve", quick());
    let first = up.ready(1).await;
    assert_eq!(alive(&up.marker).len(), 4);
    let killed = Instant::now();
    kill(leader(&first), Signal::SIGKILL).unwrap();
    // A health probe may miss it before its end is known.
    let dead = |node: &NodeView| !node.is_ready() && node.reason.is_some();
    let dead = up.until("not ready, and why", dead).await;
    assert!(
        killed.elapsed() < Duration::from_secs(2),
        "{:?}",
        killed.elapsed()
    );
    assert!(dead.reason.unwrap().contains("SIGKILL"));
    let second = up.ready(2).await;
    assert_eq!((second.restarts, second.reaped), (1, 1));
    assert_ne!(second.pid, first.pid);
    assert!(up.log().contains("hello from n 1\n"));
    assert!(up.log().contains("hello from n 2\n"));
    // Grandchildren of the first life are gone: one tree, not one and a half.
    assert_eq!(alive(&up.marker).len(), 4);
    up.stop().await;
}

#[tokio::test]
async fn a_killed_guard_leaves_nothing_and_the_node_returns() {
    let up = Supervised::start("serve", quick());
    let first = up.ready(1).await;
    let before = alive(&up.marker);
    kill(up.guard_of(&first), Signal::SIGKILL).unwrap();
    let second = up.ready(2).await;
    assert_eq!(second.reaped, 1);
    let after = alive(&up.marker);
    assert_eq!(after.len(), 4);
    assert!(before.iter().all(|pid| !after.contains(pid)));
    up.stop().await;
}

/// As in a container that may not make mount namespaces.
#[tokio::test]
async fn a_killed_guard_leaves_no_shared_memory_where_the_tree_has_no_dev_shm_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let guard = dir.path().join("guard");
    let text = "#!/bin/bash\nargs=(\"$@\")\nexec PEGAFLOW \"${args[@]/--private-shm/--cpus=0}\"\n";
    let text = text.replace("PEGAFLOW", env!("CARGO_BIN_EXE_pegaflow"));
    std::fs::write(&guard, text).unwrap();
    std::fs::set_permissions(&guard, std::fs::Permissions::from_mode(0o755)).unwrap();
    let up = Supervised::start_under("shm", quick(), free_addr(), &guard);
    let first = up.ready(1).await;
    let [old, new] =
        [1, 2].map(|life| PathBuf::from(format!("/dev/shm/pegaflow-{}-{life}", up.marker)));
    assert!(old.exists());
    // A guard looks once a second.
    tokio::time::sleep(Duration::from_secs(3)).await;
    kill(up.guard_of(&first), Signal::SIGKILL).unwrap();
    up.ready(2).await;
    assert!(new.exists() && !old.exists());
    up.stop().await;
    assert!(!new.exists());
}

#[tokio::test]
async fn a_leader_that_ignores_term_is_killed_after_the_grace() {
    let up = Supervised::start("stubborn", quick());
    up.ready(1).await;
    let started = Instant::now();
    up.stop().await;
    assert!(started.elapsed() >= quick().stop_grace);
}

#[tokio::test]
async fn insisting_does_not_wait_for_the_grace() {
    let plan = SupervisorPlan {
        stop_grace: LIMIT * 10,
        ..quick()
    };
    let up = Supervised::start("stubborn", plan);
    up.ready(1).await;
    up.shutdown.advance();
    up.until("stopping", |node| node.phase == Phase::Stopping)
        .await;
    up.shutdown.advance();
    up.ended().await;
}

#[tokio::test]
async fn a_stopped_guard_cannot_hold_up_a_forced_end() {
    let up = Supervised::start("serve", quick());
    let node = up.ready(1).await;
    kill(up.guard_of(&node), Signal::SIGSTOP).unwrap();
    let Supervised {
        shutdown,
        task,
        marker,
        ..
    } = up;
    shutdown.advance();
    shutdown.advance();
    // Kill is not obeyed; after ten seconds the guard is killed, and its tree is swept.
    tokio::time::timeout(LIMIT * 2, task)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(alive(&marker), Vec::<i32>::new());
}

#[tokio::test]
async fn a_dead_engine_is_restarted_and_a_deaf_server_only_leaves_routing() {
    let up = Supervised::start("serve", quick());
    up.ready(1).await;
    let deaf = up.dir.path().join("deaf");
    std::fs::write(&deaf, "").unwrap();
    up.until("unreachable", |node| node.phase == Phase::Unreachable)
        .await;
    std::fs::remove_file(&deaf).unwrap();
    up.ready(1).await;
    std::fs::write(up.dir.path().join("dead"), "").unwrap();
    up.until("restarted", |node| node.restarts >= 1).await;
    std::fs::remove_file(up.dir.path().join("dead")).unwrap();
    up.until("ready", NodeView::is_ready).await;
    up.stop().await;
}

#[tokio::test]
async fn a_node_that_keeps_dying_is_given_up() {
    let up = Supervised::start("crash", quick());
    let node = up
        .until("crash loop", |node| {
            node.phase == Phase::CrashLoop && node.reaped == node.incarnation
        })
        .await;
    assert_eq!(node.incarnation, 3);
    let said = up.until("explained", |node| {
        node.reason
            .as_deref()
            .is_some_and(|why| why.contains("bad luck"))
    });
    said.await;
    assert!(!up.task.is_finished());
    up.stop().await;
}

#[tokio::test]
async fn a_wrong_flag_is_not_retried() {
    let up = Supervised::start("usage", quick());
    let node = up.until("failed", |node| node.phase == Phase::Failed).await;
    assert_eq!(node.incarnation, 1);
    assert!(node.reason.unwrap().contains("--frob"));
    up.stop().await;
}

#[tokio::test]
async fn a_taken_port_is_waited_for() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let up = Supervised::start_at("serve", quick(), holder.local_addr().unwrap());
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(
        up.fleet.snapshot().node(&"n".into()).unwrap().incarnation,
        0
    );
    drop(holder);
    up.ready(1).await;
    up.stop().await;
}

#[tokio::test]
async fn a_supervisor_that_is_dropped_leaves_nothing() {
    let up = Supervised::start("stubborn", quick());
    up.ready(1).await;
    up.task.abort();
    let marker = up.marker.clone();
    let gone = tokio::task::spawn_blocking(move || {
        eventually("everything is gone", || alive(&marker).is_empty())
    });
    assert!(gone.await.unwrap() < Duration::from_secs(5));
}
