//! pegaflow and guards killed in the same moment: a guard that was spared, or the next `up`, ends what the
//! kernel does not.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;

use crate::commands::told;
use crate::support::client::{Ending, completion};
use crate::support::{self, HANG, Site, processes, send};
use crate::wait_until;

fn guards(pegaflow: u32) -> Vec<u32> {
    let mut guards = processes::children(pegaflow);
    guards.retain(|pid| processes::describe(*pid).contains(" __guard "));
    guards
}

/// Kills pegaflow and the guards `with`, none of which sees another's death. Returns what is left.
async fn kill_at_once(site: &Site, pegaflow: u32, with: &[u32]) -> BTreeSet<u32> {
    for pid in with.iter().chain([&pegaflow]) {
        send(*pid, Signal::SIGSTOP);
    }
    for guard in with {
        send(*guard, Signal::SIGKILL);
    }
    let killed = || with.iter().all(|guard| !processes::is_alive(*guard));
    wait_until(async || killed(), "the guards are dead").await;
    send(pegaflow, Signal::SIGKILL);
    // Guards that were spared end their nodes.
    tokio::time::sleep(support::GONE_LIMIT).await;
    site.processes()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_guard_and_pegaflow_left_is_ended_by_the_next_up() {
    let site = Site::new();
    let neighbour_port = support::free_port();
    let own = support::topology(site.port);
    site.topology(&support::topology(neighbour_port));
    let mut neighbour = site.up();
    neighbour.wait_for_log("pegaflow is ready").await;
    let neighbours = site.processes();
    site.topology(&own);

    // Both guards, and only one of them.
    for spared in [0, 1] {
        let mut up = site.up_ready().await;
        let guards = guards(up.pid());
        assert_eq!(guards.len(), 2);
        let left = kill_at_once(&site, up.pid(), &guards[spared..]).await;
        up.wait(HANG).await;
        let left: Vec<_> = left.difference(&neighbours).copied().collect();
        // A guard that was spared ends all of it.
        assert_eq!(left.is_empty(), spared > 0, "{left:?}");

        let again = site.up_ready().await;
        let alive = left.iter().filter(|pid| processes::is_alive(**pid));
        assert_eq!(alive.count(), 0, "{left:?}");
        let said = format!("ended {} processes of an earlier run", left.len());
        assert_eq!(again.output().contains(&said), spared == 0, "{said}");
        let answer = again.generate(&completion(1, 100, 4)).await;
        assert_eq!(answer.ending, Ending::Complete);
        let name = format!("test-{}", site.port);
        told(&site, &["down", &name]).await;
    }
    let now = site.processes();
    assert!(neighbours.is_subset(&now), "another fleet is left alone");
    told(&site, &["down"]).await;
    assert_eq!(neighbour.wait(HANG).await.code(), Some(0));
    site.assert_nothing_left(std::time::Duration::from_secs(1))
        .await;
}

/// `pkill -9 pegaflow` kills whoever has this name.
#[tokio::test(flavor = "multi_thread")]
async fn a_guard_has_another_name_than_pegaflow() {
    let site = Site::new();
    let mut up = site.up_ready().await;
    let name = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    let mut named = site.processes();
    named.retain(|pid| name(*pid).contains("pegaflow"));
    assert_eq!(named, BTreeSet::from([up.pid()]));
    for pid in named {
        send(pid, Signal::SIGKILL);
    }
    up.wait(HANG).await;
    site.assert_nothing_left(support::GONE_LIMIT).await;
}
