//! Watches the fleet on behalf of the person at the terminal: writes the banner once, and notices
//! when a start has failed for good.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::{Context, Exit};
use crate::fleet::{FleetSnapshot, FleetWatch, KvTrust, NodeId, Phase, Role, Service};
use crate::instance::Instance;
use crate::observe::{Console, ProgressHandle};
use crate::plan::Plan;

const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// What a fleet that has just started up amounts to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// Some node is still on its way.
    Waiting,
    /// All nodes are as they should be.
    Ready,
    /// Something serves, but not everything that the topology asks for.
    Degraded(Vec<String>),
    /// Nothing serves, and nothing will without a hand on it.
    Failed(Vec<String>),
}

/// Judges a start: pure, from one snapshot.
pub fn judge(fleet: &FleetSnapshot) -> Start {
    let nodes: Vec<_> = fleet.nodes().collect();
    let troubles: Vec<String> = nodes
        .iter()
        .filter_map(|node| {
            let reason = node.reason.as_deref().unwrap_or("no reason known");
            match (&node.phase, &node.trust) {
                (Phase::Ready, KvTrust::None | KvTrust::Proven | KvTrust::Assumed) => None,
                (Phase::Ready, KvTrust::Unproven) => Some(format!(
                    "{}: serves whole requests only, no partner to hand off with",
                    node.id
                )),
                (_, KvTrust::Refused(why)) => Some(format!("{}: {why}", node.id)),
                (phase, _) => Some(format!("{}: {}, {reason}", node.id, phase.label())),
            }
        })
        .collect();
    let ready = nodes.iter().filter(|node| node.is_ready()).count();
    let terminal = nodes.iter().filter(|node| node.phase.is_terminal()).count();
    let dying =
        |phase: &Phase| matches!(phase, Phase::Backoff { .. } | Phase::Draining | Phase::Down);
    let dying = nodes.iter().filter(|node| dying(&node.phase)).count();
    match ready {
        _ if troubles.is_empty() => Start::Ready,
        0 if terminal == nodes.len() => Start::Failed(troubles),
        // A node that has died already may take minutes to be given up; the others serve meanwhile.
        1.. if ready + terminal + dying == nodes.len() => Start::Degraded(troubles),
        _ => Start::Waiting,
    }
}

/// Prints the banner when the fleet serves, then waits for the end. A start that fails for good is
/// the end.
pub async fn watch(
    cx: &Context,
    plan: &Plan,
    fleet: FleetWatch,
    instance: &Instance,
    has_started: &AtomicBool,
) -> Result<(), Exit> {
    let end = cx.shutdown.graceful();
    let _shown = AbortOnDrop(tokio::spawn(progress(cx.console.clone(), fleet.clone())));
    let start = tokio::select! {
        () = end.cancelled() => return Err(Exit::Interrupted),
        start = started(fleet.clone()) => start,
    };
    match start {
        Start::Failed(reasons) => {
            let reasons = reasons.join("\n  ");
            let logs = instance.log_dir().display();
            return Err(Exit::Failed(anyhow::anyhow!(
                "no node came up; logs are in {logs}\n  {reasons}"
            )));
        }
        Start::Degraded(reasons) => {
            for reason in reasons {
                tracing::warn!("degraded: {reason}");
            }
        }
        Start::Ready | Start::Waiting => {}
    }
    has_started.store(true, Ordering::Relaxed);
    let snapshot = fleet.now();
    cx.service.ready(&snapshot);
    let _narrator = AbortOnDrop(tokio::spawn(narrate(fleet.clone())));
    announce(&cx.console, &banner(plan, &snapshot, instance.log_dir()));
    end.cancelled().await;
    Ok(())
}

/// A task that lasts no longer than its owner.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The banner goes to stdout, for the person and for scripts that wait for it; all else is on stderr. A
/// detached pegaflow has its launcher and its log for both.
fn announce(console: &Console, banner: &str) {
    console.flush();
    if console.is_detached() {
        return console.ready(banner);
    }
    let mut stdout = std::io::stdout().lock();
    // A closed stdout is no reason to stop serving.
    let _ = writeln!(stdout, "\n{banner}");
    let _ = stdout.flush();
}

/// Waits until [`judge`] no longer says [`Start::Waiting`]. Cancel-safe.
pub async fn started(mut fleet: FleetWatch) -> Start {
    loop {
        let verdict = judge(&fleet.latest());
        if verdict != Start::Waiting {
            return verdict;
        }
        if fleet.changed().await.is_err() {
            return Start::Failed(vec!["the supervisor ended".into()]);
        }
    }
}

/// Shows how far each node is, until the start is settled or this is dropped.
pub async fn progress(console: Console, fleet: FleetWatch) {
    let mut shown: BTreeMap<NodeId, ProgressHandle> = BTreeMap::new();
    let started = Instant::now();
    loop {
        let now = fleet.now();
        for node in now.nodes() {
            if node.is_ready() || node.phase.is_terminal() {
                shown.remove(&node.id);
                continue;
            }
            let handle = shown
                .entry(node.id.clone())
                .or_insert_with(|| console.progress(node.id.as_str()));
            let seconds = started.elapsed().as_secs();
            handle.set_message(&format!("{} ({seconds} s)", node.phase.label()));
        }
        if judge(&now) != Start::Waiting {
            return;
        }
        tokio::time::sleep(PROGRESS_INTERVAL).await;
    }
}

/// After the start: says when the fleet stops handing off or serving, and when it does again.
pub async fn narrate(mut fleet: FleetWatch) {
    let mut last = fleet.latest().service();
    while fleet.changed().await.is_ok() {
        let now = fleet.latest().service();
        if now == last {
            continue;
        }
        match now {
            Service::Full => tracing::info!("the fleet serves as planned again"),
            Service::Degraded => {
                tracing::warn!("degraded: requests are served whole, on the nodes that are left");
            }
            Service::Down => tracing::warn!("no node serves; requests wait for one"),
        }
        last = now;
    }
}

