//! The store's sessions, as `docs/protocol.md` describes them. Every failure of the store is a
//! miss; it is written to the log and never ends the process.

use std::collections::{BTreeMap, HashMap};
use std::io::{IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use pegaflow::engine::protocol::{
    ClientMessage, Commit, Found as FoundMessage, Granted, HandoffName, Hello, KeyQuery, Loaded,
    MAX_FRAME, Open, RequestName, ServerMessage, SessionKind, SlotRef, VERSION, Welcome, body_len,
    decode, encode_frame,
};
use serde_bytes::ByteBuf;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, oneshot};

use crate::args::Args;
use crate::wire::Chunk;

/// Bytes that one rank writes per chunk.
pub const ROW_BYTES: usize = 4096;
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// A block's hash and the KV group 0.
pub type Key = [u8; 36];
const KEY_LEN: u32 = 36;

/// What the store says about a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    Miss,
    Pending,
    Hit(SlotRef),
}

/// A chunk as the workers know it.
pub fn chunk(slot: SlotRef, key: &Key) -> Chunk {
    let key = key.iter().map(|byte| format!("{byte:02x}")).collect();
    Chunk {
        slot: slot.slot,
        generation: slot.generation,
        key,
    }
}

fn handshake(args: &Args, kind: SessionKind) -> Option<(StdStream, Welcome, Option<OwnedFd>)> {
    let env = |name: &str| std::env::var(name).unwrap_or_default();
    let mut stream = StdStream::connect(env("PEGAFLOW_KV_SOCKET")).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let namespace = BTreeMap::from([
        ("weights".to_owned(), env("PEGAFLOW_WEIGHTS_ID")),
        ("block_size".to_owned(), args.block_size.to_string()),
        ("world".to_owned(), args.tensor_parallel.to_string()),
        ("vllm".to_owned(), "0.32.0-fake".to_owned()),
    ]);
    let hello = ClientMessage::Hello(Hello {
        version: VERSION,
        token: env("PEGAFLOW_KV_TOKEN"),
        node: env("PEGAFLOW_NODE"),
        incarnation: env("PEGAFLOW_INCARNATION").parse().unwrap_or(0),
        kind,
        rank: args.rank,
        world: args.tensor_parallel,
        replicated: false,
        namespace,
        row_bytes: if kind == SessionKind::Worker {
            ROW_BYTES as u64
        } else {
            0
        },
        pid: std::process::id(),
    });
    stream.write_all(&encode_frame(&hello).unwrap()).ok()?;
    let (message, fd) = receive_with_fd(&stream)?;
    match message {
        ServerMessage::Welcome(welcome) => {
            stream.set_read_timeout(None).ok()?;
            Some((stream, welcome, fd))
        }
        other => {
            eprintln!("ERROR: pegaflow refused a {kind:?} session: {other:?}");
            None
        }
    }
}

/// One frame and the file descriptor on it.
fn receive_with_fd(stream: &StdStream) -> Option<(ServerMessage, Option<OwnedFd>)> {
    let (mut bytes, mut fd) = (Vec::new(), None);
    loop {
        let wanted = match bytes.first_chunk::<4>() {
            None => 4 - bytes.len(),
            Some(prefix) => 4 + body_len(*prefix, MAX_FRAME).ok()? - bytes.len(),
        };
        if wanted == 0 {
            return Some((decode(&bytes[4..]).ok()?, fd));
        }
        let mut buffer = vec![0; wanted];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut iov = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let got = recvmsg::<()>(stream.as_raw_fd(), &mut iov, Some(&mut space), flags).ok()?;
        for control in got.cmsgs().ok()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                fd = fds.first().map(|fd| own(*fd));
            }
        }
        let read = got.bytes;
        if read == 0 {
            return None;
        }
        bytes.extend_from_slice(&buffer[..read]);
    }
}

