//! `pegaflow router`: the router alone, in front of nodes that others started.
//!
//! ```text
//! bind ─▶ watch the nodes, serve ─▶ (first signal) drain ─▶ end
//! ```
//!
//! There is no topology, no store and no supervisor here; `docs/router.md` says how it is used.

mod nodes;
mod store;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;
use prometheus_client::registry::Registry;
use tokio::task::JoinSet;

use super::listen::{self, Credentials};
use super::others::{self, Watching};
use super::{Exit, Seat};
use crate::fleet::FleetPublisher;
use crate::handoff::HandoffBoard;
use crate::live::Live;
use crate::observe::{LogFormat, NodeCollector};
use crate::plan::ExternalNode;
use crate::router::{self, RouterDeps, RouterMetrics};
use crate::supervise::{ExternalDeps, OrderDesk};
use crate::topology::{Connector, KvReady, RouterSettings, TlsFiles, is_origin};
use crate::traffic::Traffic;
use nodes::NodeArgs;
use store::StoreArgs;

const WEEK: Duration = Duration::from_secs(7 * 24 * 3600);

#[derive(Debug, Args)]
pub struct RouterArgs {
    /// Name or address to listen on. Other machines reach it only if this is one of theirs to reach, like
    /// 0.0.0.0; then set --api-keys.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on.
    #[arg(long, default_value_t = 8080, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    #[command(flatten)]
    nodes: NodeArgs,
    /// A file of API keys, one a line; read again when it changes. More may stand in PEGAFLOW_API_KEYS. Without
    /// either, everybody who reaches the port may use it.
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// What says that a prompt's KV is ready: the prefill node's reply, or what it says at POST /kv_ready.
    #[arg(long, value_enum, default_value_t = KvReady::Reply)]
    kv_ready: KvReady,
    /// What carries KV from the prefill nodes to the decode nodes.
    #[arg(long, value_enum, default_value_t = Connector::Pegaflow)]
    connector: Connector,
    #[command(flatten)]
    store: StoreArgs,
    /// A file with the key that prefill nodes show at /kv_ready; PEGAFLOW_ADMIN_KEY instead of it will do.
    #[arg(long, value_name = "FILE")]
    admin_key_file: Option<PathBuf>,
    /// A certificate and its chain in PEM, for HTTPS; read again when it changes.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's key in PEM, which no other user may read.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Web pages that may use the API from a browser, like https://chat.example.com; * for all. Can be given
    /// several times.
    #[arg(long, num_args = 1.., value_name = "ORIGIN", value_parser = origin)]
    cors_origin: Vec<String>,
    /// Another name for a model, like gpt-4o=Qwen/Qwen3-8B. Can be given several times.
    #[arg(long, num_args = 1.., value_name = "NAME=MODEL", value_parser = alias)]
    alias: Vec<(String, String)>,
    /// Address and port for /metrics and /status, without TLS and keys; they are then not on --port.
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics_listen: Option<SocketAddr>,
    #[command(flatten)]
    limits: Limits,
    /// How log lines look on stderr.
    #[arg(long, value_enum, default_value_t = LogFormat::Human, env = "PEGAFLOW_LOG_FORMAT")]
    pub log_format: LogFormat,
}

/// What `[router]` is in a topology.
#[derive(Debug, Args)]
struct Limits {
    /// Between two looks at a node's /health.
    #[arg(long, default_value = "1s", value_name = "DURATION", value_parser = duration)]
    health_interval: Duration,
    /// For a connection to a node.
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = duration)]
    connect_timeout: Duration,
    /// From sending a request to a node to the head of its reply (for a stream) or the whole reply.
    #[arg(long, default_value = "10m", value_name = "DURATION", value_parser = duration)]
    first_byte_timeout: Duration,
    /// Between two pieces of a stream.
    #[arg(long, default_value = "2m", value_name = "DURATION", value_parser = duration)]
    chunk_timeout: Duration,
    /// From sending a prompt to prefill to its KV being ready; then decode computes it itself.
    #[arg(long, default_value = "1m", value_name = "DURATION", value_parser = duration)]
    handoff_timeout: Duration,
    /// How long a client's connection may be idle, or take to send a request's head.
    #[arg(long, default_value = "2m", value_name = "DURATION", value_parser = duration)]
    head_timeout: Duration,
    /// From a request's head to the end of its body.
    #[arg(long, default_value = "1m", value_name = "DURATION", value_parser = duration)]
    body_timeout: Duration,
    /// Bytes of a request.
    #[arg(long, default_value = "64MiB", value_name = "SIZE", value_parser = size)]
    max_body: usize,
    /// Requests at a time.
    #[arg(long, default_value = "1024", value_name = "N", value_parser = count(1))]
    max_in_flight: usize,
    /// Requests that may wait; more are answered 429.
    #[arg(long, default_value = "1024", value_name = "N", value_parser = count(0))]
    max_queue: usize,
    /// How long a request waits for a place or a node; 0s for not at all.
    #[arg(long, default_value = "1m", value_name = "DURATION", value_parser = duration_or_zero)]
    queue_timeout: Duration,
    /// After the first signal, how long running requests may finish.
    #[arg(long, default_value = "30s", value_name = "DURATION", value_parser = duration_or_zero)]
    drain_timeout: Duration,
    /// The header with which clients name a session; empty for none.
    #[arg(long, default_value = "x-session-id", value_name = "NAME", value_parser = header)]
    session_header: Header,
    /// Serve prompts of fewer tokens whole; estimated from their bytes.
    #[arg(long, default_value = "0", value_name = "N")]
    split_min_tokens: u64,
    /// Prompt tokens that every prefill node has before an idle decode node computes a prompt itself; 0: it never does.
    #[arg(long, default_value = "65536", value_name = "N")]
    split_max_backlog: u64,
    /// Log one line for every request.
    #[arg(long)]
    access_log: bool,
    /// Do not let streams go on at another node when theirs fails; nodes are then not asked for token ids.
    #[arg(long)]
    no_replay: bool,
}

