//! What the nodes say of themselves (`GET /metrics` of vLLM), in one text with the router's own figures.
//!
//! ```text
//! node ── Prometheus text ─▶ families ─▶ each sample gets node="..." ─▶ one family for all nodes ─▶ OpenMetrics
//!    └ silent, broken ─▶ its figures are missing, and pegaflow_node_scraped says 0
//! ```
//!
//! A scraper refuses a whole answer for one bad line or one family that is there twice, so what is no sample is left
//! out, and families are put together by name. Old Prometheus text differs from OpenMetrics where a counter's family
//! has no `_total` and times of creation are no families of their own.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::timeout;

use super::Context;
use crate::fleet::{NodeView, Phase};

/// For all of a node's answer. Prometheus gives up after 10 s.
const DEADLINE: Duration = Duration::from_secs(3);
/// Families of ours; no node may speak for us.
const OWN: &str = "pegaflow_";
const LABEL: &str = "node";
/// What a node's own label of that name becomes, as it would in Prometheus.
const THEIRS: &str = "exported_node";

/// The figures of all nodes that run, as a part of an OpenMetrics text.
pub(super) async fn of_nodes(cx: &Context) -> String {
    let fleet = cx.fleet.now();
    let asked = fleet.nodes().filter(|node| runs(node)).map(|node| async {
        let text = timeout(DEADLINE, cx.client.read(node, "/metrics")).await;
        (node.id.as_str(), text.ok().and_then(Result::ok))
    });
    let answers = join_all(asked).await;
    let mut families = Families::default();
    let mut scraped = String::from(
        "# HELP pegaflow_node_scraped 1 where the node's own figures are in this answer.\n# TYPE pegaflow_node_scraped gauge\n",
    );
    for (node, text) in &answers {
        let good = text.as_ref().is_some_and(|text| families.add(node, text));
        let node = escaped(node);
        let _ = writeln!(
            scraped,
            "pegaflow_node_scraped{{node=\"{node}\"}} {}",
            u8::from(good)
        );
    }
    if answers.is_empty() {
        return String::new();
    }
    families.write(&mut scraped);
    scraped
}

/// Its API server may answer.
fn runs(node: &NodeView) -> bool {
    matches!(
        node.phase,
        Phase::Ready | Phase::Draining | Phase::Unreachable
    )
}

#[derive(Debug, Default)]
struct Families<'a> {
    by_name: BTreeMap<&'a str, Family<'a>>,
}

#[derive(Debug, Default)]
struct Family<'a> {
    help: &'a str,
    kind: Kind,
    /// Lines.
    samples: String,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Kind {
    #[default]
    Unknown,
    Gauge,
    Counter,
    Histogram,
    Summary,
}

impl Kind {
    fn parse(word: &str) -> Self {
        match word {
            "gauge" => Self::Gauge,
            "counter" => Self::Counter,
            "histogram" => Self::Histogram,
            "summary" => Self::Summary,
            _ => Self::Unknown,
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Gauge => "gauge",
            Self::Counter => "counter",
            Self::Histogram => "histogram",
            Self::Summary => "summary",
        }
    }

    /// What a sample's name has after its family's.
    const fn suffixes(self) -> &'static [&'static str] {
        match self {
            Self::Unknown | Self::Gauge => &[""],
            Self::Counter => &["_total"],
            Self::Histogram => &["_bucket", "_count", "_sum"],
            Self::Summary => &["", "_count", "_sum"],
        }
    }
}

impl<'a> Families<'a> {
    /// False: the text is no text.
    fn add(&mut self, node: &str, text: &'a Bytes) -> bool {
        let Ok(text) = std::str::from_utf8(text) else {
            return false;
        };
        let node = escaped(node);
        let (mut current, mut help) = ("", ("", ""));
        for line in text.lines() {
            if let Some(about) = line.strip_prefix("# ") {
                let mut words = about.splitn(3, ' ');
                let (what, name) = (words.next(), words.next().unwrap_or_default());
                let rest = words.next().unwrap_or_default();
                if what == Some("HELP") {
                    help = (name, rest);
                } else if what == Some("TYPE") {
                    let kind = Kind::parse(rest.trim());
                    current = self.declare(name, kind, help);
                }
            } else if let Some(family) = self.by_name.get_mut(current)
                && let Some(sample) = Sample::parse(line)
                && family.has(current, sample.name)
            {
                sample.write(&node, &mut family.samples);
            }
        }
        true
    }

