//! An HTTP client that looks at answers as a user's program does.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value, json};

use super::{HANG, Pegaflow, processes};

/// How a generation request ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// All of it.
    Complete,
    /// An HTTP error, or a connection that broke, before the first byte of the answer.
    Refused(String),
    /// An explicit error event after the stream had begun.
    ErrorEvent(String),
    /// The stream began and then just ended, without `[DONE]` or error.
    Torn,
    /// Nothing for [`HANG`].
    Hung,
}

/// What arrived.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub ending: Ending,
    pub text: String,
    /// Token pieces received (streams) or reported (whole answers).
    pub tokens: usize,
    pub first_byte: Duration,
    pub total: Duration,
}

/// Sends `body` to `/v1/chat/completions` if it has messages, else to `/v1/completions`.
pub async fn generate(base: &str, body: &Value) -> Answer {
    generate_as(&Endpoint { base, key: None }, body).await
}

/// Where, and with which key.
struct Endpoint<'a> {
    base: &'a str,
    key: Option<&'a str>,
}

async fn generate_as(at: &Endpoint<'_>, body: &Value) -> Answer {
    let started = Instant::now();
    let mut answer = Answer {
        ending: Ending::Hung,
        text: String::new(),
        tokens: 0,
        first_byte: HANG,
        total: HANG,
    };
    let work = async {
        let ending = if body["stream"] == true {
            stream(at, body, &mut answer, started).await
        } else {
            whole(at, body, &mut answer, started).await
        };
        answer.ending = ending;
    };
    let _ = tokio::time::timeout(HANG, work).await;
    answer.total = started.elapsed();
    answer
}

async fn post(at: &Endpoint<'_>, body: &Value) -> Result<reqwest::Response, Ending> {
    let path = if body["messages"].is_array() {
        "chat/completions"
    } else {
        "completions"
    };
    let mut request = reqwest::Client::new()
        .post(format!("{}/v1/{path}", at.base))
        .header("content-type", "application/json")
        .body(body.to_string());
    if let Some(key) = at.key {
        request = request.bearer_auth(key);
    }
    let response = request
        .send()
        .await
        .map_err(|error| Ending::Refused(format!("{error:?}")))?;
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status();
    Err(Ending::Refused(format!(
        "{status}: {}",
        response.text().await.unwrap_or_default()
    )))
}

async fn whole(at: &Endpoint<'_>, body: &Value, answer: &mut Answer, started: Instant) -> Ending {
    let response = match post(at, body).await {
        Ok(response) => response,
        Err(ending) => return ending,
    };
    answer.first_byte = started.elapsed();
    let Ok(bytes) = response.bytes().await else {
        return Ending::Torn;
    };
    let Ok(reply) = serde_json::from_slice::<Value>(&bytes) else {
        return Ending::Torn;
    };
    answer.text = piece(&reply);
    answer.tokens = usize::try_from(reply["usage"]["completion_tokens"].as_u64().unwrap()).unwrap();
    Ending::Complete
}

async fn stream(at: &Endpoint<'_>, body: &Value, answer: &mut Answer, started: Instant) -> Ending {
    let response = match post(at, body).await {
        Ok(response) => response,
        Err(ending) => return ending,
    };
    let mut bytes = response.bytes_stream();
    let mut buffer = Vec::new();
    let mut error = None;
    while let Some(Ok(part)) = bytes.next().await {
        buffer.extend_from_slice(&part);
        while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = buffer.drain(..end + 2).collect();
            let event = String::from_utf8(event).unwrap();
            let Some(data) = event.trim_end().strip_prefix("data: ") else {
                continue;
            };
            if data == "[DONE]" {
                return error.map_or(Ending::Complete, Ending::ErrorEvent);
            }
            let value: Value = serde_json::from_str(data).unwrap();
            if !value["error"].is_null() {
                error = Some(value["error"].to_string());
                continue;
            }
            let text = piece(&value);
            if !text.is_empty() {
                answer.first_byte = answer.first_byte.min(started.elapsed());
                answer.tokens += text.split_whitespace().count();
                answer.text += &text;
            }
        }
    }
    error.map_or(Ending::Torn, Ending::ErrorEvent)
}