fn duration_or_zero(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= WEEK => Ok(duration),
        _ => Err("write a duration up to a week, like 30s, 500ms or 5m".to_owned()),
    }
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    match duration_or_zero(text)? {
        Duration::ZERO => Err("it must be above zero".to_owned()),
        duration => Ok(duration),
    }
}

fn alias(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, model)) if !name.is_empty() && !model.is_empty() => {
            Ok((name.to_owned(), model.to_owned()))
        }
        _ => Err("write NAME=MODEL, like gpt-4o=Qwen/Qwen3-8B".to_owned()),
    }
}

fn origin(text: &str) -> Result<String, String> {
    match text == "*" || is_origin(text) {
        true => Ok(text.to_owned()),
        false => Err("write a scheme and a host, like https://chat.example.com, or *".to_owned()),
    }
}

/// A header's name in lower case, or none.
#[derive(Debug, Clone)]
struct Header(Option<String>);

fn header(text: &str) -> Result<Header, String> {
    if text.is_empty() {
        return Ok(Header(None));
    }
    match http::HeaderName::from_bytes(text.as_bytes()) {
        Ok(name) => Ok(Header(Some(name.as_str().to_owned()))),
        Err(_) => Err("write the name of a header, like x-session-id".to_owned()),
    }
}

pub(super) fn size(text: &str) -> Result<usize, String> {
    match text.parse::<ByteSize>() {
        Ok(ByteSize(bytes)) if bytes > 0 => Ok(usize::try_from(bytes).unwrap_or(usize::MAX)),
        _ => Err("write a size, like 64MiB".to_owned()),
    }
}

/// As many as `[router]` allows.
pub(super) fn count(least: usize) -> impl Fn(&str) -> Result<usize, String> + Clone {
    move |text| match text.parse() {
        Ok(count) if (least..=1_000_000).contains(&count) => Ok(count),
        _ => Err(format!("write a number from {least} to 1000000")),
    }
}

impl RouterArgs {
    fn tls(&self) -> Option<TlsFiles> {
        Some(TlsFiles {
            cert: self.tls_cert.clone()?,
            key: self.tls_key.clone()?,
        })
    }

    fn settings(&self, listen: SocketAddr) -> RouterSettings {
        let limits = &self.limits;
        RouterSettings {
            listen,
            api_keys: self.api_keys.clone(),
            admin_key_file: self.admin_key_file.clone(),
            kv_ready: match self.store.is_given() {
                true => KvReady::Store,
                false => self.kv_ready,
            },
            connector: self.connector,
            tls: self.tls(),
            cors_origins: self.cors_origin.clone(),
            aliases: self.alias.iter().cloned().collect(),
            metrics_listen: self.metrics_listen,
            connect_timeout: limits.connect_timeout,
            first_byte_timeout: limits.first_byte_timeout,
            chunk_timeout: limits.chunk_timeout,
            handoff_timeout: limits.handoff_timeout,
            head_timeout: limits.head_timeout,
            body_timeout: limits.body_timeout,
            max_body: limits.max_body,
            max_in_flight: limits.max_in_flight,
            max_queue: limits.max_queue,
            queue_timeout: limits.queue_timeout,
            drain_timeout: limits.drain_timeout,
            access_log: limits.access_log,
            replay: !limits.no_replay,
            session_header: limits.session_header.0.clone(),
            split_min_tokens: limits.split_min_tokens,
            split_max_backlog: limits.split_max_backlog,
        }
    }
}