/// What a person wants to know at the moment when the fleet serves.
pub fn banner(plan: &Plan, fleet: &FleetSnapshot, log_dir: &std::path::Path) -> String {
    let (url, figures) = (plan.router.url(), plan.router.metrics_url());
    let mut text = format!(
        "pegaflow is ready: {url}/v1   model: {}\n",
        Vec::from_iter(plan.served_names()).join(", ")
    );
    let _ = writeln!(
        text,
        "\n  {:<14} {:<8} {:<22} {:<10} PID",
        "NODE", "ROLE", "ADDRESS", "DEVICE"
    );
    for node in fleet.nodes() {
        let device = plan
            .nodes
            .iter()
            .find(|planned| planned.id == node.id)
            .map_or_else(|| "others".to_owned(), device);
        let pid = node.pid.map_or_else(|| "-".into(), |pid| pid.to_string());
        let _ = writeln!(
            text,
            "  {:<14} {:<8} {:<22} {:<10} {pid}",
            node.id,
            node.role,
            node.addr.to_string(),
            device
        );
    }
    let mode = if fleet.can_split() {
        "prefill and decode are apart; loaded KV was proven equal to computed KV"
    } else if fleet.nodes().all(|node| node.role == Role::Unified) {
        "unified nodes, no hand-off"
    } else {
        "DEGRADED: requests are served whole"
    };
    let key = match plan.router.api_keys {
        Some(_) => " -H \"Authorization: Bearer $KEY\"",
        None => "",
    };
    let _ = write!(
        text,
        "\n  {mode}\n  metrics {figures}/metrics   state {figures}/status   logs {}\n  \
         dashboard: `pegaflow dashboard` prints its address\n\n  \
         curl {url}/v1/completions{key} -H 'Content-Type: application/json' \\\n    \
         -d '{{\"model\": \"{}\", \"prompt\": \"The quick brown fox\", \"max_tokens\": 16}}'\n",
        log_dir.display(),
        plan.served_names().first().unwrap_or(&"")
    );
    text
}

fn device(node: &crate::plan::NodePlan) -> String {
    let join = |numbers: Vec<String>| numbers.join(",");
    if node.gpus.is_empty() {
        format!(
            "CPU {}",
            join(node.cpus.iter().map(ToString::to_string).collect())
        )
    } else {
        format!(
            "GPU {}",
            join(node.gpus.iter().map(ToString::to_string).collect())
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{FleetPublisher, NodeView};
    use std::net::SocketAddr;
    use std::sync::Arc;

    fn fleet(nodes: &[(&str, Role, Phase, KvTrust)]) -> Arc<FleetSnapshot> {
        let addr = SocketAddr::from(([127, 0, 0, 1], 1));
        let views = nodes.iter().map(|(name, role, phase, trust)| {
            let mut view = NodeView::pending((*name).into(), *role, addr);
            view.phase = phase.clone();
            view.trust = trust.clone();
            view
        });
        FleetPublisher::new(views).snapshot()
    }

    #[test]
    fn service_is_full_degraded_or_down() {
        use KvTrust::{None, Proven, Unproven};
        let pair = |p, d| {
            let prefill = ("p", Role::Prefill, Phase::Ready, p);
            fleet(&[prefill, ("d", Role::Decode, Phase::Ready, d)]).service()
        };
        assert_eq!(pair(Proven, Proven), Service::Full);
        assert_eq!(pair(Proven, Unproven), Service::Degraded);
        let unified = |phase| {
            let one = ("a", Role::Unified, Phase::Ready, None);
            fleet(&[one, ("b", Role::Unified, phase, None)]).service()
        };
        assert_eq!(unified(Phase::Ready), Service::Full);
        assert_eq!(unified(Phase::Starting), Service::Degraded);
        let down = fleet(&[("a", Role::Unified, Phase::Unreachable, None)]);
        assert_eq!(down.service(), Service::Down);
    }

    #[test]
    fn a_start_is_judged_when_every_node_has_settled() {
        use KvTrust::{Proven, Refused, Unproven};
        let p = |phase, trust| ("p", Role::Prefill, phase, trust);
        let d = |phase, trust| ("d", Role::Decode, phase, trust);
        let waiting = fleet(&[p(Phase::Ready, Proven), d(Phase::Starting, Unproven)]);
        assert_eq!(judge(&waiting), Start::Waiting);
        let ready = fleet(&[p(Phase::Ready, Proven), d(Phase::Ready, Proven)]);
        assert_eq!(judge(&ready), Start::Ready);
        let degraded = fleet(&[p(Phase::CrashLoop, Unproven), d(Phase::Ready, Unproven)]);
        assert!(matches!(judge(&degraded), Start::Degraded(why) if why.len() == 2));
        let refused = Refused("canary: tokens differ".into());
        let failed = fleet(&[p(Phase::Failed, refused.clone()), d(Phase::Failed, refused)]);
        assert!(matches!(judge(&failed), Start::Failed(why) if why.len() == 2));
        let backoff = Phase::Backoff {
            delay: std::time::Duration::from_secs(5),
        };
        let dying = fleet(&[p(backoff.clone(), Unproven), d(Phase::Ready, Unproven)]);
        assert!(matches!(judge(&dying), Start::Degraded(why) if why.len() == 2));
        let hopeful = fleet(&[p(backoff.clone(), Unproven), d(backoff, Unproven)]);
        assert_eq!(judge(&hopeful), Start::Waiting);
    }
}
