//! Many requests at a time, with the right answers known beforehand.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use tokio::task::JoinSet;

use super::Pegaflow;
use super::client::{Answer, Ending, chat, completion, generate, streamed};

/// A request and what a node that computes everything by itself answers.
#[derive(Debug, Clone)]
pub struct Expected {
    pub body: Value,
    pub text: String,
}

/// Chats and completions, streamed and not, of 1 token to 12 chunks.
pub async fn mixed(pegaflow: &Pegaflow<'_>, count: u32, max_tokens: u32) -> Vec<Expected> {
    let lengths = [1, 31, 32, 33, 64, 100, 200, 390];
    let mut all = Vec::new();
    for seed in 0..count {
        let length = lengths[seed as usize % lengths.len()];
        let body = match seed % 3 {
            0 => chat(seed, length / 2 + 1, max_tokens),
            _ => completion(seed, length, max_tokens),
        };
        let text = pegaflow.whole("decode", &body).await.text;
        assert!(!text.is_empty(), "the node itself does not answer {body}");
        let body = if seed % 2 == 0 { streamed(body) } else { body };
        all.push(Expected { body, text });
    }
    all
}

/// Keeps `workers` requests running until [`Load::finish`].
pub struct Load {
    stop: Arc<AtomicBool>,
    workers: JoinSet<Vec<(Expected, Answer)>>,
}

impl Load {
    pub fn start(pegaflow: &Pegaflow<'_>, requests: &[Expected], workers: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut set = JoinSet::new();
        for worker in 0..workers {
            let (stop, url, requests) = (stop.clone(), pegaflow.url(), requests.to_vec());
            set.spawn(async move {
                let mut answers = Vec::new();
                let mut turn = worker;
                while !stop.load(Ordering::Relaxed) {
                    let expected = requests[turn % requests.len()].clone();
                    answers.push((expected.clone(), generate(&url, &expected.body).await));
                    turn += 1;
                }
                answers
            });
        }
        Self { stop, workers: set }
    }

    /// Lets running requests end and returns every answer.
    pub async fn finish(self) -> Vec<(Expected, Answer)> {
        self.stop.store(true, Ordering::Relaxed);
        self.workers.join_all().await.concat()
    }
}

/// Every answer is whole and right: a request outlives the node that works on it.
pub fn check(answers: &[(Expected, Answer)]) {
    assert!(!answers.is_empty(), "no request was made");
    for (expected, answer) in answers {
        assert!(
            answer.ending == Ending::Complete && answer.text == expected.text,
            "expected {:?} for {}, got {answer:#?}",
            expected.text,
            expected.body
        );
    }
}
