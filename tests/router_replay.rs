//! Streams whose node fails after their first byte: what the client reads has no seam.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::time::Duration;

use pegaflow::fleet::{Phase, Role};
use pegaflow::handoff::HandoffBoard;
use pegaflow::plan::RouterPlan;
use serde_json::{Value, json};
use support_router::storyteller::{End, MODEL_LEN, Node, right};
use support_router::*;

const DEATHS: [End; 4] = [End::Reset, End::Cut, End::Stall, End::EngineDead];

/// A client's view of a stream.
#[derive(Debug, Default)]
struct Told {
    text: String,
    ids: Vec<u64>,
    names: std::collections::BTreeSet<String>,
    finishes: usize,
    usage: Value,
    error: Value,
    done: usize,
}

fn read(got: &Got) -> Told {
    assert_eq!(got.status, 200, "{}", got.text);
    let mut told = Told::default();
    for event in got.text.split_terminator("\n\n") {
        let json = event.strip_prefix("data: ").unwrap();
        if json == "[DONE]" {
            told.done += 1;
            continue;
        }
        assert_eq!(told.done, 0, "something comes after the end: {}", got.text);
        let value: Value = serde_json::from_str(json).unwrap();
        if value["error"].is_object() {
            told.error = value["error"].clone();
            continue;
        }
        told.names.insert(format!(
            "{} {} {}",
            value["id"], value["created"], value["object"]
        ));
        if !value["usage"].is_null() {
            told.usage = value["usage"].clone();
        }
        let choice = &value["choices"][0];
        let piece = choice["text"]
            .as_str()
            .or(choice["delta"]["content"].as_str());
        told.text += piece.unwrap_or("");
        let ids = choice["token_ids"].as_array().into_iter().flatten();
        told.ids.extend(ids.map(|id| id.as_u64().unwrap()));
        told.finishes += usize::from(choice["finish_reason"].is_string());
    }
    told
}

const PROMPT: &str = "abcd";

