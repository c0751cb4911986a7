//! From a file, or its text, to a [`Topology`] or everything that is wrong with it.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use toml::de::DeTable;

use super::interpolate::{Interpolated, Secrets};
use super::problem::{Findings, Problem, ProblemKind};
use super::source::{Source, syntax_problem};
use super::{Topology, TopologyErrors, overrides, read, validate, value};

/// What counts besides the file.
pub struct Surroundings<'a> {
    /// `KEY=VALUE` from the command line, in its order.
    pub set: &'a [String],
    /// Looks up an environment variable.
    pub env: &'a dyn Fn(&str) -> Option<OsString>,
}

impl<'a> Surroundings<'a> {
    /// These overrides, and the environment of this process.
    pub fn process(set: &'a [String]) -> Self {
        Self {
            set,
            env: &|name| std::env::var_os(name),
        }
    }
}

impl Topology {
    /// Reads and checks a file. Relative paths in it start from its directory.
    pub fn load(file: &Path) -> Result<Self, TopologyErrors> {
        Self::load_with(file, &Surroundings::process(&[]))
    }

    /// [`Topology::load`] with overrides.
    pub fn load_with(file: &Path, around: &Surroundings<'_>) -> Result<Self, TopologyErrors> {
        Self::parse_with(&text_of(file)?, file, around)
    }

    /// Checks the text of a file. `file` is for messages, the default name and relative paths; it
    /// need not exist.
    pub fn parse(text: &str, file: &Path) -> Result<Self, TopologyErrors> {
        Self::parse_with(text, file, &Surroundings::process(&[]))
    }

    /// [`Topology::parse`] with overrides.
    pub fn parse_with(
        text: &str,
        file: &Path,
        around: &Surroundings<'_>,
    ) -> Result<Self, TopologyErrors> {
        let written =
            Written::read(text, file, around).map_err(|problem| refused(file, vec![problem]))?;
        let mut findings = written.findings();
        let mut topology = read::topology(&written.document, &mut findings);
        topology.secrets = written.secrets.clone();
        validate::validate(&topology, &mut findings);
        match findings.into_problems() {
            problems if problems.is_empty() => Ok(topology),
            problems => Err(refused(file, problems)),
        }
    }

    /// The name of the instance that a file describes, whatever else is wrong with it: it may have
    /// changed, or lack a variable here, since its instance was started.
    pub fn instance_name(file: &Path, around: &Surroundings<'_>) -> Result<String, TopologyErrors> {
        let text = text_of(file)?;
        let written =
            Written::read(&text, file, around).map_err(|problem| refused(file, vec![problem]))?;
        let mut findings = written.findings();
        let name = match written.document.get("name") {
            Some(name) => value::string(name.get_ref()).unwrap_or_else(|kind| {
                findings.add("name", kind);
                String::new()
            }),
            None => read::stem_name(file),
        };
        validate::instance_name(&name, &mut findings);
        let mut problems = findings.into_problems();
        problems.retain(|problem| {
            use ProblemKind::{Override, Syntax};
            problem.key == "name" || matches!(problem.kind, Override { .. } | Syntax { .. })
        });
        if problems.is_empty() {
            Ok(name)
        } else {
            Err(refused(file, problems))
        }
    }
}

fn text_of(file: &Path) -> Result<String, TopologyErrors> {
    fs::read_to_string(file).map_err(|source| TopologyErrors::Read {
        file: file.to_owned(),
        source,
    })
}

fn refused(file: &Path, problems: Vec<Problem<ProblemKind>>) -> TopologyErrors {
    TopologyErrors::Invalid {
        file: file.to_owned(),
        problems,
    }
}

/// A document with overrides and variables put in, not yet understood.
struct Written<'d> {
    document: DeTable<'d>,
    source: Source,
    secrets: Secrets,
    overrides: Vec<Problem<ProblemKind>>,
    unfilled: Vec<(String, ProblemKind)>,
}

impl<'d> Written<'d> {
    fn read(
        text: &'d str,
        file: &Path,
        around: &Surroundings<'d>,
    ) -> Result<Self, Problem<ProblemKind>> {
        let document = DeTable::parse(text).map_err(|error| syntax_problem(text, &error))?;
        let mut document = document.into_inner();
        let mut source = Source::new(file, text, &document);
        let overrides = overrides::apply(&mut document, around.set, &mut source);
        let done = Interpolated::of(&mut document, around.env);
        source.set_templates(done.templates);
        Ok(Self {
            document,
            source,
            secrets: done.secrets,
            overrides,
            unfilled: done.problems,
        })
    }

    fn findings(&self) -> Findings<'_> {
        let mut findings = Findings::new(&self.source);
        findings.extend(self.overrides.clone());
        for (key, kind) in &self.unfilled {
            findings.add(key, kind.clone());
        }
        findings
    }
}
