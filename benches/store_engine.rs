//! An engine alone, for benchmarks in other languages: `store-engine SOCKET CAPACITY_BYTES`. Prints
//! `ready` when it listens; ends with its standard input.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod rig;

use std::io::Read;
use std::path::Path;

use pegaflow::handoff::HandoffBoard;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, socket, capacity] = arguments.as_slice() else {
        panic!("usage: store-engine SOCKET CAPACITY_BYTES");
    };
    let capacity = capacity.parse().unwrap();
    let _engine = rig::start_engine(Path::new(socket), capacity, HandoffBoard::default());
    println!("ready");
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}
