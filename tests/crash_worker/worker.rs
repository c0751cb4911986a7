//! A worker: copies in and out of the arena, slowly, so that a kill hits it in the middle. It keeps the
//! shim's rules: look at the generation before a copy and again after a load, write a row's checksum
//! between the copy and the commit and compare it before the second look, and do not say hello while a
//! copy is under way.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use pegaflow::engine::client::Client;
use pegaflow::engine::protocol::{
    ClientMessage as M, Commit, Damaged, Discard, Loaded, SessionKind, SlotRef,
};

use crate::Process;
use crate::arena::Arena;
use crate::link::Link;
use crate::spec::{
    Chunk, Event, Job, JobKind, Point, ROW_BYTES, ROW_WORDS, Rng, SEAL, SEAL_WORD, row, sum, verify,
};

/// A row is copied in so many pieces.
const PIECES: usize = 4;

struct Worker {
    process: Process,
    rank: u32,
    link: Link,
    client: Client,
    arena: Arena,
    /// Hellos said; only while it is 1 are the leases of a job sure to be alive.
    hellos: u32,
    rng: Rng,
}

pub fn run(process: Process, rank: u32) {
    let link = Link::inherited(std::os::fd::AsFd::as_fd(&std::io::stdin()));
    let client = process.admitted(SessionKind::Worker);
    let mut worker = Worker {
        rng: Rng::new(process.spec.seed),
        arena: Arena::map(&client),
        hellos: 1,
        process,
        rank,
        link,
        client,
    };
    // A first hello ends leases like a later one, so no job may come before it: vLLM, too, has its
    // workers before its scheduler speaks.
    worker.link.done();
    // Jobs that are still in the link are done even when the scheduler is dead.
    while let Some(job) = worker.link.next() {
        worker.work(&job);
        worker.link.done();
        if worker.rng.one_in(60) {
            worker.say_hello_again();
        }
    }
    worker.process.idle();
}

impl Worker {
    fn work(&mut self, job: &Job) {
        // The store may have closed the session; that shows only when something is sent.
        self.tell(&M::Loaded(Loaded {
            chunks: 0,
            bytes: 0,
            micros: 0,
            failed: 0,
        }));
        let ours = [0, self.arena.epoch()].contains(&job.epoch);
        let usable = ours && self.all_current(&job.chunks);
        match job.kind {
            JobKind::Write if usable => self.write(&job.chunks),
            JobKind::Write => self.discard(&job.chunks),
            JobKind::Load { leased } => self.load(&job.chunks, usable, leased),
        }
    }

    fn all_current(&self, chunks: &[Chunk]) -> bool {
        chunks.iter().all(|chunk| self.arena.is_current(chunk.at()))
    }

    fn write(&mut self, chunks: &[Chunk]) {
        self.process.pass(Point::BeforeWrite);
        self.copy_in(chunks);
        self.process.pass(Point::Written);
        if self.link.hung_up() && !self.rng.one_in(8) {
            self.process.report.say(&Event::Orphaned);
            loop {
                self.check_still_ours(chunks);
                self.copy_in(chunks);
            }
        }
        self.check_still_ours(chunks);
        if self.rng.one_in(20) {
            return self.discard(chunks);
        }
        for chunk in chunks {
            let row = self.arena.row(chunk.slot);
            row[SEAL_WORD].store(SEAL, Ordering::Relaxed);
            if let Some(kept) = self.arena.sum(chunk.slot) {
                let words: Vec<u64> = row.iter().map(|w| w.load(Ordering::Relaxed)).collect();
                kept.store(sum(&words), Ordering::Relaxed);
            }
        }
        let commit = Commit {
            refs: encode(chunks),
            bytes: ROW_BYTES * chunks.len() as u64,
            micros: 1,
        };
        self.tell(&M::Commit(commit));
        let chunks = chunks.len() as u64;
        self.process.report.say(&Event::Committed { chunks });
    }

    fn copy_in(&mut self, chunks: &[Chunk]) {
        for chunk in chunks {
            let words = row(chunk, self.rank, self.process.spec.seed);
            for piece in 0..PIECES {
                let row = self.arena.row(chunk.slot);
                for at in span(piece) {
                    row[at].store(words[at], Ordering::Relaxed);
                }
                self.process.pass(Point::MidWrite);
                self.dawdle();
            }
        }
    }

