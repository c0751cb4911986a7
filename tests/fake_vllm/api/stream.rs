//! An answer as an event stream.

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::reply::Reply;
use super::{Kind, engine_dead};
use crate::generation::{Generation, Piece};

/// The response head goes out at once, as vLLM's does.
pub fn respond(reply: Reply, generation: Generation) -> Response {
    let stream = Stream {
        reply,
        generation,
        generated: 0,
        stage: Stage::Begin,
        held: None,
    };
    let body = futures_util::stream::unfold(stream, |mut stream| async {
        let text = stream.next().await?;
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(text)), stream))
    });
    let kind = (header::CONTENT_TYPE, "text/event-stream; charset=utf-8");
    ([kind], Body::from_stream(body)).into_response()
}

/// An event stream in progress.
struct Stream {
    reply: Reply,
    generation: Generation,
    generated: usize,
    stage: Stage,
    /// The first token of a chat; its role is an event before it.
    held: Option<Piece>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Begin,
    Tokens,
    Ended,
}

impl Stream {
    async fn next(&mut self) -> Option<String> {
        if self.stage == Stage::Ended {
            return None;
        }
        let next = match self.held.take() {
            Some(piece) => Some(Ok(piece)),
            None => self.generation.next().await,
        };
        let Some(piece) = next else {
            self.stage = Stage::Ended;
            let mut chunk = self.reply.envelope(self.object(), json!([]));
            chunk["usage"] = self.reply.usage(self.generated);
            let usage = if self.reply.usage_chunk {
                event(&chunk)
            } else {
                String::new()
            };
            return Some(usage + "data: [DONE]\n\n");
        };
        let Ok(piece) = piece else {
            self.stage = Stage::Ended;
            return Some(event(&engine_dead()) + "data: [DONE]\n\n");
        };
        if self.stage == Stage::Begin && self.reply.kind == Kind::Chat {
            let delta = json!({"role": "assistant", "content": ""});
            let choice =
                json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": null}]);
            let mut chunk = self.reply.envelope(self.object(), choice);
            chunk["prompt_token_ids"] = match self.reply.token_ids {
                true => json!(self.reply.prompts[0]),
                false => Value::Null,
            };
            self.stage = Stage::Tokens;
            self.held = Some(piece);
            return Some(event(&chunk));
        }
        self.stage = Stage::Tokens;
        self.generated += 1;
        let choice = self.reply.choice(&[piece], true);
        Some(event(&self.reply.envelope(self.object(), json!([choice]))))
    }

    fn object(&self) -> &'static str {
        match self.reply.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion.chunk",
        }
    }
}

fn event(value: &Value) -> String {
    format!("data: {value}\n\n")
}
