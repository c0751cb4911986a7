//! What a test makes the fake do: a JSON file named by `FAKE_VLLM_SCRIPT`, read again on every
//! request. Top-level keys hold for all nodes; `nodes.<PEGAFLOW_NODE>` overrides them:
//!
//! ```json
//! {"itl_ms": 2, "nodes": {"decode": {"fail": {"kind": "500", "next": 2}}}}
//! ```

use std::sync::Mutex;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

const HOLD_LOOK: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Script {
    /// From start to the first `/health`.
    pub startup_ms: u64,
    /// Computing a prompt that was not loaded.
    pub prefill_ms: u64,
    /// Before the first token, on every leg.
    pub ttft_ms: u64,
    /// Before each later token.
    pub itl_ms: u64,
    /// SIGTERM is ignored.
    pub ignore_term: bool,
    /// At start: this message on stderr, exit code 2.
    pub fatal_start: Option<String>,
    /// At start: a traceback, exit code 1.
    pub crash_start: bool,
    /// Wrong bytes are stored (prefill) or read (decode).
    pub corrupt_kv: bool,
    pub health: Health,
    pub fail: Option<Fail>,
    /// The leader kills itself after this many streamed or collected tokens.
    pub die_after_tokens: Option<u64>,
    /// With other requests in the batch, logprobs are a little different.
    pub batch_noise: bool,
    /// The chunk writes of a prefill leg take this long.
    pub save_ms: u64,
    /// The chunk reads of a decode leg take this long.
    pub load_ms: u64,
    /// Nobody gets past these stages as long as they are here.
    pub hold: Vec<Stage>,
    /// Of the whole file; only the reader looks at it.
    nodes: Value,
}

/// Where a process can be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// All processes run; no `/health` yet.
    Start,
    /// The workers compute a prompt: the warm-up's, a canary's, a request's.
    Prefill,
    /// The workers write chunks.
    Save,
    /// The workers read chunks.
    Load,
    /// Two tokens of an answer are there.
    Decode,
}

impl Stage {
    /// Waits until the script holds nobody here.
    pub async fn pass(self) {
        while read().unwrap_or_default().hold.contains(&self) {
            tokio::time::sleep(HOLD_LOOK).await;
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    #[default]
    Ok,
    Hang,
    #[serde(rename = "503")]
    Dead,
}

/// Which requests fail, and how.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fail {
    pub kind: FailKind,
    #[serde(default = "always")]
    pub probability: f64,
    /// Only that many; counted anew whenever the `fail` object changes.
    pub next: Option<u64>,
}

fn always() -> f64 {
    1.0
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailKind {
    /// The listening socket is closed; `/health` is refused as well.
    Refuse,
    /// The connection is closed without an answer.
    Reset,
    /// No answer, ever.
    Hang,
    #[serde(rename = "500")]
    Error,
}

/// Reads the script and counts failures.
#[derive(Debug, Default)]
pub struct ScriptReader {
    failed: Mutex<(Option<Fail>, u64)>,
}

impl ScriptReader {
    /// The script as it stands now; a missing or half-written file is the default.
    pub fn current(&self) -> Script {
        read().unwrap_or_default()
    }

    /// Whether this request is to fail.
    pub fn failure(&self, script: &Script) -> Option<FailKind> {
        let mut failed = self.failed.lock().unwrap();
        if failed.0 != script.fail {
            *failed = (script.fail.clone(), 0);
        }
        let fail = script.fail.as_ref()?;
        if fail.next.is_some_and(|next| failed.1 >= next)
            || rand::random::<f64>() >= fail.probability
        {
            return None;
        }
        failed.1 += 1;
        Some(fail.kind)
    }
}

fn read() -> Option<Script> {
    let path = std::env::var_os("FAKE_VLLM_SCRIPT")?;
    let mut value: Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let node = std::env::var("PEGAFLOW_NODE").unwrap_or_default();
    let overrides = value["nodes"][&node].clone();
    if let (Some(all), Some(own)) = (value.as_object_mut(), overrides.as_object()) {
        all.extend(own.clone());
    }
    Some(serde_json::from_value(value).unwrap_or_else(|error| panic!("FAKE_VLLM_SCRIPT: {error}")))
}
