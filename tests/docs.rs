//! What the documentation tells people to type: every pegaflow command is one that pegaflow takes, and every file is there.
//! That the commands also do what is said is tested where their subject is, and `tests/real/test_docs.py` runs a guide.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::error::ErrorKind;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every Markdown file that people read, with its path below the root.
fn pages() -> Vec<(String, String)> {
    let mut pages = Vec::new();
    for dir in ["", "docs", "examples", "examples/grafana"] {
        for entry in fs::read_dir(root().join(dir)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|found| found == "md") {
                let name = path.strip_prefix(root()).unwrap().display().to_string();
                pages.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(pages.len() > 10);
    pages
}

/// Where it stands, and what is to be typed. `is_whole`: it is a line of its own, not a word about a command.
struct Shown {
    at: String,
    text: String,
    is_whole: bool,
}

fn shown(page: &str, text: &str) -> Vec<Shown> {
    let mut all = Vec::new();
    // The language of the block that we are in.
    let mut fence: Option<&str> = None;
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let at = format!("{page}:{}", number + 1);
        if let Some(language) = line.trim_start().strip_prefix("```") {
            fence = match fence {
                Some(_) => None,
                None => Some(language),
            };
        } else if fence.is_some_and(|language| !["sh", "bash"].contains(&language)) {
            // A picture, or another language.
        } else if fence.is_some() || line.starts_with("    ") {
            let mut text = line.trim().to_owned();
            while let Some(begin) = text.strip_suffix('\\') {
                text = format!("{begin} {}", lines.next().unwrap().1.trim());
            }
            all.push(Shown {
                at,
                text,
                is_whole: true,
            });
        } else {
            let code = line.split('`').skip(1).step_by(2);
            all.extend(code.map(|text| Shown {
                at: at.clone(),
                text: text.to_owned(),
                is_whole: false,
            }));
        }
    }
    all
}

/// The arguments, if it is a command of pegaflow; what is optional is left out, and of alternatives the first is taken.
fn arguments(text: &str) -> Option<Vec<String>> {
    let starts = ["pegaflow ", "cargo run --release -- ", "cargo run -- "];
    let rest = starts.iter().find_map(|start| text.strip_prefix(start))?;
    let rest = rest.replace("\\|", "|");
    let rest = rest.trim_end_matches(" &");
    let end = [" | ", " > ", " && ", ";", " # ", " 2>"];
    let end = end.iter().filter_map(|end| rest.find(end)).min();
    let mut plain = String::new();
    let mut depth = 0;
    for c in rest[..end.unwrap_or(rest.len())].chars() {
        // Of `--set node.decode.gpus=[1]` the list is no option.
        match c {
            '[' if depth > 0 || plain.is_empty() || plain.ends_with(' ') => depth += 1,
            ']' if depth > 0 => depth -= 1,
            _ if depth == 0 => plain.push(c),
            _ => {}
        }
    }
    let words = shlex::split(&plain)?;
    let words = words.into_iter().filter(|word| !word.contains("..."));
    let first = |word: String| match word.contains("://") || word.contains('=') {
        true => word,
        false => word.split('|').next().unwrap().to_owned(),
    };
    Some(words.map(first).collect())
}

fn is_placeholder(word: &str) -> bool {
    word.chars().any(|c| c.is_ascii_uppercase()) && !word.chars().any(|c| c.is_ascii_lowercase())
}

#[test]
fn every_command_that_is_shown_is_one() {
    let mut seen = 0;
    for (page, text) in pages() {
        for Shown { at, text, is_whole } in shown(&page, &text) {
            let Some(arguments) = arguments(&text) else {
                continue;
            };
            if arguments.first().is_none_or(|first| is_placeholder(first)) {
                continue;
            }
            seen += 1;
            let words = std::iter::once("pegaflow".to_owned()).chain(arguments.iter().cloned());
            let Err(error) = pegaflow::cli::try_parse(words) else {
                continue;
            };
            let has_placeholder = arguments.iter().any(|word| is_placeholder(word));
            let is_fine = match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => true,
                // A word about a command need not have all that it needs.
                ErrorKind::MissingRequiredArgument
                | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => !is_whole,
                ErrorKind::InvalidValue if error.to_string().contains("a value is required") => {
                    !is_whole
                }
                ErrorKind::ValueValidation | ErrorKind::InvalidValue => has_placeholder,
                _ => false,
            };
            assert!(is_fine, "{at}: `{text}`: {error}");
        }
    }
    assert!(seen > 60, "only {seen} commands were found");
}

#[test]
fn every_file_that_is_named_is_there() {
    let mut seen = 0;
    for (page, text) in pages() {
        if page == "CHANGELOG.md" {
            continue;
        }
        for Shown { at, text, .. } in shown(&page, &text) {
            for word in text.split([' ', '"', '\'', '(', ')', ',', ';', ':', '=']) {
                let dirs = [
                    "configs/",
                    "tests/",
                    "benches/",
                    "examples/",
                    "docs/",
                    "fuzz/",
                    "src/",
                    ".ci/",
                ];
                let word = word.trim_end_matches('.');
                let is_path = dirs.iter().any(|dir| word.starts_with(dir));
                if !is_path || word.contains(['*', '<', '{', '$', '[']) {
                    continue;
                }
                seen += 1;
                assert!(root().join(word).exists(), "{at}: {word} is not there");
            }
        }
        for link in text.split("](").skip(1) {
            let target = link.split(')').next().unwrap();
            let file = target.split('#').next().unwrap();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            seen += 1;
            let dir = root().join(Path::new(&page).parent().unwrap());
            assert!(
                dir.join(file).exists(),
                "{page}: the link to {target} leads nowhere"
            );
        }
    }
    assert!(seen > 100, "only {seen} files were found");
}

#[test]
fn the_committed_table_of_keys_is_what_the_command_prints() {
    let run = Command::new(env!("CARGO_BIN_EXE_pegaflow"))
        .args(["schema", "--markdown"])
        .output()
        .unwrap();
    assert!(run.status.success());
    let printed = String::from_utf8(run.stdout).unwrap();
    let committed = fs::read_to_string(root().join("docs/topology-keys.md")).unwrap();
    assert!(
        printed == committed,
        "a key changed: run `cargo run -- schema --markdown > docs/topology-keys.md` and commit it"
    );
}

#[test]
fn words_are_taken_apart_as_they_are_meant() {
    let of = |text: &str| arguments(text).map(|words| words.join(" "));
    for (text, words) in [
        ("pegaflow logs [NODE]", "logs"),
        ("pegaflow init [--model MODEL] [--force]", "init"),
        ("pegaflow restart NODE\\|ROLE", "restart NODE"),
        (
            "pegaflow up x.toml --set node.decode.gpus=[1] --set kv.capacity=1GiB",
            "up x.toml --set node.decode.gpus=[1] --set kv.capacity=1GiB",
        ),
        ("pegaflow completions fish | source", "completions fish"),
        ("cargo run --release -- up a.toml", "up a.toml"),
    ] {
        assert_eq!(of(text).as_deref(), Some(words), "{text}");
    }
    assert_eq!(of("pegaflow.log"), None);
}
