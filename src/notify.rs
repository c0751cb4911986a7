//! What a service manager is told: systemd's notify protocol (`sd_notify(3)`), and the signs of life
//! behind its watchdog.
//!
//! ```text
//! up: preparing ─ STATUS ─▶ nodes start ─ STATUS "1 of 2 ..." ─▶ serves ─ READY ─▶ end begins ─ STOPPING
//!
//! supervisor's actors ─┐ Beat::tick in their loops    Vitals: did every part beat?
//! router's accept loop ┴──────────────────────────▶   yes ─ WATCHDOG=1      no ─ nothing, and an error
//! ```
//!
//! A part that hangs, or a runtime whose threads all do, stops beating; then the manager hears nothing
//! more and restarts the service. Without a manager nothing beats and nothing is sent.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval};

const SOCKET: &str = "NOTIFY_SOCKET";
const WATCHDOG: &str = "WATCHDOG_USEC";
const WATCHDOG_PID: &str = "WATCHDOG_PID";
/// Meant for this process alone: whatever it starts must not speak in its name.
pub const VARIABLES: [&str; 3] = [SOCKET, WATCHDOG, WATCHDOG_PID];

/// A manager that does not read may hold a sender for this long.
const SEND_LIMIT: Duration = Duration::from_millis(100);
/// Looks at the parts in one watchdog period, and beats in one look.
const LOOKS: u32 = 4;
const BEATS: u32 = 4;

/// One thing to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News<'a> {
    Ready,
    /// One line for `systemctl status`.
    Status(&'a str),
    /// Everything makes progress.
    Alive,
    Stopping,
}

#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    #[error("NOTIFY_SOCKET={0:?} is neither a path nor an abstract name")]
    Address(OsString),
    #[error("cannot reach the service manager: {0}")]
    Socket(#[from] io::Error),
}

/// The way to the service manager; to nobody where there is none.
#[derive(Debug, Default)]
pub struct Notifier {
    manager: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// As the environment says, which a manager sets.
    pub fn from_env() -> Result<Self, NotifyError> {
        Self::from_vars(|name| std::env::var_os(name))
    }

    fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Result<Self, NotifyError> {
        let Some(name) = var(SOCKET).filter(|name| !name.is_empty()) else {
            return Ok(Self::default());
        };
        let address = match name.as_bytes() {
            [b'/', ..] => SocketAddr::from_pathname(&name)?,
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => return Err(NotifyError::Address(name)),
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(SEND_LIMIT))?;
        let number = |name| var(name)?.to_str()?.parse::<u64>().ok();
        let is_ours = number(WATCHDOG_PID).is_none_or(|pid| pid == u64::from(std::process::id()));
        let period = number(WATCHDOG).filter(|period| is_ours && *period > 0);
        Ok(Self {
            manager: Some((socket, address)),
            watchdog: period.map(Duration::from_micros),
        })
    }

    /// A manager at this path, with this patience.
    #[cfg(test)]
    pub fn to(path: &std::path::Path, watchdog: Option<Duration>) -> Result<Self, NotifyError> {
        let notifier = Self::from_vars(|name| (name == SOCKET).then(|| path.into()))?;
        Ok(Self {
            watchdog,
            ..notifier
        })
    }

    /// How often to look whether everything makes progress, if that is asked for.
    pub fn look_interval(&self) -> Option<Duration> {
        self.watchdog.map(|period| period / LOOKS)
    }

    /// The signs of life that fit this manager's patience.
    pub fn vitals(&self) -> Vitals {
        Vitals {
            beat: self.look_interval().map(|interval| interval / BEATS),
            parts: Arc::default(),
        }
    }

    pub fn send(&self, news: &[News<'_>]) -> io::Result<()> {
        let Some((socket, address)) = &self.manager else {
            return Ok(());
        };
        let lines: Vec<String> = news
            .iter()
            .map(|news| match news {
                News::Ready => "READY=1".to_owned(),
                News::Status(text) => format!("STATUS={}", text.replace('\n', " ")),
                News::Alive => "WATCHDOG=1".to_owned(),
                News::Stopping => "STOPPING=1".to_owned(),
            })
            .collect();
        socket.send_to_addr(lines.join("\n").as_bytes(), address)?;
        Ok(())
    }
}

/// Which parts there are, and whether each still makes progress. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Vitals {
    /// `None`: nobody asks.
    beat: Option<Duration>,
    parts: Arc<Mutex<Vec<Part>>>,
}

#[derive(Debug)]
struct Part {
    name: String,
    beats: Weak<AtomicU64>,
    /// At the last look; `None` before the first.
    seen: Option<u64>,
}

impl Vitals {
    /// A part that counts from now until its beat is dropped.
    pub fn part(&self, name: impl Into<String>) -> Beat {
        let beats = Arc::new(AtomicU64::new(0));
        let part = Part {
            name: name.into(),
            beats: Arc::downgrade(&beats),
            seen: None,
        };
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.push(part);
        Beat {
            beats,
            period: self.beat,
            clock: None,
        }
    }

