//! A router under test, its client, and what must hold at the end.

use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use pegaflow::fleet::{FleetPublisher, KvTrust, NodeKey, NodeView, Phase, Role};
use pegaflow::handoff::HandoffBoard;
use pegaflow::live::Live;
use pegaflow::notify::Vitals;
use pegaflow::plan::RouterPlan;
use pegaflow::reach::Reaches;
use pegaflow::router::{
    ApiKeys, KeysSource, Listeners, RouterDeps, RouterError, RouterMetrics, Tls, serve,
};
use pegaflow::shutdown::Shutdown;
use pegaflow::traffic::Traffic;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::{HANG, soon};

/// No timeout is short.
pub fn plan() -> RouterPlan {
    // So that a test which needs one of these to pass fails instead.
    let far = HANG * 10;
    RouterPlan {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        connect_timeout: far,
        first_byte_timeout: far,
        chunk_timeout: far,
        handoff_timeout: far,
        head_timeout: far,
        body_timeout: far,
        max_body: 1 << 20,
        max_in_flight: 512,
        max_queue: 512,
        queue_timeout: far,
        drain_timeout: far,
        ..RouterPlan::default()
    }
}

/// A file that no other user may read.
pub fn write_private(file: &Path, text: &str) {
    let mut options = std::fs::OpenOptions::new();
    options.create(true).write(true).truncate(true).mode(0o600);
    let mut file = options.open(file).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// A running router.
pub struct Rig {
    pub fleet: FleetPublisher,
    pub board: HandoffBoard,
    pub traffic: Traffic,
    pub shutdown: Shutdown,
    pub addr: SocketAddr,
    /// Where its figures are, if not there.
    pub figures: Option<SocketAddr>,
    pub http: reqwest::Client,
    pub task: JoinHandle<Result<(), RouterError>>,
}

impl Rig {
    /// All nodes are ready and proven.
    pub async fn start(
        board: &HandoffBoard,
        plan: RouterPlan,
        nodes: &[(&str, Role, SocketAddr)],
    ) -> Self {
        Self::keyed(board, plan, nodes, None).await
    }

    /// And they want to be shown this key.
    pub async fn keyed(
        board: &HandoffBoard,
        plan: RouterPlan,
        nodes: &[(&str, Role, SocketAddr)],
        node_key: Option<NodeKey>,
    ) -> Self {
        Self::reaching(board, plan, nodes, (node_key, Reaches::default())).await
    }

    /// Nodes are reached so.
    pub async fn reaching(
        board: &HandoffBoard,
        plan: RouterPlan,
        nodes: &[(&str, Role, SocketAddr)],
        (node_key, reaches): (Option<NodeKey>, Reaches),
    ) -> Self {
        let nodes = nodes.iter().map(|(id, role, addr)| {
            let mut node = NodeView::pending((*id).into(), *role, *addr).serving(["tiny"]);
            node.phase = Phase::Ready;
            node.incarnation = 1;
            if *role != Role::Unified {
                node.trust = KvTrust::Proven;
            }
            node
        });
        let fleet = FleetPublisher::new(nodes);
        let clients = TcpListener::bind(plan.listen).await.unwrap();
        let addr = clients.local_addr().unwrap();
        let metrics = match plan.metrics_listen {
            Some(listen) => Some(TcpListener::bind(listen).await.unwrap()),
            None => None,
        };
        let figures = metrics
            .as_ref()
            .map(|listener| listener.local_addr().unwrap());
        let listeners = Listeners { clients, metrics };
        let mut registry = Registry::default();
        let (api_keys, admin_key) = (plan.api_keys.clone(), plan.admin_key_file.clone());
        let open = |file: &Option<PathBuf>, variable| {
            let file = file.as_deref();
            ApiKeys::open(KeysSource { file, variable }).unwrap()
        };
        let tls = plan.tls.as_ref().map(|files| Tls::open(files).unwrap());
        let traffic = Traffic::default();
        let deps = RouterDeps {
            plan,
            fleet: fleet.watch(),
            board: board.clone(),
            traffic: traffic.clone(),
            keys: open(&api_keys, "NO_KEYS_IN_TESTS"),
            admin: open(&admin_key, "NO_KEYS_IN_TESTS"),
            tls,
            node_key,
            reaches,
            metrics: RouterMetrics::register(&mut registry),
            registry: Arc::new(registry),
            vitals: Vitals::default(),
            live: Live::default(),
            dashboard: None,
        };
        let shutdown = Shutdown::default();
        let task = tokio::spawn(serve(listeners, deps, shutdown.clone()));
        Self {
            fleet,
            board: board.clone(),
            traffic,
            shutdown,
            addr,
            figures,
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
            task,
        }
    }

    pub fn set(&self, id: &str, phase: Phase) {
        self.fleet.update(&id.into(), |node| node.phase = phase);
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    pub fn request(&self, path: &str, body: &Value) -> reqwest::RequestBuilder {
        self.http
            .post(self.url(path))
            .header("content-type", "application/json")
            .body(body.to_string())
    }

    pub async fn complete(&self, body: &Value) -> Got {
        self.send(self.request("/v1/completions", body)).await
    }

    pub async fn send(&self, request: reqwest::RequestBuilder) -> Got {
        soon("a response", async {
            let response = request.send().await.unwrap();
            Got {
                status: response.status().as_u16(),
                headers: response.headers().clone(),
                text: response.text().await.unwrap(),
            }
        })
        .await
    }

    pub async fn get(&self, path: &str) -> Got {
        self.send(self.http.get(self.url(path))).await
    }

    pub async fn metrics(&self) -> String {
        self.get("/metrics").await.text
    }

    /// The value of the first sample whose line starts so; 0 where there is none.
    pub async fn sample(&self, start: &str) -> f64 {
        let text = self.metrics().await;
        let line = text.lines().find(|line| line.starts_with(start));
        line.map_or(0.0, |line| {
            line.rsplit(' ').next().unwrap().parse().unwrap()
        })
    }

    /// Everything is given back: places, counts, tickets.
    pub async fn idle(&self) {
        soon("the router to be idle", async {
            loop {
                let status: Value = serde_json::from_str(&self.get("/status").await.text).unwrap();
                let still = status["in_flight"] == 0
                    && status["queued"] == 0
                    && status["handoffs_waiting"] == 0
                    && status["in_flight_by_node"] == json!({});
                if still {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        assert_eq!(self.board.waiting(), 0);
        let metrics = self.metrics().await;
        for gauge in ["pegaflow_router_in_flight 0", "pegaflow_router_queued 0"] {
            assert!(metrics.lines().any(|line| line == gauge), "{metrics}");
        }
    }

    /// Checks that nothing is left, and that the router ends.
    pub async fn finish(self) {
        self.idle().await;
        self.shutdown.graceful().cancel();
        drop(self.http);
        soon("serve to return", self.task).await.unwrap().unwrap();
    }
}

#[derive(Debug)]
pub struct Got {
    pub status: u16,
    pub headers: HeaderMap,
    pub text: String,
}

impl Got {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap()
    }

    /// The stream is whole: eight tokens in order, then `[DONE]`.
    pub fn is_whole_stream(&self, tag: &str) {
        let mut expected: String = (0..8)
            .map(|index| format!("data: {{\"token\":{index},\"tag\":{tag}}}\n\n"))
            .collect();
        expected.push_str("data: [DONE]\n\n");
        assert_eq!(self.status, 200);
        assert_eq!(self.text, expected);
    }

    /// The stream ends with an error event of this code, and has no `[DONE]`.
    pub fn is_broken_stream(&self, tokens: usize, code: &str) {
        assert_eq!(self.status, 200);
        assert_eq!(
            self.text.matches("\"token\":").count(),
            tokens,
            "{}",
            self.text
        );
        assert!(!self.text.contains("[DONE]"));
        let last = self.text.trim_end().rsplit("\n\n").next().unwrap();
        let event: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(event["error"]["code"], code);
    }
}