fn completion(extra: Value) -> Value {
    merged(
        json!({"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "stream": true, "temperature": 0}),
        extra,
    )
}

fn chat(extra: Value) -> Value {
    let messages = json!([{"role": "user", "content": PROMPT}]);
    merged(
        json!({"model": "tiny", "messages": messages, "stream": true, "temperature": 0}),
        extra,
    )
}

fn merged(mut body: Value, extra: Value) -> Value {
    let all = body.as_object_mut().unwrap();
    all.extend(extra.as_object().unwrap().clone());
    body
}

fn quick() -> RouterPlan {
    RouterPlan {
        chunk_timeout: Duration::from_millis(400),
        ..plan()
    }
}

async fn ask(rig: &Rig, body: &Value) -> Told {
    let path = match body["messages"].is_array() {
        true => "/v1/chat/completions",
        false => "/v1/completions",
    };
    read(&rig.send(rig.request(path, body)).await)
}

const OK: &str = "pegaflow_router_replays_total{outcome=\"ok\",reason=\"\"}";

/// Whatever ends the first node, on both endpoints, after a hand-off and without one.
#[tokio::test]
async fn a_stream_outlives_its_node_unseen() {
    let usage = json!({"stream_options": {"include_usage": true}});
    for end in DEATHS {
        for (body, tokens) in [
            (completion(usage.clone()), 12),
            (chat(usage.clone()), MODEL_LEN - PROMPT.len()),
            (
                chat(merged(
                    usage.clone(),
                    json!({"max_completion_tokens": 9, "max_tokens": 3}),
                )),
                9,
            ),
        ] {
            for split in [true, false] {
                let board = HandoffBoard::default();
                let p = Fake::always(&board, Kv::Settle(READY), Answer::Tokens).await;
                let dying = Node::dying(5, end).await;
                let well = Node::well().await;
                // The name decides which of two idle nodes is asked first.
                let mut nodes = vec![
                    ("a", Role::Decode, dying.addr),
                    ("b", Role::Decode, well.addr),
                ];
                if split {
                    nodes.push(("p", Role::Prefill, p.addr));
                }
                let rig = Rig::start(&board, quick(), &nodes).await;
                let told = ask(&rig, &body).await;
                let case = format!("{end:?}, split {split}, {body}: {told:?}");
                assert_eq!(told.text, right(PROMPT, tokens), "{case}");
                assert_eq!((told.done, told.finishes), (1, 1), "{case}");
                assert_eq!(told.names.len(), 1, "{case}");
                assert!(told.ids.is_empty() && told.error.is_null(), "{case}");
                let expected = json!({
                    "prompt_tokens": PROMPT.len(), "completion_tokens": tokens,
                    "total_tokens": PROMPT.len() + tokens,
                });
                assert_eq!(told.usage, expected, "{case}");
                assert_eq!(rig.sample(OK).await, 1.0, "{case}");
                assert_eq!(dying.seen().len(), 1, "{case}");
                let seen = well.seen();
                let (path, asked) = &seen[0];
                assert_eq!(
                    (path.as_str(), seen.len()),
                    ("/v1/completions", 1),
                    "{case}"
                );
                assert_eq!(asked["prompt"].as_array().unwrap().len(), PROMPT.len() + 5);
                let leg = &asked["kv_transfer_params"]["pegaflow"]["leg"];
                assert_eq!(leg == "decode", split, "{case}");
                rig.finish().await;
            }
        }
    }
}

#[tokio::test]
async fn ids_that_the_client_wants_go_on_as_well() {
    let board = HandoffBoard::default();
    let dying = Node::dying(5, End::Reset).await;
    let well = Node::well().await;
    let nodes = [
        ("a", Role::Unified, dying.addr),
        ("b", Role::Unified, well.addr),
    ];
    let rig = Rig::start(&board, plan(), &nodes).await;
    let told = ask(&rig, &completion(json!({"return_token_ids": true}))).await;
    let text: String = told.ids.iter().map(|id| format!("t{id} ")).collect();
    assert_eq!(text, right(PROMPT, 12));
    assert_eq!(told.text, text);
    rig.finish().await;
}

/// A stream is not handed around for ever, and one that goes on is not lost when that fails at first.
#[tokio::test]
async fn a_stream_outlives_some_nodes_and_not_any_number() {
    let board = HandoffBoard::default();
    // Each tells two tokens more.
    let dying = Node::start(|_| (2, End::EngineDead)).await;
    let also = Node::start(|_| (2, End::EngineDead)).await;
    let nodes = [
        ("a", Role::Unified, dying.addr),
        ("b", Role::Unified, also.addr),
    ];
    let rig = Rig::start(&board, plan(), &nodes).await;
    let told = ask(&rig, &completion(json!({"max_tokens": 8}))).await;
    assert_eq!((told.text, told.done), (right(PROMPT, 8), 1));
    assert_eq!(rig.sample(OK).await, 3.0);

    let told = ask(&rig, &completion(json!({"max_tokens": 12}))).await;
    assert_eq!((told.text, told.done), (right(PROMPT, 8), 0));
    assert_eq!(told.error["code"], "in_stream");
    let refused = "pegaflow_router_replays_total{outcome=\"refused\",reason=\"too_often\"}";
    assert_eq!(rig.sample(refused).await, 1.0);
    rig.finish().await;
}

/// A connection that breaks says little about its node: it is asked again if there is no other one.
#[tokio::test]
async fn a_node_that_lives_on_is_asked_again_when_there_is_no_other() {
    let board = HandoffBoard::default();
    let node = Node::start(|number| match number {
        0 => (5, End::Reset),
        _ => (usize::MAX, End::Well),
    })
    .await;
    let rig = Rig::start(&board, plan(), &[("a", Role::Unified, node.addr)]).await;
    let told = ask(&rig, &chat(json!({}))).await;
    // For a chat without a limit it is asked how many tokens the model has room for.
    assert_eq!(
        (told.text, told.done),
        (right(PROMPT, MODEL_LEN - PROMPT.len()), 1)
    );
    assert_eq!(node.seen().len(), 2);
    rig.finish().await;
}

#[tokio::test]
async fn what_cannot_go_on_ends_with_an_error() {
    let board = HandoffBoard::default();
    let dying = Node::dying(5, End::EngineDead).await;
    let well = Node::well().await;
    let nodes = [
        ("a", Role::Decode, dying.addr),
        ("b", Role::Prefill, well.addr),
    ];
    for (extra, reason) in [
        (json!({"n": 2}), "choices"),
        (json!({"logprobs": 1}), "logprobs"),
        (json!({"seed": 1, "temperature": 1}), "seed"),
        (json!({"stop": ["never"]}), "stop"),
        (json!({"structured_outputs": {"regex": ".*"}}), "guided"),
    ] {
        let rig = Rig::start(&board, plan(), &nodes).await;
        let told = ask(&rig, &completion(extra)).await;
        assert_eq!((told.text, told.done), (right(PROMPT, 5), 0), "{reason}");
        assert_eq!(told.error["code"], "in_stream", "{reason}");
        let refused =
            format!("pegaflow_router_replays_total{{outcome=\"refused\",reason=\"{reason}\"}}");
        assert_eq!(rig.sample(&refused).await, 1.0, "{reason}");
        let (_, asked) = dying.seen().pop().unwrap();
        assert_eq!(asked.get("return_token_ids"), None, "{reason}");
        rig.finish().await;
    }
}

#[tokio::test]
async fn switched_off_it_asks_for_nothing_and_ends_with_an_error() {
    let board = HandoffBoard::default();
    let dying = Node::dying(5, End::EngineDead).await;
    let well = Node::well().await;
    let nodes = [
        ("a", Role::Unified, dying.addr),
        ("b", Role::Unified, well.addr),
    ];
    let off = RouterPlan {
        replay: false,
        ..plan()
    };
    let rig = Rig::start(&board, off, &nodes).await;
    let told = ask(&rig, &completion(json!({}))).await;
    assert_eq!((told.text, told.done), (right(PROMPT, 5), 0));
    assert_eq!(told.error["code"], "in_stream");
    assert_eq!(dying.seen()[0].1.get("return_token_ids"), None);
    rig.finish().await;
}

/// The only node comes back, in time or not.
#[tokio::test]
async fn a_stream_waits_for_the_only_node_to_return() {
    for returns in [true, false] {
        let board = HandoffBoard::default();
        let node = Node::start(|number| match number {
            0 => (5, End::EngineDead),
            _ => (usize::MAX, End::Well),
        })
        .await;
        let patience = RouterPlan {
            queue_timeout: if returns {
                plan().queue_timeout
            } else {
                Duration::from_millis(300)
            },
            ..plan()
        };
        let rig = Rig::start(&board, patience, &[("a", Role::Unified, node.addr)]).await;
        let die = async {
            soon("the first tokens", async {
                while rig
                    .sample("pegaflow_router_itl_seconds_count{path=\"whole\"}")
                    .await
                    < 3.0
                {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            })
            .await;
            let delay = Duration::from_millis(1);
            rig.set("a", Phase::Backoff { delay });
            tokio::time::sleep(Duration::from_millis(100)).await;
            if returns {
                rig.fleet.update(&"a".into(), |node| {
                    node.incarnation = 2;
                    node.phase = Phase::Ready;
                });
            }
        };
        let body = completion(json!({}));
        let (told, ()) = tokio::join!(ask(&rig, &body), die);
        let (tokens, done) = if returns { (12, 1) } else { (5, 0) };
        assert_eq!((told.text, told.done), (right(PROMPT, tokens), done));
        assert_eq!(told.error.is_null(), returns);
        rig.finish().await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_meanwhile_leaves_nothing() {
    let board = HandoffBoard::default();
    let dying = Node::dying(5, End::EngineDead).await;
    let stuck = Node::dying(0, End::Stall).await;
    let nodes = [
        ("a", Role::Unified, dying.addr),
        ("b", Role::Unified, stuck.addr),
    ];
    let rig = Rig::start(&board, plan(), &nodes).await;
    let body = completion(json!({}));
    let mut response = rig.request("/v1/completions", &body).send().await.unwrap();
    soon("the replay", async {
        while stuck.seen().is_empty() {
            let _ = tokio::time::timeout(Duration::from_millis(5), response.chunk()).await;
        }
    })
    .await;
    drop(response);
    rig.finish().await;
}
