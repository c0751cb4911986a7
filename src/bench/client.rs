//! One request: what is sent, and when the pieces of its answer came.

use std::ops::RangeInclusive;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{AUTHORIZATION, HeaderValue};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, timeout};

use super::Load;
use super::ask::Scale;

/// Words of the two prompts that are asked before the load. The second one has more where the load's prompts are long,
/// since words differ; a word of two tokens does not make it longer than those.
const SHORT_PROBE: usize = 32;
const LONG_PROBE: RangeInclusive<usize> = 160..=4096;
/// Bytes of one event, and of an answer that is no stream.
const MAX_EVENT: usize = 16 << 20;
/// How much of an error's text is quoted.
const EXCERPT: usize = 200;

/// Which of the two endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Api {
    /// /v1/completions
    #[default]
    Completions,
    /// /v1/chat/completions
    Chat,
}

/// Where, and how it is asked.
#[derive(Debug, Clone)]
pub struct Endpoint {
    http: reqwest::Client,
    pub url: String,
    key: Option<HeaderValue>,
    pub model: String,
    pub api: Api,
    /// Answers end when they have the length that is asked for, not before: `ignore_eos`, which vLLM knows.
    pub ignore_eos: bool,
    /// For a whole answer.
    pub limit: Duration,
}

/// Why there is no load.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("{url} does not answer: {source}")]
    Unreachable { url: String, source: reqwest::Error },
    #[error("{url} answered {status}: {said}")]
    Refused {
        url: String,
        status: u16,
        said: String,
    },
    #[error("{url} answered with more than {MAX_EVENT} bytes")]
    TooLong { url: String },
    #[error("{url} serves no model; name one with --model")]
    NoModel { url: String },
    #[error("the API key cannot be sent: it has characters that no header may have")]
    Key,
}

/// Why one request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    #[error("cannot connect")]
    Connect,
    #[error("connection broke")]
    Broke,
    #[error("status {0}")]
    Status(u16),
    #[error("event is no JSON")]
    NoJson,
    #[error("error event")]
    ErrorEvent,
    #[error("event too long")]
    EventTooLong,
    #[error("more text than asked for")]
    TooMuch,
    #[error("stream ended early")]
    EndedEarly,
    #[error("timeout")]
    Timeout,
}

/// What came of one request.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Sample {
    /// After the beginning of the load.
    pub(super) sent: Duration,
    /// From sending it to each piece, which is a token as a rule.
    pub(super) pieces: Vec<Duration>,
    /// To the end of the answer.
    pub(super) total: Duration,
    /// As the endpoint counted.
    pub(super) input: u64,
    pub(super) output: u64,
    /// Why it failed.
    pub(super) failure: Option<Failure>,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    role: Option<String>,
    content: Option<String>,
    reasoning: Option<String>,
    reasoning_content: Option<String>,
    tool_calls: Option<Value>,
}

#[derive(Deserialize, Default)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
}

impl Choice {
    /// What a next prompt repeats of it.
    fn words(&self) -> Option<&str> {
        let of_chat = || self.delta.as_ref()?.content.as_deref();
        self.text.as_deref().or_else(of_chat)
    }

    /// It brings a token: words, or none yet, where a token is only a part of a character. What names the role before
    /// the first token does not, nor what only says that it is over.
    fn is_token(&self) -> bool {
        let is_empty = |text: &Option<String>| text.as_ref().is_some_and(String::is_empty);
        let of_chat = |delta: &Delta| delta.role.is_none() && is_empty(&delta.content);
        let is_part = is_empty(&self.text) || self.delta.as_ref().is_some_and(of_chat);
        self.says_something() || (is_part && self.finish_reason.is_none())
    }

    fn says_something(&self) -> bool {
        let has = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        has(&self.text)
            || self.delta.as_ref().is_some_and(|delta| {
                has(&delta.content)
                    || has(&delta.reasoning)
                    || has(&delta.reasoning_content)
                    || delta.tool_calls.is_some()
            })
    }
}

/// A conversation so far: question, answer, question, ...
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Said(Vec<String>);

impl Said {
    pub(super) fn ask(&mut self, question: String) {
        self.0.push(question);
    }

