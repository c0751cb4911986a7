//! What a person sees: log lines, node lines, progress of long jobs, the banner.
//!
//! ```text
//! tracing events ─┐
//! node lines      ├─▶ Console ──bounded, never waits──▶ one writer thread ──▶ stderr
//! progress        │      (full: counted and dropped)      TTY: lines above live bars
//! banner          ┘                                       else: plain lines; or JSON lines
//! ```
//!
//! A detached pegaflow has a [`LogFile`] instead of stderr, and a [`link`] to whoever launched it.
//!
//! One thread owns the terminal, so lines do not tear, and a reader that has stopped reading slows
//! nobody. A closed stderr loses the text and nothing else.

mod console;
mod gpus;
mod link;
mod log_file;
mod nodes;
mod shown;
mod sink;
mod tail;

use std::io;
use std::os::unix::net::UnixStream;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::util::TryInitError;

pub use console::{Console, ProgressHandle};
pub use gpus::GpuCollector;
pub use link::Word;
pub use log_file::LogFile;
pub use nodes::NodeCollector;
pub use shown::Shown;
pub use sink::Style;
pub use tail::{Tail, logs_in};

/// The variable that filters log lines, in the syntax of tracing's `EnvFilter`.
pub const LOG_VARIABLE: &str = "PEGAFLOW_LOG";

/// How log lines and everything else on stderr look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// For a person.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
}

#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    #[error("PEGAFLOW_LOG={value} is not a log filter (like `info` or `pegaflow::router=debug`)")]
    Filter {
        value: String,
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("the console's thread could not be started: {0}")]
    Thread(#[source] io::Error),
    #[error("logging is set up already: {0}")]
    Twice(#[from] TryInitError),
}

/// Sets up logging for the whole process and returns the console that everything else prints to.
pub fn init(format: LogFormat) -> Result<Console, ObserveError> {
    let style = Style::of_stderr(format);
    set_up(format, style, || Console::start(style))
}

/// [`init`] for a process that nobody sees; `launcher` hears of it until it is ready.
pub fn init_detached(format: LogFormat, launcher: UnixStream) -> Result<Console, ObserveError> {
    let style = match format {
        LogFormat::Human => Style::Plain,
        LogFormat::Json => Style::Json,
    };
    set_up(format, style, || Console::detached(launcher, style))
}

fn set_up(
    format: LogFormat,
    style: Style,
    console: impl FnOnce() -> io::Result<Console>,
) -> Result<Console, ObserveError> {
    use tracing_subscriber::util::SubscriberInitExt as _;
    let filter = filter(std::env::var(LOG_VARIABLE).ok().as_deref())?;
    let console = console().map_err(ObserveError::Thread)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(LogWriter(console.clone()));
    match format {
        LogFormat::Human => builder
            .with_ansi(style.has_colour())
            .with_timer(Seconds)
            .with_target(false)
            .finish()
            .try_init()?,
        LogFormat::Json => builder.json().finish().try_init()?,
    }
    Ok(console)
}

fn filter(value: Option<&str>) -> Result<EnvFilter, ObserveError> {
    let value = value.filter(|value| !value.trim().is_empty());
    let value = value.unwrap_or("info");
    EnvFilter::try_new(value).map_err(|source| ObserveError::Filter {
        value: value.to_owned(),
        source,
    })
}

/// UTC, in whole seconds.
struct Seconds;

impl FormatTime for Seconds {
    fn format_time(&self, w: &mut Writer<'_>) -> std::fmt::Result {
        let now = std::time::SystemTime::now();
        write!(w, "{}", humantime::format_rfc3339_seconds(now))
    }
}

/// Hands every event, which the formatter writes in one piece, to the console.
struct LogWriter(Console);

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Event<'a>;

    fn make_writer(&'a self) -> Event<'a> {
        Event(&self.0)
    }
}

struct Event<'a>(&'a Console);

impl io::Write for Event<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.formatted(String::from_utf8_lossy(bytes).trim_end());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_filter_is_an_error_and_an_empty_one_the_default() {
        assert!(matches!(
            filter(Some("pegaflow=loud")),
            Err(ObserveError::Filter { .. })
        ));
        assert_eq!(filter(Some(" ")).unwrap().to_string(), "info");
        assert_eq!(filter(None).unwrap().to_string(), "info");
        assert_eq!(filter(Some("debug")).unwrap().to_string(), "debug");
    }
}
