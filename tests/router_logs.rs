//! Logs hold no prompt and no key, at any level.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use std::fs::{self, File};

use pegaflow::handoff::HandoffBoard;
use serde_json::json;
use support_router::command::{RouterProcess, router_command};
use support_router::*;

const PROMPT: &str = "whispered-prompt";
const OUR_KEY: &str = "our-own-api-key";
const THEIR_KEY: &str = "key-of-the-nodes";

async fn node(answer: Answer) -> Fake {
    Fake::always(&HandoffBoard::default(), Kv::Nothing, answer).await
}

/// What a router logs at its loudest while nodes answer so.
async fn logged(answer: Answer, keys: bool) -> String {
    let folder = tempfile::tempdir().unwrap();
    let (log, file) = (folder.path().join("log"), folder.path().join("keys"));
    write_private(&file, &format!("{OUR_KEY}\n"));
    let (p, d) = (node(answer.clone()).await, node(answer).await);
    let (p, d) = (format!("http://{}", p.addr), format!("http://{}", d.addr));
    let mut flags = vec!["--prefill", &p, "--decode", &d, "--queue-timeout", "100ms"];
    if keys {
        flags.extend(["--api-keys", file.to_str().unwrap()]);
    }
    let (mut command, port) = router_command(&flags);
    command
        .env("PEGAFLOW_LOG", "trace")
        .stderr(File::create(&log).unwrap());
    let router = RouterProcess::launch(command, port).await;
    let key = if keys { OUR_KEY } else { THEIR_KEY };
    soon("ready nodes", async {
        while router.get("/health").await.json()["status"] != "ok" {}
    })
    .await;
    let mut stream = false;
    for (path, wrong_key) in [
        ("/v1/completions", false),
        ("/v1/chat/completions", false),
        ("/v1/responses", false),
        ("/v1/embeddings?text=whispered-prompt", false),
        ("/v1/completions", true),
        ("/whispered-prompt", false),
        ("/v1/models/whispered-prompt", false),
    ] {
        for _ in 0..2 {
            stream = !stream;
            let body = json!({
                "model": "tiny", "prompt": PROMPT, "input": PROMPT, "stream": stream, "tag": 1,
                "messages": [{"role": "user", "content": PROMPT}],
            });
            let request = router.post(path, &body).header("x-whatever", PROMPT);
            let key = if wrong_key {
                "wrong-key-whispered-prompt"
            } else {
                key
            };
            // However it ends.
            let _ = soon("an answer", async {
                request.bearer_auth(key).send().await?.bytes().await
            })
            .await;
        }
    }
    let broken = format!("{{\"prompt\": \"{PROMPT}\", \"messages\" {PROMPT}");
    let request = router
        .post("/v1/completions", &json!(null))
        .bearer_auth(key)
        .body(broken);
    assert_eq!(router.send(request).await.status, 400);
    router.stop().await;
    fs::read_to_string(log).unwrap()
}

#[tokio::test]
async fn neither_prompts_nor_keys_are_logged() {
    for answer in [
        Answer::Tokens,
        Answer::Status(500, "failed on whispered-prompt"),
        Answer::Status(400, "failed on whispered-prompt"),
        Answer::Reset,
        Answer::BreakAfter(2),
        Answer::ErrorEvent(500),
    ] {
        for keys in [false, true] {
            let text = logged(answer.clone(), keys).await;
            assert!(
                text.contains("DEBUG request id="),
                "it is not loud enough: {text}"
            );
            for secret in [PROMPT, OUR_KEY, THEIR_KEY] {
                let lines: Vec<_> = text.lines().filter(|line| line.contains(secret)).collect();
                assert!(lines.is_empty(), "{answer:?}: {lines:#?}");
            }
        }
    }
}
