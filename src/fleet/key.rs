//! What a node wants to be shown before it answers.

use std::fmt;
use std::sync::Arc;

use http::HeaderValue;

/// Why a text is no key. Never shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("it is empty; write the node's API key into it, and nothing else")]
    Empty,
    #[error("it has more than one word; write the node's API key into it, and nothing else")]
    Several,
    #[error(
        "the key in it has letters that no HTTP header takes; use visible ASCII, without spaces"
    )]
    Letters,
}

/// Of a node of ours: made new for each run, unless a file has it; known to pegaflow and, through their environment, to
/// its nodes. So nobody else on the machine can use them, past the router, although they listen where everybody can
/// connect. Of a node of others: what its owner gave us.
#[derive(Clone, PartialEq, Eq)]
pub struct NodeKey(Arc<str>);

impl NodeKey {
    /// Where vLLM looks for it.
    pub const VARIABLE: &str = "VLLM_API_KEY";

    pub fn random() -> Self {
        Self(format!("{:032x}", rand::random::<u128>()).into())
    }

    /// The one key in a file's text.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let mut words = text.split_whitespace();
        let key = words.next().ok_or(KeyError::Empty)?;
        if words.next().is_some() {
            return Err(KeyError::Several);
        }
        // What a header cannot hold could never be shown.
        if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(KeyError::Letters);
        }
        Ok(Self(key.into()))
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
    fn a_file_has_one_key_with_white_space_around_it() {
        let key = NodeKey::parse(" sk-1.2/3=\n\n").unwrap();
        assert_eq!(key.reveal(), "sk-1.2/3=");
        assert_eq!(key.authorization().unwrap(), "Bearer sk-1.2/3=");
        for (text, why) in [
            ("", KeyError::Empty),
            (" \n", KeyError::Empty),
            ("one\ntwo\n", KeyError::Several),
            ("schl\u{fc}ssel", KeyError::Letters),
            ("nul\0", KeyError::Letters),
        ] {
            assert_eq!(NodeKey::parse(text), Err(why), "{text:?}");
        }
    }

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
