//! What the last incarnation of a node, or a stranger, may still hold of what the next one needs.
//!
//! ```text
//! reaped ─▶ session with the store closed? ─▶ port free? ─▶ GPU memory back to what it was? ─▶ spawn
//! ```
//!
//! That every process is gone, and with them what they had in /dev/shm, is known before: the guard
//! says `empty` only then, and the sweep does the same for a guard that was killed.
//!
//! GPU memory is compared with the moment before the last spawn, on each of the node's GPUs. What
//! processes hold that have come or grown since is not waited for: it is not the dead node's. A driver whose
//! pids are those of another namespace makes that invisible, so the wait ends anyhow
//! ([`Obstacle::patience`]).

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::fleet::NodeId;
use crate::host::{GpuHolder, take_gpus};

use super::guard::processes;

/// Fluctuations of the driver's own, and of a desktop's.
const SLACK: u64 = 512 << 20;
const GIB: f64 = (1u64 << 30) as f64;
/// A driver that does not answer must not keep a node down.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

/// Whether the store still serves a dead incarnation.
pub trait StoreSessions: Send + Sync {
    /// No process of this incarnation, or of one before it, is connected.
    fn is_closed(&self, node: &NodeId, incarnation: u64) -> bool;
}

/// Why a node cannot be spawned now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    Port(u16),
    Session,
    Gpu { index: u32, excess: u64 },
}

impl Obstacle {
    /// How long it is waited for.
    pub fn patience(&self) -> Duration {
        match self {
            Self::Port(_) | Self::Session => Duration::from_secs(10),
            // A large process's memory takes the driver some seconds.
            Self::Gpu { .. } => Duration::from_secs(15),
        }
    }

    /// After that, a start would fail for certain.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Port(_))
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(
                f,
                "another process holds port {port}; stop it (`ss -ltnp` names it) or choose another `port`"
            ),
            Self::Session => write!(f, "the store still has a session of the dead node"),
            Self::Gpu { index, excess } => {
                let gib = *excess as f64 / GIB;
                write!(
                    f,
                    "{gib:.1} GiB of GPU {index} are in use that were free before the node's last start \
                     (`nvidia-smi` names who has them)"
                )
            }
        }
    }
}

/// Who used how much of one GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Usage {
    index: u32,
    /// Bytes.
    used: u64,
    holders: Vec<GpuHolder>,
}

/// The use of a node's GPUs at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Baseline(Vec<Usage>);

/// What one look found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    pub obstacle: Option<Obstacle>,
    /// What the next look is compared with, if the node is spawned now.
    pub baseline: Baseline,
}

/// What there is to look at.
#[derive(Clone)]
pub struct Gate {
    pub node: NodeId,
    pub addr: SocketAddr,
    pub gpus: Vec<u32>,
    /// Of the last incarnation.
    pub incarnation: u64,
    /// Before the last spawn; `None`: there was none.
    pub baseline: Option<Baseline>,
    pub store: Option<Arc<dyn StoreSessions>>,
}

impl Gate {
    /// A look takes the driver's time, where there are GPUs.
    pub fn is_slow(&self) -> bool {
        !self.gpus.is_empty()
    }

    /// [`Gate::look`] on a thread that is left behind if the driver hangs. Memory is unknown then.
    pub async fn look_in_time(self) -> Look {
        let blind = Self {
            gpus: vec![],
            ..self.clone()
        };
        let looking = tokio::task::spawn_blocking(move || self.look());
        match tokio::time::timeout(LOOK_LIMIT, looking).await {
            Ok(Ok(look)) => look,
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(node = %blind.node, "the GPU driver does not answer; its memory is not looked at");
                blind.look()
            }
        }
    }

    pub fn look(&self) -> Look {
        let now = usage(&self.gpus);
        let obstacle = self.obstacle(&now);
        Look {
            obstacle,
            baseline: Baseline(now),
        }
    }

    fn obstacle(&self, now: &[Usage]) -> Option<Obstacle> {
        let closed = |store: &Arc<dyn StoreSessions>| store.is_closed(&self.node, self.incarnation);
        if self.incarnation > 0 && !self.store.as_ref().is_none_or(closed) {
            return Some(Obstacle::Session);
        }
        if !port_is_free(self.addr) {
            return Some(Obstacle::Port(self.addr.port()));
        }
        let Baseline(before) = self.baseline.as_ref()?;
        now.iter().find_map(|now| {
            let before = before.iter().find(|before| before.index == now.index)?;
            let excess = excess(before, now, is_alive);
            (excess > SLACK).then_some(Obstacle::Gpu {
                index: now.index,
                excess,
            })
        })
    }
}

