//! What a prefill node's connector says of the KV that it keeps for one decode node: its `kv_transfer_params`.
//!
//! ```text
//!            take: fresh, and not taken yet
//!  held ─────────────────────────────────────▶ in a decode leg's body ──▶ that node reads the KV, or lets it go
//!   │  ▲                                                │
//!   │  └──── the node never saw it (no connection) ─────┘
//!   └─ dropped: the request is over, or answered otherwise ─▶ a decode node is asked to let it go (NIXL)
//! ```
//!
//! It is good once: whoever has read the KV tells the prefill node, which then uses the blocks for other prompts, and
//! what a second reader would find there is somebody else's KV. And it is good for a while only: the prefill
//! node's lease runs out, unless a decode node that has asked for the KV renews it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Context;
use super::balance::Pick;
use super::legs::Client;
use super::split;
use crate::fleet::{FleetWatch, NodeView, Role};
use crate::topology::Connector;

/// From the prefill node's reply. A NIXL lease is 30 s by default; the decode node needs some of them to begin.
const FRESH: Duration = Duration::from_secs(20);
/// To let it go. After that the lease ends by itself.
const RELEASE: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Claim {
    params: Mutex<Option<String>>,
    since: Instant,
    /// `None`: the connector has no word for that.
    release: Option<Release>,
}

/// What it takes to tell a decode node.
#[derive(Debug)]
struct Release {
    client: Client,
    fleet: FleetWatch,
    pool: std::sync::Arc<str>,
    background: TaskTracker,
    stop: CancellationToken,
}

impl Claim {
    /// On what `pick`, a prefill node, has just said.
    pub(super) fn new(cx: &Context, pick: &Pick, params: String) -> Self {
        let release = (cx.plan.connector == Connector::Nixl).then(|| Release {
            client: cx.client.clone(),
            fleet: cx.fleet.clone(),
            pool: pick.pool.clone(),
            background: cx.background.clone(),
            stop: cx.stop.clone(),
        });
        Self {
            params: Mutex::new(Some(params)),
            since: Instant::now(),
            release,
        }
    }

    /// For the one decode leg that it is good for; `None`: it was taken, or is too old.
    pub(super) fn take(&self) -> Option<String> {
        self.held().take_if(|_| self.is_fresh())
    }

    /// Nobody has seen it.
    pub(super) fn give_back(&self, params: String) {
        *self.held() = Some(params);
    }

    fn is_fresh(&self) -> bool {
        self.since.elapsed() < FRESH
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        // Every change is one step.
        self.params.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let (Some(params), Some(release)) = (self.take(), self.release.take()) {
            let (background, stop) = (release.background.clone(), release.stop.clone());
            // Ended with the router; at most one for each request in flight.
            background.spawn(async move { stop.run_until_cancelled(release.run(params)).await });
        }
    }
}

impl Release {
    async fn run(self, params: String) {
        let fleet = self.fleet.now();
        let reader = |node: &&NodeView| node.can_hand_off() && node.pool == self.pool;
        let Some(node) = fleet.ready(Role::Decode).find(reader) else {
            tracing::debug!("no decode node can let a prompt's KV go; its lease ends by itself");
            return;
        };
        let body = split::release_body(&params);
        let told = self.client.tell(node, "/v1/completions", body);
        match tokio::time::timeout(RELEASE, told).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(node = %node.id, %error, "KV was not let go"),
            Err(_) => tracing::debug!(node = %node.id, "KV was not let go in time"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim() -> Claim {
        Claim {
            params: Mutex::new(Some("{}".to_owned())),
            since: Instant::now(),
            release: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_good_once_and_for_a_while() {
        let taken = claim();
        let params = taken.take().unwrap();
        assert_eq!(taken.take(), None);
        taken.give_back(params);
        assert!(taken.take().is_some());

        let old = claim();
        tokio::time::advance(FRESH - Duration::from_millis(1)).await;
        let params = old.take().unwrap();
        old.give_back(params);
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(old.take(), None);
    }
}
