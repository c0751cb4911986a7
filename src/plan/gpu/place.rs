//! Which GPUs the nodes get that leave the choice to pegaflow. Pure.
//!
//! The ranks of a node talk to each other at every layer, so they are kept close first; then the nodes
//! that share KV are kept on one NUMA node, beside the store's memory, and a prefill node close to
//! its decode node. Only then does free memory count.
//!
//! ```text
//! node with the fewest choices first:
//!   each usable GPU as a start ─▶ add the GPU that costs least, until enough ─▶ keep the cheapest
//! repeated with every start for the first node ─▶ the cheapest whole assignment
//! none found ─▶ any assignment there is (bipartite matching), close or not
//! ```

use std::cmp::Reverse;
use std::collections::BTreeSet;

use super::Booking;
use crate::fleet::Role;
use crate::host::Link;

/// Of two GPUs that the driver tells nothing of.
const UNKNOWN: u64 = Link::System as u64;

/// What an assignment costs; the parts count in this order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    /// GPUs that more than one node uses.
    shared: usize,
    /// Models too many within a node: ranks wait for the slowest.
    mixed: usize,
    /// Within the nodes.
    ranks: u64,
    /// GPUs away from the NUMA nodes that the topology names for the store.
    off_arena: usize,
    /// NUMA nodes of the GPUs that share KV.
    numa_nodes: usize,
    /// From each node to its nearest partner.
    partners: u64,
    free: Reverse<u128>,
    /// Decides between equals, the same way each time.
    indices: Vec<Vec<u32>>,
}

/// Gives GPUs to these replicas (by place), or says which one went without.
pub(super) fn place<'b>(
    booking: &Booking<'b>,
    waiting: &[usize],
) -> Result<Booking<'b>, (usize, Booking<'b>)> {
    let mut order = waiting.to_vec();
    order.sort_by_key(|&at| (booking.usable(at).len(), Reverse(booking.count(at)), at));
    let Some((&first, rest)) = order.split_first() else {
        return Ok(booking.clone());
    };
    let mut best: Option<(Cost, Booking<'b>)> = None;
    let mut failed = (first, booking.clone());
    for start in booking.usable(first) {
        let mut trial = booking.clone();
        let Some(grown) = grow(&trial, first, start) else {
            continue;
        };
        trial.give(first, grown);
        match fill(trial, rest) {
            Ok(trial) => {
                let cost = cost(&trial);
                if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                    best = Some((cost, trial));
                }
            }
            Err(stuck) => failed = stuck,
        }
    }
    best.map(|(_, trial)| trial)
        .or_else(|| matched(booking, &order))
        .ok_or(failed)
}

/// The rest, one after the other, each as cheaply as it can be had.
fn fill<'b>(mut trial: Booking<'b>, rest: &[usize]) -> Result<Booking<'b>, (usize, Booking<'b>)> {
    for &at in rest {
        let grown = trial.usable(at).into_iter();
        let sets = grown.filter_map(|start| grow(&trial, at, start));
        match sets.min_by_key(|set| cost(&with(&trial, at, set))) {
            Some(set) => trial.give(at, set),
            None => return Err((at, trial)),
        }
    }
    Ok(trial)
}

/// As many GPUs as the replica wants, from one on.
fn grow(booking: &Booking<'_>, at: usize, start: u32) -> Option<Vec<u32>> {
    let mut set = vec![start];
    while set.len() < booking.count(at) {
        let more = booking.usable(at).into_iter();
        let next = more.filter(|gpu| !set.contains(gpu)).min_by_key(|gpu| {
            let mut wider = set.clone();
            wider.push(*gpu);
            cost(&with(booking, at, &wider))
        })?;
        set.push(next);
    }
    set.sort_unstable();
    Some(set)
}

fn with<'b>(booking: &Booking<'b>, at: usize, set: &[u32]) -> Booking<'b> {
    let mut trial = booking.clone();
    trial.give(at, set.to_vec());
    trial
}