fn piece(value: &Value) -> String {
    let choice = &value["choices"][0];
    let texts = [
        &choice["text"],
        &choice["message"]["content"],
        &choice["delta"]["content"],
    ];
    texts
        .iter()
        .find_map(|text| text.as_str())
        .unwrap_or("")
        .to_owned()
}

/// A completion request with `tokens` prompt tokens that begin differently for each `seed`.
pub fn completion(seed: u32, tokens: u32, max_tokens: u32) -> Value {
    let prompt: Vec<u32> = (0..tokens)
        .map(|position| seed * 7919 + position * 31 + 1)
        .collect();
    json!({"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0})
}

/// A chat request whose prompt has about `words` * 2 tokens.
pub fn chat(seed: u32, words: u32, max_tokens: u32) -> Value {
    let words: Vec<String> = (0..words)
        .map(|word| format!("{:07}", seed * 1000 + word))
        .collect();
    let messages = json!([{"role": "user", "content": words.join(" ")}]);
    json!({"model": "tiny", "messages": messages, "max_tokens": max_tokens, "temperature": 0})
}

/// The same request, streamed.
pub fn streamed(mut body: Value) -> Value {
    body["stream"] = json!(true);
    body
}

impl Pegaflow<'_> {
    /// Where clients connect.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.site.port)
    }

    pub async fn generate(&self, body: &Value) -> Answer {
        generate(&self.url(), body).await
    }

    /// The same prompt, computed by one node without any hand-off.
    pub async fn whole(&self, node: &str, body: &Value) -> Answer {
        let view = self.node(node).await;
        let base = format!("http://{}", view["addr"].as_str().unwrap());
        let key = node_key(&view);
        let at = Endpoint {
            base: &base,
            key: Some(&key),
        };
        generate_as(&at, body).await
    }

    pub async fn get(&self, path: &str) -> String {
        get(&format!("{}{path}", self.url())).await.unwrap()
    }

    /// The node's entry in `/status`.
    pub async fn node(&self, node: &str) -> Value {
        let status: Value = serde_json::from_str(&self.get("/status").await).unwrap();
        status["fleet"]["nodes"][node].clone()
    }

    /// Waits until the node's entry satisfies `condition`.
    pub async fn wait_for_node(&self, node: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let view = self.node(node).await;
            if condition(&view) {
                return view;
            }
            assert!(started.elapsed() < HANG, "{node} stays {view}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A node's own figure from its `/metrics`, all labels summed.
    pub async fn node_metric(&self, node: &str, name: &str) -> f64 {
        let addr = self.node(node).await["addr"].as_str().unwrap().to_owned();
        metric(&get(&format!("http://{addr}/metrics")).await.unwrap(), name)
    }
}

/// What the node wants to be shown, as its own user can see.
pub fn node_key(view: &Value) -> String {
    let pid = u32::try_from(view["pid"].as_u64().unwrap()).unwrap();
    processes::variable(pid, "VLLM_API_KEY").expect("the node has a key")
}

/// Ready, and trusted with KV.
pub fn is_proven(node: &Value) -> bool {
    node["phase"] == "ready" && node["kv"] == "proven"
}

pub async fn get(url: &str) -> Result<String, reqwest::Error> {
    reqwest::Client::new()
        .get(url)
        .timeout(HANG)
        .send()
        .await?
        .text()
        .await
}

/// A figure in Prometheus text: the sum of all samples whose name or name with labels starts so.
pub fn metric(text: &str, name: &str) -> f64 {
    let samples = text.lines().filter(|line| line.starts_with(name));
    samples
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
        .sum()
}
