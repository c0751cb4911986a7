//! How the answer to one request looks.

use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::{Kind, bad, engine_dead, error};
use crate::generation::{Generation, Order, Piece};
use crate::leader::Server;
use crate::tokens;
use crate::wire::Leg;

/// What the request asked for.
#[derive(Debug, Clone)]
pub struct Reply {
    pub kind: Kind,
    id: String,
    model: String,
    logprobs: bool,
    pub token_ids: bool,
    pub usage_chunk: bool,
    pub prompts: Vec<Vec<u32>>,
    max_tokens: usize,
}

impl Reply {
    pub fn read(
        server: &Server,
        kind: Kind,
        headers: &HeaderMap,
        body: &Value,
    ) -> Result<Self, Box<Response>> {
        let model = body["model"].as_str().unwrap_or(&server.args.served_name);
        if model != server.args.served_name {
            let message = format!("The model `{model}` does not exist.");
            return Err(Box::new(error(
                StatusCode::NOT_FOUND,
                "NotFoundError",
                &message,
            )));
        }
        let prompts = match kind {
            Kind::Completion => tokens::prompts(&body["prompt"]),
            Kind::Chat => body["messages"]
                .as_array()
                .map(|messages| vec![tokens::tokenize(&tokens::render(messages))]),
        };
        let Some(prompts) = prompts.filter(|all| all.iter().all(|prompt| !prompt.is_empty()))
        else {
            return Err(Box::new(bad(
                "the prompt is missing, empty or of a wrong type",
            )));
        };
        let number = |name: &str| {
            body[name]
                .as_u64()
                .and_then(|value| usize::try_from(value).ok())
        };
        let default = if kind == Kind::Chat { 32 } else { 16 };
        let max_tokens = number("max_completion_tokens")
            .or(number("max_tokens"))
            .unwrap_or(default);
        if max_tokens == 0 {
            return Err(Box::new(bad("max_tokens must be at least 1, got 0.")));
        }
        if number("min_tokens").is_some_and(|min| min > max_tokens) {
            return Err(Box::new(bad(
                "min_tokens must be less than or equal to max_tokens",
            )));
        }
        if !body["stream_options"].is_null() && body["stream"] != true {
            return Err(Box::new(bad(
                "Stream options can only be defined when `stream=True`.",
            )));
        }
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        if longest + max_tokens > server.args.max_model_len {
            let limit = server.args.max_model_len;
            return Err(Box::new(bad(&format!(
                "This model's maximum context length is {limit} tokens."
            ))));
        }
        let prefix = if kind == Kind::Chat {
            "chatcmpl"
        } else {
            "cmpl"
        };
        let request = headers
            .get("x-request-id")
            .and_then(|value| value.to_str().ok());
        let request =
            request.map_or_else(|| format!("{:032x}", rand::random::<u128>()), str::to_owned);
        Ok(Self {
            kind,
            id: format!("{prefix}-{request}"),
            model: model.to_owned(),
            logprobs: body["logprobs"].is_u64() || body["logprobs"] == true,
            token_ids: body["return_token_ids"] == true,
            usage_chunk: body["stream_options"]["include_usage"] == true,
            prompts,
            max_tokens,
        })
    }

    pub fn order(&self, body: &Value) -> Order {
        let leg = body["kv_transfer_params"]["pegaflow"].clone();
        Order {
            request: self.id.clone(),
            prompts: self.prompts.clone(),
            n: body["n"]
                .as_u64()
                .map_or(1, |n| usize::try_from(n).unwrap()),
            max_tokens: self.max_tokens,
            salt: body["cache_salt"].as_str().unwrap_or("").to_owned(),
            leg: serde_json::from_value::<Option<Leg>>(leg).ok().flatten(),
        }
    }

    pub fn envelope(&self, object: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": object, "created": 1, "model": self.model, "choices": choices})
    }

    pub fn usage(&self, generated: usize) -> Value {
        let prompt: usize = self.prompts.iter().map(Vec::len).sum();
        json!({
            "prompt_tokens": prompt, "completion_tokens": generated,
            "total_tokens": prompt + generated, "prompt_tokens_details": null,
        })
    }

    fn logprobs(&self, pieces: &[Piece]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        if self.kind == Kind::Chat {
            let content = pieces.iter().map(|Piece { token, .. }| {
                let (text, logprob) = (token.text(), token.logprob);
                json!({"token": text, "logprob": logprob, "bytes": text.as_bytes(), "top_logprobs": []})
            });
            return json!({"content": content.collect::<Vec<_>>()});
        }
        let text = |piece: &Piece| piece.token.text();
        json!({
            "tokens": pieces.iter().map(text).collect::<Vec<_>>(),
            "token_logprobs": pieces.iter().map(|piece| piece.token.logprob).collect::<Vec<_>>(),
            "top_logprobs": pieces.iter().map(|piece| json!({text(piece): piece.token.logprob})).collect::<Vec<_>>(),
            "text_offset": pieces.iter().map(|piece| piece.position * 7).collect::<Vec<_>>(),
        })
    }

    pub fn choice(&self, pieces: &[Piece], streaming: bool) -> Value {
        let text: String = pieces.iter().map(|piece| piece.token.text()).collect();
        let (first, last) = (&pieces[0], &pieces[pieces.len() - 1]);
        let mut choice = json!({
            "index": first.choice,
            "logprobs": self.logprobs(pieces),
            "finish_reason": if last.last { json!("length") } else { Value::Null },
            "stop_reason": null,
        });
        match (self.kind, streaming) {
            (Kind::Completion, _) => choice["text"] = json!(text),
            (Kind::Chat, true) => choice["delta"] = json!({"content": text}),
            (Kind::Chat, false) => {
                choice["message"] = json!({"role": "assistant", "content": text})
            }
        }
        // The fields are there whether or not anybody asks for ids.
        choice["token_ids"] = Value::Null;
        if self.kind == Kind::Completion {
            choice["prompt_token_ids"] = Value::Null;
        }
        if self.token_ids {
            let ids: Vec<u32> = pieces.iter().map(|piece| piece.token.id).collect();
            choice["token_ids"] = json!(ids);
            if self.kind == Kind::Completion && first.position == 0 {
                let n = self.prompts.len();
                choice["prompt_token_ids"] = json!(self.prompts[first.choice.min(n - 1)]);
            }
        }
        choice
    }

    pub async fn collect(self, mut generation: Generation) -> Response {
        let mut choices: Vec<Vec<Piece>> = Vec::new();
        while let Some(piece) = generation.next().await {
            let Ok(piece) = piece else {
                return (StatusCode::INTERNAL_SERVER_ERROR, axum::Json(engine_dead()))
                    .into_response();
            };
            if piece.position == 0 {
                choices.push(Vec::new());
            }
            choices.last_mut().unwrap().push(piece);
        }
        let list: Vec<Value> = choices
            .iter()
            .map(|pieces| self.choice(pieces, false))
            .collect();
        let object = match self.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion",
        };
        let mut reply = self.envelope(object, json!(list));
        reply["usage"] = self.usage(choices.iter().map(Vec::len).sum());
        reply["kv_transfer_params"] = Value::Null;
        if self.kind == Kind::Chat {
            reply["prompt_token_ids"] = match self.token_ids {
                true => json!(self.prompts[0]),
                false => Value::Null,
            };
        }
        axum::Json(reply).into_response()
    }
}