    /// The parts that have not beaten since the last look.
    pub fn look(&self) -> Vec<String> {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stuck = Vec::new();
        parts.retain_mut(|part| {
            let Some(beats) = part.beats.upgrade() else {
                return false;
            };
            let now = beats.load(Ordering::Relaxed);
            if part.seen.replace(now) == Some(now) {
                stuck.push(part.name.clone());
            }
            true
        });
        stuck
    }
}

/// One part's sign of life.
#[derive(Debug)]
pub struct Beat {
    beats: Arc<AtomicU64>,
    period: Option<Duration>,
    clock: Option<Interval>,
}

impl Beat {
    /// The part did something.
    pub fn mark(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits for the next beat, and marks it: an arm of the part's loop. Cancel-safe. Never comes where
    /// nobody asks.
    pub async fn tick(&mut self) {
        let Some(period) = self.period else {
            return std::future::pending().await;
        };
        let clock = self.clock.get_or_insert_with(|| {
            let mut clock = interval(period);
            clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
            clock
        });
        clock.tick().await;
        self.mark();
    }

    /// Does something that has a deadline of its own, and beats meanwhile.
    pub async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = work.as_mut() => return done,
                () = self.tick() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notifier(vars: &[(&str, &str)]) -> Result<Notifier, NotifyError> {
        Notifier::from_vars(|name| {
            let found = vars.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    fn received(socket: &UnixDatagram) -> String {
        let limit = Duration::from_secs(10);
        socket.set_read_timeout(Some(limit)).unwrap();
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn news_go_to_a_path_or_an_abstract_name_in_one_datagram() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("@pegaflow-test-{}", std::process::id());
        let by_path = UnixDatagram::bind(&path).unwrap();
        let address = SocketAddr::from_abstract_name(&name[1..]).unwrap();
        let by_name = UnixDatagram::bind_addr(&address).unwrap();
        for (socket, address) in [(by_path, path.to_str().unwrap()), (by_name, &name)] {
            let notifier = notifier(&[(SOCKET, address)]).unwrap();
            let news = [News::Ready, News::Status("two\nlines")];
            notifier.send(&news).unwrap();
            assert_eq!(received(&socket), "READY=1\nSTATUS=two lines");
            notifier.send(&[News::Alive]).unwrap();
            assert_eq!(received(&socket), "WATCHDOG=1");
            notifier.send(&[News::Stopping]).unwrap();
            assert_eq!(received(&socket), "STOPPING=1");
        }
        let gone = notifier(&[(SOCKET, "/does/not/exist")]).unwrap();
        assert!(gone.send(&[News::Ready]).is_err());
    }

    #[test]
    fn without_a_manager_nothing_is_sent_or_asked() {
        for vars in [&[][..], &[(SOCKET, "")], &[(WATCHDOG, "1000000")]] {
            let notifier = notifier(vars).unwrap();
            notifier.send(&[News::Ready]).unwrap();
            assert_eq!(notifier.look_interval(), None);
        }
        let vsock = notifier(&[(SOCKET, "vsock:2:1234")]);
        assert!(matches!(vsock, Err(NotifyError::Address(_))));
    }

    #[test]
    fn a_manager_that_does_not_read_holds_nobody_for_long() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let _deaf = UnixDatagram::bind(&path).unwrap();
        let notifier = notifier(&[(SOCKET, path.to_str().unwrap())]).unwrap();
        let text = "x".repeat(1000);
        let started = std::time::Instant::now();
        while notifier.send(&[News::Status(&text)]).is_ok() {
            assert!(started.elapsed() < Duration::from_secs(60), "never full");
        }
    }

    #[test]
    fn the_watchdog_is_for_the_process_that_it_names() {
        let period = |pid: &str, micros: &str| {
            let vars = [(SOCKET, "/x"), (WATCHDOG, micros), (WATCHDOG_PID, pid)];
            notifier(&vars).unwrap().look_interval()
        };
        let ours = std::process::id().to_string();
        assert_eq!(period(&ours, "4000000"), Some(Duration::from_secs(1)));
        assert_eq!(period("1", "4000000"), None);
        assert_eq!(period(&ours, "0"), None);
        assert_eq!(period(&ours, "soon"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_part_that_stops_beating_is_found_and_one_that_ended_is_not() {
        let notifier = notifier(&[(SOCKET, "/x"), (WATCHDOG, "4000000")]).unwrap();
        let vitals = notifier.vitals();
        let mut healthy = vitals.part("healthy");
        let healthy =
            tokio::spawn(async move { healthy.during(std::future::pending::<()>()).await });
        let hung = vitals.part("hung");
        let ended = vitals.part("ended");
        let second = || tokio::time::sleep(Duration::from_secs(1));
        assert_eq!(vitals.look(), [""; 0], "new parts have a period");
        drop(ended);
        second().await;
        assert_eq!(vitals.look(), ["hung"]);
        hung.mark();
        second().await;
        assert_eq!(vitals.look(), [""; 0]);
        healthy.abort();
        second().await;
        assert_eq!(vitals.look(), ["hung"]);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_beats_when_nobody_asks() {
        let mut beat = Vitals::default().part("idle");
        let ticked = tokio::time::timeout(Duration::from_secs(3600), beat.tick()).await;
        assert!(ticked.is_err());
    }
}
