//! Nodes of others that want a key, or speak TLS.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pegaflow::fleet::{NodeKey, Role};
use pegaflow::handoff::HandoffBoard;
use pegaflow::reach::{NodeTls, Reach, Reaches, Roots};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use serde_json::{Value, json};
use support_router::command::{RouterProcess, router_command};
use support_router::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

const KEY: &str = "sk-of-the-node";

/// Somebody who vouches for nodes.
struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.as_ref().pem()
    }

    fn file(&self, folder: &Path) -> String {
        let file = folder.join("ca.pem");
        fs::write(&file, self.pem()).unwrap();
        file.to_str().unwrap().to_owned()
    }

    fn certificate(&self, name: &str) -> ServerConfig {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        let made = params.signed_by(&key, &*self.0).unwrap();
        server(made.der().to_vec(), &key)
    }
}

fn server(certificate: Vec<u8>, key: &KeyPair) -> ServerConfig {
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.into()], key)
        .unwrap()
}

/// TLS before a node, which notes what it is told: a text for each connection.
struct Door {
    addr: SocketAddr,
    told: Arc<Mutex<Vec<String>>>,
    node: Fake,
    /// Ends all connections.
    close: watch::Sender<()>,
}

impl Door {
    async fn new(config: ServerConfig, node: Fake) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let close = watch::Sender::new(());
        let (notes, behind, closed) = (told.clone(), node.addr, close.subscribe());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(pass(
                    acceptor.clone(),
                    stream,
                    (behind, closed.clone()),
                    notes.clone(),
                ));
            }
        });
        Self {
            addr,
            told,
            node,
            close,
        }
    }

    fn url(&self) -> String {
        format!("https://{}", self.addr)
    }

    fn told(&self) -> Vec<String> {
        self.told.lock().unwrap().clone()
    }

    /// Those over which requests came.
    fn used(&self) -> usize {
        let told = self.told();
        told.iter().filter(|told| told.contains("POST /")).count()
    }
}

