//! The figures of a whole fleet: those that are documented are there, and those that are there are documented; the
//! shipped dashboard and alerts ask for nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::gpu::{Library, free_gpus, gpu_site};
use crate::support::client::{Ending, completion, streamed};

/// Documented, and not on `/metrics` of a fleet: that is at `/metrics/all`, or of `pegaflow router --engine`.
const ELSEWHERE: [&str; 2] = ["pegaflow_node_scraped", "pegaflow_router_engine_connected"];
/// What the shipped dashboard and alerts may ask for besides what `docs/metrics.md` lists: Prometheus' own, and those of
/// vLLM that `docs/metrics.md` names in its text.
const OTHERS: [&str; 1] = ["up"];

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Family {
    kind: String,
    labels: BTreeSet<String>,
}

/// Families by the name that queries use: a counter's with `_total`.
fn documented() -> BTreeMap<String, Family> {
    let text = read("docs/metrics.md");
    let rows = text.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `pegaflow_")?.split(" | ");
        let name = format!("pegaflow_{}", cells.next()?.trim_end_matches('`'));
        let kind = cells.next()?.to_owned();
        let labels = cells.next()?.split(',').map(|label| label.trim());
        let labels = labels.filter(|label| !label.is_empty());
        let labels = labels.map(|label| label.trim_matches('`').to_owned());
        let labels = labels.collect();
        Some((name, Family { kind, labels }))
    });
    rows.collect()
}

/// What an OpenMetrics text has, and whether it is well-formed as far as Prometheus would refuse it otherwise.
fn exposed(text: &str) -> BTreeMap<String, Family> {
    let mut found: BTreeMap<String, Family> = BTreeMap::new();
    let mut names = BTreeMap::new();
    let mut last = "";
    for line in text.strip_suffix("# EOF\n").expect("it ends").lines() {
        if let Some(about) = line.strip_prefix("# TYPE ") {
            let (name, kind) = about.split_once(' ').unwrap();
            let query = match kind {
                "counter" => format!("{name}_total"),
                _ => name.to_owned(),
            };
            let family = Family {
                kind: kind.to_owned(),
                labels: BTreeSet::new(),
            };
            assert!(
                found.insert(query.clone(), family).is_none(),
                "{name} is there twice"
            );
            names.insert(name.to_owned(), query);
            last = name;
        } else if !line.starts_with('#') {
            let end = line.find(['{', ' ']).unwrap();
            assert!(line.starts_with(last), "{line} is no sample of {last}");
            let value = line.rsplit(' ').next().unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let labels = &line[end..line.len() - value.len()];
            let labels = labels.trim().trim_matches(['{', '}']);
            let labels = labels.split("\",").filter(|label| !label.is_empty());
            let labels = labels.map(|label| label.split_once('=').unwrap().0.to_owned());
            let labels = labels.filter(|label| label != "le");
            let family = found.get_mut(&names[last]).unwrap();
            family.labels.extend(labels);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_documented_is_there_and_nothing_else() {
    let site = gpu_site(Library::Scripted(
        &(free_gpus() + "is 0 util=37 temp=61 ecc=0\n"),
    ));
    let up = site.up_ready().await;
    for seed in [1, 2] {
        let mut body = streamed(completion(seed, 64, 8));
        body["model"] = "Qwen3-8B".into();
        let answer = up.generate(&body).await;
        assert_eq!(answer.ending, Ending::Complete);
    }
    let text = up.get("/metrics").await;
    let (exposed_alone, documented) = (exposed(&text), documented());
    let names = |families: &BTreeMap<String, Family>| Vec::from_iter(families.keys().cloned());
    let mut expected = names(&documented);
    expected.retain(|name| !ELSEWHERE.contains(&name.as_str()));
    assert_eq!(
        names(&exposed_alone),
        expected,
        "left: /metrics, right: docs/metrics.md"
    );
    for (name, family) in &exposed_alone {
        let told = &documented[name];
        assert_eq!(family.kind, told.kind, "{name}");
        // Some have no samples before something goes wrong.
        if !family.labels.is_empty() {
            assert_eq!(family.labels, told.labels, "{name}");
        }
    }

    let all = up.get("/metrics/all").await;
    let exposed_all = exposed(&all);
    assert!(
        names(&exposed_alone)
            .iter()
            .all(|name| exposed_all.contains_key(name))
    );
    for node in ["prefill", "decode"] {
        let line = format!("pegaflow_node_scraped{{node=\"{node}\"}} 1");
        assert!(all.lines().any(|found| found == line), "{all}");
        let start = format!("vllm:generation_tokens_total{{node=\"{node}\",engine=\"0\",");
        assert!(all.lines().any(|found| found.starts_with(&start)), "{all}");
    }
    up.stop().await;
}

/// The metrics in a query. `promtool` says whether it is one at all: see `examples/grafana/check.sh`.
fn names(query: &str) -> BTreeSet<&str> {
    let is_part = |char: char| char.is_ascii_alphanumeric() || "_:".contains(char);
    let words = query.split(|char| !is_part(char));
    let is_metric = |word: &&str| {
        OTHERS.contains(word) || word.starts_with("pegaflow_") || word.starts_with("vllm:")
    };
    words.filter(is_metric).collect()
}

/// Every query of the dashboard and the alerts, with where it is.
fn queries() -> Vec<(String, String)> {
    let dashboard: Value = serde_json::from_str(&read("examples/grafana/dashboard.json")).unwrap();
    let mut found = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            // Grafana puts a time there.
            let expr = target["expr"].as_str().unwrap();
            let expr = expr.replace("$__rate_interval", "1m");
            found.push((panel["title"].to_string(), expr));
        }
    }
    let panels = found.len();
    let rules = read("examples/grafana/alerts.yml");
    let mut lines = rules.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(expr) = line.trim().strip_prefix("expr: ") else {
            continue;
        };
        let mut expr = expr.to_owned();
        if expr == ">-" {
            expr.clear();
            // The block goes on as long as it is indented more.
            while let Some(more) = lines.next_if(|more| more.starts_with("          ")) {
                expr.push_str(more.trim());
                expr.push(' ');
            }
        }
        found.push((format!("alert {}", found.len() - panels), expr));
    }
    assert!(panels > 30 && found.len() - panels > 10, "{}", found.len());
    found
}

#[test]
fn the_dashboard_and_the_alerts_ask_for_what_there_is() {
    let documented = documented();
    let text = read("docs/metrics.md");
    for (place, query) in queries() {
        let names = names(&query);
        assert!(!names.is_empty(), "{place}: {query}");
        for name in names {
            let is_histogram = |family: &Family| family.kind == "histogram";
            let of_histogram = ["_bucket", "_sum", "_count"].iter().any(|suffix| {
                let family = name.strip_suffix(suffix);
                family.is_some_and(|family| documented.get(family).is_some_and(is_histogram))
            });
            let of_others = OTHERS.contains(&name)
                || name.starts_with("vllm:") && text.contains(&format!("`{name}`"));
            assert!(
                documented.contains_key(name) || of_histogram || of_others,
                "{place}: {name} is not in docs/metrics.md"
            );
        }
    }
}
