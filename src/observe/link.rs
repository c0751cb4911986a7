//! From a detached pegaflow to the process that launched it, until the fleet is ready.
//!
//! ```text
//! console ───────── bounded, never waits ──▶ one thread ── JSON lines ──▶ the launcher's console
//! the last word ─── never dropped ──────────────┘
//! ```
//!
//! The launcher may be stopped, slow or gone: nothing waits for it, but the last word for a second.

use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::shown::Shown;

/// Words that may wait for the launcher.
const QUEUE: usize = 1024;
const LAST_WORD: Duration = Duration::from_secs(1);

/// What the launcher hears, one JSON object a line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Word {
    /// The console's.
    Shown(Shown),
    /// It has its name and its address; what it writes itself goes into `log` from now on.
    Underway { name: String, log: PathBuf },
    /// The fleet serves. Nothing follows.
    Ready { banner: String },
    /// It ends, and why. Nothing follows.
    Failed { error: String },
}

/// The daemon's end.
#[derive(Debug)]
pub(super) struct Link {
    /// `None` after the last word.
    queue: Mutex<Option<SyncSender<Word>>>,
    last: Arc<Mutex<Option<Word>>>,
    /// Disconnected when all is said.
    over: Mutex<Receiver<()>>,
}

impl Link {
    pub fn start(launcher: UnixStream) -> io::Result<Self> {
        let (queue, words) = sync_channel(QUEUE);
        let (alive, over) = sync_channel(0);
        let last = Arc::new(Mutex::new(None));
        let slot = last.clone();
        // Detached on purpose: a launcher that is stopped holds it up, and `end` does not wait long.
        thread::Builder::new()
            .name("launcher".into())
            .spawn(move || {
                let _alive: SyncSender<()> = alive;
                // A launcher that is gone wants to hear no more.
                let _ = pass_on(launcher, &words, &slot);
            })?;
        Ok(Self {
            queue: Mutex::new(Some(queue)),
            last,
            over: Mutex::new(over),
        })
    }

    /// Lost when the launcher is far behind.
    pub fn tell(&self, word: Word) {
        if let Some(queue) = &*lock(&self.queue) {
            let _ = queue.try_send(word);
        }
    }

    /// The last word; what is told later is not sent.
    pub fn end(&self, word: Word) {
        let queue = lock(&self.queue).take();
        if queue.is_some() {
            *lock(&self.last) = Some(word);
        }
        drop(queue);
        let _ = lock(&self.over).recv_timeout(LAST_WORD);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pass_on(
    mut launcher: UnixStream,
    words: &Receiver<Word>,
    last: &Mutex<Option<Word>>,
) -> io::Result<()> {
    let mut say = |word: &Word| {
        let mut line = serde_json::to_vec(word)?;
        line.push(b'\n');
        launcher.write_all(&line)
    };
    for word in words {
        say(&word)?;
    }
    match lock(last).take() {
        Some(word) => say(&word),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader, Read as _};

    fn text(number: usize) -> Word {
        Word::Shown(Shown::Text(format!("{number} {}", "x".repeat(4096))))
    }

    #[test]
    fn a_launcher_that_does_not_listen_delays_nobody_and_hears_the_last_word() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let link = Link::start(theirs).unwrap();
        let started = std::time::Instant::now();
        for number in 0..10 * QUEUE {
            link.tell(text(number));
        }
        let banner = "ready".to_owned();
        link.end(Word::Ready { banner });
        link.tell(text(0));
        assert!(started.elapsed() < Duration::from_secs(30));
        let lines = BufReader::new(ours).lines();
        let words: Vec<Word> = lines
            .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
            .collect();
        assert!(words.len() < 3 * QUEUE, "nothing was dropped");
        assert!(matches!(words.last(), Some(Word::Ready { banner }) if banner == "ready"));
    }

    #[test]
    fn a_launcher_that_is_gone_is_no_trouble() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let link = Link::start(theirs).unwrap();
        drop(ours);
        for number in 0..2 * QUEUE {
            link.tell(text(number));
        }
        let error = "late".to_owned();
        link.end(Word::Failed { error });
    }

    #[test]
    fn the_end_of_the_link_is_seen() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let link = Link::start(theirs).unwrap();
        link.tell(text(1));
        drop(link);
        let mut all = String::new();
        ours.read_to_string(&mut all).unwrap();
        assert_eq!(all.lines().count(), 1);
    }
}
