//! One request's tokens, in time.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::leader::{EngineDead, Running, Server, Slot};
use crate::script::Stage;
use crate::tokens::{Model, Token};
use crate::wire::{Job, Leg, LegKind};

/// The token that `Stage::Decode` keeps back.
const HELD_AT: usize = 2;

/// What to generate.
#[derive(Debug, Clone)]
pub struct Order {
    pub request: String,
    pub prompts: Vec<Vec<u32>>,
    /// Choices per prompt.
    pub n: usize,
    pub max_tokens: usize,
    pub salt: String,
    pub leg: Option<Leg>,
}

/// One token of one choice.
#[derive(Debug)]
pub struct Piece {
    pub choice: usize,
    pub position: usize,
    pub token: Token,
    pub last: bool,
}

/// A request that runs; dropping it aborts it.
#[derive(Debug)]
pub struct Generation {
    pub order: Order,
    server: Arc<Server>,
    choice: usize,
    position: usize,
    current: Option<(Running, Model)>,
    /// From its first token on until its end.
    slot: Option<Slot>,
}

impl Generation {
    pub fn new(server: Arc<Server>, order: Order) -> Self {
        let counters = &server.counters;
        counters.requests.fetch_add(1, Ordering::Relaxed);
        let leg = match order.leg.as_ref().map(|leg| leg.leg) {
            Some(LegKind::Prefill) => "prefill",
            Some(LegKind::Decode) => "decode",
            None => "whole",
        };
        *counters.legs.lock().unwrap().entry(leg).or_default() += 1;
        Self {
            order,
            server,
            choice: 0,
            position: 0,
            current: None,
            slot: None,
        }
    }

    pub fn choices(&self) -> usize {
        self.order.prompts.len() * self.order.n
    }

    /// The next token; none at the end.
    pub async fn next(&mut self) -> Option<Result<Piece, EngineDead>> {
        if self.choice == self.choices() {
            return None;
        }
        Some(self.piece().await)
    }

    async fn piece(&mut self) -> Result<Piece, EngineDead> {
        let script = self.server.script.current();
        let delay = if self.position == 0 {
            script.ttft_ms
        } else {
            script.itl_ms
        };
        if self.slot.is_none() {
            self.slot = Some(self.server.admit().await?);
        }
        if self.current.is_none() {
            let prompt = &self.order.prompts[self.choice / self.order.n];
            let job = Job {
                id: 0,
                request: format!("{}-{}", self.order.request, self.choice),
                tokens: prompt.clone(),
                salt: self.order.salt.clone(),
                leg: self.order.leg.clone(),
            };
            let (running, outcome) = self.server.run(job).await?;
            if self.choice.is_multiple_of(self.order.n) {
                let counter = &self.server.counters.prompt_tokens;
                counter.fetch_add(prompt.len() as u64, Ordering::Relaxed);
            }
            let model = Model::new(prompt, self.choice % self.order.n, outcome.wrong);
            self.current = Some((running, model));
        }
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        if self.position == HELD_AT {
            Stage::Decode.pass().await;
        }
        self.server.working().await;
        if self.server.is_dead() {
            return Err(EngineDead);
        }
        let (_, model) = self.current.as_mut().unwrap();
        let (choice, position) = (self.choice, self.position);
        let mut token = model.token();
        if script.batch_noise && self.server.counters.running.load(Ordering::Relaxed) > 1 {
            token.logprob -= 1e-3;
        }
        self.position += 1;
        let last = self.position >= self.order.max_tokens;
        if last {
            (self.choice, self.position, self.current) = (choice + 1, 0, None);
        }
        let total = self
            .server
            .counters
            .generated_tokens
            .fetch_add(1, Ordering::Relaxed)
            + 1;
        if script.die_after_tokens.is_some_and(|limit| total > limit) {
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
        Ok(Piece {
            choice,
            position,
            token,
            last,
        })
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if self.choice < self.choices() && !self.server.is_dead() {
            self.server.counters.aborted.fetch_add(1, Ordering::Relaxed);
        }
    }
}
