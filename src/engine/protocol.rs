//! The wire protocol of `docs/protocol.md`: message types, framing and limits.
//!
//! Decoding is strict: an unknown `op` or field, a missing field, a wrong type or bytes after the
//! map is an error, and the session that sent it ends. `tests/golden/protocol.json` holds the
//! bytes that this side and the Python side must both produce and accept.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// The version in `hello`.
pub const VERSION: u32 = 3;
/// The longest frame after the handshake, in bytes.
pub const MAX_FRAME: usize = 16 << 20;
/// The longest `hello`, in bytes: what a peer may send before it has shown the token.
pub const MAX_HELLO: usize = 64 << 10;
/// The most keys in one message, so that the answer fits into a frame too.
pub const MAX_KEYS: usize = 1 << 20;
/// The longest key, in bytes; the shortest is one byte of hash and four of group.
pub const MAX_KEY_LEN: usize = 256;

/// What arrived is not the protocol; the session ends.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("frame of {len} bytes is above the limit of {limit}")]
    TooLong { len: usize, limit: usize },
    #[error("frame is not a message of version {VERSION}")]
    Decode(#[from] rmp_serde::decode::Error),
    #[error("{0} bytes follow the message in its frame")]
    Trailing(usize),
    #[error("message cannot be encoded")]
    Encode(#[from] rmp_serde::encode::Error),
    #[error("{bytes} bytes of keys are not a list of at most {MAX_KEYS} keys of {key_len} bytes")]
    Keys { bytes: usize, key_len: u32 },
    #[error("{0} bytes of refs are not a list of 8-byte refs")]
    Refs(usize),
    #[error("name of {0} bytes is too long")]
    Name(usize),
    #[error("more than {0} requests are unfinished")]
    TooManyRequests(usize),
    #[error("`{0}` is not allowed here")]
    Misplaced(&'static str),
}

/// From a vLLM process, or from a router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum ClientMessage {
    Hello(Hello),
    Lookup(KeyQuery),
    Store(KeyQuery),
    Open(Open),
    Seal(HandoffName),
    Abort(HandoffName),
    Release(RequestName),
    Finish(RequestName),
    Commit(Commit),
    Discard(Discard),
    Loaded(Loaded),
    Damaged(Damaged),
    Watch(Watch),
    Await(HandoffName),
    Leave(HandoffName),
}

impl ClientMessage {
    /// The `op`, for error texts.
    pub fn op(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Lookup(_) => "lookup",
            Self::Store(_) => "store",
            Self::Open(_) => "open",
            Self::Seal(_) => "seal",
            Self::Abort(_) => "abort",
            Self::Release(_) => "release",
            Self::Finish(_) => "finish",
            Self::Commit(_) => "commit",
            Self::Discard(_) => "discard",
            Self::Loaded(_) => "loaded",
            Self::Damaged(_) => "damaged",
            Self::Watch(_) => "watch",
            Self::Await(_) => "await",
            Self::Leave(_) => "leave",
        }
    }
}

/// From the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum ServerMessage {
    Welcome(Welcome),
    Refused(Refused),
    Found(Found),
    Granted(Granted),
    Watching(Watching),
    Opened(HandoffName),
    Settled(Settled),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionKind {
    Scheduler,
    Worker,
}

/// What makes stored bytes interchangeable, field by field.
pub type Namespace = BTreeMap<String, String>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    pub version: u32,
    pub token: String,
    pub node: String,
    pub incarnation: u64,
    pub kind: SessionKind,
    pub rank: u32,
    pub world: u32,
    /// Every rank has the same KV (MLA under tensor parallelism): rank 0 writes it, all read it.
    pub replicated: bool,
    pub namespace: Namespace,
    /// Bytes that this rank writes per chunk; 0 from a scheduler.
    pub row_bytes: u64,
    pub pid: u32,
}

/// A router's first message: it waits for hand-offs, and stores nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watch {
    pub version: u32,
    pub token: String,
}