    pub(super) fn hear(&mut self, answer: String) {
        self.0.push(answer);
    }

    fn messages(&self) -> Value {
        let roles = ["user", "assistant"].into_iter().cycle();
        let message = |(content, role)| json!({"role": role, "content": content});
        self.0.iter().zip(roles).map(message).collect()
    }
}

impl Endpoint {
    /// `model`: without one, the first that the endpoint serves is taken.
    pub async fn find(
        url: &str,
        key: Option<&str>,
        model: Option<String>,
        api: Api,
        limit: Duration,
    ) -> Result<Self, BenchError> {
        let key = match key {
            Some(key) => {
                let mut value =
                    HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| BenchError::Key)?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        let mut endpoint = Self {
            // Idle connections would be closed by uvicorn after 5 s.
            http: reqwest::Client::builder()
                .no_proxy()
                .tcp_nodelay(true)
                .pool_idle_timeout(Duration::from_secs(4))
                .build()
                .map_err(|source| BenchError::Unreachable {
                    url: url.to_owned(),
                    source,
                })?,
            url: url.trim_end_matches('/').trim_end_matches("/v1").to_owned(),
            key,
            model: model.unwrap_or_default(),
            api,
            ignore_eos: true,
            limit,
        };
        if endpoint.model.is_empty() {
            let models = endpoint
                .json(endpoint.http.get(format!("{}/v1/models", endpoint.url)))
                .await?;
            let first = models
                .pointer("/data/0/id")
                .and_then(Value::as_str)
                .map(str::to_owned);
            endpoint.model = first.ok_or_else(|| BenchError::NoModel {
                url: endpoint.url.clone(),
            })?;
        }
        Ok(endpoint)
    }

    async fn json(&self, request: reqwest::RequestBuilder) -> Result<Value, BenchError> {
        let failed = |source| BenchError::Unreachable {
            url: self.url.clone(),
            source,
        };
        let mut response = self
            .authorized(request)
            .timeout(self.limit)
            .send()
            .await
            .map_err(failed)?;
        let status = response.status();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_EVENT {
                return Err(BenchError::TooLong {
                    url: self.url.clone(),
                });
            }
        }
        if !status.is_success() {
            return Err(BenchError::Refused {
                url: self.url.clone(),
                status: status.as_u16(),
                said: excerpt(&body),
            });
        }
        Ok(serde_json::from_slice(&body).unwrap_or_default())
    }

    fn authorized(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.key {
            Some(key) => request.header(AUTHORIZATION, key),
            None => request,
        }
    }

    /// Asks two short prompts, to learn how many tokens a word has.
    pub(super) async fn scale(&self, load: &Load) -> Result<Scale, BenchError> {
        let mut found = Vec::new();
        let long = load.input.least() as usize / 2;
        for words in [
            SHORT_PROBE,
            long.clamp(*LONG_PROBE.start(), *LONG_PROBE.end()),
        ] {
            let mut said = Said::default();
            said.ask(load.probe(words));
            let body = self.body(&said, 1, false);
            let answer = self.json(self.post(&body)).await?;
            let tokens = answer
                .pointer("/usage/prompt_tokens")
                .and_then(Value::as_u64);
            found.push((words, tokens.unwrap_or_default()));
        }
        let scale = match found.as_slice() {
            [short, long] => Scale::from(*short, *long),
            _ => None,
        };
        // It does not count: a word is a token.
        Ok(scale.unwrap_or(Scale {
            fixed: 0.0,
            per_word: 1.0,
        }))
    }

    fn body(&self, said: &Said, output: u32, stream: bool) -> Value {
        let mut body = Map::new();
        let mut put = |key: &str, value: Value| drop(body.insert(key.to_owned(), value));
        put("model", self.model.as_str().into());
        put("max_tokens", output.into());
        put("temperature", 0.into());
        put("stream", stream.into());
        if stream {
            put("stream_options", json!({"include_usage": true}));
        }
        match self.api {
            Api::Completions => put("prompt", said.0.join(" ").into()),
            Api::Chat => put("messages", said.messages()),
        }
        if self.ignore_eos {
            put("ignore_eos", true.into());
        }
        body.into()
    }

