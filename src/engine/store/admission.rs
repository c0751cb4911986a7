//! Who may speak to the store: the checks of `hello`, and the namespace that all sessions share.
//!
//! The first session fixes the terms (namespace, number of ranks, who of them writes), the first worker the row size
//! and with it the arena. When nobody is connected and nothing is held, the next one may bring
//! another namespace, and the arena is made anew.

use super::*;
use crate::engine::arena::Rows;
use crate::engine::protocol::{Hello, RefusalCode, Refused, VERSION, Watch, Welcome};
use crate::engine::stats::RefusedSession;

/// As many as fit into the bitset of a Pending chunk.
const MAX_WORLD: u32 = 64;

/// What every session must bring alike.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Terms {
    pub namespace: Namespace,
    pub world: u32,
    pub replicated: bool,
}

impl Terms {
    fn of(hello: &Hello) -> Self {
        Self {
            namespace: hello.namespace.clone(),
            world: hello.world,
            replicated: hello.replicated,
        }
    }

    /// How many ranks write a row of each chunk.
    fn writers(&self) -> u32 {
        if self.replicated { 1 } else { self.world }
    }
}

struct Refusal {
    code: RefusalCode,
    fields: Vec<String>,
    message: String,
}

impl Refusal {
    fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self {
            code,
            fields: Vec::new(),
            message: message.into(),
        }
    }
}

impl Store {
    /// A session for this peer. After it, [`Store::arena`] may be another one.
    pub fn admit(&mut self, hello: Hello) -> Result<Welcome, Refused> {
        match self.try_admit(&hello) {
            Ok(welcome) => {
                self.counters.sessions_opened += 1;
                Ok(welcome)
            }
            Err(refusal) => {
                let refused = Refused {
                    code: refusal.code,
                    message: refusal.message,
                };
                self.counters.refused(RefusedSession {
                    node: hello.node.chars().take(MAX_NAME).collect(),
                    incarnation: hello.incarnation,
                    code: refused.code,
                    fields: refusal.fields,
                    message: refused.message.clone(),
                });
                Err(refused)
            }
        }
    }

    /// Whether a router may wait for hand-offs here.
    pub fn check_watcher(&self, watch: &Watch) -> Result<(), Refused> {
        self.check_word(watch.version, &watch.token)
            .map_err(|refusal| Refused {
                code: refusal.code,
                message: refusal.message,
            })
    }

    /// The arena of [`Store::arena`] could not be made: the session that asked for it is taken
    /// back, and the next worker may ask again.
    pub fn retract(&mut self, session: SessionId, why: &str) -> Refused {
        let owner = self.owner_of(session);
        self.sessions.remove(&session);
        self.forget_arena();
        let refused = Refused {
            code: RefusalCode::Capacity,
            message: format!("cannot make the arena: {why}"),
        };
        self.counters.refused(RefusedSession {
            node: owner.as_ref().map_or("", |o| o.node.as_str()).to_owned(),
            incarnation: owner.map_or(0, |owner| owner.incarnation),
            code: refused.code,
            fields: Vec::new(),
            message: refused.message.clone(),
        });
        refused
    }

    fn try_admit(&mut self, hello: &Hello) -> Result<Welcome, Refusal> {
        self.check_peer(hello)?;
        if self.is_idle() && !self.agrees(hello) {
            self.forget_arena();
            self.terms = None;
        }
        self.check_namespace(hello)?;
        if hello.kind == SessionKind::Worker {
            self.fix_rows(hello)?;
        }
        self.terms.get_or_insert_with(|| Terms::of(hello));
        self.replace(hello);
        if hello.kind == SessionKind::Worker {
            self.returned(&Writer {
                owner: owner(hello),
                rank: hello.rank,
            });
        }
        let id = self.next_session;
        self.next_session += self.config.sessions.1;
        let session = Session {
            owner: owner(hello),
            kind: hello.kind,
            rank: hello.rank,
            pid: hello.pid,
            requests: HashMap::new(),
        };
        self.sessions.insert(id, session);
        // Of a replicated layout, all ranks read and check what rank 0 has written.
        let row = match hello.kind {
            SessionKind::Worker if !hello.replicated => u64::from(hello.rank),
            SessionKind::Worker | SessionKind::Scheduler => 0,
        };
        Ok(match self.arena() {
            Some((epoch, shape)) => Welcome {
                epoch,
                session: id,
                slots: shape.slots,
                stride: shape.stride,
                rank_offset: row * shape.row_bytes,
                header_bytes: shape.header_bytes,
                arena_bytes: shape.arena_bytes,
                checksum_offset: shape.checksum_offset_of(row),
            },
            None => Welcome {
                epoch: 0,
                session: id,
                slots: 0,
                stride: 0,
                rank_offset: 0,
                header_bytes: 0,
                arena_bytes: 0,
                checksum_offset: 0,
            },
        })
    }

    /// Closes what is left of an earlier session of the same peer.
    fn replace(&mut self, hello: &Hello) {
        let owner = owner(hello);
        let same = |session: &Session| {
            session.owner == owner && session.kind == hello.kind && session.rank == hello.rank
        };
        let earlier = self.sessions.iter().find(|(_, session)| same(session));
        if let Some((&id, _)) = earlier {
            self.disconnect(id, Lost::Replaced);
            self.actions.push(Action::Close(id));
        }
    }

