//! Which node: see [`Traffic::choose`].

use std::net::SocketAddr;
use std::sync::Arc;

use crate::fleet::{NodeId, NodeView, Role};
use crate::traffic::{Passage, Traffic};

/// A chosen node; counted as in flight until this is dropped.
#[derive(Debug)]
pub(super) struct Pick {
    pub(super) role: Role,
    pub(super) pool: Arc<str>,
    pub(super) addr: SocketAddr,
    pub(super) incarnation: u64,
    /// Its KV was proven, or is vouched for: it may take part in a hand-off.
    pub(super) can_hand_off: bool,
    /// Others started it.
    pub(super) is_external: bool,
    passage: Passage,
}

impl Pick {
    pub(super) fn node(&self) -> &NodeId {
        self.passage.node()
    }
}

pub(super) fn pick<'a>(
    traffic: &Traffic,
    candidates: impl Iterator<Item = &'a NodeView>,
) -> Option<Pick> {
    let (node, passage) = traffic.choose(candidates)?;
    Some(Pick {
        role: node.role,
        pool: node.pool.clone(),
        addr: node.addr,
        incarnation: node.incarnation,
        can_hand_off: node.can_hand_off(),
        is_external: node.external,
        passage,
    })
}