    /// Until this rank commits, discards or is dead, nobody else may write there.
    fn check_still_ours(&mut self, chunks: &[Chunk]) {
        for chunk in chunks {
            let words = row(chunk, self.rank, self.process.spec.seed);
            let found = self.arena.row(chunk.slot).iter().zip(&words);
            let foreign = found.filter(|(found, ours)| found.load(Ordering::Relaxed) != **ours);
            let foreign = foreign.count();
            if foreign > 0 {
                let what = format!("{foreign} words of a slot that is being written: {chunk:?}");
                let node = self.process.spec.node.clone();
                self.process.report.say(&Event::Corrupt { node, what });
            }
        }
    }

    fn load(&mut self, chunks: &[Chunk], usable: bool, leased: bool) {
        let mut loaded = self.load_once(chunks, usable, leased);
        while loaded && leased && self.link.hung_up() {
            // A slow load, which goes on although its scheduler is dead.
            loaded = self.load_once(chunks, usable, leased);
        }
        let count = u32::try_from(chunks.len()).unwrap();
        self.tell(&M::Loaded(Loaded {
            chunks: if loaded { count } else { 0 },
            bytes: ROW_BYTES * chunks.len() as u64,
            micros: 1,
            failed: if loaded { 0 } else { count },
        }));
    }

    fn load_once(&mut self, chunks: &[Chunk], usable: bool, leased: bool) -> bool {
        let (mut rows, mut sums) = (Vec::new(), Vec::new());
        if usable {
            for chunk in chunks {
                let mut words = Vec::with_capacity(ROW_WORDS);
                for piece in 0..PIECES {
                    let row = self.arena.row(chunk.slot);
                    words.extend(span(piece).map(|at| row[at].load(Ordering::Relaxed)));
                    self.process.pass(Point::MidLoad);
                    self.dawdle();
                }
                rows.push(words);
            }
            let kept = |chunk: &Chunk| self.arena.sum(chunk.slot);
            let kept = chunks.iter().filter_map(kept);
            sums.extend(kept.map(|kept| kept.load(Ordering::Relaxed)));
        }
        let loaded = usable && self.all_current(chunks);
        if loaded {
            self.check(chunks, &rows);
            self.check_sums(chunks, &rows, &sums);
        } else {
            let leased = leased && self.hellos == 1;
            let node = self.process.spec.node.clone();
            self.process.report.say(&Event::Overtaken { node, leased });
        }
        loaded
    }

    fn check(&mut self, chunks: &[Chunk], rows: &[Vec<u64>]) {
        let wrong = |(chunk, words): (&Chunk, &Vec<u64>)| verify(chunk, self.rank, words).err();
        let event = match chunks.iter().zip(rows).find_map(wrong) {
            None => Event::Verified {
                chunks: chunks.len() as u64,
            },
            Some(what) => Event::Corrupt {
                node: self.process.spec.node.clone(),
                what,
            },
        };
        self.process.report.say(&event);
    }

    /// Looked at before the generation was for the second time: the sums are those of the same chunks.
    fn check_sums(&mut self, chunks: &[Chunk], rows: &[Vec<u64>], sums: &[u32]) {
        for ((chunk, row), kept) in chunks.iter().zip(rows).zip(sums) {
            if sum(row) != *kept {
                let node = self.process.spec.node.clone();
                let chunk = *chunk;
                self.process.report.say(&Event::Damaged { node, chunk });
                self.tell(&M::Damaged(Damaged {
                    refs: encode(&[chunk]),
                }));
            }
        }
        if !sums.is_empty() {
            let chunks = sums.len() as u64;
            self.process.report.say(&Event::Summed { chunks });
        }
    }

    fn discard(&mut self, chunks: &[Chunk]) {
        let refs = encode(chunks);
        self.tell(&M::Discard(Discard { refs }));
    }

    /// What gets lost with a session stays lost.
    fn tell(&mut self, message: &M) {
        if self.client.send(message).is_err() {
            self.say_hello_again();
        }
    }

    /// Nothing is being copied at this moment.
    fn say_hello_again(&mut self) {
        self.process.report.say(&Event::Reconnected);
        self.client = self.process.admitted(SessionKind::Worker);
        self.arena = Arena::map(&self.client);
        self.hellos += 1;
    }

    fn dawdle(&mut self) {
        thread::sleep(Duration::from_micros(self.rng.below(250)));
    }
}

fn span(piece: usize) -> std::ops::Range<usize> {
    piece * ROW_WORDS / PIECES..(piece + 1) * ROW_WORDS / PIECES
}

fn encode(chunks: &[Chunk]) -> serde_bytes::ByteBuf {
    SlotRef::encode_all(chunks.iter().map(Chunk::at))
}