    /// The family's name; empty where its samples are left out.
    fn declare(&mut self, name: &'a str, kind: Kind, help: (&'a str, &'a str)) -> &'a str {
        if name.is_empty() || name.starts_with(OWN) || name.ends_with("_created") {
            return "";
        }
        // Old text declares a counter under the name of its sample.
        let family = match kind {
            Kind::Counter => name.strip_suffix("_total").unwrap_or(name),
            _ => name,
        };
        let known = self.by_name.entry(family).or_insert(Family {
            kind,
            ..Family::default()
        });
        if help.0 == name && known.help.is_empty() {
            known.help = help.1;
        }
        // Two nodes that do not agree what it is.
        if known.kind == kind { family } else { "" }
    }

    fn write(&self, out: &mut String) {
        for (name, family) in &self.by_name {
            if family.samples.is_empty() {
                continue;
            }
            if !family.help.is_empty() {
                let _ = writeln!(out, "# HELP {name} {}", family.help);
            }
            let _ = writeln!(out, "# TYPE {name} {}", family.kind.word());
            out.push_str(&family.samples);
        }
    }
}

impl Family<'_> {
    fn has(&self, family: &str, sample: &str) -> bool {
        let suffix = sample.strip_prefix(family);
        suffix.is_some_and(|suffix| self.kind.suffixes().contains(&suffix))
    }
}

/// One line of figures.
struct Sample<'a> {
    name: &'a str,
    labels: Vec<(&'a str, &'a str)>,
    value: &'a str,
}

impl<'a> Sample<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let end = line.find(['{', ' ', '\t'])?;
        let (name, rest) = line.split_at_checked(end)?;
        let is_name = |name: &str| {
            let mut bytes = name.bytes();
            bytes.next().is_some_and(|first| !first.is_ascii_digit())
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"_:".contains(&byte))
        };
        if !is_name(name) {
            return None;
        }
        let (labels, rest) = match rest.strip_prefix('{') {
            Some(rest) => labels(rest)?,
            None => (Vec::new(), rest),
        };
        if !labels.iter().all(|(name, _)| is_name(name)) {
            return None;
        }
        // A time may follow, which counts milliseconds in one format and seconds in the other.
        let value = rest.split_ascii_whitespace().next()?;
        value.parse::<f64>().ok()?;
        Some(Self {
            name,
            labels,
            value,
        })
    }

    /// `node`: escaped.
    fn write(&self, node: &str, out: &mut String) {
        let _ = write!(out, "{}{{{LABEL}=\"{node}\"", self.name);
        for (name, value) in &self.labels {
            let name = if *name == LABEL { THEIRS } else { name };
            let _ = write!(out, ",{name}=\"{value}\"");
        }
        let _ = writeln!(out, "}} {}", self.value);
    }
}

/// Names and values, these as they are written, up to the brace; and what follows it.
fn labels(mut text: &str) -> Option<(Vec<(&str, &str)>, &str)> {
    let mut found = Vec::new();
    loop {
        text = text.trim_start_matches([',', ' ']);
        if let Some(rest) = text.strip_prefix('}') {
            return Some((found, rest));
        }
        let (name, rest) = text.split_once("=\"")?;
        let mut is_escaped = false;
        let end = rest.find(|char| {
            let is_end = char == '"' && !is_escaped;
            is_escaped = char == '\\' && !is_escaped;
            is_end
        })?;
        let (value, rest) = rest.split_at_checked(end)?;
        found.push((name.trim(), value));
        text = rest.get(1..)?;
    }
}

fn escaped(label: &str) -> String {
    label
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests;