#[expect(unsafe_code, reason = "nix returns received descriptors as integers")]
fn own(fd: i32) -> OwnedFd {
    // SAFETY: recvmsg has just made this descriptor, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The engine process's session.
#[derive(Debug)]
pub struct Scheduler {
    /// Whole frames: an aborted request must not leave half of one behind.
    frames: mpsc::Sender<Vec<u8>>,
    waiting: Waiting,
    next: AtomicU64,
}

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<ServerMessage>>>>;

impl Scheduler {
    /// None when there is no store or it refused.
    pub async fn connect(args: &Args) -> Option<Self> {
        let (stream, _, _) = handshake(args, SessionKind::Scheduler)?;
        stream.set_nonblocking(true).ok()?;
        let (reader, mut writer) = UnixStream::from_std(stream).ok()?.into_split();
        let waiting = Waiting::default();
        tokio::spawn(read_answers(reader, waiting.clone()));
        let (frames, mut receiver) = mpsc::channel::<Vec<u8>>(1024);
        tokio::spawn(async move {
            while let Some(frame) = receiver.recv().await {
                if writer.write_all(&frame).await.is_err() {
                    break;
                }
            }
        });
        Some(Self {
            frames,
            waiting,
            next: AtomicU64::new(1),
        })
    }

    pub async fn open(&self, request: &str, handoff: &str, chunks: u32) {
        let (request, handoff) = (request.to_owned(), handoff.to_owned());
        self.send(&ClientMessage::Open(Open {
            request,
            handoff,
            chunks,
        }))
        .await;
    }

    pub async fn seal(&self, handoff: &str) {
        let handoff = handoff.to_owned();
        self.send(&ClientMessage::Seal(HandoffName { handoff }))
            .await;
    }

    pub async fn release(&self, request: &str) {
        let request = request.to_owned();
        self.send(&ClientMessage::Release(RequestName { request }))
            .await;
    }

    pub async fn finish(&self, request: &str) {
        let request = request.to_owned();
        self.send(&ClientMessage::Finish(RequestName { request }))
            .await;
    }

    /// A state per key.
    pub async fn lookup(&self, request: &str, handoff: &str, keys: &[Key]) -> Option<Vec<Found>> {
        let query = query(request, handoff, keys);
        let ServerMessage::Found(FoundMessage { states, refs, .. }) =
            self.ask(query, ClientMessage::Lookup).await?
        else {
            return None;
        };
        let refs = SlotRef::decode_all(&refs).ok()?;
        let found = states.iter().zip(refs).map(|(state, slot)| match state {
            1 => Found::Hit(slot),
            2 => Found::Pending,
            _ => Found::Miss,
        });
        Some(found.collect())
    }

    /// Which keys are to be written, and where.
    pub async fn store(
        &self,
        request: &str,
        handoff: &str,
        keys: &[Key],
    ) -> Option<Vec<(usize, SlotRef)>> {
        let query = query(request, handoff, keys);
        let ServerMessage::Granted(Granted { ok, new, refs, .. }) =
            self.ask(query, ClientMessage::Store).await?
        else {
            return None;
        };
        let (indices, _) = new.as_chunks::<4>();
        let indices = indices
            .iter()
            .map(|index| u32::from_le_bytes(*index) as usize);
        ok.then_some(indices.zip(SlotRef::decode_all(&refs).ok()?).collect())
    }

    async fn ask(
        &self,
        mut query: KeyQuery,
        message: fn(KeyQuery) -> ClientMessage,
    ) -> Option<ServerMessage> {
        query.seq = self.next.fetch_add(1, Ordering::Relaxed);
        let seq = query.seq;
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().unwrap().insert(seq, sender);
        self.send(&message(query)).await;
        let answer = tokio::time::timeout(ANSWER_LIMIT, receiver).await;
        self.waiting.lock().unwrap().remove(&seq);
        answer.ok()?.ok()
    }

    async fn send(&self, message: &ClientMessage) {
        let _ = self.frames.send(encode_frame(message).unwrap()).await;
    }
}

fn query(request: &str, handoff: &str, keys: &[Key]) -> KeyQuery {
    KeyQuery {
        seq: 0,
        request: request.to_owned(),
        handoff: Some(handoff.to_owned()),
        keys: ByteBuf::from(keys.concat()),
        key_len: KEY_LEN,
    }
}

async fn read_answers(mut reader: OwnedReadHalf, waiting: Waiting) {
    while let Some(message) = read_frame(&mut reader).await {
        let seq = match &message {
            ServerMessage::Found(found) => found.seq,
            ServerMessage::Granted(granted) => granted.seq,
            _ => continue,
        };
        if let Some(sender) = waiting.lock().unwrap().remove(&seq) {
            let _ = sender.send(message);
        }
    }
    eprintln!("WARNING: the store closed the scheduler's session");
    waiting.lock().unwrap().clear();
}

async fn read_frame(reader: &mut OwnedReadHalf) -> Option<ServerMessage> {
    let mut prefix = [0; 4];
    reader.read_exact(&mut prefix).await.ok()?;
    let mut body = vec![0; body_len(prefix, MAX_FRAME).ok()?];
    reader.read_exact(&mut body).await.ok()?;
    decode(&body).ok()
}

/// A worker process's session, with the arena.
#[derive(Debug)]
pub struct Worker {
    stream: UnixStream,
    welcome: Welcome,
    arena: memmap2::MmapRaw,
}

impl Worker {
    /// None when there is no store or it refused.
    pub async fn connect(args: &Args) -> Option<Self> {
        let (stream, welcome, fd) = handshake(args, SessionKind::Worker)?;
        stream.set_nonblocking(true).ok()?;
        let stream = UnixStream::from_std(stream).ok()?;
        let len = usize::try_from(welcome.arena_bytes).ok()?;
        let arena = memmap2::MmapOptions::new().len(len).map_raw(&fd?).ok()?;
        Some(Self {
            stream,
            welcome,
            arena,
        })
    }

    /// Puts a chunk's bytes into its slot.
    #[expect(unsafe_code, reason = "the arena is shared with other processes")]
    pub fn write(&mut self, chunk: &Chunk, bytes: &[u8]) {
        let offset = self.row(chunk.slot, bytes.len());
        // SAFETY: `row` has checked the bounds; nobody reads the slot before it is committed.
        unsafe {
            self.arena
                .as_mut_ptr()
                .add(offset)
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }

    /// A chunk's bytes; none when the slot holds another chunk by now.
    #[expect(unsafe_code, reason = "the arena is shared with other processes")]
    pub fn read(&self, chunk: &Chunk) -> Option<Vec<u8>> {
        let offset = self.row(chunk.slot, ROW_BYTES);
        let mut bytes = vec![0; ROW_BYTES];
        let before = self.generation(chunk.slot);
        // SAFETY: `row` has checked the bounds; a race with a writer shows in the generation.
        unsafe {
            bytes
                .as_mut_ptr()
                .copy_from_nonoverlapping(self.arena.as_ptr().add(offset), ROW_BYTES);
        }
        let valid = before == chunk.generation && self.generation(chunk.slot) == chunk.generation;
        valid.then_some(bytes)
    }

    pub async fn commit(&mut self, chunks: &[Chunk], took: Duration) {
        let refs = chunks.iter().map(|chunk| SlotRef {
            slot: chunk.slot,
            generation: chunk.generation,
        });
        let message = ClientMessage::Commit(Commit {
            refs: SlotRef::encode_all(refs),
            bytes: (chunks.len() * ROW_BYTES) as u64,
            micros: u64::try_from(took.as_micros()).unwrap(),
        });
        self.send(&message).await;
    }

    pub async fn loaded(&mut self, chunks: u32, failed: u32, took: Duration) {
        let message = ClientMessage::Loaded(Loaded {
            chunks,
            bytes: u64::from(chunks) * ROW_BYTES as u64,
            micros: u64::try_from(took.as_micros()).unwrap(),
            failed,
        });
        self.send(&message).await;
    }

    async fn send(&mut self, message: &ClientMessage) {
        if let Err(error) = self.stream.write_all(&encode_frame(message).unwrap()).await {
            eprintln!(
                "WARNING: the store did not take `{}`: {error}",
                message.op()
            );
        }
    }

    /// Where this rank's part of a slot begins.
    fn row(&self, slot: u32, len: usize) -> usize {
        let Welcome {
            header_bytes,
            stride,
            rank_offset,
            ..
        } = self.welcome;
        let offset =
            usize::try_from(header_bytes + u64::from(slot) * stride + rank_offset).unwrap();
        assert!(
            slot < self.welcome.slots && len <= ROW_BYTES,
            "slot {slot}, {len} bytes"
        );
        assert!(
            offset + len <= self.arena.len(),
            "slot {slot} is outside of the arena"
        );
        offset
    }

    #[expect(unsafe_code, reason = "the arena is shared with other processes")]
    fn generation(&self, slot: u32) -> u32 {
        assert!(
            u64::from(slot) * 4 + 4 <= self.welcome.header_bytes,
            "slot {slot}"
        );
        // SAFETY: within the header, aligned, and only ever accessed atomically.
        unsafe {
            let header: *const std::sync::atomic::AtomicU32 = self.arena.as_ptr().cast();
            (*header.add(slot as usize)).load(Ordering::Acquire)
        }
    }
}
