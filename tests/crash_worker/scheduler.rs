//! A scheduler of a prefill node (stores prompts) or of a decode node (looks them up).

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use pegaflow::engine::client::{Client, ClientError, Query};
use pegaflow::engine::protocol::{
    ClientMessage as M, HandoffName, Open, RequestName, SessionKind, SlotRef,
};

use crate::Process;
use crate::link::Link;
use crate::spec::{Chunk, Event, Job, JobKind, MAX_CHUNKS, PROMPTS, Point, Rng, Role, key, prompt};

/// Requests whose copies may be under way at a time.
const WINDOW: usize = 3;

struct Scheduler {
    process: Process,
    /// None only between two sessions.
    client: Option<Client>,
    links: Vec<Link>,
    rng: Rng,
    requests: u64,
    handoffs: VecDeque<String>,
}

pub fn run(process: Process) {
    let mut links = vec![Link::inherited(std::io::stdin().as_fd())];
    if process.spec.world > 1 {
        links.push(Link::inherited(std::io::stdout().as_fd()));
    }
    let client = process.admitted(SessionKind::Scheduler);
    let producer = process.spec.role == Role::Producer;
    let mut scheduler = Scheduler {
        rng: Rng::new(process.spec.seed),
        handoffs: process.spec.handoffs.clone().into(),
        process,
        client: Some(client),
        links,
        requests: 0,
    };
    // All workers are admitted.
    scheduler.wait();
    let mut under_way = VecDeque::new();
    loop {
        let turn = if producer {
            scheduler.produce(&mut under_way)
        } else {
            scheduler.consume()
        };
        if turn.is_err() || scheduler.rng.one_in(30) {
            scheduler.reconnect();
        }
    }
}

impl Scheduler {
    fn produce(&mut self, under_way: &mut VecDeque<String>) -> Result<(), ClientError> {
        let (request, ids) = self.request();
        let keys: Vec<Vec<u8>> = ids.iter().map(|&id| key(id)).collect();
        let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
        let handoff = if self.rng.one_in(3) {
            self.handoffs.pop_front()
        } else {
            None
        };
        if let Some(handoff) = &handoff {
            self.store().send(&M::Open(Open {
                request: request.clone(),
                handoff: handoff.clone(),
                chunks: u32::try_from(ids.len()).unwrap(),
            }))?;
        }
        let query = Query {
            request: &request,
            handoff: handoff.as_deref(),
            keys: &keys,
        };
        self.store().lookup(query)?;
        let granted = self.store().store(query)?;
        if !granted.ok {
            thread::sleep(Duration::from_millis(2));
            return self.finish(request);
        }
        self.process.pass(Point::Granted);
        let (indices, _) = granted.new.as_chunks::<4>();
        let new = indices
            .iter()
            .map(|at| ids[u32::from_le_bytes(*at) as usize]);
        let chunks = place(new, &granted.refs);
        let copying = !chunks.is_empty();
        self.dispatch(JobKind::Write, chunks);
        if let Some(handoff) = handoff {
            let name = HandoffName { handoff };
            let message = match self.rng.below(8) {
                0 => M::Abort(name),
                _ => M::Seal(name),
            };
            self.store().send(&message)?;
        }
        if !copying {
            thread::sleep(Duration::from_micros(200));
            return self.finish(request);
        }
        under_way.push_back(request);
        while under_way.len() >= WINDOW {
            self.wait();
            let request = under_way.pop_front().unwrap();
            self.finish(request)?;
        }
        Ok(())
    }

    fn consume(&mut self) -> Result<(), ClientError> {
        let (request, ids) = self.request();
        let keys: Vec<Vec<u8>> = ids.iter().map(|&id| key(id)).collect();
        let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
        let handoff = self.handoffs.pop_front();
        self.handoffs.extend(handoff.clone());
        let found = self.store().lookup(Query {
            request: &request,
            handoff: handoff.as_deref(),
            keys: &keys,
        })?;
        self.process.pass(Point::Found);
        let mut chunks = place(ids.into_iter(), &found.refs);
        chunks.retain(|chunk| chunk.at() != SlotRef::NONE);
        if chunks.is_empty() {
            thread::sleep(Duration::from_millis(1));
            return self.finish(request);
        }
        let leased = !self.rng.one_in(8);
        self.dispatch(JobKind::Load { leased }, chunks);
        if !leased {
            let request = request.clone();
            self.store().send(&M::Release(RequestName { request }))?;
        } else if self.rng.one_in(20) {
            // The workers are in the middle of it.
            self.reconnect();
        }
        self.wait();
        self.finish(request)
    }

    /// A name that was never used, and a prompt.
    fn request(&mut self) -> (String, Vec<u64>) {
        self.requests += 1;
        let chunks = 1 + self.rng.below(MAX_CHUNKS);
        // Some prompts are asked for more often.
        let number = match self.rng.below(2) {
            0 => self.rng.below(PROMPTS),
            _ => self.rng.below(PROMPTS / 8),
        };
        let ids = prompt(number, chunks);
        (format!("r{}", self.requests), ids)
    }

    fn dispatch(&mut self, kind: JobKind, chunks: Vec<Chunk>) {
        if chunks.is_empty() {
            return;
        }
        let job = Job {
            kind,
            epoch: self.store().welcome().epoch,
            chunks,
        };
        for link in &mut self.links {
            link.send(&job);
        }
        self.process.pass(Point::Dispatched);
    }

    /// One more job is done by all workers that live.
    fn wait(&mut self) {
        for link in &mut self.links {
            link.wait();
        }
    }

    fn finish(&mut self, request: String) -> Result<(), ClientError> {
        self.store().send(&M::Finish(RequestName { request }))
    }

    /// The same incarnation again, whatever its workers are doing.
    fn reconnect(&mut self) {
        self.process.report.say(&Event::Reconnected);
        if !self.rng.one_in(3) {
            self.client = None;
        } // Otherwise the new session begins before the old one has ended.
        thread::sleep(Duration::from_millis(1));
        self.client = Some(self.process.admitted(SessionKind::Scheduler));
    }

    fn store(&mut self) -> &mut Client {
        self.client.as_mut().unwrap()
    }
}

/// What is where; `refs` are as many as `ids`.
fn place(ids: impl Iterator<Item = u64>, refs: &[u8]) -> Vec<Chunk> {
    let refs = SlotRef::decode_all(refs).unwrap();
    ids.zip(refs).map(|(id, at)| Chunk::new(id, at)).collect()
}
