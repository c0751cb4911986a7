//! How nodes of others are reached, beside their addresses: which key they want to be shown, and whether they speak TLS.
//!
//! ```text
//! key_file ─▶ NodeKey ─▶ Authorization ─┐
//! https URL, ca_file or system ─▶ NodeTls ┴─▶ Reach, one for each node ─▶ the router, and who looks at the nodes
//! ```
//!
//! It is kept apart from the fleet's view of a node, which is shown to people: here are secrets.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use http::HeaderValue;

use crate::fleet::{NodeId, NodeKey};

mod tls;

pub use tls::{NodeTls, Roots, RootsError, TlsFailure};

/// Of one node. The default: plain HTTP, and no key but the client's.
#[derive(Debug, Clone, Default)]
pub struct Reach {
    /// Marked, so that nothing shows it.
    authorization: Option<HeaderValue>,
    tls: Option<Arc<NodeTls>>,
}

impl Reach {
    /// What it wants to be shown.
    pub fn with_key(mut self, key: &NodeKey) -> Self {
        self.authorization = key.authorization();
        self
    }

    pub fn with_tls(mut self, tls: NodeTls) -> Self {
        self.tls = Some(Arc::new(tls));
        self
    }

    /// The value of `Authorization`.
    pub fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    pub fn tls(&self) -> Option<&Arc<NodeTls>> {
        self.tls.as_ref()
    }

    /// The value of `Host`: behind one address of TLS there may be servers of several names.
    pub fn host(&self, addr: SocketAddr) -> Option<HeaderValue> {
        match &self.tls {
            Some(tls) => Some(tls.host().clone()),
            // An address is a header value.
            None => HeaderValue::try_from(addr.to_string()).ok(),
        }
    }
}

/// Of all nodes; those that are not named are reached by the default. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Reaches(Arc<HashMap<NodeId, Reach>>);

impl Reaches {
    pub fn new(reaches: impl IntoIterator<Item = (NodeId, Reach)>) -> Self {
        Self(Arc::new(reaches.into_iter().collect()))
    }

    pub fn of(&self, node: &NodeId) -> &Reach {
        static DEFAULT: Reach = Reach {
            authorization: None,
            tls: None,
        };
        self.0.get(node).unwrap_or(&DEFAULT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_shown_to_its_node_alone_and_to_no_reader() {
        let key = NodeKey::parse("s3cret-of-a").unwrap();
        let reaches = Reaches::new([("a".into(), Reach::default().with_key(&key))]);
        let shown = reaches.of(&"a".into()).authorization().unwrap();
        assert_eq!(shown, "Bearer s3cret-of-a");
        assert!(reaches.of(&"b".into()).authorization().is_none());
        assert!(!format!("{reaches:?}").contains("s3cret"), "{reaches:?}");
        let addr = SocketAddr::from(([10, 0, 0, 7], 8000));
        let host = reaches.of(&"b".into()).host(addr).unwrap();
        assert_eq!(host, "10.0.0.7:8000");
    }
}
