//! Prompts to tokens, tokens to text, and the function that stands for the model.

use serde_json::Value;
use sha2::{Digest, Sha256};

/// Four bytes of text are one token.
pub fn tokenize(text: &str) -> Vec<u32> {
    let pieces = text.as_bytes().chunks(4);
    pieces
        .map(|piece| {
            let mut word = [0; 4];
            word[..piece.len()].copy_from_slice(piece);
            u32::from_le_bytes(word) & 0x7fff_ffff
        })
        .collect()
}

/// The prompts of a completion request: text, texts, ids, or lists of ids.
pub fn prompts(prompt: &Value) -> Option<Vec<Vec<u32>>> {
    match prompt {
        Value::String(text) => Some(vec![tokenize(text)]),
        Value::Array(items) if items.iter().all(Value::is_u64) && !items.is_empty() => {
            Some(vec![ids(items)?])
        }
        Value::Array(items) if !items.is_empty() => items
            .iter()
            .map(|item| match item {
                Value::String(text) => Some(tokenize(text)),
                Value::Array(items) => ids(items),
                _ => None,
            })
            .collect(),
        _ => None,
    }
}

fn ids(items: &[Value]) -> Option<Vec<u32>> {
    items
        .iter()
        .map(|item| u32::try_from(item.as_u64()?).ok())
        .collect()
}

/// A chat as its template would write it.
pub fn render(messages: &[Value]) -> String {
    let mut text = String::new();
    for message in messages {
        let content = match &message["content"] {
            Value::String(content) => content.clone(),
            other => other.to_string(),
        };
        text += &format!("<|{}|>{content}\n", message["role"].as_str().unwrap_or(""));
    }
    text + "<|assistant|>"
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    pub id: u32,
    pub logprob: f64,
}

impl Token {
    pub fn text(&self) -> String {
        format!("t{} ", self.id)
    }
}

/// The model: a pure function of the prompt with what it has generated so far, and the choice's number. `wrong`
/// is a model that attended to wrong KV.
#[derive(Debug)]
pub struct Model {
    text: Sha256,
    choice: usize,
    wrong: bool,
}

impl Model {
    pub fn new(prompt: &[u32], choice: usize, wrong: bool) -> Self {
        let mut text = Sha256::new();
        for id in prompt {
            text.update(id.to_le_bytes());
        }
        Self {
            text,
            choice,
            wrong,
        }
    }

    /// The next token.
    pub fn token(&mut self) -> Token {
        let mut hash = self.text.clone();
        hash.update(self.choice.to_le_bytes());
        hash.update([u8::from(self.wrong)]);
        let bytes: [u8; 32] = hash.finalize().into();
        let id = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        self.text.update(id.to_le_bytes());
        Token {
            id,
            logprob: -f64::from(bytes[2]) / 64.0,
        }
    }
}
