//! How a running fleet ends: signals, kill -9, and a second `up`.

use std::time::Duration;

use nix::sys::signal::Signal;

use crate::support::client::{Ending, completion, generate, streamed};
use crate::support::{self, GONE_LIMIT, HANG, Site};
use crate::wait_until;

#[tokio::test(flavor = "multi_thread")]
async fn killed_pegaflow_leaves_nothing_and_starts_again() {
    let site = Site::new();
    let mut up = site.up_ready().await;
    assert!(
        site.processes().len() >= 9,
        "pegaflow, 2 guards, 2 x (leader, engine, worker)"
    );
    up.signal(Signal::SIGKILL);
    let status = up.wait(HANG).await;
    assert!(!status.success());
    site.assert_nothing_left(GONE_LIMIT).await;

    let again = site.up_ready().await;
    assert_eq!(
        again.generate(&completion(1, 100, 4)).await.ending,
        Ending::Complete
    );
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_forces_the_end() {
    let site = Site::new();
    let topology = support::topology(site.port);
    site.topology(&topology.replace("drain_timeout = \"2s\"", "drain_timeout = \"60s\""));
    let mut up = site.up_ready().await;
    site.script(r#"{"ignore_term": true, "itl_ms": 100}"#);
    let (url, body) = (up.url(), streamed(completion(1, 64, 1000)));
    let request = tokio::spawn(async move { generate(&url, &body).await });
    wait_until(
        async || up.node_metric("decode", "vllm:num_requests_running").await > 0.0,
        "decode runs the request",
    )
    .await;
    up.signal(Signal::SIGINT);
    up.wait_for_log("once more to force").await;
    up.signal(Signal::SIGINT);
    up.wait(Duration::from_secs(5)).await;
    site.assert_nothing_left(Duration::from_secs(1)).await;
    let answer = tokio::time::timeout(HANG, request).await.unwrap().unwrap();
    assert_ne!(answer.ending, Ending::Hung);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_up_says_what_runs() {
    let site = Site::new();
    let up = site.up_ready().await;
    let output = site.command(&["up", "topology.toml"]).output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(!output.status.success(), "{text}");
    assert!(text.contains(&up.pid().to_string()), "{text}");
    assert!(text.contains(&site.port.to_string()), "{text}");
    assert_eq!(
        up.generate(&completion(1, 100, 4)).await.ending,
        Ending::Complete
    );
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_signal_lets_running_requests_finish_and_takes_no_new_ones() {
    let site = Site::new();
    let topology = support::topology(site.port);
    site.topology(&topology.replace("drain_timeout = \"2s\"", "drain_timeout = \"60s\""));
    let mut up = site.up_ready().await;
    site.script(r#"{"itl_ms": 50}"#);
    let (url, body) = (up.url(), streamed(completion(1, 64, 40)));
    let request = tokio::spawn(async move { generate(&url, &body).await });
    wait_until(
        async || up.node_metric("decode", "vllm:num_requests_running").await > 0.0,
        "decode runs the request",
    )
    .await;
    up.signal(Signal::SIGTERM);
    up.wait_for_log("once more to force").await;
    let late = generate(&up.url(), &completion(2, 64, 4)).await;
    assert!(matches!(late.ending, Ending::Refused(_)), "{late:?}");
    let answer = request.await.unwrap();
    assert_eq!((answer.ending, answer.tokens), (Ending::Complete, 40));
    assert_eq!(up.wait(HANG).await.code(), Some(0));
    site.assert_nothing_left(Duration::from_secs(1)).await;
}