fn cost(booking: &Booking<'_>) -> Cost {
    let nodes = || booking.replicas.iter().zip(&booking.given);
    let sharing = || nodes().filter(|(replica, _)| replica.settings.shares_kv());
    let gpus = || nodes().flat_map(|(_, set)| set);
    let numa = |gpu: &u32| booking.gpu(*gpu).and_then(|gpu| gpu.numa_node);
    let distinct: BTreeSet<&u32> = gpus().collect();
    let numa_nodes: BTreeSet<u32> = sharing()
        .flat_map(|(_, set)| set)
        .filter_map(numa)
        .collect();
    let mixed = |set: &Vec<u32>| {
        let gpus = set.iter().filter_map(|index| booking.gpu(*index));
        let names: BTreeSet<&str> = gpus.map(|gpu| gpu.name.as_str()).collect();
        names.len().saturating_sub(1)
    };
    let nearest = |of: &[u32], role, pool: &str| {
        sharing()
            .filter(|(other, set)| {
                other.settings.role == role && other.settings.pool == pool && !set.is_empty()
            })
            .map(|(_, set)| between(booking, of, set))
            .min()
            .unwrap_or(0)
    };
    let partners = sharing().map(|(replica, set)| {
        let other = match replica.settings.role {
            Role::Prefill => Role::Decode,
            Role::Decode | Role::Unified => Role::Prefill,
        };
        nearest(set, other, &replica.settings.pool)
    });
    Cost {
        shared: gpus().count() - distinct.len(),
        mixed: booking.given.iter().map(mixed).sum(),
        ranks: booking
            .given
            .iter()
            .map(|set| between(booking, set, set))
            .sum(),
        off_arena: sharing()
            .flat_map(|(_, set)| set)
            .filter_map(numa)
            .filter(|node| !booking.arena.is_empty() && !booking.arena.contains(node))
            .count(),
        numa_nodes: numa_nodes.len(),
        partners: partners.sum(),
        free: Reverse(
            gpus()
                .filter_map(|index| booking.gpu(*index)?.memory_free)
                .map(u128::from)
                .sum(),
        ),
        indices: booking.given.clone(),
    }
}

/// The distances from every GPU of one set to every one of another.
fn between(booking: &Booking<'_>, one: &[u32], other: &[u32]) -> u64 {
    let pairs = one.iter().flat_map(|a| other.iter().map(move |b| (a, b)));
    pairs.map(|(a, b)| distance(booking, *a, *b)).sum()
}

fn distance(booking: &Booking<'_>, a: u32, b: u32) -> u64 {
    if a == b {
        return 0;
    }
    let known = booking
        .paths
        .iter()
        .find(|path| (path.a, path.b) == (a.min(b), a.max(b)));
    // NVLink is not the same place.
    1 + known.map_or(UNKNOWN, |path| path.link as u64)
}

/// Any assignment in which no GPU has two of the waiting nodes, by augmenting paths.
fn matched<'b>(booking: &Booking<'b>, waiting: &[usize]) -> Option<Booking<'b>> {
    let usable: Vec<(usize, Vec<u32>)> = waiting
        .iter()
        .flat_map(|&at| std::iter::repeat_n((at, booking.usable(at)), booking.count(at)))
        .collect();
    let mut holder: Vec<(u32, usize)> = Vec::new();
    for seat in 0..usable.len() {
        if !augment(seat, &usable, &mut holder, &mut BTreeSet::new()) {
            return None;
        }
    }
    let mut trial = booking.clone();
    for &at in waiting {
        let mine = holder
            .iter()
            .filter(|(_, seat)| usable.get(*seat).is_some_and(|(node, _)| *node == at));
        let mut set: Vec<u32> = mine.map(|(gpu, _)| *gpu).collect();
        set.sort_unstable();
        trial.give(at, set);
    }
    Some(trial)
}

/// Finds a GPU for a seat, moving others where that makes room.
fn augment(
    seat: usize,
    usable: &[(usize, Vec<u32>)],
    holder: &mut Vec<(u32, usize)>,
    seen: &mut BTreeSet<u32>,
) -> bool {
    let Some((_, gpus)) = usable.get(seat) else {
        return false;
    };
    for &gpu in gpus {
        if !seen.insert(gpu) {
            continue;
        }
        match holder.iter().position(|(held, _)| *held == gpu) {
            None => {
                holder.push((gpu, seat));
                return true;
            }
            Some(place) => {
                let other = holder.get(place).map(|(_, other)| *other);
                if other.is_some_and(|other| augment(other, usable, holder, seen)) {
                    // The other seat has moved to a GPU of its own.
                    if let Some(held) = holder.get_mut(place) {
                        *held = (gpu, seat);
                    }
                    return true;
                }
            }
        }
    }
    false
}
