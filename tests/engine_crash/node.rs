//! One node of the storm: starts the processes of an incarnation, has one of them killed, lets the
//! others linger, reaps them all and tells the engine.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use pegaflow::handoff::{HandoffId, HandoffTicket};

use crate::spec::{Point, Rng, Role, Spec, Stop};
use crate::storm::{Gone, Storm, assert_settled};

/// Hand-offs that a producer opens in one life.
const HANDOFFS: u64 = 12;
/// How long a stop point may take to be reached.
const STOP_WITHIN: Duration = Duration::from_secs(5);
const SIGKILL: i32 = 9;

pub struct Node<'a> {
    storm: &'a Storm,
    name: &'static str,
    role: Role,
    rng: Rng,
}

/// Killed and reaped when dropped, whatever the test comes to.
struct Process(Child);

impl Process {
    fn start(spec: &Spec, stdin: OwnedFd, stdout: Stdio) -> Self {
        let command = Command::new(program())
            .arg(serde_json::to_string(spec).unwrap())
            .stdin(stdin)
            .stdout(stdout)
            .spawn();
        Self(command.unwrap())
    }

    /// Dead and reaped. Nothing but a kill may have ended it.
    fn kill(&mut self) {
        // Fails when it has killed itself and has been waited for.
        let _ = self.0.kill();
        let status = self.0.wait().unwrap();
        assert_eq!(status.signal(), Some(SIGKILL), "ended by itself: {status}");
    }

    fn ends_within(&mut self, limit: Duration, storm: &Storm) -> bool {
        let started = Instant::now();
        while started.elapsed() < limit {
            if self.0.try_wait().unwrap().is_some() {
                return true;
            }
            storm.assert_all_were_admitted();
            thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The first death of an incarnation.
struct Fault {
    /// 0 is the scheduler, then the workers by rank.
    victim: usize,
    /// Where it kills itself; otherwise it is killed after `delay`.
    stop: Option<Stop>,
    delay: Duration,
    /// For how long the others go on.
    linger: Duration,
}

impl<'a> Node<'a> {
    pub fn new(storm: &'a Storm, name: &'static str, role: Role, seed: u64) -> Self {
        Self {
            storm,
            name,
            role,
            rng: Rng::new(seed),
        }
    }

    /// From the start of an incarnation to the moment when it is gone.
    pub fn live(&mut self) {
        let incarnation = self.storm.next_incarnation(self.name);
        let fault = self.fault(incarnation);
        let tickets = self.tickets(incarnation);
        let mut processes = self.start(&fault, &tickets);
        let victim = &mut processes[fault.victim];
        if fault.stop.is_none() {
            thread::sleep(fault.delay);
        } else {
            victim.ends_within(STOP_WITHIN, self.storm);
        }
        victim.kill();
        let gone = || {
            self.storm
                .engine
                .incarnation_gone(&self.name.into(), incarnation)
        };
        if self.storm.plan.gone == Gone::TooEarly {
            gone();
        } else {
            self.storm.assert_all_were_admitted();
        }
        thread::sleep(fault.linger);
        processes.iter_mut().for_each(Process::kill);
        gone();
        for ticket in &tickets {
            assert_settled(ticket.state());
        }
    }

    /// All kinds in turn.
    fn fault(&mut self, incarnation: u64) -> Fault {
        let rng = &mut self.rng;
        if self.storm.plan.gone == Gone::TooEarly {
            return Fault {
                victim: 0,
                stop: None,
                delay: Duration::from_millis(50 + rng.below(50)),
                linger: Duration::from_millis(300),
            };
        }
        let ranks = u64::from(self.storm.plan.world);
        let worker = 1 + usize::try_from(rng.below(ranks)).unwrap();
        let (victim, point) = match (incarnation % 10, self.role) {
            (0, Role::Producer) => (0, Some(Point::Granted)),
            (1, Role::Producer) => (worker, Some(Point::BeforeWrite)),
            (2, Role::Producer) => (worker, Some(Point::MidWrite)),
            (3, Role::Producer) => (worker, Some(Point::Written)),
            (0, _) => (0, Some(Point::Found)),
            (1 | 2, _) => (worker, Some(Point::MidLoad)),
            (4 | 5, _) => (0, Some(Point::Dispatched)),
            (6 | 7, _) => (worker, None),
            _ => (0, None),
        };
        let passes = u32::try_from(rng.below(12)).unwrap();
        Fault {
            victim,
            stop: point.map(|point| Stop { point, passes }),
            delay: Duration::from_micros(5000 + rng.below(200_000)),
            linger: Duration::from_millis(
                [0, 50, 150, 300][usize::try_from(rng.below(4)).unwrap()],
            ),
        }
    }

    fn handoff(&self, node: &str, incarnation: u64) -> impl Iterator<Item = String> {
        (0..HANDOFFS).map(move |at| format!("{node}-{incarnation}-{at}"))
    }

    /// Somebody waits for every hand-off of a producer.
    fn tickets(&self, incarnation: u64) -> Vec<HandoffTicket> {
        if self.role != Role::Producer {
            return Vec::new();
        }
        let ids = self.handoff(self.name, incarnation);
        ids.map(|id| self.storm.board.register(HandoffId::from(id.as_str())))
            .collect()
    }

    fn start(&mut self, fault: &Fault, tickets: &[HandoffTicket]) -> Vec<Process> {
        let handoffs = match self.role {
            Role::Producer => tickets.iter().map(|t| t.id().as_str().to_owned()).collect(),
            _ => ["p0", "p1"]
                .iter()
                .flat_map(|node| self.handoff(node, self.storm.incarnation(node)))
                .collect(),
        };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..self.storm.plan.world {
            let (scheduler, worker) = UnixStream::pair().unwrap();
            ours.push(OwnedFd::from(scheduler));
            theirs.push(OwnedFd::from(worker));
        }
        let mut specs = vec![self.storm.spec(self.name, self.role)];
        specs[0].handoffs = handoffs;
        for rank in 0..self.storm.plan.world {
            specs.push(self.storm.spec(self.name, Role::Worker { rank }));
        }
        specs
            .iter_mut()
            .for_each(|spec| spec.seed = self.rng.next());
        specs[fault.victim].stop = fault.stop;

        let mut ours = ours.into_iter();
        let stdin = ours.next().unwrap();
        let stdout = ours.next().map_or_else(Stdio::null, Stdio::from);
        let mut processes = vec![Process::start(&specs[0], stdin, stdout)];
        for (spec, link) in specs[1..].iter().zip(theirs) {
            processes.push(Process::start(spec, link, Stdio::null()));
        }
        processes
    }
}

/// Built as an example, beside the tests.
fn program() -> PathBuf {
    let target = std::env::current_exe().unwrap();
    let target = target.parent().unwrap().parent().unwrap();
    let program = target.join("examples/crash-worker");
    assert!(
        program.exists(),
        "{} is missing: cargo build --examples",
        program.display()
    );
    program
}