    fn check_peer(&self, hello: &Hello) -> Result<(), Refusal> {
        self.check_word(hello.version, &hello.token)?;
        let wrong = if hello.node.is_empty() || hello.node.len() > MAX_NAME {
            format!("node has a name of {} bytes", hello.node.len())
        } else if hello.world == 0 || hello.world > MAX_WORLD {
            format!("world {} is not within 1 to {MAX_WORLD}", hello.world)
        } else if hello.rank >= hello.world {
            format!("rank {} is not below world {}", hello.rank, hello.world)
        } else if (hello.kind == SessionKind::Worker) != (hello.row_bytes > 0) {
            format!(
                "row_bytes is {}; a worker's is above 0, a scheduler's is 0",
                hello.row_bytes
            )
        } else if self
            .gone
            .get(&NodeId::from(hello.node.as_str()))
            .is_some_and(|&gone| hello.incarnation <= gone)
        {
            format!("incarnation {} was reaped already", hello.incarnation)
        } else {
            return Ok(());
        };
        Err(Refusal::new(RefusalCode::BadHello, wrong))
    }

    fn check_word(&self, version: u32, token: &str) -> Result<(), Refusal> {
        if version != VERSION {
            let message = format!("version {version} is not {VERSION}");
            return Err(Refusal::new(RefusalCode::Version, message));
        }
        if !same_secret(token.as_bytes(), self.config.token.as_bytes()) {
            let message = "the token is not this store's";
            return Err(Refusal::new(RefusalCode::Token, message));
        }
        Ok(())
    }

    /// Nobody is connected, and nobody who was may still be reading or writing.
    fn is_idle(&self) -> bool {
        self.sessions.is_empty() && self.departed.is_empty() && self.index.census().quarantined == 0
    }

    fn agrees(&self, hello: &Hello) -> bool {
        let rows = match (hello.kind, self.shape) {
            (SessionKind::Worker, Some(shape)) => shape.row_bytes == hello.row_bytes,
            _ => true,
        };
        rows && self.terms.as_ref() == Some(&Terms::of(hello))
    }

    fn check_namespace(&self, hello: &Hello) -> Result<(), Refusal> {
        let Some(Terms {
            namespace,
            world,
            replicated,
        }) = &self.terms
        else {
            return Ok(());
        };
        let mut differing: Vec<(&str, String, String)> = Vec::new();
        let absent = || "absent".to_owned();
        for field in namespace.keys().chain(hello.namespace.keys()) {
            let (here, there) = (namespace.get(field), hello.namespace.get(field));
            if here != there && differing.iter().all(|(known, ..)| known != field) {
                let show = |value: Option<&String>| value.map_or_else(absent, |v| format!("`{v}`"));
                differing.push((field, show(here), show(there)));
            }
        }
        if *world != hello.world {
            differing.push(("world", world.to_string(), hello.world.to_string()));
        }
        if *replicated != hello.replicated {
            let show = |value: bool| value.to_string();
            differing.push(("replicated", show(*replicated), show(hello.replicated)));
        }
        if differing.is_empty() {
            return Ok(());
        }
        let texts: Vec<_> = differing
            .iter()
            .map(|(field, here, there)| {
                format!(
                    "{field} is {here} in the store and {there} at {}",
                    hello.node
                )
            })
            .collect();
        Err(Refusal {
            code: RefusalCode::Namespace,
            fields: differing.iter().map(|(f, ..)| (*f).to_owned()).collect(),
            message: texts.join("; "),
        })
    }

    /// The first worker's row size makes the arena; the others must agree.
    fn fix_rows(&mut self, hello: &Hello) -> Result<(), Refusal> {
        if let Some(shape) = self.shape {
            if shape.row_bytes == hello.row_bytes {
                return Ok(());
            }
            let message = format!(
                "a row is {} bytes in the store and {} at {}",
                shape.row_bytes, hello.row_bytes, hello.node
            );
            return Err(Refusal::new(RefusalCode::RowBytes, message));
        }
        let capacity = self.config.capacity;
        let writers = Terms::of(hello).writers();
        let rows = Rows {
            bytes: hello.row_bytes,
            writers,
            verify: self.config.verify,
        };
        let shape = Shape::fit(capacity, rows).ok_or_else(|| {
            let message = format!(
                "{capacity} bytes do not hold one chunk of {writers} rows of {} bytes; raise the store's capacity",
                hello.row_bytes
            );
            Refusal::new(RefusalCode::Capacity, message)
        })?;
        self.shape = Some(shape);
        self.index = Index::new(shape.slots, writers);
        self.epoch += 1;
        Ok(())
    }

    fn forget_arena(&mut self) {
        for number in self.handoffs.all() {
            self.fail(number, HandoffFailure::ProducerDied);
        }
        self.shape = None;
        self.index = Index::new(0, 1);
    }
}

fn owner(hello: &Hello) -> Owner {
    Owner {
        node: NodeId::from(hello.node.as_str()),
        incarnation: hello.incarnation,
    }
}

/// Takes equally long wherever the two differ.
fn same_secret(a: &[u8], b: &[u8]) -> bool {
    let differing = a.iter().zip(b).fold(0, |acc, (x, y)| acc | (x ^ y));
    a.len() == b.len() && std::hint::black_box(differing) == 0
}
