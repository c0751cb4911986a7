//! Hostile peers on the real socket: whatever they send, they lose their session at most; the store,
//! the other sessions and the memory stay as they are.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

#[path = "../fuzz/rig.rs"]
mod rig;
#[path = "crash_worker/spec.rs"]
mod spec;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pegaflow::engine::client::Client;
use pegaflow::engine::protocol::{
    ClientMessage as M, HandoffName, Hello, MAX_FRAME, MAX_HELLO, Open, SessionKind, decode,
    encode_frame,
};
use rig::{LIMIT, Rig, hostile_hello};
use spec::{Event, Rng, Role, Spec};

/// The golden frames that a vLLM process sends, with their length prefixes.
fn golden() -> Vec<Vec<u8>> {
    let golden: Vec<serde_json::Value> =
        serde_json::from_str(include_str!("golden/protocol.json")).unwrap();
    let bytes = |hex: &str| -> Vec<u8> {
        let digits = hex.as_bytes().as_chunks::<2>().0;
        let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16);
        digits.iter().map(|pair| byte(pair).unwrap()).collect()
    };
    let bodies = golden
        .iter()
        .map(|entry| bytes(entry["hex"].as_str().unwrap()));
    let sent = bodies.filter(|body| decode::<M>(body).is_ok());
    sent.map(|body| framed(&body)).collect()
}

fn framed(body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).unwrap().to_le_bytes();
    [len.as_slice(), body].concat()
}

fn hello_frame(kind: SessionKind) -> Vec<u8> {
    encode_frame(&M::Hello(hostile_hello(kind))).unwrap()
}

/// One to four changes at random places.
fn mutate(frame: &[u8], other: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = frame.to_vec();
    // Mostly an honest length: otherwise only the framing is ever tested.
    let honest = !rng.one_in(4);
    for _ in 0..=rng.below(3) {
        let len = bytes.len() as u64;
        let at = usize::try_from(4 + rng.below((len - 4).max(1)))
            .unwrap()
            .min(bytes.len() - 1);
        let byte = rng.next().to_le_bytes()[0];
        match rng.below(7) {
            0 => bytes[at] ^= 1 << (byte % 8),
            1 => bytes[at] = byte,
            2 => bytes.insert(at, byte),
            3 => drop(bytes.remove(at)),
            4 => bytes.truncate(at.max(5)),
            5 => {
                // MessagePack's own markers, where they hurt.
                let markers = [0x80, 0x90, 0xc0, 0xc6, 0xdb, 0xdd, 0xdf, 0xcf, 0xd9, 0xff];
                bytes[at] = markers[usize::from(byte) % markers.len()];
            }
            _ => {
                let cut = usize::from(byte) % other.len();
                bytes.splice(at.., other[cut..].iter().copied());
            }
        }
        if bytes.len() < 5 {
            bytes.resize(5, byte);
        }
    }
    if honest {
        framed(&bytes[4..])
    } else {
        let at = usize::try_from(rng.below(4)).unwrap();
        bytes[at] ^= rng.next().to_le_bytes()[0];
        bytes
    }
}

/// Whether the bytes are whole frames, each of them a message.
fn is_well_formed(mut bytes: &[u8]) -> bool {
    while let Some((prefix, rest)) = bytes.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*prefix) as usize;
        if rest.len() < len || decode::<M>(&rest[..len]).is_err() {
            return false;
        }
        bytes = &rest[len..];
    }
    bytes.is_empty()
}

/// Reads until the engine closes. It must, within the limit.
fn read_to_the_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut answers = Vec::new();
    match stream.read_to_end(&mut answers) {
        Ok(_) => answers,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => answers,
        Err(error) => panic!("not closed: {error}"),
    }
}

