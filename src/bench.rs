//! A load on an OpenAI endpoint, and what it felt like there.
//!
//! ```text
//! seed ─▶ asks: prompt, length of the answer, when it is due
//!            ├─ open:   sent when due, however many are under way
//!            └─ closed: sent when one of so many clients is free
//!                          └─▶ a conversation, turn by turn: one streamed request ─▶ Sample: when its pieces came, or why it failed ─▶ Report
//! ```
//!
//! The same seed makes the same asks in the same order, so that two endpoints can be given the same load. Prompts are
//! random words, or what a [`Trace`] recorded; how many tokens a word has with this model is asked before the load. What is reported of
//! lengths is what the endpoint counted.

mod ask;
mod client;
mod compare;
mod html;
mod lengths;
mod plot;
mod queue;
mod report;
mod slo;
mod trace;
mod words;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

pub use ask::{Load, Pace};
pub use client::{Api, BenchError, Endpoint};
pub use compare::{Capacity, Compared, Comparison, Row};
pub use lengths::{Lengths, LengthsError};
pub use report::{Report, Stats};
pub use slo::{Slo, SloError};
pub use trace::{Trace, TraceError, Wanted};

use ask::Asks;
use client::{Said, Sample};
use report::Run;

/// The most requests of one run.
pub const MOST: usize = 100_000;

/// Gives the load to the endpoint, and waits until every answer has ended; each ends by the endpoint's time limit at
/// the latest. `stop` ends it early: what was not sent is not sent, what is under way counts as failed.
pub async fn run(
    endpoint: &Endpoint,
    load: &Load,
    slo: Option<&Slo>,
    stop: &CancellationToken,
    told: impl Fn(usize) + Send + Sync + 'static,
) -> Result<Report, BenchError> {
    let of = Run {
        endpoint: &endpoint.url,
        model: &endpoint.model,
        load,
        slo,
    };
    let Some(scale) = stop.run_until_cancelled(endpoint.scale(load)).await else {
        return Ok(Report::new(&of, &[], Duration::ZERO, true));
    };
    let asks = Asks::new(load, scale?);
    let shared = Arc::new(Shared {
        endpoint: endpoint.clone(),
        next: AtomicUsize::new(0),
        done: AtomicUsize::new(0),
        asks,
        begun: Instant::now(),
        told: Box::new(told),
    });
    let mut tasks = JoinSet::new();
    match load.pace {
        Pace::Open { .. } | Pace::Recorded { .. } => {
            for number in 0..shared.asks.conversations() {
                let shared = shared.clone();
                tasks.spawn(async move { shared.when_due(number).await });
            }
        }
        Pace::Closed { clients } => {
            for _ in 0..clients {
                let shared = shared.clone();
                tasks.spawn(async move { shared.one_after_the_other().await });
            }
        }
    }
    let mut samples = Vec::new();
    let all = async {
        while let Some(some) = tasks.join_next().await {
            // A task that panicked has no samples, and its requests are missing in the report.
            samples.extend(some.unwrap_or_default());
        }
    };
    let interrupted = stop.run_until_cancelled(all).await.is_none();
    tasks.shutdown().await;
    let took = shared.begun.elapsed();
    Ok(Report::new(&of, &samples, took, interrupted))
}

struct Shared {
    endpoint: Endpoint,
    asks: Asks,
    /// The next conversation of a closed load.
    next: AtomicUsize,
    done: AtomicUsize,
    begun: Instant,
    told: Box<dyn Fn(usize) + Send + Sync>,
}

impl Shared {
    async fn when_due(&self, conversation: usize) -> Vec<Sample> {
        sleep_until(self.begun + self.asks.due(conversation)).await;
        let mut samples = Vec::new();
        self.talk(conversation, &mut samples).await;
        samples
    }

    async fn one_after_the_other(&self) -> Vec<Sample> {
        let mut samples = Vec::new();
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.asks.conversations() {
                return samples;
            }
            self.talk(number, &mut samples).await;
        }
    }

    /// All turns of a conversation; after one that failed there is nothing to go on with.
    async fn talk(&self, conversation: usize, samples: &mut Vec<Sample>) {
        let mut said = Said::default();
        for turn in 0.. {
            let Some(ask) = self.asks.get(conversation, turn) else {
                return;
            };
            if turn > 0 {
                sleep(self.asks.think()).await;
            }
            said.ask(ask.prompt);
            let sent = self.begun.elapsed();
            let (mut sample, answer) = self.endpoint.sample(&said, ask.output).await;
            sample.sent = sent;
            let is_lost = sample.failure.is_some();
            samples.push(sample);
            (self.told)(self.done.fetch_add(1, Ordering::Relaxed) + 1);
            if is_lost {
                return;
            }
            said.hear(answer);
        }
    }
}
