//! The console's handle: cheap to clone, never waits for the terminal.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use super::link::{Link, Word};
use super::log_file::LogFile;
use super::shown::{Shown, printable};
use super::sink::{Sink, Style};
use crate::runtime::Progress;
use crate::topology::Secrets;

/// Lines that may wait for the terminal.
const QUEUE: usize = 4096;
/// How long the end may wait for the terminal.
const FLUSH: Duration = Duration::from_secs(1);
/// The plain sink shows a job's newest status this often at most; also when nothing else comes.
const TICK: Duration = Duration::from_secs(1);

/// What the writer thread does, in order.
#[derive(Debug)]
enum Message {
    Show(Shown),
    LogTo(LogFile),
    Flush(SyncSender<()>),
}

/// The one way to stderr.
#[derive(Debug, Clone)]
pub struct Console {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
    jobs: AtomicU64,
    secrets: OnceLock<Secrets>,
    /// Who launched this process, if it is detached.
    link: Option<Link>,
}

impl Console {
    /// Starts the writer thread; it ends with the last handle.
    pub fn start(style: Style) -> io::Result<Self> {
        Self::with_sink(Sink::stderr(style), None)
    }

    /// The console of a process that nobody sees: to whoever launched it, and to [`Console::log_to`].
    pub(super) fn detached(launcher: UnixStream, style: Style) -> io::Result<Self> {
        Self::with_sink(Sink::log(style), Some(Link::start(launcher)?))
    }

    /// A console that writes to `out` in plain lines or JSON; for tests and files.
    pub fn to_writer(out: Box<dyn io::Write + Send>, style: Style) -> io::Result<Self> {
        Self::with_sink(Sink::lines(out, style), None)
    }