fn connect(rig: &Rig) -> UnixStream {
    let stream = UnixStream::connect(&rig.socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Resident memory of this process, in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[test]
fn ten_thousand_mutated_frames_do_no_harm() {
    let seed = std::env::var("PEGAFLOW_HOSTILE_SEED")
        .map_or_else(|_| rand::random(), |s| s.parse().unwrap());
    eprintln!("PEGAFLOW_HOSTILE_SEED={seed}");
    let mut rng = Rng::new(seed);
    let mut rig = Rig::start();
    let golden = golden();
    assert!(golden.len() >= 11, "every message that a client sends");
    let (mut malformed, mut settled) = (0, 0);
    for round in 0..10_000_u32 {
        let frame = &golden[usize::try_from(rng.below(golden.len() as u64)).unwrap()];
        let other = &golden[usize::try_from(rng.below(golden.len() as u64)).unwrap()];
        let bytes = mutate(frame, other, &mut rng);
        let mut stream = connect(&rig);
        let kind = [SessionKind::Scheduler, SessionKind::Worker][usize::from(rng.one_in(2))];
        if !rng.one_in(8) {
            stream.write_all(&hello_frame(kind)).unwrap();
        }
        // Fails when it was closed half way.
        let _ = stream.write_all(&bytes);
        if is_well_formed(&bytes) {
            let _ = stream.shutdown(Shutdown::Write);
        } else {
            malformed += 1;
            if cut_short(&bytes) {
                let _ = stream.shutdown(Shutdown::Write);
            }
        }
        read_to_the_end(&mut stream);
        if round % 100 == 0 {
            rig.assert_unharmed();
        }
        if round == 2000 {
            settled = resident();
        }
    }
    assert!(malformed > 5000, "{malformed}");
    rig.assert_unharmed();
    let grown = resident().saturating_sub(settled);
    assert!(
        grown < 32 << 20,
        "{grown} bytes more after 8000 hostile sessions"
    );
    rig.assert_nothing_is_left_of_the_hostile();
}

/// The engine waits for the rest of such bytes, for a while.
fn cut_short(mut bytes: &[u8]) -> bool {
    loop {
        let Some((prefix, rest)) = bytes.split_first_chunk::<4>() else {
            return true;
        };
        let len = u32::from_le_bytes(*prefix) as usize;
        if len > MAX_FRAME || rest.len() >= len && decode::<M>(&rest[..len]).is_err() {
            return false;
        }
        if rest.len() < len {
            return true;
        }
        bytes = &rest[len..];
    }
}

#[test]
fn messages_out_of_order_or_too_large_end_the_session() {
    let mut rig = Rig::start();
    let scheduler = hello_frame(SessionKind::Scheduler);
    let worker = hello_frame(SessionKind::Worker);
    let seal = M::Seal(HandoffName {
        handoff: "h".into(),
    });
    let long_name = M::Open(Open {
        request: "r".repeat(2000),
        handoff: "h".into(),
        chunks: 1,
    });
    let with = |change: fn(&mut Hello)| {
        let mut hello = hostile_hello(SessionKind::Worker);
        change(&mut hello);
        encode_frame(&M::Hello(hello)).unwrap()
    };
    let length = |len: usize| u32::try_from(len).unwrap().to_le_bytes().to_vec();
    let broken: Vec<(&str, Vec<u8>)> = vec![
        ("another message before hello", encode_frame(&seal).unwrap()),
        ("a hello above its limit", length(MAX_HELLO + 1)),
        (
            "a frame above the limit",
            [scheduler.clone(), length(MAX_FRAME + 1)].concat(),
        ),
        (
            "the longest length",
            [scheduler.clone(), vec![0xff; 4]].concat(),
        ),
        (
            "hello twice",
            [scheduler.clone(), scheduler.clone()].concat(),
        ),
        (
            "a scheduler's message from a worker",
            [worker.clone(), encode_frame(&seal).unwrap()].concat(),
        ),
        (
            "a long name",
            [scheduler.clone(), encode_frame(&long_name).unwrap()].concat(),
        ),
        (
            "deep nesting",
            [scheduler.clone(), framed(&[0x91; 4096])].concat(),
        ),
        (
            "a map that promises 2^32 entries",
            [scheduler.clone(), framed(&[0xdf, 0xff, 0xff, 0xff, 0xff])].concat(),
        ),
        (
            "bytes that promise 2^32",
            [
                scheduler,
                framed(&[0x81, 0xa2, b'o', b'p', 0xc6, 0xff, 0xff, 0xff, 0xff]),
            ]
            .concat(),
        ),
    ];
    for (what, bytes) in broken {
        let before = rig.engine.stats().counters.sessions_broken;
        let mut stream = connect(&rig);
        stream.write_all(&bytes).unwrap();
        // Without a word of ours, and long before any deadline of the engine's.
        let started = Instant::now();
        read_to_the_end(&mut stream);
        assert!(
            started.elapsed() < Duration::from_secs(4),
            "{what}: closed late"
        );
        assert_eq!(
            rig.engine.stats().counters.sessions_broken,
            before + 1,
            "{what}"
        );
        rig.assert_unharmed();
    }
    let refused: Vec<(&str, Vec<u8>)> = vec![
        ("a wrong token", with(|h| h.token = "Secret".into())),
        ("an empty token", with(|h| h.token = String::new())),
        ("a token that goes on", with(|h| h.token.push('x'))),
        ("another version", with(|h| h.version = 0)),
        (
            "rank 2^32-1 of 2^32-1",
            with(|h| (h.rank, h.world) = (u32::MAX, u32::MAX)),
        ),
        ("rows of 2^64-1 bytes", with(|h| h.row_bytes = u64::MAX)),
        (
            "another namespace",
            with(|h| drop(h.namespace.insert("x".into(), "y".into()))),
        ),
    ];
    for (what, bytes) in refused {
        let before = rig.engine.stats().counters.sessions_refused;
        let mut stream = connect(&rig);
        stream.write_all(&bytes).unwrap();
        read_to_the_end(&mut stream);
        assert_eq!(
            rig.engine.stats().counters.sessions_refused,
            before + 1,
            "{what}"
        );
        rig.assert_unharmed();
    }
    rig.assert_nothing_is_left_of_the_hostile();
}

#[test]
fn a_frame_that_stops_half_way_is_closed_and_its_length_costs_no_memory() {
    let mut rig = Rig::start();
    let before = resident();
    let mut stalled: Vec<UnixStream> = (0..64)
        .map(|_| {
            let mut stream = connect(&rig);
            stream
                .write_all(&hello_frame(SessionKind::Scheduler))
                .unwrap();
            let announced = u32::try_from(MAX_FRAME).unwrap().to_le_bytes();
            // A kilobyte of the 16 MiB that it announces.
            let _ = stream.write_all(&[announced.as_slice(), &[0xc6; 1024]].concat());
            stream
        })
        .collect();
    rig.assert_alive();
    assert!(resident().saturating_sub(before) < 64 << 20);
    for stream in &mut stalled {
        read_to_the_end(stream);
    }
    rig.assert_unharmed();
    rig.assert_nothing_is_left_of_the_hostile();
}

#[test]
fn silent_connections_do_not_lock_others_out() {
    let mut rig = Rig::start();
    // More than the engine serves at a time; the rest waits in the listener's queue.
    let silent: Vec<UnixStream> = (0..600)
        .filter_map(|_| connect_or_full(&rig.socket))
        .collect();
    assert!(silent.len() >= 512);
    rig.assert_alive();
    // Somebody new gets in when the silent have used up their time.
    let late = Client::connect(&rig.socket, hostile_hello(SessionKind::Scheduler), LIMIT);
    drop((late.unwrap(), silent));
    rig.assert_unharmed();
}

/// None when the listener's queue is full.
fn connect_or_full(socket: &Path) -> Option<UnixStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket as open};
    use std::os::fd::AsRawFd;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = open(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
    // The engine accepts as fast as we connect, so one more try is enough most of the time.
    for _ in 0..50 {
        match connect(fd.as_raw_fd(), &UnixAddr::new(socket).unwrap()) {
            Ok(()) => return Some(fd.into()),
            Err(nix::Error::EAGAIN) => std::thread::sleep(Duration::from_millis(2)),
            Err(error) => panic!("{error}"),
        }
    }
    None
}

/// The socket's mode would keep another user out already; here it is wide open, and the token is right.
#[test]
fn a_process_of_another_user_is_refused() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not root: cannot become another user; SO_PEERCRED is not tested here");
        return;
    }
    let mut rig = Rig::start();
    let dir = rig.socket.parent().unwrap();
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&rig.socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    for (uid, expected) in [(65534, false), (0, true)] {
        let report = dir.join(format!("stranger-{uid}"));
        let hello = hostile_hello(SessionKind::Worker);
        let spec = Spec {
            role: Role::Stranger { uid },
            socket: rig.socket.clone(),
            report: report.clone(),
            node: hello.node,
            incarnation: 1,
            world: 1,
            seed: 0,
            stop: None,
            handoffs: Vec::new(),
        };
        let mut child = Command::new(crash_worker())
            .arg(serde_json::to_string(&spec).unwrap())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        assert!(child.wait().unwrap().success());
        let line = std::fs::read(&report).unwrap();
        let event: Event = serde_json::from_slice(&line).unwrap();
        assert_eq!(event, Event::Stranger { admitted: expected }, "uid {uid}");
    }
    rig.assert_unharmed();
}

fn crash_worker() -> PathBuf {
    let target = Path::new(env!("CARGO_BIN_EXE_pegaflow")).parent().unwrap();
    let program = target.join("examples/crash-worker");
    assert!(
        program.exists(),
        "{} is missing: cargo build --examples",
        program.display()
    );
    program
}

#[test]
fn every_input_that_was_ever_interesting_does_no_harm() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/frames");
    let mut files: Vec<_> = std::fs::read_dir(&corpus)
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    assert!(
        files.len() >= 30,
        "{} holds {} inputs",
        corpus.display(),
        files.len()
    );
    let mut rig = Rig::start();
    for file in files {
        let input = std::fs::read(&file).unwrap();
        rig::check_decoding(&input);
        rig.feed(&input);
        assert!(rig.engine.is_running(), "{}", file.display());
    }
    rig.assert_unharmed();
    rig.assert_nothing_is_left_of_the_hostile();
}
