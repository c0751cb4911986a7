//! The repository's shape: layers, file length, where unsafe code may be, and the shipped configs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use pegaflow::topology::Topology;

/// Imports go from an earlier layer to a later one. Within a layer only where it is listed.
const LAYERS: &[&[&str]] = &[
    &["main", "cli"],
    &["control", "dashboard"],
    &["bench", "engine", "router", "supervise"],
    &["observe"],
    &["plan"],
    &["runtime", "model", "instance", "host", "topology"],
    &["traffic", "live", "reach"],
    &["fleet", "handoff", "notify", "shutdown"],
];

/// Within one layer.
const SIDEWAYS: &[(&str, &str)] = &[
    ("main", "cli"),
    ("dashboard", "control"),
    ("runtime", "topology"),
    ("model", "topology"),
    ("model", "runtime"),
    ("model", "instance"),
    ("instance", "topology"),
    ("instance", "runtime"),
    ("host", "topology"),
];

const MAX_LINES: usize = 450;

/// Every other file is safe code.
const MAY_BE_UNSAFE: &[&str] = &[
    "src/engine/arena.rs",
    "src/engine/arena/sys.rs",
    "src/engine/client.rs",
    "src/host/cuda.rs",
    "src/supervise/guard.rs",
    "src/supervise/guard/place.rs",
    "tests/crash_worker/arena.rs",
    "tests/fake_vllm/kv.rs",
    "tests/fake_vllm/shm.rs",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Path below the root, and text, of every file with this extension.
fn files(dir: &str, extension: &str) -> BTreeMap<String, String> {
    let mut open = vec![root().join(dir)];
    let mut found = BTreeMap::new();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                let name = path
                    .strip_prefix(root())
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned();
                found.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    found
}

fn module(file: &str) -> &str {
    let below = file.strip_prefix("src/").unwrap();
    below.split(['/', '.']).next().unwrap()
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// The modules that a file names as `crate::x`, also in `crate::{x::.., y::..}`.
fn imports(text: &str) -> Vec<String> {
    let word = |text: &str| -> String {
        text.chars()
            .take_while(|c| c.is_ascii_lowercase() || *c == '_')
            .collect()
    };
    let mut found = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.push(word(rest));
            continue;
        };
        let mut depth = 0;
        let mut item = String::new();
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => found.push(word(&std::mem::take(&mut item))),
                c if !c.is_whitespace() || !item.is_empty() => item.push(c),
                _ => {}
            }
        }
        found.push(word(&item));
    }
    found.retain(|name| !name.is_empty());
    found
}

/// Doc links may point anywhere.
fn without_comments(text: &str) -> String {
    let code = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    code.collect::<Vec<_>>().join("\n")
}

#[test]
fn imports_are_read_from_single_and_grouped_uses() {
    let text = "use crate::fleet::NodeId;\nuse crate::{plan::{A, B}, engine};\ncrate::host::x()";
    assert_eq!(imports(text), ["fleet", "plan", "engine", "host"]);
}

#[test]
fn imports_go_downward_only() {
    let mut wrong = Vec::new();
    for (file, text) in files("src", "rs") {
        let from = module(&file);
        if from == "lib" {
            continue;
        }
        let Some(from_layer) = layer(from) else {
            wrong.push(format!("{file}: `{from}` is in no layer"));
            continue;
        };
        for to in imports(&without_comments(&text)) {
            let Some(to_layer) = layer(&to) else { continue };
            let sideways = from == to || SIDEWAYS.contains(&(from, to.as_str()));
            if to_layer < from_layer || to_layer == from_layer && !sideways {
                wrong.push(format!("{file} imports crate::{to}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn files_are_short() {
    let all = files("src", "rs");
    assert!(all.len() > 10);
    let long: Vec<_> = all
        .iter()
        .map(|(file, text)| (file, text.lines().count()))
        .filter(|(_, lines)| *lines > MAX_LINES)
        .collect();
    assert!(long.is_empty(), "above {MAX_LINES} lines: {long:?}");
}

#[test]
fn unsafe_code_is_where_it_is_expected() {
    let mut wrong = Vec::new();
    for (file, text) in files("src", "rs").into_iter().chain(files("tests", "rs")) {
        let code = without_comments(&text);
        let is_unsafe = ["unsafe {", "unsafe fn"]
            .iter()
            .any(|word| code.contains(word));
        if file != "tests/tidy.rs" && !MAY_BE_UNSAFE.contains(&file.as_str()) && is_unsafe {
            wrong.push(file);
        }
    }
    assert!(
        wrong.is_empty(),
        "unsafe code outside of MAY_BE_UNSAFE: {wrong:?}"
    );
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    for file in MAY_BE_UNSAFE {
        let Ok(text) = fs::read_to_string(root().join(file)) else {
            continue;
        };
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            if line.contains("unsafe {") {
                let before = &lines[at.saturating_sub(6)..at];
                let said = before.iter().any(|line| line.contains("// SAFETY:"));
                assert!(said, "{file}:{}: no SAFETY comment", at + 1);
            }
        }
    }
}

#[test]
fn every_shipped_topology_loads() {
    for dir in ["configs", "examples"] {
        let topologies = files(dir, "toml");
        assert!(!topologies.is_empty(), "{dir} holds no topology");
        for file in topologies.keys() {
            let loaded = Topology::load(&root().join(file));
            assert!(loaded.is_ok(), "{}", loaded.unwrap_err());
        }
    }
}
