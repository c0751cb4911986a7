//! The store's sessions.
use std::time::Duration;

use crate::args::Args;
use crate::wire::Chunk;

pub const ROW_BYTES: usize = 4096;
pub type Key = [u8; 36];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    pub slot: u32,
    pub generation: u32,
}

impl Slot {
    pub fn chunk(self, key: &Key) -> Chunk {
        let key = key.iter().map(|byte| format!("{byte:02x}")).collect();
        Chunk {
            slot: self.slot,
            generation: self.generation,
            key,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    Miss,
    Pending,
    Hit(Slot),
}

#[derive(Debug)]
pub struct Scheduler {}

impl Scheduler {
    pub async fn connect(_args: &Args) -> Option<Self> {
        None
    }
    pub async fn open(&self, _request: &str, _handoff: &str, _chunks: u32) {}
    pub async fn seal(&self, _handoff: &str) {}
    pub async fn release(&self, _request: &str) {}
    pub async fn finish(&self, _request: &str) {}
    pub async fn lookup(&self, _r: &str, _h: &str, _keys: &[Key]) -> Option<Vec<Found>> {
        None
    }
    pub async fn store(&self, _r: &str, _h: &str, _keys: &[Key]) -> Option<Vec<(usize, Slot)>> {
        None
    }
}

#[derive(Debug)]
pub struct Worker {}

impl Worker {
    pub async fn connect(_args: &Args) -> Option<Self> {
        None
    }
    pub fn write(&mut self, _chunk: &Chunk, _bytes: &[u8]) {}
    pub fn read(&self, _chunk: &Chunk) -> Option<Vec<u8>> {
        None
    }
    pub async fn commit(&mut self, _chunks: &[Chunk], _took: Duration) {}
    pub async fn loaded(&mut self, _chunks: u32, _failed: u32, _took: Duration) {}
}
