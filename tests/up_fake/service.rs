//! `up` under a service manager: a real datagram socket stands in for systemd.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::Instant;

use nix::sys::signal::Signal;

use crate::helpers::Work;
use crate::support::{HANG, Site, processes, send};
use crate::wait_until;

/// systemd, as far as a service sees it.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    heard: Vec<String>,
}

impl Manager {
    fn of(site: &mut Site) -> Self {
        let path = site.path("notify.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        site.env("NOTIFY_SOCKET", path.to_str().unwrap());
        site.env("WATCHDOG_USEC", "2000000");
        Self {
            socket,
            path,
            heard: Vec::new(),
        }
    }

    /// Takes what has come, one line each.
    fn listen(&mut self) {
        let mut buffer = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut buffer) {
            let text = String::from_utf8(buffer[..length].to_vec()).unwrap();
            self.heard.extend(text.lines().map(str::to_owned));
        }
    }

    /// Waits for a line that has not been waited for yet, and forgets what came before it.
    async fn hears(&mut self, wanted: impl Fn(&str) -> bool, what: &str) -> String {
        let started = Instant::now();
        loop {
            self.listen();
            if let Some(at) = self.heard.iter().position(|line| wanted(line)) {
                return self.heard.drain(..=at).next_back().unwrap();
            }
            assert!(started.elapsed() < HANG, "never {what}: {:?}", self.heard);
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manager_hears_of_every_step_and_nobody_else_speaks() {
    let mut site = Site::new();
    let mut manager = Manager::of(&mut site);
    let mut up = site.up();
    manager
        .hears(|line| line.starts_with("STATUS=preparing"), "preparing")
        .await;
    manager
        .hears(
            |line| line.starts_with("STATUS=0 of 2 nodes ready; "),
            "0 of 2",
        )
        .await;
    assert!(
        !manager.heard.iter().any(|line| line == "READY=1"),
        "too early"
    );
    manager.hears(|line| line == "READY=1", "ready").await;
    manager
        .hears(|line| line == "STATUS=2 of 2 nodes ready", "2 of 2")
        .await;
    // Parts that do nothing but wait make progress too.
    for _ in 0..3 {
        manager.hears(|line| line == "WATCHDOG=1", "alive").await;
    }

    let variable = format!("NOTIFY_SOCKET={}", manager.path.display());
    let speakers = processes::with_environment(&variable);
    assert_eq!(speakers.into_iter().collect::<Vec<_>>(), [up.pid()]);
    let variable = "WATCHDOG_USEC=2000000";
    assert!(processes::with_environment(variable).contains(&up.pid()));
    let node = u32::try_from(up.node("decode").await["pid"].as_u64().unwrap()).unwrap();
    let environment = fs::read(format!("/proc/{node}/environ")).unwrap();
    let environment = String::from_utf8_lossy(&environment).into_owned();
    assert!(environment.contains("PEGAFLOW_NODE=decode"));
    assert!(!environment.contains("NOTIFY_SOCKET") && !environment.contains("WATCHDOG"));

    send(node, Signal::SIGKILL);
    manager
        .hears(
            |line| line.starts_with("STATUS=1 of 2 nodes ready; decode: "),
            "1 of 2",
        )
        .await;
    manager
        .hears(|line| line == "STATUS=2 of 2 nodes ready", "healed")
        .await;

    up.signal(Signal::SIGTERM);
    manager.hears(|line| line == "STOPPING=1", "stopping").await;
    assert!(up.wait(HANG).await.success());
    manager.listen();
    assert!(
        !manager
            .heard
            .iter()
            .any(|line| line.contains("nodes ready"))
    );
}

/// Also while it only installs: what runs then does not inherit the socket, and ends with it.
#[tokio::test(flavor = "multi_thread")]
async fn helpers_of_the_preparation_do_not_inherit_the_managers_socket() {
    let mut site = Work::Install.site();
    site.hang();
    let mut manager = Manager::of(&mut site);
    let mut up = site.up();
    manager
        .hears(|line| line.starts_with("STATUS=preparing"), "preparing")
        .await;
    wait_until(async || site.path("stuck").exists(), "the install").await;
    let variable = format!("NOTIFY_SOCKET={}", manager.path.display());
    let speakers = processes::with_environment(&variable);
    assert_eq!(speakers.into_iter().collect::<Vec<_>>(), [up.pid()]);
    up.signal(Signal::SIGTERM);
    up.wait(HANG).await;
}

/// A manager that is not there costs a warning.
#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_is_gone_is_no_reason_to_fail() {
    let mut site = Site::new();
    site.env("NOTIFY_SOCKET", "/does/not/exist");
    let up = site.up_ready().await;
    let warning = "the service manager does not take news";
    assert_eq!(up.output().matches(warning).count(), 1);
    up.stop().await;
}
