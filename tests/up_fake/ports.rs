//! Who else answers on a node's port is not taken for the node.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::client::{Ending, completion, is_proven};
use crate::support::{HANG, Site, send};

/// Answers everything with 200 until told to stop, and not for ever.
fn answer_all(listener: &TcpListener, stop: &AtomicBool) {
    listener.set_nonblocking(true).unwrap();
    let started = Instant::now();
    let answer = |mut stream: TcpStream| {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let _ = stream.read(&mut [0; 4096])?;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
    };
    while !stop.load(Ordering::Relaxed) && started.elapsed() < HANG {
        match listener.accept() {
            // A client that has left is none of this test's.
            Ok((stream, _)) => drop::<std::io::Result<()>>(answer(stream)),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_on_the_port_of_a_starting_node_is_not_taken_for_it() {
    let site = Site::new();
    let up = site.up_ready().await;
    let view = up.node("decode").await;
    let addr: SocketAddr = view["addr"].as_str().unwrap().parse().unwrap();
    // The next life takes longer to load than the stranger stays.
    site.script(r#"{"startup_ms": 6000}"#);
    send(
        u32::try_from(view["pid"].as_u64().unwrap()).unwrap(),
        Signal::SIGKILL,
    );
    let starting = |view: &Value| view["phase"] == "starting";
    up.wait_for_node("decode", starting).await;

    let listener = TcpListener::bind(addr).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stranger = std::thread::spawn({
        let stop = stop.clone();
        move || answer_all(&listener, &stop)
    });
    let told = |view: &Value| {
        let reason = view["reason"].as_str().unwrap_or_default();
        view["phase"] == "starting" && reason.contains("another process answers")
    };
    up.wait_for_node("decode", told).await;
    stop.store(true, Ordering::Relaxed);
    stranger.join().unwrap();

    let view = up.wait_for_node("decode", is_proven).await;
    assert_eq!(view["restarts"], 1, "the stranger cost no restart: {view}");
    let answer = up.generate(&completion(1, 100, 8)).await;
    assert_eq!(answer.ending, Ending::Complete);
    up.stop().await;
}
