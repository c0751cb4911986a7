//! Streams that outlive the node that generates them.
//!
//! ```text
//!  streamed request ─▶ recipe: may its rest come from another node? ── no ─▶ a broken stream ends with an error event
//!        │ yes: the node is asked for token ids                               (the reason is counted)
//!        ▼
//!  transcript ◀─ ids of the prompt and of every token that went out; null in the events again
//!        │ the node dies, falls silent, or says that its engine is dead
//!        ▼
//!  continuation: prompt ids + generated ids, the limits less what is generated ─▶ another node, any endpoint's
//!        │                                                                        stream as a completion
//!        ▼
//!  splice: its events in the shape, with the id and the usage, of the stream that the client reads
//! ```
//!
//! The other node finds the prompt's KV where every decode node does, in the store; what was generated
//! it computes as a prompt, in one step. Ids, not text, are sent: text would be cut into other tokens
//! at the seam. vLLM's detokenizer is primed with the end of the prompt, so a character whose bytes
//! were cut by the seam comes out whole.
//!
//! What is refused ([`Refusal`]) is what the other node would answer differently: whatever depends on
//! *which* tokens are the answer's, or on a parser's or a grammar's state.

mod events;
mod recipe;
mod splice;

use bytes::Bytes;

pub(super) use recipe::{Recipe, Refusal};

use self::events::{Look, Pieces};
use self::splice::Head;
use super::body::ObjectWriter;

/// Nodes that one stream may outlive.
pub(super) const MOST: usize = 3;

/// What is known of one stream, to go on with it elsewhere.
pub(super) struct Transcript {
    recipe: Recipe,
    head: Option<Head>,
    prompt: Vec<u32>,
    generated: Vec<u32>,
    /// The last token's reason to be the last went out.
    finished: bool,
    /// What comes after that went out as well.
    ended: bool,
    /// Something was seen that cannot be continued.
    refused: Option<Refusal>,
    /// Of `generated`, those before the node that generates now: its own counts do not know them.
    base: Option<usize>,
    replays: usize,
}

/// How a stream whose node failed goes on.
pub(super) enum Next {
    /// Everything but the end was there: these events are the end.
    Ends(Bytes),
    /// This is asked of another node, as a completion.
    Asks(Continuation),
    Refused(Refusal),
}

/// A completion that goes on where a stream broke off.
pub(super) struct Continuation {
    /// Without the token limit where the model's own is the limit: see [`Continuation::body`].
    writer: ObjectWriter,
    limit: Option<u64>,
    tokens: u64,
}

impl Continuation {
    /// The model's own limit has to be known.
    pub(super) fn needs_model_len(&self) -> bool {
        self.limit.is_none()
    }

    /// `model_len`: tokens of prompt and answer together. `None`: it is not known, but needed, or
    /// nothing is left of it.
    pub(super) fn body(mut self, model_len: Option<u64>) -> Option<Bytes> {
        let limit = match self.limit {
            Some(limit) => limit,
            None => model_len?
                .checked_sub(self.tokens)
                .filter(|left| *left > 0)?,
        };
        self.writer.field("max_tokens", &limit.to_string());
        Some(self.writer.finish())
    }
}

impl Transcript {
    pub(super) fn new(recipe: Recipe) -> Self {
        Self {
            recipe,
            head: None,
            prompt: Vec::new(),
            generated: Vec::new(),
            finished: false,
            ended: false,
            refused: None,
            base: None,
            replays: 0,
        }
    }

    /// Takes down whole events of a node; returns what the client gets of them.
    pub(super) fn take(&mut self, events: Bytes) -> Bytes {
        match self.base {
            None => self.take_original(events),
            Some(base) => self.take_continuation(&events, base),
        }
    }

    fn take_original(&mut self, events: Bytes) -> Bytes {
        let Pieces { text, look } = events::look(events, self.recipe.wants_ids());
        if self.head.is_none() {
            self.head = Head::read(&text);
        }
        self.note(look);
        text
    }

    fn take_continuation(&mut self, events: &Bytes, base: usize) -> Bytes {
        // With their ids: they are read from the events themselves.
        let Pieces { look, .. } = events::look(events.clone(), true);
        let prompt = self.prompt.len();
        self.note(Look {
            prompt: Vec::new(),
            ..look
        });
        let head = self.head.as_ref();
        head.map_or_else(Bytes::new, |head| {
            splice::splice(events, head, &self.recipe, prompt, base)
        })
    }

    fn note(&mut self, look: Look) {
        if self.prompt.is_empty() {
            self.prompt = look.prompt;
        }
        self.generated.extend_from_slice(&look.generated);
        self.finished |= look.finished;
        self.ended |= look.ended;
        if self.recipe.is_chat() && self.base.is_none() && look.odd {
            self.refused = Some(Refusal::Parsed);
        }
        if look.unreadable {
            self.refused = Some(Refusal::NoIds);
        }
    }

    /// The node will generate nothing more.
    pub(super) fn next(&mut self) -> Next {
        if let Some(refusal) = self.refused {
            return Next::Refused(refusal);
        }
        let Some(head) = &self.head else {
            return Next::Refused(Refusal::NoIds);
        };
        let (prompt, generated) = (self.prompt.len(), self.generated.len());
        if self.finished {
            let usage = self.recipe.wants_usage() && !self.ended;
            let end = splice::end(head, self.recipe.is_chat(), usage, prompt, generated);
            return Next::Ends(end);
        }
        if self.prompt.is_empty() {
            return Next::Refused(Refusal::NoIds);
        }
        if self.replays == MOST {
            return Next::Refused(Refusal::TooOften);
        }
        let Some(limit) = self.recipe.left(generated) else {
            return Next::Refused(Refusal::Limit);
        };
        self.replays += 1;
        self.base = Some(generated);
        let ids = self.prompt.iter().chain(&self.generated);
        let mut writer = ObjectWriter::with_capacity(8 * (prompt + generated) + 512);
        self.recipe.write(&mut writer, generated);
        writer.field("prompt", &events::ids_json(ids));
        Next::Asks(Continuation {
            writer,
            limit,
            tokens: (prompt + generated) as u64,
        })
    }
}

#[cfg(test)]
mod tests;
