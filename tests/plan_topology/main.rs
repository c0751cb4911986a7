//! Every kind of mistake in a topology, with its place.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod keys;
mod nixl;
mod together;

use std::path::Path;

use pegaflow::topology::{ProblemKind as Kind, Topology, TopologyErrors};

/// A file to put mistakes into. Line numbers in the tests count from `device`, line 1.
const TOP: &str = "device = \"cuda\"\nmodel = \"owner/name\"\n";
const PD: &str =
    "[[node]]\nname = \"p\"\nrole = \"prefill\"\n[[node]]\nname = \"d\"\nrole = \"decode\"\n";

/// Place, key and kind.
type Finding = (usize, usize, String, Kind);

fn problems(text: &str) -> Vec<Finding> {
    match Topology::parse(text, Path::new("dir/t.toml")) {
        Err(TopologyErrors::Invalid { file, problems }) => {
            assert_eq!(file, Path::new("dir/t.toml"));
            problems
                .into_iter()
                .map(|p| (p.place.line, p.place.column, p.key, p.kind))
                .collect()
        }
        other => panic!("expected problems in {text}\ngot {other:?}"),
    }
}

/// The text has exactly one problem.
#[track_caller]
fn one(text: &str) -> Finding {
    let mut problems = problems(text);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    problems.remove(0)
}

macro_rules! assert_one {
    ($text:expr, $line:literal : $column:literal $key:literal, $kind:pat $(if $guard:expr)?) => {{
        let text = $text;
        let (line, column, key, kind) = $crate::one(&text);
        assert_eq!((line, column, key.as_str()), ($line, $column, $key), "{kind:?} in\n{text}");
        assert!(matches!(&kind, $kind $(if $guard)?), "{kind:?}");
    }};
}
use assert_one;

fn cuda(rest: &str) -> String {
    format!("{TOP}{rest}")
}

/// One unified node from line 3 on; `rest` starts on line 5.
fn unified(rest: &str) -> String {
    cuda(&format!("[[node]]\nrole = \"unified\"\n{rest}"))
}

fn unified_cpu(rest: &str) -> String {
    unified(rest).replace("cuda", "cpu")
}