    fn with_sink(sink: Sink, link: Option<Link>) -> io::Result<Self> {
        let (queue, messages) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&dropped);
        // Detached on purpose: it may hang in a terminal that nobody reads. `flush` is the bounded
        // way to wait for it.
        thread::Builder::new()
            .name("console".into())
            .spawn(move || write_all(sink, &messages, &counter))?;
        Ok(Self {
            shared: Arc::new(Shared {
                queue,
                dropped,
                jobs: AtomicU64::new(0),
                secrets: OnceLock::new(),
                link,
            }),
        })
    }

    /// From now on these are not shown. Counts once: there is one topology in a process.
    pub fn hide(&self, secrets: &Secrets) {
        let _ = self.shared.secrets.set(secrets.clone());
    }

    /// A line that a node wrote.
    pub fn node_line(&self, node: &str, line: &str) {
        self.send(Shown::NodeLine {
            node: node.to_owned(),
            line: printable(line),
        });
    }

    /// Text as it is, in one piece.
    pub fn print(&self, text: &str) {
        self.send(Shown::Text(text.trim_end_matches('\n').to_owned()));
    }

    /// Text with an empty line around it, after everything that was printed before.
    pub fn banner(&self, text: &str) {
        self.send(Shown::Text(format!("\n{}\n", text.trim_matches('\n'))));
    }

    /// Shows a long job until the handle is finished or dropped.
    pub fn progress(&self, name: &str) -> ProgressHandle {
        let job = self.shared.jobs.fetch_add(1, Ordering::Relaxed);
        self.send(Shown::Started {
            job,
            name: name.to_owned(),
        });
        ProgressHandle {
            console: self.clone(),
            job,
            finished: false,
        }
    }

    /// Waits, for a second at most, until what was printed before is written. False: it was not.
    pub fn flush(&self) -> bool {
        let (done, written) = sync_channel(1);
        // The queue may be full of lines that are just being written.
        let started = std::time::Instant::now();
        let mut message = Message::Flush(done);
        while let Err(error) = self.shared.queue.try_send(message) {
            let std::sync::mpsc::TrySendError::Full(back) = error else {
                return false;
            };
            if started.elapsed() > FLUSH {
                return false;
            }
            message = back;
            thread::sleep(Duration::from_millis(5));
        }
        written.recv_timeout(FLUSH).is_ok()
    }

    /// A detached process writes what it shows into this file from now on.
    pub fn log_to(&self, file: LogFile) {
        let _ = self.shared.queue.try_send(Message::LogTo(file));
    }

    /// What another process shows.
    pub fn relay(&self, shown: Shown) {
        self.send(shown);
    }

    pub fn is_detached(&self) -> bool {
        self.shared.link.is_some()
    }

    /// For whoever launched this process; for nobody, where a person did.
    pub fn underway(&self, name: &str, log: &Path) {
        if let Some(link) = &self.shared.link {
            let (name, log) = (name.to_owned(), log.to_owned());
            link.tell(Word::Underway { name, log });
        }
    }

    /// The same; nothing more is told. The log has it, too.
    pub fn ready(&self, banner: &str) {
        let banner = banner.to_owned();
        self.enqueue(Shown::Text(banner.clone()));
        self.flush();
        self.end_link(Word::Ready { banner });
    }

    /// Why this process ends.
    pub fn error(&self, text: &str) {
        let mut error = text.to_owned();
        if let Some(secrets) = self.shared.secrets.get() {
            secrets.redact_in(&mut error);
        }
        self.enqueue(Shown::Text(error.clone()));
        self.end_link(Word::Failed { error });
    }

    fn end_link(&self, word: Word) {
        if let Some(link) = &self.shared.link {
            link.end(word);
        }
    }

    pub(super) fn formatted(&self, text: &str) {
        self.send(Shown::Formatted(text.to_owned()));
    }

    fn send(&self, mut shown: Shown) {
        if let (Some(secrets), Some(text)) = (self.shared.secrets.get(), shown.text()) {
            secrets.redact_in(text);
        }
        if let Some(link) = &self.shared.link {
            link.tell(Word::Shown(shown.clone()));
        }
        self.enqueue(shown);
    }

    fn enqueue(&self, shown: Shown) {
        if self.shared.queue.try_send(Message::Show(shown)).is_err() {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// One long job on the console.
#[derive(Debug)]
pub struct ProgressHandle {
    console: Console,
    job: u64,
    finished: bool,
}

impl ProgressHandle {
    /// Replaces what the job shows.
    pub fn set_message(&self, text: &str) {
        self.console.send(Shown::Status {
            job: self.job,
            text: printable(text),
        });
    }

    /// Ends the display; a text that is not empty stays as a line.
    pub fn finish(mut self, text: &str) {
        self.end(text);
    }

    fn end(&mut self, text: &str) {
        if !self.finished {
            self.finished = true;
            self.console.send(Shown::Finished {
                job: self.job,
                text: printable(text),
            });
        }
    }
}

impl Drop for ProgressHandle {
    fn drop(&mut self) {
        self.end("");
    }
}

impl Progress for ProgressHandle {
    fn status(&self, text: &str) {
        self.set_message(text);
    }

    fn note(&self, text: &str) {
        self.console.send(Shown::Note {
            job: self.job,
            text: printable(text),
        });
    }
}

fn write_all(mut sink: Sink, messages: &Receiver<Message>, dropped: &AtomicU64) {
    loop {
        match messages.recv_timeout(TICK) {
            Ok(Message::Flush(done)) => {
                sink.flush();
                let _ = done.send(());
            }
            Ok(Message::Show(shown)) => sink.write(shown),
            Ok(Message::LogTo(file)) => sink.log_to(file),
            Err(RecvTimeoutError::Timeout) => sink.tick(),
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            sink.write(Shown::Text(format!("({lost} console lines were dropped)")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Captured {
        fn lines(&self) -> Vec<String> {
            let bytes = self.0.lock().unwrap().clone();
            let text = String::from_utf8(bytes).unwrap();
            text.lines().map(str::to_owned).collect()
        }
    }

    impl io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn console(style: Style) -> (Console, Captured) {
        let captured = Captured::default();
        let console = Console::to_writer(Box::new(captured.clone()), style).unwrap();
        (console, captured)
    }

    #[test]
    fn plain_lines_in_order_and_repeated_status_is_rate_limited() {
        let (console, captured) = console(Style::Plain);
        console.node_line("prefill-0", "loading\u{1b}[32m weights\u{1b}[0m\r");
        let job = console.progress("runtime");
        for i in 0..1000 {
            job.set_message(&format!("step {i}"));
        }
        job.finish("done");
        console.banner("ready\n");
        assert!(console.flush());
        let lines = captured.lines();
        assert_eq!(lines[0], "[prefill-0] loading weights");
        assert_eq!(lines[1], "runtime: step 0");
        assert_eq!(lines[lines.len() - 4], "runtime: done");
        assert!(lines.contains(&"ready".to_owned()));
        assert!(lines.len() < 50, "the status was not rate-limited");
    }

    #[test]
    fn json_lines_are_json() {
        let (console, captured) = console(Style::Json);
        console.node_line("d", "a \"b\"");
        console.print("two\nlines");
        console.progress("model").finish("done");
        assert!(console.flush());
        let values: Vec<serde_json::Value> = captured
            .lines()
            .iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(values[0]["node"], "d");
        assert_eq!(values[0]["message"], "a \"b\"");
        assert_eq!(values[1]["message"], "two\nlines");
        assert_eq!(values[2]["progress"], "model");
    }

    #[test]
    fn a_closed_stderr_loses_the_text_and_nothing_else() {
        struct Closed;
        impl io::Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let console = Console::to_writer(Box::new(Closed), Style::Plain).unwrap();
        console.print("lost");
        assert!(console.flush());
        console.node_line("n", "lost");
        assert!(console.flush());
    }

    #[test]
    fn a_terminal_that_nobody_reads_blocks_nobody() {
        struct Stuck(Receiver<()>);
        impl io::Write for Stuck {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                // Until the test lets go of the other end.
                let _ = self.0.recv();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (release, stuck) = sync_channel(0);
        let console = Console::to_writer(Box::new(Stuck(stuck)), Style::Plain).unwrap();
        let started = std::time::Instant::now();
        for _ in 0..3 * QUEUE {
            console.node_line("n", "line");
        }
        assert!(!console.flush());
        assert!(started.elapsed() < Duration::from_secs(20));
        assert!(console.shared.dropped.load(Ordering::Relaxed) > 0);
        drop(release);
    }
}