async fn pass(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    (behind, mut closed): (SocketAddr, watch::Receiver<()>),
    notes: Arc<Mutex<Vec<String>>>,
) {
    closed.mark_unchanged();
    let Ok(mut stream) = acceptor.accept(stream).await else {
        return;
    };
    let number = {
        let mut notes = notes.lock().unwrap();
        notes.push(String::new());
        notes.len() - 1
    };
    let mut node = TcpStream::connect(behind).await.unwrap();
    let (mut to, mut from) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        tokio::select! {
            read = stream.read(&mut to) => {
                let Ok(read @ 1..) = read else { return };
                let text = String::from_utf8_lossy(&to[..read]).into_owned();
                notes.lock().unwrap()[number].push_str(&text);
                node.write_all(&to[..read]).await.unwrap();
            }
            _ = closed.changed() => {
                let _ = stream.shutdown().await;
                return;
            }
            read = node.read(&mut from) => {
                let Ok(read @ 1..) = read else {
                    let _ = stream.shutdown().await;
                    return;
                };
                if stream.write_all(&from[..read]).await.is_err() || stream.flush().await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn node(answer: Answer) -> Fake {
    Fake::always(&HandoffBoard::default(), Kv::Nothing, answer).await
}

fn stream(tag: u32) -> Value {
    json!({"model": "tiny", "prompt": "abc", "max_tokens": 8, "stream": true, "tag": tag})
}

fn key_file(folder: &Path) -> String {
    let file = folder.join("node.key");
    write_private(&file, &format!("{KEY}\n"));
    file.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_node_that_speaks_tls_and_wants_a_key_serves_beside_a_plain_one() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Ca::new("ours");
    let far = Door::new(ca.certificate("127.0.0.1"), node(Answer::Tokens).await).await;
    let near = node(Answer::Tokens).await;
    let (plain, ca_file, key) = (
        format!("http://{}", near.addr),
        ca.file(folder.path()),
        key_file(folder.path()),
    );
    let mut flags = vec!["--unified", &plain];
    let url = far.url();
    flags.extend([
        url.as_str(),
        "--node-ca-file",
        &ca_file,
        "--node-key-file",
        &key,
    ]);
    let router = RouterProcess::started(&flags, &["unified-0", "unified-1"]).await;
    let ask = |body: Value| {
        let request = router
            .post("/v1/completions", &body)
            .bearer_auth("a-clients");
        router.send(request.header("x-api-key", "a-clients"))
    };
    for tag in 0..6 {
        ask(stream(tag)).await.is_whole_stream(&tag.to_string());
    }
    let long = "x".repeat(900_000);
    for tag in 0..2 {
        let got = ask(json!({"model": "tiny", "prompt": long, "tag": tag})).await;
        assert_eq!(
            (got.status, &got.json()["tag"]),
            (200, &json!(tag.to_string()))
        );
    }
    let (through, beside) = (far.node.seen().len(), near.seen().len());
    assert!(through >= 3 && beside >= 3 && through + beside == 8);
    let shown = format!("Bearer {KEY}");
    for seen in far.node.seen().into_iter().chain(near.seen()) {
        assert_eq!(seen.headers["authorization"], shown.as_str());
        assert!(!seen.headers.contains_key("x-api-key"));
    }
    assert_eq!(
        far.node.seen()[0].headers["host"],
        far.addr.to_string().as_str()
    );
    // One after another, over one connection.
    assert_eq!(far.used(), 1);

    let figures = router.get("/metrics/all").await.text;
    for name in ["unified-0", "unified-1"] {
        let line = format!("pegaflow_node_scraped{{node=\"{name}\"}} 1");
        assert!(figures.lines().any(|found| found == line), "{figures}");
    }
    let told = far.told().concat();
    let asked: Vec<_> = told
        .split("\r\n\r\n")
        .filter(|head| head.contains(" /v1/models "))
        .collect();
    assert!(
        !asked.is_empty() && asked.iter().all(|head| head.contains(&shown)),
        "{asked:?}"
    );
    for path in ["/status", "/metrics/all"] {
        assert!(!router.get(path).await.text.contains(KEY), "{path}");
    }
    router.stop().await;
}

#[tokio::test]
async fn a_node_that_does_not_take_its_key_is_down() {
    let folder = tempfile::tempdir().unwrap();
    let key = key_file(folder.path());
    let guarded = |headers: http::HeaderMap| async move {
        match headers
            .get("authorization")
            .is_some_and(|shown| shown == "Bearer another")
        {
            true => (http::StatusCode::OK, r#"{"data": [{"id": "tiny"}]}"#),
            false => (http::StatusCode::UNAUTHORIZED, "{}"),
        }
    };
    let app = axum::Router::new()
        .route("/health", axum::routing::get(async || ()))
        .route("/v1/models", axum::routing::get(guarded));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let served = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    let router = RouterProcess::start(&["--unified", &url, "--node-key-file", &key]).await;
    router.phase_is("unified", "down").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let seen = router.node("unified").await;
    assert_eq!(
        (&seen["phase"], &seen["incarnation"]),
        (&json!("down"), &json!(0))
    );
    let reason = seen["reason"].as_str().unwrap();
    assert!(reason.contains("401") && !reason.contains(KEY), "{reason}");
    router.stop().await;
    // Without a key of ours clients show theirs: that nobody shows one here says nothing.
    let router = RouterProcess::started(&["--unified", &url], &["unified"]).await;
    router.stop().await;
    served.abort();
}

#[tokio::test]
async fn a_prompt_is_handed_off_between_nodes_that_speak_tls() {
    const REPLY: &str = r#"{"choices":[],"kv_transfer_params":{"remote_block_ids":[7]}}"#;
    let folder = tempfile::tempdir().unwrap();
    let ca = Ca::new("ours");
    let p = Door::new(
        ca.certificate("127.0.0.1"),
        node(Answer::Status(200, REPLY)).await,
    )
    .await;
    let d = Door::new(ca.certificate("127.0.0.1"), node(Answer::Tokens).await).await;
    let ca_file = ca.file(folder.path());
    let flags = [
        "--prefill",
        &p.url(),
        "--decode",
        &d.url(),
        "--node-ca-file",
        &ca_file,
    ];
    let router = RouterProcess::started(&flags, &["prefill", "decode"]).await;
    for tag in 0..3 {
        let request = router
            .post("/v1/completions", &stream(tag))
            .bearer_auth("a-clients");
        router.send(request).await.is_whole_stream(&tag.to_string());
    }
    let params = &d.node.seen()[0].body["kv_transfer_params"];
    assert_eq!(params["remote_block_ids"], json!([7]));
    // There is no key for them.
    for seen in p.node.seen().into_iter().chain(d.node.seen()) {
        assert_eq!(seen.headers["authorization"], "Bearer a-clients");
    }
    assert_eq!((p.used(), d.used()), (1, 1));
    router.stop().await;
}

#[tokio::test]
async fn a_node_whose_certificate_is_not_trusted_is_down_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Ca::new("ours"), Ca::new("theirs"));
    let strange = Door::new(theirs.certificate("127.0.0.1"), node(Answer::Tokens).await).await;
    let misnamed = Door::new(ours.certificate("node.test"), node(Answer::Tokens).await).await;
    let plain = node(Answer::Tokens).await;
    let (a, b, c) = (
        strange.url(),
        misnamed.url(),
        format!("https://{}", plain.addr),
    );
    let ca_file = ours.file(folder.path());
    let flags = [
        "--unified",
        &a,
        &b,
        &c,
        "--node-ca-file",
        &ca_file,
        "--queue-timeout",
        "200ms",
    ];
    let router = RouterProcess::start(&flags).await;
    for (name, why) in [
        (
            "unified-0",
            "nobody who is trusted here has signed its certificate",
        ),
        ("unified-1", "node.test"),
        ("unified-2", "does not speak TLS"),
    ] {
        router.phase_is(name, "down").await;
        let node = router.node(name).await;
        assert!(node["reason"].as_str().unwrap().contains(why), "{node}");
    }
    let got = router.complete(&stream(1)).await;
    assert_eq!(
        (got.status, &got.json()["error"]["code"]),
        (503, &json!("no_ready_node"))
    );
    for door in [&strange, &misnamed] {
        assert!(door.told().is_empty() && door.node.seen().is_empty());
    }
    router.stop().await;
}

/// How the node `u` is reached that has this name.
fn reach(name: &str, ca: &Ca) -> Reaches {
    let roots = Roots::from_pem(&ca.pem()).unwrap();
    let tls = NodeTls::new(name, &format!("{name}:8000"), &roots).unwrap();
    let key = NodeKey::parse(KEY).unwrap();
    Reaches::new([("u".into(), Reach::default().with_tls(tls).with_key(&key))])
}

/// A router that has not looked at the node yet.
async fn rig(door: &Door, reaches: Reaches) -> Rig {
    let board = HandoffBoard::default();
    let mut plan = plan();
    plan.queue_timeout = Duration::from_millis(300);
    plan.connect_timeout = Duration::from_millis(500);
    let nodes = [("u", Role::Unified, door.addr)];
    let rig = Rig::reaching(&board, plan, &nodes, (Some(NodeKey::random()), reaches)).await;
    rig.fleet.update(&"u".into(), |node| node.external = true);
    rig
}

#[tokio::test]
async fn a_request_that_meets_a_certificate_for_nobody_here_is_told_so() {
    let (ours, theirs) = (Ca::new("ours"), Ca::new("theirs"));
    let door = Door::new(ours.certificate("node.test"), node(Answer::Tokens).await).await;
    let good = rig(&door, reach("node.test", &ours)).await;
    good.complete(&stream(1)).await.is_whole_stream("1");
    let long = json!({"model": "tiny", "prompt": "Wie geht's?\n ".repeat(60_000), "tag": 2});
    assert_eq!(good.complete(&long).await.status, 200);
    assert_eq!(door.node.seen()[1].body["prompt"], long["prompt"]);
    assert_eq!(door.used(), 1);
    let seen = &door.node.seen()[0].headers;
    assert_eq!(seen["host"], "node.test:8000");
    assert_eq!(seen["authorization"], format!("Bearer {KEY}").as_str());
    good.finish().await;

    for (reaches, why) in [
        (reach("node.test", &theirs), "nobody who is trusted here"),
        (reach("other.test", &ours), "not valid for name"),
    ] {
        let rig = rig(&door, reaches).await;
        let got = rig.complete(&stream(1)).await;
        assert_eq!(
            (got.status, &got.json()["error"]["code"]),
            (502, &json!("tls")),
            "{}",
            got.text
        );
        assert!(got.text.contains(why), "{}", got.text);
        rig.finish().await;
    }
    assert_eq!(door.node.seen().len(), 2);

    // A CA's own certificate, self-signed, as `openssl req -x509` makes it.
    let mut params = CertificateParams::new(["node.test".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let made = params.self_signed(&key).unwrap();
    let config = server(made.der().to_vec(), &key);
    let door = Door::new(config, node(Answer::Tokens).await).await;
    let roots = Roots::from_pem(&made.pem()).unwrap();
    let tls = NodeTls::new("node.test", "node.test:1", &roots).unwrap();
    let reaches = Reaches::new([("u".into(), Reach::default().with_tls(tls))]);
    let rig = rig(&door, reaches).await;
    let got = rig.complete(&stream(1)).await;
    assert!(got.text.contains("CA:FALSE"), "{}", got.text);
    rig.finish().await;
}

#[tokio::test]
async fn a_kept_connection_that_the_node_has_closed_is_not_used() {
    let ca = Ca::new("ours");
    let door = Door::new(
        ca.certificate("node.test"),
        node(Answer::Status(200, "{\"a\":1}")).await,
    )
    .await;
    let rig = rig(&door, reach("node.test", &ca)).await;
    let body = json!({"model": "tiny", "prompt": "x"});
    for _ in 0..3 {
        assert_eq!(rig.complete(&body).await.text, "{\"a\":1}");
    }
    assert_eq!(door.used(), 1);
    for used in 2..5 {
        door.close.send_replace(());
        // Its end arrives.
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(rig.complete(&body).await.text, "{\"a\":1}");
        assert_eq!(door.used(), used);
    }
    assert_eq!(rig.sample("pegaflow_router_retries_total").await, 0.0);
    rig.finish().await;
}

#[tokio::test]
async fn a_handshake_takes_no_longer_than_a_connection_may() {
    let ca = Ca::new("ours");
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut door = Door::new(ca.certificate("node.test"), node(Answer::Tokens).await).await;
    door.addr = silent.local_addr().unwrap();
    let rig = rig(&door, reach("node.test", &ca)).await;
    let got = rig.complete(&stream(1)).await;
    assert_eq!(
        (got.status, &got.json()["error"]["code"]),
        (502, &json!("connect")),
        "{}",
        got.text
    );
    rig.finish().await;
}

#[tokio::test]
async fn files_that_cannot_be_used_end_it_before_it_starts() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str, mode: u32| -> PathBuf {
        let file = folder.path().join(name);
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        file
    };
    let open = file("open.key", KEY, 0o644);
    for (flag, file, why) in [
        (
            "--node-key-file",
            folder.path().join("none"),
            "No such file",
        ),
        ("--node-key-file", open, "chmod o="),
        (
            "--node-key-file",
            file("empty.key", "\n", 0o600),
            "it is empty",
        ),
        (
            "--node-key-file",
            file("two.key", "sk-of-the-node b", 0o600),
            "more than one word",
        ),
        ("--node-ca-file", folder.path().join("none"), "No such file"),
        (
            "--node-ca-file",
            file("no.pem", "hello", 0o644),
            "no certificate",
        ),
    ] {
        let name = file.to_str().unwrap();
        let (mut command, _) = router_command(&["--unified", "https://127.0.0.1:1", flag, name]);
        let output = command.stderr(Stdio::piped()).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(4), "{told}");
        assert!(told.contains(name) && told.contains(why), "{told}");
        assert!(!told.contains(KEY), "{told}");
    }
    let ca = folder.path().join("no.pem");
    let flags = [
        "--unified",
        "http://127.0.0.1:1",
        "--node-ca-file",
        ca.to_str().unwrap(),
    ];
    let (mut command, _) = router_command(&flags);
    assert_eq!(command.output().unwrap().status.code(), Some(2));
}

#[tokio::test]
async fn without_a_file_those_vouch_whom_the_machine_trusts() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Ca::new("ours");
    let door = Door::new(ca.certificate("127.0.0.1"), node(Answer::Tokens).await).await;
    let (mut command, port) = router_command(&["--unified", &door.url()]);
    command.env("SSL_CERT_FILE", ca.file(folder.path()));
    command.env_remove("SSL_CERT_DIR");
    let router = RouterProcess::launch(command, port).await;
    router.phase_is("unified", "ready").await;
    router.complete(&stream(1)).await.is_whole_stream("1");
    router.stop().await;
}

#[tokio::test]
async fn pieces_of_a_stream_come_as_they_are_said_and_a_client_that_leaves_ends_it() {
    use futures_util::StreamExt as _;
    let ca = Ca::new("ours");
    let door = Door::new(
        ca.certificate("node.test"),
        node(Answer::StallAfter(3)).await,
    )
    .await;
    let rig = rig(&door, reach("node.test", &ca)).await;
    let reply = rig.request("/v1/completions", &stream(1)).send();
    let reply = soon("a head", reply).await.unwrap();
    let mut pieces = reply.bytes_stream();
    let mut got = String::new();
    while got.matches("\"token\":").count() < 3 {
        let piece = soon("a piece", pieces.next()).await.unwrap().unwrap();
        got.push_str(std::str::from_utf8(&piece).unwrap());
    }
    door.node.active_is(1).await;
    drop(pieces);
    door.node.active_is(0).await;
    rig.finish().await;
}
