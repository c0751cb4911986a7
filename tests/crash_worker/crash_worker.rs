//! A vLLM process as the store sees it, made to be killed: a scheduler or a worker of a prefill or a
//! decode node that checks every byte it loads. `tests/engine_crash.rs` starts and kills it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod arena;
mod link;
mod scheduler;
mod spec;
mod worker;

use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::{Signal, raise};
use nix::unistd::{Uid, geteuid, setuid};
use pegaflow::engine::client::{Client, ClientError};
use pegaflow::engine::protocol::SessionKind;

use crate::spec::{Event, Point, Report, Role, Spec, Stop, hello, refusals};

/// For every answer of the store; only a hang reaches it.
const LIMIT: Duration = Duration::from_secs(30);

/// What all roles share.
struct Process {
    spec: Spec,
    report: Report,
    stop: Option<Stop>,
}

impl Process {
    /// Dies here, if here is where it is to die.
    fn pass(&mut self, point: Point) {
        match &mut self.stop {
            Some(stop) if stop.point == point && stop.passes == 0 => {
                self.report.say(&Event::Stopped(point));
                let _ = raise(Signal::SIGKILL);
            }
            Some(stop) if stop.point == point => stop.passes -= 1,
            _ => {}
        }
    }

    fn connect(&self, kind: SessionKind) -> Result<Client, ClientError> {
        Client::connect(&self.spec.socket, hello(&self.spec, kind), LIMIT)
    }

    /// A session. That there is none is reported at once: nothing that a storm does is a reason.
    fn admitted(&self, kind: SessionKind) -> Client {
        match self.connect(kind) {
            Ok(client) => client,
            Err(error) => {
                let spec = &self.spec;
                let who = format!("{} {}: {:?}", spec.node, spec.incarnation, spec.role);
                let source = std::error::Error::source(&error).map(ToString::to_string);
                let why = format!("{error} {}", source.unwrap_or_default());
                Report::append(&refusals(&spec.report)).say(&format!("{who}: {why}"));
                self.idle()
            }
        }
    }

    /// Until the test ends it.
    fn idle(&self) -> ! {
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

fn main() {
    // No process outlives the test.
    prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
    let argument = std::env::args()
        .nth(1)
        .expect("one argument: a Spec as JSON");
    let spec: Spec = serde_json::from_str(&argument).unwrap();
    let process = Process {
        report: Report::open(&spec),
        stop: spec.stop,
        spec,
    };
    match process.spec.role {
        Role::Producer | Role::Consumer => scheduler::run(process),
        Role::Worker { rank } => worker::run(process, rank),
        Role::Stranger { uid } => stranger(process, uid),
    }
}

fn stranger(mut process: Process, uid: u32) {
    setuid(Uid::from_raw(uid)).unwrap();
    assert_eq!(geteuid().as_raw(), uid);
    let admitted = match process.connect(SessionKind::Worker) {
        Ok(_) | Err(ClientError::Refused(_)) => true,
        // It got as far as the socket and was shown the door without a word.
        Err(ClientError::Io(error)) => {
            let kind = error.kind();
            use std::io::ErrorKind as K;
            let closed = [K::UnexpectedEof, K::ConnectionReset, K::BrokenPipe];
            assert!(closed.contains(&kind), "{error}");
            false
        }
        Err(error) => panic!("{error:?}"),
    };
    process.report.say(&Event::Stranger { admitted });
}
