//! What must hold after a strike.

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::cell::{Cell, Effect};
use crate::scene::{Request, Scene, until};
use crate::support::client::{Answer, Ending, completion, is_proven, metric};
use crate::support::{GONE_LIMIT, HANG, Pegaflow, Site, processes, send};

/// Longer than a hang takes to be found, and than a stream may be silent.
const PAUSE: Duration = Duration::from_secs(6);
/// In which a restart that should not be would begin.
const QUIET: Duration = Duration::from_millis(1500);
/// A guard that stands still is only killed after the grace and ten seconds more.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// Plays the cell. How long it took until all was well again; `None`: it was all the time.
pub async fn play(cell: Cell) -> Option<Duration> {
    let site = crate::scene::site();
    let mut scene = Scene::set(&site, cell).await;
    let struck = Instant::now();
    scene.strike(cell).await;
    match cell.effect() {
        Effect::Death => {
            scene.ask(2);
            Some(returns(scene, cell, struck).await)
        }
        Effect::Nothing => {
            scene.ask(2);
            goes_on(&mut scene, cell).await;
            stop(scene.up).await;
            None
        }
        Effect::Pause => Some(pauses(scene, cell).await),
        Effect::End => Some(ends(scene, cell, struck).await),
        Effect::Gone => Some(is_gone(scene, cell, struck).await),
    }
}

/// The node dies and comes back; the other one does not notice.
async fn returns(mut scene: Scene<'_>, cell: Cell, struck: Instant) -> Duration {
    let node = cell.node();
    let restarts = scene.restarts + 1;
    if let Some(drain) = scene.drain.take() {
        // It stays drained whatever becomes of its process, and is empty now.
        let again = |view: &Value| view["phase"] == "draining" && count(view) >= restarts;
        scene.up.wait_for_node(node, again).await;
        drained(drain).await;
        undrain(&scene.up, node).await;
    }
    let back = |view: &Value| is_proven(view) && count(view) >= restarts;
    scene.up.wait_for_node(node, back).await;
    let took = struck.elapsed();
    restarted(&scene, cell, restarts).await;
    let old = &scene.tree;
    until("nothing is left of the life that ended", async || {
        old.iter().all(|pid| !processes::is_alive(*pid)) && processes::shm_of(old).is_empty()
    })
    .await;
    let requests = std::mem::take(&mut scene.requests);
    answered(&scene.up, cell, requests).await;
    clean(&scene.up).await;
    stop(scene.up).await;
    took
}

/// Nothing is to be seen of it.
async fn goes_on(scene: &mut Scene<'_>, cell: Cell) {
    if let Some(drain) = scene.drain.take() {
        drained(drain).await;
        undrain(&scene.up, cell.node()).await;
    }
    scene.up.wait_for_node(cell.node(), is_proven).await;
    tokio::time::sleep(QUIET).await;
    restarted(scene, cell, scene.restarts).await;
    let requests = std::mem::take(&mut scene.requests);
    answered(&scene.up, cell, requests).await;
    clean(&scene.up).await;
}

/// pegaflow stands still, goes on, stands still again and is killed.
async fn pauses(mut scene: Scene<'_>, cell: Cell) -> Duration {
    scene.ask(2);
    tokio::time::sleep(PAUSE).await;
    let resumed = Instant::now();
    scene.up.signal(Signal::SIGCONT);
    goes_on(&mut scene, cell).await;
    let took = resumed.elapsed() - QUIET;
    let addrs = addresses(&scene.up).await;
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        scene.up.signal(signal);
    }
    scene.up.wait(HANG).await;
    scene.up.site.assert_nothing_left(GONE_LIMIT).await;
    free(&addrs).await;
    took
}

/// pegaflow ends in good order.
async fn ends(mut scene: Scene<'_>, cell: Cell, struck: Instant) -> Duration {
    let site = scene.up.site;
    let status = scene.up.wait(HANG).await;
    let took = struck.elapsed();
    // 130: it was stopped before it was ready.
    let code = if cell.is_first_start() { 130 } else { 0 };
    assert_eq!(status.code(), Some(code), "exit status");
    site.assert_nothing_left(GONE_LIMIT).await;
    starts_again(site, cell, scene).await;
    took
}

/// pegaflow is dead, and its guards clean up.
async fn is_gone(mut scene: Scene<'_>, cell: Cell, struck: Instant) -> Duration {
    let site = scene.up.site;
    assert!(!scene.up.wait(HANG).await.success());
    site.assert_nothing_left(GONE_LIMIT).await;
    let took = struck.elapsed();
    starts_again(site, cell, scene).await;
    took
}

