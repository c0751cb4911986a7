//! How a person's commands reach the nodes' actors.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::fleet::NodeId;

use super::state::{Command, Refusal};

/// Commands for one node that wait for its actor.
const QUEUE: usize = 4;
/// An actor never waits for anything slow.
const LIMIT: Duration = Duration::from_secs(5);

/// One command, and who waits for the answer: it comes when the fleet shows the effect.
#[derive(Debug)]
pub struct Order {
    pub(super) command: Command,
    pub(super) reply: oneshot::Sender<Result<(), Refusal>>,
}

/// The end of whoever commands.
#[derive(Debug, Clone, Default)]
pub struct Orders {
    nodes: Arc<BTreeMap<NodeId, mpsc::Sender<Order>>>,
}

/// The end of the supervisor.
#[derive(Debug, Default)]
pub struct OrderDesk {
    nodes: BTreeMap<NodeId, mpsc::Receiver<Order>>,
}

/// Both ends, for these nodes.
pub fn orders<'n>(nodes: impl Iterator<Item = &'n NodeId>) -> (Orders, OrderDesk) {
    let mut senders = BTreeMap::new();
    let mut desk = OrderDesk::default();
    for node in nodes {
        let (sender, receiver) = mpsc::channel(QUEUE);
        senders.insert(node.clone(), sender);
        desk.nodes.insert(node.clone(), receiver);
    }
    let nodes = Arc::new(senders);
    (Orders { nodes }, desk)
}

impl Orders {
    /// Returns when the node has begun to do it. A node that is unknown, or stopped, has no actor.
    pub async fn give(&self, node: &NodeId, command: Command) -> Result<(), Refusal> {
        let sender = self.nodes.get(node).ok_or(Refusal::Stopping)?;
        let (reply, answer) = oneshot::channel();
        let giving = async {
            let order = Order { command, reply };
            sender.send(order).await.map_err(|_| Refusal::Stopping)?;
            answer.await.unwrap_or(Err(Refusal::Stopping))
        };
        tokio::time::timeout(LIMIT, giving)
            .await
            .unwrap_or(Err(Refusal::NoAnswer(LIMIT)))
    }
}

impl OrderDesk {
    /// A desk of their own for these nodes.
    pub fn split<'n>(&mut self, nodes: impl Iterator<Item = &'n NodeId>) -> Self {
        let taken = nodes.filter_map(|node| self.nodes.remove_entry(node));
        Self {
            nodes: taken.collect(),
        }
    }

    /// For the node's actor. Nobody commands a node that is not listed.
    pub(super) fn take(&mut self, node: &NodeId) -> mpsc::Receiver<Order> {
        self.nodes
            .remove(node)
            .unwrap_or_else(|| mpsc::channel(1).1)
    }
}
