//! What a node of ours wants to be shown before it answers.

use std::fmt;
use std::sync::Arc;

use http::HeaderValue;

/// Made new for each run; known to pegaflow and, through their environment, to its nodes. So nobody else on the
/// machine can use them, past the router, although they listen where everybody can connect.
#[derive(Clone, PartialEq, Eq)]
pub struct NodeKey(Arc<str>);

impl NodeKey {
    /// Where vLLM looks for it.
    pub const VARIABLE: &str = "VLLM_API_KEY";

    pub fn random() -> Self {
        Self(format!("{:032x}", rand::random::<u128>()).into())
    }

    /// For the nodes' environment, and to be hidden from their logs.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The value of `Authorization`. Marked, so that nothing logs it.
    pub fn authorization(&self) -> Option<HeaderValue> {
        let mut value = HeaderValue::from_str(&format!("Bearer {}", self.0)).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeKey(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_new_each_time_and_is_not_shown() {
        let key = NodeKey::random();
        assert_ne!(key, NodeKey::random());
        assert_eq!(key.reveal().len(), 32);
        let header = key.authorization().unwrap();
        assert_eq!(
            header.as_bytes(),
            format!("Bearer {}", key.reveal()).as_bytes()
        );
        for shown in [format!("{key:?}"), format!("{header:?}")] {
            assert!(!shown.contains(key.reveal()), "{shown}");
        }
    }
}