/// The answer to [`Watch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watching {
    pub version: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Welcome {
    pub epoch: u64,
    pub session: u64,
    pub slots: u32,
    pub stride: u64,
    pub rank_offset: u64,
    pub header_bytes: u64,
    pub arena_bytes: u64,
    /// Where this rank's checksums begin, a `u32` per slot; 0: none are kept.
    pub checksum_offset: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused {
    pub code: RefusalCode,
    pub message: String,
}

impl Refused {
    /// Nobody is let in any more.
    pub fn down() -> Self {
        Self {
            code: RefusalCode::Capacity,
            message: "the store is turned off".into(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    Version,
    Token,
    Namespace,
    RowBytes,
    Capacity,
    BadHello,
}

/// `lookup` and `store`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyQuery {
    pub seq: u64,
    pub request: String,
    #[serde(deserialize_with = "present")]
    pub handoff: Option<String>,
    pub keys: ByteBuf,
    pub key_len: u32,
}

impl KeyQuery {
    /// The keys, one slice each.
    pub fn keys(&self) -> Result<Vec<&[u8]>, ProtocolError> {
        let refused = || ProtocolError::Keys {
            bytes: self.keys.len(),
            key_len: self.key_len,
        };
        let len = usize::try_from(self.key_len).map_err(|_| refused())?;
        if !(GROUP_LEN + 1..=MAX_KEY_LEN).contains(&len)
            || !self.keys.len().is_multiple_of(len)
            || self.keys.len() / len > MAX_KEYS
        {
            return Err(refused());
        }
        Ok(self.keys.chunks_exact(len).collect())
    }
}

/// A key ends with its KV group's index, big-endian.
pub const GROUP_LEN: usize = 4;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Found {
    pub seq: u64,
    /// A [`KeyState`] per key.
    pub states: ByteBuf,
    /// A ref per key; zeros where not a hit.
    pub refs: ByteBuf,
}

/// A key's state in `found`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum KeyState {
    Miss = 0,
    Hit = 1,
    Pending = 2,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Granted {
    pub seq: u64,
    pub ok: bool,
    /// `u32` little-endian indices into the query's keys that are to be written.
    pub new: ByteBuf,
    /// A ref per entry of `new`.
    pub refs: ByteBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Open {
    pub request: String,
    pub handoff: String,
    pub chunks: u32,
}

/// `seal` and `abort`; `await`, `leave` and `opened`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoffName {
    pub handoff: String,
}

/// How a hand-off ended, to a router that waits for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settled {
    pub handoff: String,
    /// Why it failed, as metrics call it; `None`: it is ready.
    #[serde(deserialize_with = "present")]
    pub failure: Option<String>,
    pub chunks: u32,
    pub already_stored: bool,
}

/// `release` and `finish`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestName {
    pub request: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    pub refs: ByteBuf,
    pub bytes: u64,
    pub micros: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Discard {
    pub refs: ByteBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Loaded {
    pub chunks: u32,
    pub bytes: u64,
    pub micros: u64,
    pub failed: u32,
}

/// Chunks that were loaded under a lease and are not what was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Damaged {
    pub refs: ByteBuf,
}

/// A slot and the generation of the chunk in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotRef {
    pub slot: u32,
    pub generation: u32,
}

impl SlotRef {
    /// What stands where there is no chunk: no generation is ever 0.
    pub const NONE: Self = Self {
        slot: 0,
        generation: 0,
    };

    pub fn encode_all(refs: impl IntoIterator<Item = Self>) -> ByteBuf {
        let mut bytes = Vec::new();
        for r in refs {
            bytes.extend_from_slice(&r.slot.to_le_bytes());
            bytes.extend_from_slice(&r.generation.to_le_bytes());
        }
        ByteBuf::from(bytes)
    }

    pub fn decode_all(bytes: &[u8]) -> Result<Vec<Self>, ProtocolError> {
        let (refs, []) = bytes.as_chunks::<8>() else {
            return Err(ProtocolError::Refs(bytes.len()));
        };
        Ok(refs
            .iter()
            .map(|&[a, b, c, d, e, f, g, h]| Self {
                slot: u32::from_le_bytes([a, b, c, d]),
                generation: u32::from_le_bytes([e, f, g, h]),
            })
            .collect())
    }
}

/// One whole frame: length and message.
pub fn encode_frame<T: Serialize>(message: &T) -> Result<Vec<u8>, ProtocolError> {
    let body = rmp_serde::to_vec_named(message)?;
    let too_long = ProtocolError::TooLong {
        len: body.len(),
        limit: MAX_FRAME,
    };
    if body.len() > MAX_FRAME {
        return Err(too_long);
    }
    let len = u32::try_from(body.len()).map_err(|_| too_long)?;
    let mut frame = Vec::with_capacity(body.len() + 4);
    frame.extend_from_slice(&len.to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// The length of the body that follows a frame's first four bytes.
pub fn body_len(prefix: [u8; 4], limit: usize) -> Result<usize, ProtocolError> {
    let len = usize::try_from(u32::from_le_bytes(prefix)).unwrap_or(usize::MAX);
    if len > limit {
        return Err(ProtocolError::TooLong { len, limit });
    }
    Ok(len)
}

/// The message in a frame's body.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, ProtocolError> {
    let mut rest = body;
    let mut deserializer = rmp_serde::Deserializer::new(&mut rest);
    // No message nests deeper; a hostile one cannot exhaust the stack.
    deserializer.set_max_depth(8);
    let message = T::deserialize(&mut deserializer)?;
    match rest.len() {
        0 => Ok(message),
        trailing => Err(ProtocolError::Trailing(trailing)),
    }
}

/// An optional field must be there, if only as nil.
fn present<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    Option::deserialize(d)
}