/// GPUs of which the driver says nothing are left out.
fn usage(gpus: &[u32]) -> Vec<Usage> {
    if gpus.is_empty() {
        return vec![];
    }
    take_gpus()
        .gpus
        .into_iter()
        .filter(|gpu| gpus.contains(&gpu.index))
        .filter_map(|gpu| {
            let used = gpu.memory_total?.checked_sub(gpu.memory_free?)?;
            Some(Usage {
                index: gpu.index,
                used,
                holders: gpu.holders,
            })
        })
        .collect()
}

/// Bytes in use that neither were `before` nor belong to somebody who lives and has come, or grown,
/// since: a GPU may be shared.
fn excess(before: &Usage, now: &Usage, is_alive: impl Fn(u32) -> bool) -> u64 {
    let grown = |holder: &GpuHolder| {
        let known = before.holders.iter().find(|known| known.pid == holder.pid);
        match (known, holder.memory) {
            (None, Some(memory)) => memory,
            // Somebody of unknown size may have it all.
            (None, None) => u64::MAX,
            (Some(known), memory) => {
                let had = known.memory.unwrap_or(u64::MAX);
                memory.unwrap_or(0).saturating_sub(had)
            }
        }
    };
    let others = now
        .holders
        .iter()
        .filter(|holder| is_alive(holder.pid))
        .map(grown)
        .fold(0, u64::saturating_add);
    now.used.saturating_sub(others).saturating_sub(before.used)
}

/// Every process of the node itself is reaped, so whoever lives is somebody else.
fn is_alive(pid: u32) -> bool {
    i32::try_from(pid).is_ok_and(processes::is_alive)
}

/// Whether a server could listen there now.
fn port_is_free(addr: SocketAddr) -> bool {
    std::net::TcpListener::bind(addr).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn usage(used: u64, holders: &[(u32, Option<u64>)]) -> Usage {
        let holders = holders
            .iter()
            .map(|&(pid, memory)| GpuHolder {
                pid,
                name: None,
                memory,
            })
            .collect();
        Usage {
            index: 0,
            used,
            holders,
        }
    }

    #[test]
    fn what_the_dead_node_leaves_is_excess_and_what_strangers_took_is_not() {
        let living = |pid| pid < 100;
        let before = usage(2 * GIB, &[(1, Some(GIB))]);
        let of = |now: Usage| excess(&before, &now, living);
        assert_eq!(of(usage(2 * GIB, &[(1, Some(GIB))])), 0);
        assert_eq!(of(usage(GIB, &[])), 0, "somebody left");
        assert_eq!(
            of(usage(9 * GIB, &[(1, Some(GIB))])),
            7 * GIB,
            "not freed yet"
        );
        assert_eq!(
            of(usage(9 * GIB, &[(500, Some(7 * GIB))])),
            7 * GIB,
            "a dead process"
        );
        assert_eq!(of(usage(9 * GIB, &[(7, Some(7 * GIB))])), 0, "a stranger");
        assert_eq!(of(usage(9 * GIB, &[(7, Some(3 * GIB))])), 4 * GIB, "both");
        assert_eq!(
            of(usage(9 * GIB, &[(1, Some(6 * GIB))])),
            2 * GIB,
            "one that shares the GPU has grown"
        );
        assert_eq!(
            of(usage(9 * GIB, &[(7, None)])),
            0,
            "a stranger of unknown size"
        );
    }

    struct Closed(bool);

    impl StoreSessions for Closed {
        fn is_closed(&self, _: &NodeId, _: u64) -> bool {
            self.0
        }
    }

    fn gate(addr: SocketAddr, incarnation: u64, closed: bool) -> Gate {
        Gate {
            node: "n".into(),
            addr,
            gpus: vec![],
            incarnation,
            baseline: None,
            store: Some(Arc::new(Closed(closed))),
        }
    }

    #[test]
    fn a_taken_port_and_an_open_session_are_obstacles() {
        let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = holder.local_addr().unwrap();
        let taken = gate(addr, 1, true).look().obstacle;
        assert_eq!(taken, Some(Obstacle::Port(addr.port())));
        drop(holder);
        assert_eq!(gate(addr, 1, true).look().obstacle, None);
        assert_eq!(
            gate(addr, 1, false).look().obstacle,
            Some(Obstacle::Session)
        );
        assert_eq!(
            gate(addr, 0, false).look().obstacle,
            None,
            "before the first spawn"
        );
    }
}
