//! What can be wrong with a topology, and how it is told.

use std::fmt::{Display, Write};
use std::path::Path;

use super::source::{Place, Source};

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem<K> {
    pub place: Place,
    /// Like `node[1].gpus`; empty for the file as a whole.
    pub key: String,
    pub kind: K,
}

/// What is wrong with a key, as a fragment that continues "`key` ...".
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ProblemKind {
    #[error("not valid TOML: {message}")]
    Syntax { message: String },
    #[error("unknown key; {hint}")]
    UnknownKey { hint: String },
    #[error("missing; write {instead}")]
    Missing { instead: String },
    #[error("wrong type: {found}; write {instead}")]
    WrongType { found: String, instead: String },
    #[error("bad value: {found}; write {instead}")]
    BadValue { found: String, instead: String },
    #[error("does not go together with {with}; {instead}")]
    Conflict { with: String, instead: String },
    #[error("only for `device = \"{only}\"`; {instead}")]
    WrongDevice {
        only: &'static str,
        instead: &'static str,
    },
    #[error(
        "a prefill node without a decode node; add a [[node]] with `role = \"decode\"`, or write \
         `role = \"unified\"`"
    )]
    PrefillWithoutDecode,
    #[error(
        "a decode node without a prefill node; add a [[node]] with `role = \"prefill\"`, or write \
         `role = \"unified\"`"
    )]
    DecodeWithoutPrefill,
    #[error("the name {name} is taken by {other} already; write another name")]
    DuplicateName { name: String, other: String },
    #[error(
        "{this}, but {other} has {theirs}: nodes that share KV must agree, since each rank loads \
         its own part; write the same number"
    )]
    UnequalTensorParallel {
        this: u32,
        other: String,
        theirs: u32,
    },
    #[error(
        "`{flag}` is not the same as on {other}: nodes that share KV must agree on it; write it \
         for both or for neither"
    )]
    UnequalFlag { flag: &'static str, other: String },
    #[error("`{flag}` is set by pegaflow; {instead}")]
    OwnedFlag {
        flag: &'static str,
        instead: &'static str,
    },
    #[error("`{flag}` is not supported: {reason}")]
    UnsupportedFlag {
        flag: &'static str,
        reason: &'static str,
    },
    #[error("the variable is set by pegaflow; {instead}")]
    OwnedEnv { instead: &'static str },
    #[error("port {port} is taken by {other} already; write another, or leave it out")]
    PortCollision { port: u16, other: String },
}

/// The list that reading and validating add to.
pub(super) struct Findings<'s> {
    pub(super) source: &'s Source,
    problems: Vec<Problem<ProblemKind>>,
}

impl<'s> Findings<'s> {
    pub(super) fn new(source: &'s Source) -> Self {
        Self {
            source,
            problems: Vec::new(),
        }
    }

    /// Adds a problem of a value.
    pub(super) fn add(&mut self, key: &str, kind: ProblemKind) {
        self.problems.push(Problem {
            place: self.source.value(key),
            key: key.to_owned(),
            kind,
        });
    }

    /// Adds a problem of a key's name.
    pub(super) fn add_at_key(&mut self, key: &str, kind: ProblemKind) {
        self.problems.push(Problem {
            place: self.source.key(key),
            key: key.to_owned(),
            kind,
        });
    }

    /// A value already has a problem, so that what follows from it is not worth telling.
    pub(super) fn is_bad(&self, key: &str) -> bool {
        self.problems.iter().any(|problem| {
            problem
                .key
                .strip_prefix(key)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        })
    }

    /// In the file's order.
    pub(super) fn into_problems(mut self) -> Vec<Problem<ProblemKind>> {
        self.problems.sort_by_key(|problem| problem.place);
        self.problems
    }
}

/// A paragraph per problem: place and key, then what is wrong and what to do.
pub fn write_problems<K: Display>(file: &Path, problems: &[Problem<K>]) -> String {
    let mut text = match problems.len() {
        1 => format!("1 problem in {}", file.display()),
        n => format!("{n} problems in {}", file.display()),
    };
    for Problem { place, key, kind } in problems {
        let Place { line, column } = place;
        // Writing to a String cannot fail.
        let _ = write!(text, "\n\n{}:{line}:{column}", file.display());
        if !key.is_empty() {
            let _ = write!(text, ": {key}");
        }
        let _ = write!(text, "\n    {kind}");
    }
    text
}
