//! What may happen to the store in `model`.

use proptest::prelude::*;

use super::WORLD;

#[derive(Debug, Clone)]
pub enum Op {
    Open {
        node: usize,
        chunks: u32,
    },
    Store {
        node: usize,
        handoff: usize,
        chain: u8,
        from: u8,
        to: u8,
    },
    Lookup {
        node: usize,
        handoff: usize,
        chain: u8,
        to: u8,
    },
    Seal {
        handoff: usize,
    },
    Abort {
        handoff: usize,
    },
    Release {
        node: usize,
        request: usize,
    },
    Finish {
        node: usize,
        request: usize,
    },
    Commit {
        pick: usize,
        rank: u32,
    },
    CommitAll,
    Discard {
        pick: usize,
        rank: u32,
    },
    /// A worker reports a chunk, mostly one that its node has leased.
    Damage {
        node: usize,
        rank: u32,
        pick: usize,
        leased: bool,
    },
    Disconnect {
        node: usize,
        who: usize,
    },
    Gone {
        node: usize,
    },
    Join {
        node: usize,
    },
    /// A hello while the earlier session of the same peer may still look alive.
    Replace {
        node: usize,
        who: usize,
    },
    Abandon {
        handoff: usize,
    },
    Flush,
    Wait {
        seconds: u64,
    },
}

pub fn ops() -> impl Strategy<Value = Vec<Op>> {
    let (node, any) = (0..3usize, 0..1000usize);
    let op = prop_oneof![
        3 => (node.clone(), 0..5u32).prop_map(|(node, chunks)| Op::Open { node, chunks }),
        6 => (node.clone(), any.clone(), 0..4u8, 0..6u8, 1..9u8).prop_map(
            |(node, handoff, chain, from, to)| Op::Store { node, handoff, chain, from, to }),
        5 => (node.clone(), any.clone(), 0..4u8, 0..9u8).prop_map(
            |(node, handoff, chain, to)| Op::Lookup { node, handoff, chain, to }),
        3 => any.clone().prop_map(|handoff| Op::Seal { handoff }),
        1 => any.clone().prop_map(|handoff| Op::Abort { handoff }),
        2 => (node.clone(), any.clone()).prop_map(|(node, request)| Op::Release { node, request }),
        2 => (node.clone(), any.clone()).prop_map(|(node, request)| Op::Finish { node, request }),
        16 => (any.clone(), 0..WORLD).prop_map(|(pick, rank)| Op::Commit { pick, rank }),
        4 => Just(Op::CommitAll),
        2 => (any.clone(), 0..WORLD).prop_map(|(pick, rank)| Op::Discard { pick, rank }),
        2 => (node.clone(), 0..WORLD, any.clone(), prop::bool::weighted(0.7)).prop_map(
            |(node, rank, pick, leased)| Op::Damage { node, rank, pick, leased }),
        1 => (node.clone(), 0..3usize).prop_map(|(node, who)| Op::Disconnect { node, who }),
        1 => node.clone().prop_map(|node| Op::Gone { node }),
        3 => node.clone().prop_map(|node| Op::Join { node }),
        1 => (node, 0..3usize).prop_map(|(node, who)| Op::Replace { node, who }),
        1 => any.prop_map(|handoff| Op::Abandon { handoff }),
        1 => Just(Op::Flush),
        1 => (1..40u64).prop_map(|seconds| Op::Wait { seconds }),
    ];
    prop::collection::vec(op, 1..250)
}