async fn starts_again(site: &Site, cell: Cell, scene: Scene<'_>) {
    if let Some(drain) = scene.drain {
        // Done, or the end of its pegaflow; whichever, it must not wait for ever.
        within(drain, "pegaflow drain").await;
    }
    let up = site.up_ready().await;
    answered(&up, cell, scene.requests).await;
    let late = Request::send(&up, completion(9, 100, 4));
    answered(&up, cell, vec![late]).await;
    stop(up).await;
}

/// Every answer is right, or is broken in a way that this cell allows.
async fn answered(up: &Pegaflow<'_>, cell: Cell, requests: Vec<Request>) {
    for Request { body, answer } in requests {
        let answer = within(answer, "an answer").await;
        let mut whole = body.clone();
        whole["stream"] = json!(false);
        let expected = up.whole("decode", &whole).await.text;
        assert!(!expected.is_empty(), "the node itself does not answer");
        let fine = is_fine(cell, &body, &answer, &expected);
        assert!(fine, "expected {expected:?} for {body}, got {answer:#?}");
    }
}

fn is_fine(cell: Cell, body: &Value, answer: &Answer, expected: &str) -> bool {
    let begun = body["stream"] == true && !answer.text.is_empty();
    let right_so_far = expected.starts_with(&answer.text);
    match &answer.ending {
        Ending::Complete => answer.text == expected,
        // The node that had begun to answer is dead, and the client is told.
        Ending::ErrorEvent(_) => cell.effect() == Effect::Death && begun && right_so_far,
        // With the router dead nobody can say more.
        Ending::Torn => cell.effect() == Effect::Gone && right_so_far,
        Ending::Refused(why) => match cell.effect() {
            Effect::Gone => true,
            // It waited for the first node; a status, not a connection that broke.
            Effect::End => cell.is_first_start() && why.starts_with("503"),
            _ => false,
        },
        Ending::Hung => false,
    }
}

/// The node was restarted so many times, and the other one never.
async fn restarted(scene: &Scene<'_>, cell: Cell, restarts: u64) {
    for (node, wanted) in [(cell.node(), restarts), (cell.other(), 0)] {
        let view = scene.up.wait_for_node(node, is_proven).await;
        assert_eq!(count(&view), wanted, "restarts of {node}: {view}");
    }
}

fn count(view: &Value) -> u64 {
    view["restarts"].as_u64().unwrap()
}

/// Nobody holds anything of the store, and nobody waits in the router.
async fn clean(up: &Pegaflow<'_>) {
    for gauge in [
        "engine_slots_pending",
        "engine_slots_leased",
        "engine_slots_quarantined",
        "engine_slots_reserved",
        "engine_handoffs_open",
        "router_in_flight",
        "router_queued",
    ] {
        let name = format!("pegaflow_{gauge} ");
        let zero = async || {
            let text = up.get("/metrics").await;
            assert!(text.contains(&name), "{name} is missing");
            metric(&text, &name) == 0.0
        };
        until(&format!("{gauge} is 0"), zero).await;
    }
    let idle = async || {
        let status: Value = serde_json::from_str(&up.get("/status").await).unwrap();
        status["handoffs_waiting"] == 0 && status["in_flight_by_node"] == json!({})
    };
    until("nothing in flight", idle).await;
}

async fn drained(drain: tokio::task::JoinHandle<std::process::Output>) {
    let output = within(drain, "pegaflow drain").await;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "pegaflow drain: {errors}");
}

async fn undrain(up: &Pegaflow<'_>, node: &str) {
    let undrain = up.site.command(&["undrain", node]);
    let output = tokio::process::Command::from(undrain).output();
    let output = tokio::time::timeout(HANG, output).await.unwrap().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "pegaflow undrain: {errors}");
}

async fn within<T>(task: tokio::task::JoinHandle<T>, what: &str) -> T {
    match tokio::time::timeout(HANG, task).await {
        Ok(done) => done.unwrap(),
        Err(_) => panic!("{what} hangs"),
    }
}

/// Where router and nodes listen.
async fn addresses(up: &Pegaflow<'_>) -> Vec<SocketAddr> {
    let mut all = vec![SocketAddr::from(([127, 0, 0, 1], up.site.port))];
    for node in ["prefill", "decode"] {
        let addr = up.node(node).await["addr"].as_str().unwrap().to_owned();
        all.push(addr.parse().unwrap());
    }
    all
}

async fn free(addrs: &[SocketAddr]) {
    for addr in addrs {
        until("the ports are free", async || {
            TcpListener::bind(addr).is_ok()
        })
        .await;
    }
}

/// TERM, and nothing is left.
async fn stop(mut up: Pegaflow<'_>) {
    let addrs = addresses(&up).await;
    send(up.pid(), Signal::SIGTERM);
    let status = up.wait(STOP_LIMIT).await;
    assert_eq!(status.code(), Some(0), "exit status after TERM");
    up.site.assert_nothing_left(GONE_LIMIT).await;
    free(&addrs).await;
}
