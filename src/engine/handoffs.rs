//! The hand-offs under way. Pure: the caller passes the time and carries out the outcomes.
//!
//! ```text
//! open ─▶ Open ── seal ──▶ Sealed ── every key Ready ──▶ Fired ── looked up by D, or deadline ─▶ gone
//!           │                 │                            ▲
//!           ├─────────────────│── P finds every key ───────┘
//!           └── fail ─────────┴─▶ gone
//! ```
//!
//! Whoever waits may leave at any time (its client did): then a hand-off ends as abandoned, and one
//! that is opened after that is refused.
//!
//! From `open` on, slots for the keys that are still to come are reserved; a key that has come is
//! leased by the hand-off instead, so its space cannot be taken from it either.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::index::{Owner, Waiter};
use super::protocol::SlotRef;
use crate::handoff::HandoffId;

/// The most hand-offs at a time.
pub const MAX_HANDOFFS: usize = 65_536;

/// Ids that were abandoned before they were opened, remembered for as long as a message takes.
const MAX_UNWANTED: usize = 4096;

/// Names a hand-off within the table; rises with its deadline.
pub type Number = Waiter;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// More keys may come.
    Open,
    /// Every key has been offered.
    Sealed,
    /// Complete; held for the decode node.
    Fired,
}

#[derive(Debug)]
pub struct Handoff {
    pub id: HandoffId,
    /// The prefill node.
    pub owner: Owner,
    pub stage: Stage,
    /// The decode node has looked it up.
    pub consumed: bool,
    /// A chunk had to be written for it.
    pub wrote: bool,
    pub opened: Instant,
    /// Keys that have come, leased.
    keys: HashSet<SlotRef>,
    /// How many of them are not Ready.
    missing: usize,
    /// Keys that are still to come.
    reserved: u32,
    deadline: Instant,
}

impl Handoff {
    /// Keys that have come and are not Ready.
    pub fn missing(&self) -> usize {
        self.missing
    }

    pub fn is_complete(&self) -> bool {
        self.missing == 0
    }

    pub fn is_running(&self) -> bool {
        self.stage != Stage::Fired
    }

    pub fn holds(&self, key: SlotRef) -> bool {
        self.keys.contains(&key)
    }

    /// Slots that are still set aside for it.
    pub fn reserved(&self) -> u32 {
        self.reserved
    }

    pub fn chunks(&self) -> u32 {
        u32::try_from(self.keys.len()).unwrap_or(u32::MAX)
    }

    pub fn keys(&self) -> impl Iterator<Item = SlotRef> {
        self.keys.iter().copied()
    }

    /// Its keys; their leases end with it.
    pub fn into_leases(self) -> impl Iterator<Item = SlotRef> {
        self.keys.into_iter()
    }
}

/// A hand-off that a prefill node asks for.
#[derive(Debug)]
pub struct NewHandoff {
    pub id: HandoffId,
    pub owner: Owner,
    pub chunks: u32,
}

#[derive(Debug)]
pub struct Handoffs {
    /// Ordered by deadline, because it is equally far for all.
    table: BTreeMap<Number, Handoff>,
    numbers: HashMap<HandoffId, Number>,
    next: Number,
    reserved: u64,
    patience: Duration,
    unwanted: HashSet<HandoffId>,
    /// The same, the last one first.
    unwanted_since: VecDeque<HandoffId>,
}

impl Handoffs {
    pub fn new(patience: Duration) -> Self {
        Self {
            table: BTreeMap::new(),
            numbers: HashMap::new(),
            next: 1,
            reserved: 0,
            patience,
            unwanted: HashSet::new(),
            unwanted_since: VecDeque::new(),
        }
    }

    /// Whoever waited for it is gone, and no prefill node has seen it yet.
    pub fn will_not_open(&mut self, id: &HandoffId) {
        if self.unwanted.insert(id.clone()) {
            self.unwanted_since.push_front(id.clone());
        }
        if self.unwanted_since.len() > MAX_UNWANTED
            && let Some(oldest) = self.unwanted_since.pop_back()
        {
            self.unwanted.remove(&oldest);
        }
    }

    pub fn is_unwanted(&self, id: &HandoffId) -> bool {
        self.unwanted.contains(id)
    }

