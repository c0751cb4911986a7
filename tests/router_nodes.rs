//! Nodes that speak HTTP in ways of their own.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pegaflow::fleet::Role;
use pegaflow::handoff::HandoffBoard;
use serde_json::json;
use support_router::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Says exactly these pieces, each in a packet of its own, to every request.
#[derive(Clone, Copy)]
struct Node {
    says: &'static [&'static str],
    /// After each answer, without having announced it.
    hangs_up: bool,
}

impl Node {
    /// Where it listens, and how many connections it has had.
    async fn start(self) -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(self.serve(stream));
            }
        });
        (addr, connections)
    }

    async fn serve(self, mut stream: TcpStream) {
        stream.set_nodelay(true).unwrap();
        let mut read = Vec::new();
        while stream
            .read_buf(&mut read)
            .await
            .is_ok_and(|count| count > 0)
        {
            // The requests of these tests end so, and have it nowhere else.
            if !read.ends_with(b"}") {
                continue;
            }
            read.clear();
            for piece in self.says {
                stream.write_all(piece.as_bytes()).await.unwrap();
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            if self.hangs_up {
                return;
            }
        }
    }
}

async fn rig(node: Node) -> (Rig, Arc<AtomicUsize>) {
    let (addr, connections) = node.start().await;
    let board = HandoffBoard::default();
    let mut plan = plan();
    // A node that broke off may be back; not these.
    plan.queue_timeout = Duration::from_millis(300);
    let rig = Rig::start(&board, plan, &[("a", Role::Unified, addr)]).await;
    (rig, connections)
}

const LENGTH: &[&str] = &["HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n{\"a\":1}"];

#[tokio::test]
async fn a_connection_is_kept_and_one_that_the_node_has_closed_is_not_used() {
    for hangs_up in [false, true] {
        let (rig, connections) = rig(Node {
            says: LENGTH,
            hangs_up,
        })
        .await;
        for _ in 0..3 {
            let got = rig.complete(&json!({"prompt": "x"})).await;
            assert_eq!((got.status, got.text.as_str()), (200, "{\"a\":1}"));
            // Its FIN arrives.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let expected = if hangs_up { 3 } else { 1 };
        assert_eq!(connections.load(Ordering::SeqCst), expected);
        assert_eq!(rig.sample("pegaflow_router_retries_total").await, 0.0);
        rig.finish().await;
    }
}

#[tokio::test]
async fn an_answer_is_whole_however_it_is_said() {
    for says in [
        &[
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncon",
            "tent-length: 7\r",
            "\n\r\n{\"a\"",
            ":1}",
        ][..],
        &[
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x\r\n{\"\r",
            "\n5\r\na\":1}\r\n0\r\nx: y\r",
            "\n\r\n",
        ],
        &["HTTP/1.0 200 OK\r\ncontent-length: 7\r\n\r\n{\"a\":1}"],
    ] {
        let (rig, _) = rig(Node {
            says,
            hangs_up: false,
        })
        .await;
        for _ in 0..2 {
            let got = rig.complete(&json!({"prompt": "x"})).await;
            assert_eq!(
                (got.status, got.text.as_str()),
                (200, "{\"a\":1}"),
                "{says:?}"
            );
        }
        rig.finish().await;
    }
    // Its end is the connection's.
    let (rig, _) = rig(Node {
        says: &["HTTP/1.1 200 OK\r\n\r\n{\"a\"", ":1}"],
        hangs_up: true,
    })
    .await;
    let got = rig.complete(&json!({"prompt": "x"})).await;
    assert_eq!((got.status, got.text.as_str()), (200, "{\"a\":1}"));
    rig.finish().await;
}

#[tokio::test]
async fn what_is_no_answer_is_an_error_and_never_half_of_one() {
    for says in [
        "SSH-2.0-OpenSSH\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{\"a\":1}",
        "HTTP/1.1 200 OK\r\ncontent-length: 7\r\ncontent-length: 8\r\n\r\n{\"a\":1}",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n7\r\n{\"a\":1}\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nz\r\n",
        "HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ] {
        let says = vec![says].leak();
        let (rig, _) = rig(Node {
            says,
            hangs_up: true,
        })
        .await;
        let got = rig.complete(&json!({"prompt": "x"})).await;
        assert_eq!(got.status, 502, "{says:?}");
        assert_eq!(got.json()["error"]["code"], "transport", "{says:?}");
        rig.finish().await;
    }
}

#[tokio::test]
async fn a_long_prompt_reaches_both_legs_unchanged() {
    let board = HandoffBoard::default();
    let prefill = Fake::always(&board, Kv::Settle(READY), Answer::Tokens).await;
    let decode = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let nodes = [
        ("p", Role::Prefill, prefill.addr),
        ("d", Role::Decode, decode.addr),
    ];
    let rig = Rig::start(&board, plan(), &nodes).await;
    let prompt = "Wie geht's? \u{1f980} \"\n ".repeat(30_000);
    let body = json!({"suffix": "y".repeat(5_000), "prompt": prompt, "tag": 1, "max_tokens": 3});
    assert_eq!(rig.complete(&body).await.status, 200);
    for node in [&prefill, &decode] {
        let seen = node.seen();
        assert_eq!(seen[0].body["prompt"], body["prompt"]);
        assert_eq!(seen[0].body["suffix"], body["suffix"]);
        assert_eq!(seen[0].body["tag"], 1);
    }
    rig.finish().await;
}
