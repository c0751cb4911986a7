//! Several models behind one endpoint: who is asked, by which name, and what is told to who asks for another.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod support_router;

use pegaflow::fleet::{Phase, Role};
use pegaflow::handoff::HandoffBoard;
use serde_json::{Value, json};
use support_router::*;

/// Two models, each with a prefill and a decode node in a pool of its own.
struct Models {
    nodes: Vec<(&'static str, Fake)>,
    rig: Rig,
}

async fn two_models() -> Models {
    let board = HandoffBoard::default();
    let mut nodes = Vec::new();
    for (name, role) in [
        ("qwen-p", Role::Prefill),
        ("qwen-d", Role::Decode),
        ("llama-p", Role::Prefill),
        ("llama-d", Role::Decode),
    ] {
        let kv = if role == Role::Prefill {
            Kv::Settle(READY)
        } else {
            Kv::Nothing
        };
        nodes.push((name, Fake::always(&board, kv, Answer::Tokens).await, role));
    }
    let mut plan = plan();
    plan.aliases = [("gpt-4o".to_owned(), "qwen".to_owned())].into();
    plan.queue_timeout = std::time::Duration::from_millis(300);
    let views: Vec<_> = nodes
        .iter()
        .map(|(name, node, role)| (*name, *role, node.addr))
        .collect();
    let rig = Rig::start(&board, plan, &views).await;
    for (name, ..) in &nodes {
        rig.fleet.update(&(*name).into(), |node| {
            let (model, _) = name.split_once('-').unwrap();
            node.pool = model.into();
            let adapter = (model == "qwen").then(|| "qwen-sql".to_owned());
            node.models = [model.to_owned()].into_iter().chain(adapter).collect();
        });
    }
    let nodes = nodes
        .into_iter()
        .map(|(name, node, _)| (name, node))
        .collect();
    Models { nodes, rig }
}

impl Models {
    fn seen(&self, name: &str) -> Vec<Seen> {
        let found = self.nodes.iter().find(|(node, _)| *node == name);
        found.unwrap().1.seen()
    }

    fn counts(&self) -> Vec<usize> {
        self.nodes
            .iter()
            .map(|(_, node)| node.seen().len())
            .collect()
    }

    async fn post(&self, path: &str, body: &Value) -> Got {
        self.rig.send(self.rig.request(path, body)).await
    }
}

#[tokio::test]
async fn both_legs_go_to_nodes_of_the_model_by_its_own_name() {
    let models = two_models().await;
    for (asked, served, number) in [
        ("qwen", "qwen", 1),
        ("gpt-4o", "qwen", 2),
        ("qwen-sql", "qwen-sql", 3),
    ] {
        for stream in [false, true] {
            let body =
                json!({"model": asked, "prompt": "a", "max_tokens": 8, "stream": stream, "tag": 1});
            let got = models.post("/v1/completions", &body).await;
            assert_eq!(got.status, 200, "{}", got.text);
        }
        assert_eq!(models.counts(), [2 * number, 2 * number, 0, 0]);
        for leg in ["qwen-p", "qwen-d"] {
            let seen = models.seen(leg);
            assert_eq!(seen.last().unwrap().body["model"], served);
            assert!(seen.last().unwrap().mark()["handoff"].is_string());
        }
    }
    let chat = json!({"messages": [{"role": "user", "content": "a"}], "model": "llama", "tag": 1});
    assert_eq!(models.post("/v1/chat/completions", &chat).await.status, 200);
    let whole = json!({"model": "llama", "prompt": "a", "max_tokens": 1, "tag": 1});
    assert_eq!(models.post("/v1/completions", &whole).await.status, 200);
    // Passed on whole, and still to the model's own nodes.
    for (asked, count) in [("gpt-4o", 7), ("llama", 7)] {
        let body = json!({"model": asked, "input": "a", "tag": 1});
        assert_eq!(models.post("/v1/embeddings", &body).await.status, 200);
        assert_eq!(models.seen("qwen-d").len(), count);
    }
    assert_eq!(models.seen("qwen-d").last().unwrap().body["model"], "qwen");
    assert_eq!(models.counts(), [6, 7, 2, 2]);
    models.rig.finish().await;
}

#[tokio::test]
async fn a_model_that_is_not_here_costs_no_prefill() {
    let models = two_models().await;
    for path in [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
    ] {
        let mut body = json!({"model": "mistral", "prompt": "a", "messages": [], "tag": 1});
        let got = models.post(path, &body).await;
        assert_eq!(
            (got.status, &got.json()["error"]["code"]),
            (404, &json!("model_not_found"))
        );
        for known in ["`gpt-4o`", "`llama`", "`qwen`", "`qwen-sql`"] {
            assert!(got.text.contains(known), "{}", got.text);
        }
        body.as_object_mut().unwrap().remove("model");
        let got = models.post(path, &body).await;
        assert_eq!(
            (got.status, &got.json()["error"]["code"]),
            (400, &json!("model_required"))
        );
        assert!(got.text.contains("`llama`"), "{}", got.text);
    }
    assert_eq!(models.counts(), [0; 4]);

    let list = models.rig.get("/v1/models").await.json();
    let names: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| &model["id"])
        .collect();
    assert_eq!(names, ["gpt-4o", "llama", "qwen", "qwen-sql"]);
    assert_eq!(list["data"][0]["root"], "qwen");
    assert_eq!(
        models.rig.get("/v1/models/gpt-4o").await.json()["id"],
        "gpt-4o"
    );
    assert_eq!(models.rig.get("/v1/models/mistral").await.status, 404);
    models.rig.finish().await;
}

#[tokio::test]
async fn nodes_of_another_model_do_not_stand_in() {
    let models = two_models().await;
    // Without its prefill node decode computes the prompt; without both nobody does.
    models.rig.set("llama-p", Phase::CrashLoop);
    let body = json!({"model": "llama", "prompt": "a", "max_tokens": 8, "tag": 1});
    assert_eq!(models.post("/v1/completions", &body).await.status, 200);
    assert!(models.seen("llama-d")[0].mark()["handoff"].is_null());
    models.rig.set("llama-d", Phase::CrashLoop);
    let got = models.post("/v1/completions", &body).await;
    assert_eq!(
        (got.status, &got.json()["error"]["code"]),
        (503, &json!("no_ready_node"))
    );
    assert_eq!(models.counts(), [0, 0, 0, 1]);
    models.rig.finish().await;
}
