//! `up` as a service: what [`crate::notify`] tells the manager, and when.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::fleet::{FleetSnapshot, FleetWatch};
use crate::notify::{News, Notifier, Vitals};

/// Nodes that a status names; the others are counted.
const NAMED: usize = 3;

/// The service manager's view of this run.
pub struct Service {
    notifier: Notifier,
    pub vitals: Vitals,
    failed: AtomicBool,
}

impl Service {
    pub fn from_env() -> Self {
        let notifier = Notifier::from_env().unwrap_or_else(|error| {
            tracing::warn!("no news for the service manager: {error}");
            Notifier::default()
        });
        Self::new(notifier)
    }

    fn new(notifier: Notifier) -> Self {
        Self {
            vitals: notifier.vitals(),
            notifier,
            failed: AtomicBool::new(false),
        }
    }

    pub fn preparing(&self) {
        self.tell(&[News::Status("preparing the runtime and the model")]);
    }

    /// The fleet serves.
    pub fn ready(&self, fleet: &FleetSnapshot) {
        self.tell(&[News::Ready, News::Status(&status(fleet))]);
    }

    /// Tells how the fleet is until `end`, and for as long as it runs whether everything makes progress.
    pub async fn watch(&self, mut fleet: FleetWatch, end: CancellationToken) {
        // Without a watchdog, a day is as good as never.
        let period = self.notifier.look_interval();
        let mut look = interval(period.unwrap_or(Duration::from_secs(24 * 3600)));
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut said, mut stuck_before) = (String::new(), false);
        loop {
            if !end.is_cancelled() {
                let now = status(&fleet.latest());
                if now != said {
                    self.tell(&[News::Status(&now)]);
                    said = now;
                }
            }
            tokio::select! {
                () = end.cancelled(), if said != STOPPING => {
                    self.tell(&[News::Stopping, News::Status(STOPPING)]);
                    said = STOPPING.to_owned();
                }
                Ok(()) = fleet.changed(), if said != STOPPING => {}
                _ = look.tick(), if period.is_some() => {
                    let stuck = self.vitals.look();
                    if stuck.is_empty() {
                        self.tell(&[News::Alive]);
                    } else if !stuck_before {
                        tracing::error!("no progress: {} (a bug of pegaflow)", stuck.join(", "));
                    }
                    stuck_before = !stuck.is_empty();
                }
                // It stops, and nobody wants to hear that it lives.
                else => return,
            }
        }
    }

    fn tell(&self, news: &[News<'_>]) {
        if let Err(error) = self.notifier.send(news)
            && !self.failed.swap(true, Ordering::Relaxed)
        {
            tracing::warn!("the service manager does not take news: {error}");
        }
    }
}

const STOPPING: &str = "stopping";

/// Like `1 of 2 nodes ready; decode: starting`.
fn status(fleet: &FleetSnapshot) -> String {
    let nodes: Vec<_> = fleet.nodes().collect();
    let others: Vec<String> = nodes
        .iter()
        .filter(|node| !node.is_ready())
        .map(|node| format!("{}: {}", node.id, node.phase.label()))
        .collect();
    let ready = nodes.len() - others.len();
    let mut text = format!("{ready} of {} nodes ready", nodes.len());
    let named: Vec<&str> = others.iter().take(NAMED).map(String::as_str).collect();
    if !named.is_empty() {
        text += &format!("; {}", named.join(", "));
    }
    if others.len() > NAMED {
        text += &format!(" and {} more", others.len() - NAMED);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{FleetPublisher, NodeView, Phase, Role};

    fn fleet(ready: usize, others: usize) -> FleetPublisher {
        let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        FleetPublisher::new((0..ready + others).map(|index| {
            let id = format!("n{index}");
            let mut view = NodeView::pending(id.as_str().into(), Role::Unified, addr);
            if index < ready {
                view.phase = Phase::Ready;
            }
            view
        }))
    }

    #[test]
    fn a_status_counts_and_names_what_is_not_ready() {
        let said = |ready, others| status(&fleet(ready, others).watch().now());
        assert_eq!(said(2, 0), "2 of 2 nodes ready");
        assert_eq!(said(1, 1), "1 of 2 nodes ready; n1: pending");
        assert_eq!(
            said(0, 5),
            "0 of 5 nodes ready; n0: pending, n1: pending, n2: pending and 2 more"
        );
    }

    /// Most runs have no service manager, or one without a watchdog: at the stop nothing is left to tell.
    #[tokio::test]
    async fn without_a_watchdog_telling_ends_with_the_stop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = tokio::net::UnixDatagram::bind(&path).unwrap();
        let heard = Notifier::to(&path, None).unwrap();
        for notifier in [Notifier::default(), heard] {
            let (service, fleet) = (Service::new(notifier), fleet(1, 0));
            let end = CancellationToken::new();
            end.cancel();
            let watched = service.watch(fleet.watch(), end);
            tokio::time::timeout(Duration::from_secs(60), watched)
                .await
                .unwrap();
        }
        let mut buffer = [0; 256];
        let received = tokio::time::timeout(Duration::from_secs(60), manager.recv(&mut buffer));
        let length = received.await.unwrap().unwrap();
        assert!(buffer[..length].starts_with(b"STOPPING=1"));
    }

    /// As long as every part beats the watchdog is fed; one that hangs ends that, one that ended does not.
    #[tokio::test]
    async fn the_watchdog_is_fed_only_while_every_part_makes_progress() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = tokio::net::UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::to(&path, Some(Duration::from_millis(400))).unwrap();
        let service = std::sync::Arc::new(Service::new(notifier));
        let mut healthy = service.vitals.part("healthy");
        let beating = tokio::spawn(async move {
            healthy.during(std::future::pending::<()>()).await;
        });
        let fleet = fleet(1, 0);
        let (watched, watch, end) = (service.clone(), fleet.watch(), CancellationToken::new());
        let task = tokio::spawn(async move { watched.watch(watch, end).await });
        let fed = async || {
            let mut buffer = [0; 256];
            loop {
                let length = manager.recv(&mut buffer).await.unwrap();
                if buffer[..length] == *b"WATCHDOG=1" {
                    return;
                }
            }
        };
        let within = |seconds| Duration::from_secs(seconds);
        for _ in 0..3 {
            tokio::time::timeout(within(60), fed()).await.unwrap();
        }
        let hung = service.vitals.part("hung");
        // What was on its way before the part was found to hang; then silence.
        let silent = async { while tokio::time::timeout(within(2), fed()).await.is_ok() {} };
        tokio::time::timeout(within(60), silent).await.unwrap();
        drop(hung);
        tokio::time::timeout(within(60), fed()).await.unwrap();
        task.abort();
        beating.abort();
    }
}
