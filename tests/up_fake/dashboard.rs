//! The dashboard's pages, key, events, logs and buttons, without a browser: that one is in `tests/browser.sh`.

use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use nix::sys::signal::Signal;
use reqwest::{Client, Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::commands::told;
use crate::support::client::{Ending, completion, streamed};
use crate::support::{self, HANG, Site, send};

/// Who looks, with the key that `pegaflow dashboard` gave.
struct Page {
    http: Client,
    base: String,
    key: String,
}

impl Page {
    async fn open(site: &Site) -> Self {
        let address = told(site, &["dashboard"]).await;
        let (base, key) = address.trim().split_once("#key=").unwrap();
        Self {
            http: Client::builder().no_proxy().build().unwrap(),
            base: base.to_owned(),
            key: key.to_owned(),
        }
    }

    async fn ask(&self, method: Method, path: &str) -> Response {
        let request = self.http.request(method, format!("{}{path}", self.base));
        let sending = request.bearer_auth(&self.key).send();
        tokio::time::timeout(HANG, sending).await.unwrap().unwrap()
    }

    async fn events(&self) -> Events {
        let response = self.ask(Method::GET, "api/events").await;
        assert_eq!(response.status(), 200);
        Events {
            response,
            text: String::new(),
        }
    }
}

struct Events {
    response: Response,
    text: String,
}

impl Events {
    /// `None`: the stream has ended.
    async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let (name, data) = event.split_once('\n').unwrap();
                let name = name.strip_prefix("event: ").unwrap().to_owned();
                let data = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
                self.text = rest.to_owned();
                return Some((name, data));
            }
            let chunk = tokio::time::timeout(HANG, self.response.chunk()).await;
            let chunk = chunk.expect("an event").ok().flatten()?;
            self.text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    async fn until(&mut self, what: &str, is: impl Fn(&str, &Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let (name, data) = self.next().await.unwrap_or_else(|| panic!("no {what}"));
            if is(&name, &data) {
                return data;
            }
            assert!(started.elapsed() < HANG, "no {what}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_for_everybody_and_what_it_shows_for_who_has_the_key() {
    let site = Site::new();
    let up = site.up_ready().await;
    let page = Page::open(&site).await;
    assert_eq!(page.base, format!("{}/dashboard/", up.url()));
    let get = async |path: &str| page.http.get(up.url() + path).send().await.unwrap();
    // Without a slash at its end the page would not find its parts.
    let index = get("/dashboard").await;
    assert_eq!(index.url().path(), "/dashboard/");
    let policy = index.headers()["content-security-policy"].to_str().unwrap();
    assert!(
        policy.contains("default-src 'none'") && !policy.contains("unsafe"),
        "{policy}"
    );
    let index = index.text().await.unwrap();
    for file in ["app.js", "app.css", "icon.svg"] {
        assert!(index.contains(file), "{index}");
        assert_eq!(get(&format!("/dashboard/{file}")).await.status(), 200);
    }
    assert_eq!(get("/dashboard/api").await.status(), 404);

    let paths = [
        (Method::GET, "api/events"),
        (Method::GET, "api/logs"),
        (Method::GET, "api/logs/decode"),
        (Method::POST, "api/nodes/decode/restart"),
        (Method::POST, "api/nodes/decode/drain"),
        (Method::POST, "api/nodes/decode/undrain"),
    ];
    let wrong = "0".repeat(32);
    for (method, path) in paths {
        for key in ["", &wrong] {
            let request = page.http.request(method.clone(), page.base.clone() + path);
            let refused = request.bearer_auth(key).send().await.unwrap();
            assert_eq!(refused.status(), StatusCode::UNAUTHORIZED, "{path}");
            let said = refused.text().await.unwrap();
            assert!(
                said.contains("pegaflow dashboard") && !said.contains(&page.key),
                "{said}"
            );
        }
    }
    assert_eq!(up.node("decode").await["incarnation"], 1);

    // The key is nowhere but in its file.
    assert!(!up.output().contains(&page.key));
    let file = site
        .path("state/pegaflow")
        .join(format!("test-{}", site.port));
    let file = file.join("dashboard.key");
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    up.stop().await;

    // The next run knows the same key, so that an open page goes on.
    let up = site.up_ready().await;
    assert_eq!(Page::open(&site).await.key, page.key);
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_tell_requests_figures_and_what_happens_to_nodes() {
    let site = Site::new();
    site.script(r#"{"itl_ms": 5, "prefill_ms": 20}"#);
    let up = site.up_ready().await;
    let page = Page::open(&site).await;
    let mut events = page.events().await;
    let (name, begin) = events.next().await.unwrap();
    assert_eq!(name, "begin");
    assert_eq!(begin["status"]["nodes"].as_array().unwrap().len(), 2);
    assert_eq!(begin["status"]["nodes"][0]["external"], false);
    // It came up while nobody looked.
    let happened = begin["happenings"].as_array().unwrap();
    assert!(
        happened
            .iter()
            .any(|it| it["node"] == "decode" && it["to"] == "ready"),
        "{begin}"
    );

    for seed in 0..4 {
        let answer = up.generate(&streamed(completion(seed, 100, 16))).await;
        assert_eq!(answer.ending, Ending::Complete);
    }
    let told = events
        .until("request", |_, data| {
            !data["requests"].as_array().is_none_or(Vec::is_empty)
        })
        .await;
    let request = &told["requests"][0];
    assert_eq!(
        (&request["way"], &request["outcome"]),
        (&json!("split"), &json!("ok"))
    );
    assert_eq!(
        (&request["prefill"], &request["answer"]),
        (&json!("prefill"), &json!("decode"))
    );
    assert_eq!(
        (&request["tokens"], &request["status"]),
        (&json!(16), &json!(200))
    );
    let marks = [
        "admitted",
        "body_read",
        "prefill_sent",
        "settled",
        "answer_sent",
        "first_piece",
        "end",
    ];
    let marks = marks.map(|mark| request[mark].as_f64().unwrap());
    assert!(
        marks.is_sorted() && marks[3] - marks[2] >= 20.0,
        "{request}"
    );
    let tick = events
        .until("figures", |_, data| {
            data["tick"]["itl"]["count"].as_u64() >= Some(60)
        })
        .await["tick"]
        .clone();
    assert_eq!(tick["ttft"]["count"], 4);
    assert!(tick["ttft"]["p50"].as_f64().unwrap() >= 20.0, "{tick}");
    assert!(
        (4.0..50.0).contains(&tick["itl"]["p50"].as_f64().unwrap()),
        "{tick}"
    );
    assert!(tick["engine"]["used"].as_u64().unwrap() >= 4, "{tick}");

    // Who comes later is told what was.
    let (_, begin) = page.events().await.next().await.unwrap();
    assert_eq!(begin["requests"].as_array().unwrap().len(), 4);
    assert!(!begin["ticks"].as_array().unwrap().is_empty());

    let pid = up.node("decode").await["pid"].as_i64().unwrap();
    send(u32::try_from(pid).unwrap(), Signal::SIGKILL);
    let dead = |it: &Value| it["node"] == "decode" && it["from"] == "ready";
    let told = events
        .until("death", |_, data| {
            data["happenings"]
                .as_array()
                .is_some_and(|all| all.iter().any(dead))
        })
        .await;
    let death = told["happenings"]
        .as_array()
        .unwrap()
        .iter()
        .find(|it| dead(it))
        .unwrap()
        .clone();
    assert!(
        death["reason"].as_str().unwrap().contains("SIGKILL"),
        "{death}"
    );
    up.wait_for_node("decode", |node| node["phase"] == "ready")
        .await;
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn buttons_do_what_the_commands_do() {
    let site = Site::new();
    let topology =
        support::topology(site.port).replace("name = \"decode\"", "name = \"d\"\ncount = 2");
    site.topology(&topology);
    let up = site.up_ready().await;
    let page = Page::open(&site).await;
    let press = async |node: &str, button: &str| -> (u16, Value) {
        let response = page
            .ask(Method::POST, &format!("api/nodes/{node}/{button}"))
            .await;
        (
            response.status().as_u16(),
            serde_json::from_slice(&response.bytes().await.unwrap()).unwrap(),
        )
    };
    let (status, told) = press("d-0", "drain").await;
    assert_eq!((status, &told["nodes"][0]["name"]), (202, &json!("d-0")));
    up.wait_for_node("d-0", |node| node["phase"] == "draining")
        .await;
    // The last one that decodes.
    let (status, told) = press("d-1", "drain").await;
    assert_eq!(status, 409);
    assert!(
        told["error"]
            .as_str()
            .unwrap()
            .contains("No other decode node"),
        "{told}"
    );
    assert_eq!(press("d-1", "drain?force=true").await.0, 202);
    for node in ["d-0", "d-1"] {
        assert_eq!(press(node, "undrain").await.0, 202);
        up.wait_for_node(node, |node| node["phase"] == "ready")
            .await;
    }
    assert_eq!(press("d-0", "restart").await.0, 202);
    up.wait_for_node("d-0", |node| {
        node["incarnation"] == 2 && node["phase"] == "ready"
    })
    .await;
    assert_eq!(press("nobody", "restart").await.0, 404);
    // What is not there for a button cannot be pressed.
    for path in [
        "api/stop",
        "api/v1/stop",
        "api/kv/flush",
        "api/nodes/d-0/kill",
    ] {
        assert_eq!(page.ask(Method::POST, path).await.status(), 404, "{path}");
    }
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_page_does_not_hold_up_the_end() {
    let site = Site::new();
    let up = site.up_ready().await;
    let page = Page::open(&site).await;
    let mut events = page.events().await;
    let logs = page.ask(Method::GET, "api/logs?lines=50&follow=true").await;
    assert_eq!(logs.status(), 200);
    let mut lines = logs.bytes_stream();
    let first = tokio::time::timeout(HANG, lines.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(first.starts_with(b"[decode] "), "{first:?}");
    let stopping = Instant::now();
    // Drains for 2 s at most, if anything runs.
    up.stop().await;
    assert!(
        stopping.elapsed() < Duration::from_secs(8),
        "{:?}",
        stopping.elapsed()
    );
    events.until("end", |name, _| name == "end").await;
    assert_eq!(events.next().await, None);
    while let Some(line) = tokio::time::timeout(HANG, lines.next()).await.unwrap() {
        line.expect("the log ends well");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_listener_of_its_own_clients_do_not_get_it_and_their_keys_do_not_open_it() {
    let site = Site::new();
    let own = support::free_port();
    let listen = format!("[router]\nmetrics_listen = \"127.0.0.1:{own}\"");
    site.topology(&support::topology(site.port).replace("[router]", &listen));
    let up = site.up_ready().await;
    let page = Page::open(&site).await;
    assert_eq!(page.base, format!("http://127.0.0.1:{own}/dashboard/"));
    assert_eq!(page.events().await.next().await.unwrap().0, "begin");
    let clients = page
        .http
        .get(up.url() + "/dashboard/")
        .send()
        .await
        .unwrap();
    assert_eq!(clients.status(), 404);
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_pages_than_there_is_room_for_are_refused_until_one_is_closed() {
    let site = Site::new();
    let up = site.up_ready().await;
    let page = Page::open(&site).await;
    let mut open = Vec::new();
    for _ in 0..32 {
        open.push(page.events().await);
    }
    let refused = page.ask(Method::GET, "api/events").await;
    assert_eq!(refused.status(), 503);
    assert!(refused.text().await.unwrap().contains("close one"));
    open.pop();
    let started = Instant::now();
    while page.ask(Method::GET, "api/events").await.status() != 200 {
        assert!(started.elapsed() < HANG);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    up.stop().await;
}
