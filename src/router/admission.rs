//! Who may run: `max_in_flight` requests run, `max_queue` wait, more are refused.
//!
//! ```text
//! arrives ─▶ place free and a node ready ─────────────────────────────▶ runs (holds a Permit)
//!    │                                                                    ▲
//!    └─▶ queue (full: 429) ── a node is ready, then a place is free ──────┘
//!              └── queue_timeout: 503 with Retry-After
//! ```

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::error::RouterError;
use super::metrics::{GaugeGuard, RouterMetrics};
use crate::fleet::{FleetSnapshot, FleetWatch, NodeView, Phase, whole_seconds};
use crate::plan::RouterPlan;

/// What a client is told when nobody knows how long a node will take to start, in seconds.
const RETRY_AFTER_START: u64 = 5;

#[derive(Debug)]
pub(super) struct Admission {
    running: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    max_in_flight: usize,
    max_queue: usize,
    queue_timeout: Duration,
    metrics: RouterMetrics,
}

/// A running request's place.
#[derive(Debug)]
pub(super) struct Permit {
    _place: OwnedSemaphorePermit,
    _gauge: GaugeGuard,
}

impl Admission {
    pub(super) fn new(plan: &RouterPlan, metrics: &RouterMetrics) -> Self {
        let max_in_flight = plan.max_in_flight.clamp(1, Semaphore::MAX_PERMITS);
        let max_queue = plan.max_queue.min(Semaphore::MAX_PERMITS);
        Self {
            running: Arc::new(Semaphore::new(max_in_flight)),
            waiting: Arc::new(Semaphore::new(max_queue)),
            max_in_flight,
            max_queue,
            queue_timeout: plan.queue_timeout,
            metrics: metrics.clone(),
        }
    }

    pub(super) async fn enter(&self, fleet: &FleetWatch) -> Result<Permit, RouterError> {
        let ready = has_ready_node(&fleet.now());
        if let (true, Ok(place)) = (ready, self.running.clone().try_acquire_owned()) {
            return Ok(self.permit(place));
        }
        let Ok(_waiting) = self.waiting.clone().try_acquire_owned() else {
            return Err(RouterError::QueueFull {
                limit: self.max_queue,
                retry_after: 1,
            });
        };
        let _gauge = self.metrics.hold_queued();
        let deadline = Instant::now() + self.queue_timeout;
        timeout_at(deadline, wait_for_node(fleet.clone()))
            .await
            .map_err(|_| self.no_node(fleet))?;
        match timeout_at(deadline, self.running.clone().acquire_owned()).await {
            Ok(Ok(place)) => Ok(self.permit(place)),
            // The semaphore is never closed.
            Ok(Err(_)) | Err(_) => Err(RouterError::QueueTimeout {
                waited: self.queue_timeout,
                retry_after: 1,
            }),
        }
    }

    pub(super) fn no_node(&self, fleet: &FleetWatch) -> RouterError {
        let fleet = fleet.now();
        let now = SystemTime::now();
        let absent = fleet.nodes().filter(|node| !node.is_ready());
        let absent: Vec<_> = absent.map(|node| node.absence(now)).collect();
        RouterError::NoNode {
            waited: self.queue_timeout,
            nodes: absent.join("; "),
            retry_after: retry_after(&fleet),
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.max_in_flight
            .saturating_sub(self.running.available_permits())
    }

    pub(super) fn queued(&self) -> usize {
        self.max_queue
            .saturating_sub(self.waiting.available_permits())
    }

    fn permit(&self, place: OwnedSemaphorePermit) -> Permit {
        Permit {
            _place: place,
            _gauge: self.metrics.hold_in_flight(),
        }
    }
}

pub(super) fn has_ready_node(fleet: &FleetSnapshot) -> bool {
    fleet.nodes().any(NodeView::is_ready)
}

async fn wait_for_node(mut fleet: FleetWatch) {
    if fleet.wait_for(has_ready_node).await.is_err() {
        // The supervisor is gone: no node will come.
        std::future::pending::<()>().await;
    }
}

/// Seconds after which a client may try again: the shortest known delay until a node is started,
/// and then its start.
pub(super) fn retry_after(fleet: &FleetSnapshot) -> u64 {
    let now = SystemTime::now();
    let until = |node: &NodeView| match node.phase {
        Phase::Ready | Phase::Unreachable | Phase::Verifying => Some(1),
        Phase::Pending | Phase::Starting | Phase::WarmingUp | Phase::Draining | Phase::Down => {
            Some(RETRY_AFTER_START)
        }
        Phase::Backoff { delay } => {
            let left = node.next_start().and_then(|at| at.duration_since(now).ok());
            let left = left.unwrap_or_default().min(delay);
            Some(whole_seconds(left).saturating_add(RETRY_AFTER_START))
        }
        Phase::CrashLoop | Phase::Failed | Phase::Stopping | Phase::Stopped => None,
    };
    fleet.nodes().filter_map(until).min().unwrap_or(60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{FleetPublisher, Role};

    #[test]
    fn the_retry_hint_follows_the_first_node_to_return() {
        let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        let nodes = ["a", "b"].map(|id| NodeView::pending(id.into(), Role::Unified, addr));
        let fleet = FleetPublisher::new(nodes);
        let set = |id: &str, phase| fleet.update(&id.into(), |node| node.phase = phase);
        set(
            "a",
            Phase::Backoff {
                delay: Duration::from_secs(30),
            },
        );
        set("b", Phase::CrashLoop);
        assert_eq!(retry_after(&fleet.snapshot()), 35);
        set("b", Phase::Starting);
        assert_eq!(retry_after(&fleet.snapshot()), 5);
        set("a", Phase::Failed);
        set("b", Phase::Failed);
        assert_eq!(retry_after(&fleet.snapshot()), 60);
    }
}