    fn post(&self, body: &Value) -> reqwest::RequestBuilder {
        let path = match self.api {
            Api::Completions => "/v1/completions",
            Api::Chat => "/v1/chat/completions",
        };
        let request = self.http.post(format!("{}{path}", self.url));
        request
            .header("content-type", "application/json")
            .body(body.to_string())
    }

    /// What came of it, and the answer.
    pub(super) async fn sample(&self, said: &Said, output: u32) -> (Sample, String) {
        let request = self.authorized(self.post(&self.body(said, output, true)));
        let (mut sample, mut answer) = (Sample::default(), String::new());
        let begun = Instant::now();
        // A piece has a token at least, but for a few.
        let most = output as usize * 2 + 1_000;
        let reading = follow(request, begun, most, (&mut sample, &mut answer));
        let ended = timeout(self.limit, reading).await;
        sample.total = begun.elapsed();
        sample.failure = ended.unwrap_or(Err(Failure::Timeout)).err();
        (sample, answer)
    }
}

/// Reads the stream to its end. `most`: pieces of text.
async fn follow(
    request: reqwest::RequestBuilder,
    begun: Instant,
    most: usize,
    (sample, answer): (&mut Sample, &mut String),
) -> Result<(), Failure> {
    let sent = request.send().await;
    let mut response = sent.map_err(|error| match error.is_connect() {
        true => Failure::Connect,
        false => Failure::Broke,
    })?;
    let status = response.status();
    if !status.is_success() {
        return Err(Failure::Status(status.as_u16()));
    }
    let mut waiting = BytesMut::new();
    let mut is_done = false;
    while let Some(chunk) = response.chunk().await.map_err(|_| Failure::Broke)? {
        let now = begun.elapsed();
        waiting.extend_from_slice(&chunk);
        while let Some(line) = take_line(&mut waiting) {
            let Some(data) = line.strip_prefix(b"data:") else {
                continue;
            };
            let data = data.trim_ascii();
            if data == b"[DONE]" {
                is_done = true;
                continue;
            }
            let event: Event = serde_json::from_slice(data).map_err(|_| Failure::NoJson)?;
            if event.error.is_some() {
                return Err(Failure::ErrorEvent);
            }
            answer.extend(event.choices.iter().filter_map(Choice::words));
            if event.choices.iter().any(Choice::is_token) {
                if sample.pieces.len() >= most || answer.len() > MAX_EVENT {
                    return Err(Failure::TooMuch);
                }
                sample.pieces.push(now);
            }
            if let Some(usage) = event.usage {
                (sample.input, sample.output) = (usage.prompt_tokens, usage.completion_tokens);
            }
        }
        if waiting.len() > MAX_EVENT {
            return Err(Failure::EventTooLong);
        }
    }
    if !is_done {
        return Err(Failure::EndedEarly);
    }
    if sample.output == 0 {
        sample.output = sample.pieces.len() as u64;
    }
    Ok(())
}

fn take_line(waiting: &mut BytesMut) -> Option<Bytes> {
    let end = memchr::memchr(b'\n', waiting)?;
    let line = waiting.split_to(end + 1).freeze();
    Some(line.slice(..end))
}

fn excerpt(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .trim()
        .chars()
        .take(EXCERPT)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_without_words_counts_and_a_role_or_an_end_does_not() {
        for (choice, is_token) in [
            (json!({"text": "a"}), true),
            (json!({"text": "", "finish_reason": null}), true),
            (json!({"text": "", "finish_reason": "stop"}), false),
            (json!({"text": "a", "finish_reason": "length"}), true),
            (
                json!({"delta": {"role": "assistant", "content": ""}}),
                false,
            ),
            (json!({"delta": {"content": ""}}), true),
            (json!({"delta": {"content": "a"}}), true),
            (json!({"delta": {}, "finish_reason": "stop"}), false),
            (json!({"delta": {"tool_calls": []}}), true),
        ] {
            let read: Choice = serde_json::from_value(choice.clone()).unwrap();
            assert_eq!(read.is_token(), is_token, "{choice}");
        }
    }
}
