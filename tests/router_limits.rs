//! Clients that send slowly, or too much: each is cut at a limit, and holds nothing after that.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::time::{Duration, Instant};

use pegaflow::fleet::Role;
use pegaflow::handoff::HandoffBoard;
use pegaflow::plan::RouterPlan;
use support_router::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const SHORT: Duration = Duration::from_millis(400);

async fn rig(plan: RouterPlan) -> (Fake, Rig) {
    let board = HandoffBoard::default();
    let node = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let rig = Rig::start(&board, plan, &[("a", Role::Unified, node.addr)]).await;
    (node, rig)
}

/// Sends `piece` again and again until the other side hangs up: what it said, and after how long.
async fn dribble(rig: &Rig, start: &str, piece: &str) -> (String, Duration) {
    let mut stream = TcpStream::connect(rig.addr).await.unwrap();
    let since = Instant::now();
    stream.write_all(start.as_bytes()).await.unwrap();
    let (mut read, mut write) = stream.split();
    let mut said = Vec::new();
    let sending = async {
        // Ends when the router does not listen any more; then there is only the answer to wait for.
        while write.write_all(piece.as_bytes()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        std::future::pending::<()>().await;
    };
    soon("the router to hang up", async {
        tokio::select! {
            // A reset is a way to hang up as well.
            _ = read.read_to_end(&mut said) => {}
            () = sending => {}
        }
    })
    .await;
    (String::from_utf8(said).unwrap(), since.elapsed())
}

#[tokio::test]
async fn a_head_that_dribbles_is_cut() {
    let mut slow = plan();
    slow.head_timeout = SHORT;
    let (node, rig) = rig(slow).await;
    let (said, after) = dribble(&rig, "POST /v1/completions HTTP/1.1\r\nx: ", "x").await;
    assert_eq!(said, "");
    assert!(after >= SHORT, "{after:?}");
    // One that never says anything, too.
    let (said, after) = dribble(&rig, "", "").await;
    assert_eq!(said, "");
    assert!(after >= SHORT, "{after:?}");
    assert_eq!(rig.get("/health").await.status, 200);
    assert!(node.seen().is_empty());
    rig.finish().await;
}

#[tokio::test]
async fn a_body_that_dribbles_is_cut_and_gives_its_place_back() {
    let mut slow = plan();
    slow.body_timeout = SHORT;
    slow.max_in_flight = 1;
    let (node, rig) = rig(slow).await;
    for length in ["content-length: 100000", "transfer-encoding: chunked"] {
        let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\n{length}\r\n\r\n");
        let (said, after) = dribble(&rig, &head, "1\r\n{\r\n").await;
        assert!(said.starts_with("HTTP/1.1 408 "), "{said}");
        assert!(said.contains("\"body_timeout\""), "{said}");
        assert!(after >= SHORT, "{after:?}");
        assert_eq!(rig.get("/status").await.json()["in_flight"], 0);
    }
    assert!(node.seen().is_empty());
    let body = serde_json::json!({"prompt": "x", "max_tokens": 3});
    assert_eq!(rig.complete(&body).await.status, 200);
    rig.finish().await;
}

/// Sends it all, and reads until the router hangs up.
async fn answer(rig: &Rig, request: String) -> String {
    let mut stream = TcpStream::connect(rig.addr).await.unwrap();
    let (mut read, mut write) = stream.split();
    let mut said = Vec::new();
    let _ = soon("an answer", async {
        // The router may hang up before it has read everything.
        let _ = write.write_all(request.as_bytes()).await;
        read.read_to_end(&mut said).await
    })
    .await;
    String::from_utf8(said).unwrap()
}

#[tokio::test]
async fn a_head_has_a_limit_in_bytes_and_in_headers() {
    let (_node, rig) = rig(plan()).await;
    let health = |headers: String| {
        format!("GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n")
    };
    let many = |count: usize| -> String { (0..count).map(|n| format!("x{n}: y\r\n")).collect() };
    let long = |bytes: usize| format!("x: {}\r\n", "y".repeat(bytes));
    for (headers, status) in [
        (many(98), 200),
        (many(99), 431),
        (long(60 << 10), 200),
        (long(66 << 10), 431),
    ] {
        let said = answer(&rig, health(headers)).await;
        assert!(said.starts_with(&format!("HTTP/1.1 {status} ")), "{said}");
    }
    // One that does not end.
    let endless = format!("GET /{}", "x".repeat(1 << 20));
    let said = answer(&rig, endless).await;
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
    rig.finish().await;
}
