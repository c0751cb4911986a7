//! What a check found, and what to do about it.

use std::fmt::Write;

use serde::Serialize;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// A stable word, like `driver` or `gpu 0`.
    pub check: String,
    #[serde(flatten)]
    pub status: Status,
    /// A fact, for a person.
    pub what: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "status", content = "remedy", rename_all = "snake_case")]
pub enum Status {
    Ok,
    /// It could not be looked at; what would make that possible.
    NotChecked(String),
    /// It works, but not as well as it could.
    Warning(String),
    /// Something will not work.
    Failed(String),
}

impl Finding {
    pub fn ok(check: impl Into<String>, what: impl Into<String>) -> Self {
        Self::new(check, Status::Ok, what)
    }

    pub fn new(check: impl Into<String>, status: Status, what: impl Into<String>) -> Self {
        Self {
            check: check.into(),
            status,
            what: what.into(),
        }
    }

    pub fn failed(&self) -> bool {
        matches!(self.status, Status::Failed(_))
    }
}

impl Status {
    fn word(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::NotChecked(_) => "not checked",
            Self::Warning(_) => "warning",
            Self::Failed(_) => "FAILED",
        }
    }

    pub fn remedy(&self) -> Option<&str> {
        match self {
            Self::Ok => None,
            Self::NotChecked(remedy) | Self::Warning(remedy) | Self::Failed(remedy) => Some(remedy),
        }
    }
}

/// A line for each, and one for what to do.
pub fn text(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max();
    let width = width.unwrap_or(0);
    let mut text = String::new();
    for Finding {
        check,
        status,
        what,
    } in findings
    {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:11}  {check:width$}  {what}", status.word());
        if let Some(remedy) = status.remedy() {
            let _ = writeln!(text, "{:11}  {:width$}  -> {remedy}", "", "");
        }
    }
    text
}