pub async fn router(seat: Seat, args: RouterArgs) -> Result<(), Exit> {
    let nodes = args.nodes.nodes()?;
    let reaches = others::reaches(&nodes)?;
    let engine = args.store.remote()?;
    let (host, port) = (args.host.as_str(), args.port);
    let name = format!("{host} port {port}");
    let listeners = listen::listen((host, port), name, args.metrics_listen).await?;
    let listen = listeners.clients.local_addr();
    let listen = listen.map_err(|error| Exit::Machine(error.into()))?;
    let settings = args.settings(listen);
    listen::take_files(&settings);
    let Credentials { keys, admin, tls } = Credentials::open(&settings)?;
    let url = settings.url();

    let fleet = FleetPublisher::new(nodes.iter().map(ExternalNode::view));
    let traffic = Traffic::default();
    let vitals = seat.service.vitals.clone();
    let watch = ExternalDeps {
        health_interval: args.limits.health_interval,
        fleet: fleet.clone(),
        traffic: traffic.clone(),
        vitals: vitals.clone(),
        reaches: reaches.clone(),
        // Nobody can give any.
        orders: OrderDesk::default(),
    };
    let mut registry = Registry::default();
    let mut helpers = JoinSet::new();
    let board = HandoffBoard::default();
    if let Some(engine) = engine {
        store::follow(engine, board.clone(), &mut registry, &mut helpers);
    }
    let metrics = RouterMetrics::register(&mut registry);
    registry.register_collector(Box::new(NodeCollector(fleet.watch())));
    let deps = RouterDeps {
        plan: settings,
        fleet: fleet.watch(),
        board,
        traffic,
        keys,
        admin,
        tls,
        node_key: None,
        reaches,
        metrics,
        registry: Arc::new(registry),
        vitals,
        live: Live::default(),
        dashboard: None,
    };
    banner(&seat, &url, &nodes);
    seat.service.ready(&fleet.snapshot());

    let (service, told) = (seat.service.clone(), fleet.watch());
    let end = seat.shutdown.graceful().clone();
    helpers.spawn(async move { service.watch(told, end).await });
    // The nodes are watched until the last request is answered.
    let watching = Watching::start(nodes, watch);
    let routed = router::serve(listeners, deps, seat.shutdown.clone()).await;
    seat.shutdown.begin();
    let watched = watching.stop().await;
    helpers.shutdown().await;
    routed.map_err(|error| Exit::failed("the router failed", error))?;
    watched
}

/// On stdout, for the person and for scripts that wait for it.
fn banner(seat: &Seat, url: &str, nodes: &[ExternalNode]) {
    seat.console.flush();
    let mut stdout = std::io::stdout().lock();
    // A closed stdout is no reason to stop serving.
    let _ = writeln!(stdout, "pegaflow router listens on {url}");
    for node in nodes {
        let _ = writeln!(stdout, "  {:<12} {}", node.id, node.url);
    }
    let _ = stdout.flush();
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: RouterArgs,
    }

    fn parse(line: &str) -> Result<RouterArgs, clap::Error> {
        Line::try_parse_from(line.split_whitespace()).map(|line| line.args)
    }

    const PAIR: &str = "router --prefill http://p:1 --decode http://d:1";

    #[test]
    fn the_flags_default_to_what_a_topology_defaults_to() {
        let args = parse(PAIR).unwrap();
        let default = RouterSettings::default();
        assert_eq!(args.settings(default.listen), default);
        assert_eq!((args.host.as_str(), args.port), ("127.0.0.1", 8080));
    }

    #[test]
    fn urls_follow_a_flag_or_repeat_it() {
        let line = "router --prefill http://a:1 http://b:1 --decode http://c:1 --decode http://d:1 \
                    --unified http://e:1";
        let nodes = parse(line).unwrap().nodes.nodes().unwrap();
        let names: Vec<_> = nodes.iter().map(|node| node.id.as_str()).collect();
        let expected = ["prefill-0", "prefill-1", "decode-0", "decode-1", "unified"];
        assert_eq!(names, expected);
        let one = parse(PAIR).unwrap().nodes.nodes().unwrap();
        assert_eq!(one[0].id.as_str(), "prefill");
    }

    #[test]
    fn nodes_that_make_no_fleet_are_refused() {
        for line in [
            "router",
            "router --prefill http://a:1",
            "router --decode http://a:1",
            "router --unified http://a:1 --decode http://b:1",
            "router --prefill http://a:1 --decode http://A:1/",
        ] {
            let refused = parse(line).unwrap().nodes.nodes();
            assert!(matches!(refused, Err(Exit::Usage(_))), "{line}");
        }
    }

    #[test]
    fn values_that_make_no_sense_are_refused() {
        for wrong in [
            "--prefill ftp://a:1",
            "--prefill",
            "--port 0",
            "--connect-timeout 0s",
            "--connect-timeout 5",
            "--drain-timeout 1y",
            "--max-body 0",
            "--max-in-flight 0",
            "--max-queue -1",
            "--split-min-tokens few",
            "--session-header a:b",
        ] {
            assert!(parse(&format!("{PAIR} {wrong}")).is_err(), "{wrong}");
        }
        assert!(parse(&format!("{PAIR} --queue-timeout 0s --max-queue 0")).is_ok());
    }
}
