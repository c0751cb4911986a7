//! TLS on the public listener.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pegaflow::fleet::Role;
use pegaflow::handoff::HandoffBoard;
use pegaflow::topology::TlsFiles;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use support_router::*;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const NAME: &str = "router.test";

/// A self-signed certificate and its key, both in PEM.
fn made() -> (String, String) {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

fn files(folder: &Path) -> TlsFiles {
    TlsFiles {
        cert: folder.join("cert.pem"),
        key: folder.join("key.pem"),
    }
}

/// A router that speaks TLS, in front of one node.
async fn guarded(files: &TlsFiles) -> (Fake, Rig) {
    let board = HandoffBoard::default();
    let node = Fake::always(&board, Kv::Nothing, Answer::Tokens).await;
    let mut plan = plan();
    plan.tls = Some(files.clone());
    plan.drain_timeout = Duration::from_secs(5);
    let rig = Rig::start(&board, plan, &[("u", Role::Unified, node.addr)]).await;
    (node, rig)
}

/// A client that trusts this certificate and nothing else.
async fn connect(addr: SocketAddr, trusted: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(der(trusted)).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let stream = TcpStream::connect(addr).await.unwrap();
    let name = ServerName::try_from(NAME).unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    soon("a handshake", connector.connect(name, stream)).await
}

/// One request; the answer's bytes up to `until`.
async fn ask(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    body: &Value,
    until: &str,
) -> String {
    let body = body.to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {NAME}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    let mut got = Vec::new();
    soon("an answer", async {
        while !String::from_utf8_lossy(&got).contains(until) {
            assert_ne!(stream.read_buf(&mut got).await.unwrap(), 0, "closed early");
        }
    })
    .await;
    String::from_utf8(got).unwrap()
}

async fn end(rig: Rig) {
    rig.shutdown.graceful().cancel();
    soon("serve to return", rig.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn requests_and_streams_go_through_and_files_that_change_count_for_new_connections() {
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path());
    let (first, first_key) = made();
    fs::write(&files.cert, &first).unwrap();
    write_private(&files.key, &first_key);
    let (_node, rig) = guarded(&files).await;

    let mut old = connect(rig.addr, &first).await.unwrap();
    assert_eq!(old.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    let whole = json!({"prompt": "a", "tag": 1});
    assert!(
        ask(&mut old, &whole, "\"tag\":\"1\"}")
            .await
            .starts_with("HTTP/1.1 200")
    );
    let stream = json!({"prompt": "a", "stream": true, "tag": 2});
    let got = ask(&mut old, &stream, "data: [DONE]").await;
    assert_eq!(got.matches("\"token\":").count(), 8, "{got}");

    // One file alone does not fit the other: nothing changes.
    let (second, second_key) = made();
    let put = |file: &Path, text: &str| {
        let next = folder.path().join("next");
        write_private(&next, text);
        fs::rename(&next, file).unwrap();
    };
    put(&files.cert, &second);
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(connect(rig.addr, &first).await.is_ok());
    assert!(connect(rig.addr, &second).await.is_err());

    put(&files.key, &second_key);
    let until = Instant::now() + HANG;
    let mut new = loop {
        if let Ok(new) = connect(rig.addr, &second).await {
            break new;
        }
        assert!(Instant::now() < until, "the new certificate is never shown");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(connect(rig.addr, &first).await.is_err());
    for connection in [&mut new, &mut old] {
        ask(connection, &whole, "\"tag\":\"1\"}").await;
    }
    drop((old, new));
    end(rig).await;
}

#[tokio::test]
async fn who_speaks_something_else_or_nothing_is_dropped_and_keeps_nobody_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path());
    let (cert, key) = made();
    fs::write(&files.cert, &cert).unwrap();
    write_private(&files.key, &key);
    let (node, rig) = guarded(&files).await;

    let mut plain = TcpStream::connect(rig.addr).await.unwrap();
    plain
        .write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    let mut got = Vec::new();
    // It may be told of with an alert of TLS, or a reset.
    let _ = soon("an end", plain.read_to_end(&mut got)).await;
    assert!(!got.starts_with(b"HTTP"), "{got:?}");

    let mut silent = TcpStream::connect(rig.addr).await.unwrap();
    let began = Instant::now();
    let _ = soon("an end", silent.read_to_end(&mut Vec::new())).await;
    assert!(
        began.elapsed() > Duration::from_secs(9),
        "{:?}",
        began.elapsed()
    );

    // One that is in its handshake when the end begins is not waited for.
    let silent = TcpStream::connect(rig.addr).await.unwrap();
    let mut good = connect(rig.addr, &cert).await.unwrap();
    ask(
        &mut good,
        &json!({"prompt": "a", "tag": 1}),
        "\"tag\":\"1\"}",
    )
    .await;
    drop(good);
    let began = Instant::now();
    end(rig).await;
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
    drop(silent);
    assert_eq!(node.seen().len(), 1);
}
