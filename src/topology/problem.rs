//! What can be wrong with a topology, and how it is told.

use std::fmt::{Display, Write};
use std::path::Path;

use super::source::{Place, Source, is_within};

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
    #[error("{instead}")]
    Override { instead: String },
    #[error(
        "the environment variable {name} is not set; set it, or write `${{{name}:-default}}` (and `$$` \
         for a dollar sign)"
    )]
    UnsetVariable { name: String },
    #[error(
        "bad variable: {found}; write `${{NAME}}` or `${{NAME:-default}}` with the name of an environment \
         variable, or `$$` for a dollar sign"
    )]
    BadVariable { found: String },
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
        self.push(self.source.value(key), key, kind);
    }

    /// Adds a problem of a key's name.
    pub(super) fn add_at_key(&mut self, key: &str, kind: ProblemKind) {
        self.push(self.source.key(key), key, kind);
    }

    fn push(&mut self, place: Place, key: &str, kind: ProblemKind) {
        use ProblemKind::{BadVariable, UnsetVariable};
        let unfilled = |problem: &Problem<ProblemKind>| {
            problem.key == key && matches!(problem.kind, UnsetVariable { .. } | BadVariable { .. })
        };
        // The text of the file stands in for a value that is not there: no use to judge it.
        if self.problems.iter().any(unfilled) {
            return;
        }
        self.problems.push(Problem {
            place,
            key: key.to_owned(),
            kind: self.without_secrets(key, kind),
        });
    }

    /// A value that came from a variable is told as the file has it.
    fn without_secrets(&self, key: &str, mut kind: ProblemKind) -> ProblemKind {
        use ProblemKind::{BadValue, WrongType};
        if let (BadValue { found, .. } | WrongType { found, .. }, Some(template)) =
            (&mut kind, self.source.template(key))
        {
            *found = format!("what {template:?} stands for");
        }
        kind
    }

    /// Adds problems that know their place.
    pub(super) fn extend(&mut self, problems: Vec<Problem<ProblemKind>>) {
        self.problems.extend(problems);
    }

    /// A value already has a problem, so that what follows from it is not worth telling.
    pub(super) fn is_bad(&self, key: &str) -> bool {
        self.problems
            .iter()
            .any(|problem| is_within(&problem.key, key))
    }

    /// In the file's order, then those of arguments.
    pub(super) fn into_problems(mut self) -> Vec<Problem<ProblemKind>> {
        self.problems.sort_by(|a, b| a.place.cmp(&b.place));
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
        // Writing to a String cannot fail.
        let _ = write!(text, "\n\n{}", place.show(file));
        if !key.is_empty() {
            let _ = write!(text, ": {key}");
        }
        let _ = write!(text, "\n    {kind}");
    }
    text
}
