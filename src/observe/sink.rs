//! Where the console's lines go: above live bars on a terminal, or one after the other.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write};
use std::time::{Duration, Instant, SystemTime};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::LogFormat;
use super::log_file::LogFile;
use super::shown::Shown;

/// Between two lines about one job where there are no live bars.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);
const REDRAW: Duration = Duration::from_millis(120);

/// How the console writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// A terminal that can move the cursor: live bars, colours.
    Terminal,
    /// The same without colours (`NO_COLOR`).
    TerminalNoColour,
    /// A pipe or a file.
    Plain,
    /// One JSON object per line.
    Json,
}

impl Style {
    /// What fits stderr as it is now.
    pub fn of_stderr(format: LogFormat) -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        match format {
            LogFormat::Json => Self::Json,
            LogFormat::Human if dumb || !io::stderr().is_terminal() => Self::Plain,
            LogFormat::Human if set("NO_COLOR") => Self::TerminalNoColour,
            LogFormat::Human => Self::Terminal,
        }
    }

    pub fn has_colour(self) -> bool {
        self == Self::Terminal
    }
}

pub(super) struct Sink {
    out: Out,
    style: Style,
    jobs: HashMap<u64, Job>,
}

enum Out {
    Bars(MultiProgress),
    Lines(Box<dyn Write + Send>),
    /// Of a detached process; `None` before it has its place.
    Log(Option<LogFile>),
}

struct Job {
    name: String,
    bar: Option<ProgressBar>,
    shown: Option<Instant>,
    /// A status that came too early after another.
    waiting: Option<String>,
}

impl Sink {
    pub(super) fn stderr(style: Style) -> Self {
        match style {
            Style::Terminal | Style::TerminalNoColour => Self {
                out: Out::Bars(MultiProgress::new()),
                style,
                jobs: HashMap::new(),
            },
            Style::Plain | Style::Json => Self::lines(Box::new(io::stderr()), style),
        }
    }

    /// Shows nothing until [`Sink::log_to`].
    pub(super) fn log(style: Style) -> Self {
        Self {
            out: Out::Log(None),
            style,
            jobs: HashMap::new(),
        }
    }

    /// Only for a sink that is a log.
    pub(super) fn log_to(&mut self, file: LogFile) {
        if let Out::Log(log) = &mut self.out {
            *log = Some(file);
        }
    }

    pub(super) fn lines(out: Box<dyn Write + Send>, style: Style) -> Self {
        Self {
            out: Out::Lines(out),
            style,
            jobs: HashMap::new(),
        }
    }

    pub(super) fn write(&mut self, shown: Shown) {
        match shown {
            Shown::Formatted(text) => self.line(&text),
            Shown::Text(text) => self.object(None, &text),
            // The nodes have logs of their own.
            Shown::NodeLine { .. } if matches!(self.out, Out::Log(_)) => {}
            Shown::NodeLine { node, line } => self.object(Some(("node", &node)), &line),
            Shown::Started { job, name } => self.started(job, name),
            Shown::Status { job, text } => self.status(job, text),
            Shown::Note { job, text } => self.about(job, &text),
            Shown::Finished { job, text } => {
                if !text.is_empty() {
                    self.about(job, &text);
                }
                if let Some(bar) = self.jobs.remove(&job).and_then(|job| job.bar) {
                    bar.finish_and_clear();
                }
            }
        }
    }

    pub(super) fn flush(&mut self) {
        if let Out::Lines(out) = &mut self.out {
            let _ = out.flush();
        }
    }

    /// Shows what waited for its turn.
    pub(super) fn tick(&mut self) {
        let now = Instant::now();
        let mut due = Vec::new();
        for job in self.jobs.values_mut() {
            let may = job.shown.is_none_or(|at| now - at >= STATUS_INTERVAL);
            if may && let Some(text) = job.waiting.take() {
                job.shown = Some(now);
                due.push((job.name.clone(), text));
            }
        }
        for (name, text) in due {
            self.object(Some(("progress", &name)), &text);
        }
    }

    fn started(&mut self, id: u64, name: String) {
        let bar = match &self.out {
            Out::Bars(bars) => {
                let bar = bars.add(ProgressBar::new_spinner());
                let template = if self.style.has_colour() {
                    "{spinner:.cyan} {prefix:.bold} {wide_msg} {elapsed:.dim}"
                } else {
                    "{spinner} {prefix} {wide_msg} {elapsed}"
                };
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style);
                }
                bar.set_prefix(name.clone());
                bar.enable_steady_tick(REDRAW);
                Some(bar)
            }
            Out::Lines(_) | Out::Log(_) => None,
        };
        let job = Job {
            name,
            bar,
            shown: None,
            waiting: None,
        };
        self.jobs.insert(id, job);
    }

    fn status(&mut self, id: u64, text: String) {
        let Some(job) = self.jobs.get_mut(&id) else {
            return;
        };
        match &job.bar {
            Some(bar) => bar.set_message(text),
            None => {
                job.waiting = Some(text);
                self.tick();
            }
        }
    }

    fn about(&mut self, id: u64, text: &str) {
        let name = self.jobs.get(&id).map(|job| job.name.clone());
        self.object(name.as_deref().map(|name| ("progress", name)), text);
    }

    /// A message with its source: which node, or which job.
    fn object(&mut self, source: Option<(&str, &str)>, text: &str) {
        let line = match (self.style, source) {
            (Style::Json, source) => json(source, text),
            (_, None) => text.to_owned(),
            (style, Some(("node", node))) => node_prefix(style, node) + text,
            (_, Some((_, name))) => format!("{name}: {text}"),
        };
        self.line(&line);
    }

    /// Errors are swallowed: there is nowhere left to report them.
    fn line(&mut self, text: &str) {
        match &mut self.out {
            Out::Bars(bars) => {
                let _ = bars.println(text);
            }
            Out::Lines(out) => {
                let _ = out.write_all(format!("{text}\n").as_bytes());
            }
            Out::Log(log) => {
                if let Some(log) = log {
                    log.write_line(text);
                }
            }
        }
    }
}

fn json(source: Option<(&str, &str)>, text: &str) -> String {
    let mut object = serde_json::Map::new();
    let now = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    object.insert("timestamp".into(), now.into());
    if let Some((kind, name)) = source {
        object.insert(kind.into(), name.into());
    }
    object.insert("message".into(), text.into());
    serde_json::Value::Object(object).to_string()
}

/// Every node has its colour, the same in every run.
fn node_prefix(style: Style, node: &str) -> String {
    if !style.has_colour() {
        return format!("[{node}] ");
    }
    let hash = node.bytes().fold(5381u32, |hash, byte| {
        hash.wrapping_mul(33).wrapping_add(u32::from(byte))
    });
    let mut prefix = String::new();
    // Writing to a String cannot fail. 31 is red: it would look like an error.
    let _ = write!(prefix, "\u{1b}[{}m[{node}]\u{1b}[0m ", 32 + hash % 5);
    prefix
}