    /// Slots that are set aside for keys to come, over all hand-offs.
    pub fn reserved(&self) -> u64 {
        self.reserved
    }

    pub fn len(&self) -> usize {
        self.table.len()
    }

    pub fn is_full(&self) -> bool {
        self.table.len() >= MAX_HANDOFFS
    }

    pub fn number(&self, id: &HandoffId) -> Option<Number> {
        self.numbers.get(id).copied()
    }

    pub fn get(&self, number: Number) -> Option<&Handoff> {
        self.table.get(&number)
    }

    /// The caller has seen that the id is new and that `chunks` slots are available.
    pub fn open(&mut self, new: NewHandoff, now: Instant) -> Number {
        self.reserved += u64::from(new.chunks);
        self.insert(Handoff {
            id: new.id,
            owner: new.owner,
            stage: Stage::Open,
            consumed: false,
            wrote: false,
            opened: now,
            keys: HashSet::new(),
            missing: 0,
            reserved: new.chunks,
            deadline: now + self.patience,
        })
    }

    /// A key has come, and the hand-off has been given a lease on it.
    pub fn add(&mut self, number: Number, key: SlotRef, ready: bool) {
        if let Some(handoff) = self.table.get_mut(&number)
            && handoff.keys.insert(key)
        {
            if handoff.reserved > 0 {
                handoff.reserved -= 1;
                self.reserved -= 1;
            }
            if !ready {
                handoff.missing += 1;
                handoff.wrote = true;
            }
        }
    }

    /// A key that was not Ready is. True: now all are.
    pub fn arrived(&mut self, number: Number) -> bool {
        self.table.get_mut(&number).is_some_and(|handoff| {
            handoff.missing = handoff.missing.saturating_sub(1);
            handoff.is_complete()
        })
    }

    /// No more keys will come; what is still set aside is free again.
    pub fn seal(&mut self, number: Number) {
        if let Some(handoff) = self.table.get_mut(&number) {
            self.reserved -= u64::from(std::mem::take(&mut handoff.reserved));
            if handoff.stage == Stage::Open {
                handoff.stage = Stage::Sealed;
            }
        }
    }

    pub fn consume(&mut self, number: Number) {
        if let Some(handoff) = self.table.get_mut(&number) {
            handoff.consumed = true;
        }
    }

    /// Keeps a complete hand-off's leases for the decode node, for as long again.
    pub fn fire(&mut self, number: Number, now: Instant) {
        if let Some(mut handoff) = self.remove(number) {
            handoff.stage = Stage::Fired;
            handoff.reserved = 0;
            handoff.deadline = now + self.patience;
            self.insert(handoff);
        }
    }

    /// Takes a hand-off out, with what is set aside for it.
    pub fn remove(&mut self, number: Number) -> Option<Handoff> {
        let handoff = self.table.remove(&number)?;
        self.numbers.remove(&handoff.id);
        self.reserved -= u64::from(handoff.reserved);
        Some(handoff)
    }

    /// One whose deadline has passed, if there is any.
    pub fn overdue(&self, now: Instant) -> Option<Number> {
        let (&number, handoff) = self.table.first_key_value()?;
        (handoff.deadline <= now).then_some(number)
    }

    /// Those that have not fired and whose prefill node is `owner`.
    pub fn running_of(&self, owner: &Owner) -> Vec<Number> {
        self.table
            .iter()
            .filter(|(_, handoff)| handoff.is_running() && handoff.owner == *owner)
            .map(|(&number, _)| number)
            .collect()
    }

    /// Those that have not fired and count on `key`.
    pub fn running_with(&self, key: SlotRef) -> Vec<Number> {
        self.table
            .iter()
            .filter(|(_, handoff)| handoff.is_running() && handoff.holds(key))
            .map(|(&number, _)| number)
            .collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Handoff> {
        self.table.values()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Number> {
        self.table.keys().copied().collect()
    }

    fn insert(&mut self, handoff: Handoff) -> Number {
        let number = self.next;
        self.next += 1;
        self.numbers.insert(handoff.id.clone(), number);
        self.table.insert(number, handoff);
        number
    }
}
