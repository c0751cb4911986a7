//! Which of several open nodes: pure.
//!
//! A node costs what it has in flight with the new request on top, in tokens by its weight: about the time until it
//! would be done. The lowest cost wins:
//!
//! ```text
//! cost = (tokens in flight + tokens asked for - tokens that are warm there) / weight
//! ties: fewer requests by weight, then the one that was not chosen for the longest time
//! ```
//!
//! - **Warm.** A node whose own cache holds the beginning of the prompt need not compute that again. It is taken off
//!   the cost, so warmth wins until the node is behind by just as many tokens, and never longer.
//! - **Session.** Requests of one session go to the node that ranks first for it (rendezvous hashing, by weight), as
//!   long as its cost is at most [`SESSION_FACTOR`] times the lowest and [`SESSION_SLACK`] tokens more; then to the
//!   next in rank that is within. When a node comes or goes, only its own sessions move.
//!
//! Every node is looked at. There are few, what they have in flight is counted here and exact, and choosing and
//! counting are one step: two random choices out of many would know less and save nothing.

use std::cmp::Ordering;

pub const SESSION_FACTOR: u64 = 2;
/// By unit of weight.
pub const SESSION_SLACK: u64 = 16_384;

/// One open node.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    /// In flight, by estimate.
    pub(super) tokens: u64,
    pub(super) requests: u64,
    /// When it was chosen last, in choices.
    pub(super) turn: u64,
    /// At least one.
    pub(super) weight: u64,
    /// Of the request's tokens, those that the node holds already.
    pub(super) warm: u64,
    /// The session's rank for it: the lowest is first. `None`: there is no session.
    pub(super) rank: Option<f64>,
}

impl Candidate {
    /// Not yet divided by the weight.
    fn burden(&self, asked: u64) -> u64 {
        let tokens = self.tokens.saturating_add(asked);
        tokens.saturating_sub(self.warm.min(asked))
    }

    fn compare(&self, other: &Self, asked: u64) -> Ordering {
        let cost = by_weight(self.burden(asked), other.weight)
            .cmp(&by_weight(other.burden(asked), self.weight));
        let requests =
            by_weight(self.requests, other.weight).cmp(&by_weight(other.requests, self.weight));
        cost.then(requests).then(self.turn.cmp(&other.turn))
    }

    /// Not so far behind `least` that a session has to go elsewhere.
    fn keeps_sessions(&self, least: &Self, asked: u64) -> bool {
        let most = by_weight(least.burden(asked), self.weight) * u128::from(SESSION_FACTOR)
            + by_weight(SESSION_SLACK, self.weight) * u128::from(least.weight);
        by_weight(self.burden(asked), least.weight) <= most
    }
}

/// Two fractions are compared by multiplying each numerator with the other's denominator.
fn by_weight(tokens: u64, weight: u64) -> u128 {
    u128::from(tokens) * u128::from(weight)
}

/// The place of the chosen one.
pub(super) fn choose(candidates: &[Candidate], asked: u64) -> Option<usize> {
    let indexed = || candidates.iter().enumerate();
    let (index, least) = indexed().min_by(|(_, a), (_, b)| a.compare(b, asked))?;
    if least.rank.is_none() {
        return Some(index);
    }
    let within = indexed().filter(|(_, node)| node.keeps_sessions(least, asked));
    let rank = |node: &Candidate| node.rank.unwrap_or(f64::INFINITY);
    let first = within.min_by(|(_, a), (_, b)| rank(a).total_cmp(&rank(b)));
    Some(first.map_or(index, |(index, _)| index))
}

/// A session's rank for a node: the lowest goes first. `hash`: of the two together.
pub(super) fn rank(hash: u64, weight: u64) -> f64 {
    // In (0, 1), half a step away from both ends: of 52 bits, so that the half is not rounded away.
    let share = ((hash >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
    -share.ln() / weight.max(1) as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn idle(weight: u64) -> Candidate {
        Candidate {
            tokens: 0,
            requests: 0,
            turn: 0,
            weight,
            warm: 0,
            rank: None,
        }
    }

    fn candidate() -> impl Strategy<Value = Candidate> {
        let numbers = (0u64..1 << 40, 0u64..1 << 20, 0u64..1 << 20, 1u64..=100);
        (numbers, 0u64..1 << 20).prop_map(|((tokens, requests, turn, weight), warm)| Candidate {
            tokens,
            requests,
            turn,
            weight,
            warm,
            rank: None,
        })
    }

    fn cost(node: &Candidate, asked: u64) -> f64 {
        node.burden(asked) as f64 / node.weight as f64
    }

    proptest! {
        #[test]
        fn nothing_costs_less_than_what_is_chosen(
            nodes in prop::collection::vec(candidate(), 1..12), asked in 0u64..1 << 20,
        ) {
            let chosen = &nodes[choose(&nodes, asked).unwrap()];
            for node in &nodes {
                prop_assert!(cost(chosen, asked) <= cost(node, asked) * (1.0 + 1e-9));
            }
        }

        /// Requests that do not end: what each node has is in proportion to its weight, within one request.
        #[test]
        fn load_follows_the_weights(
            weights in prop::collection::vec(1u64..=100, 1..8), requests in 1usize..400, asked in 1u64..100_000,
        ) {
            let mut nodes: Vec<_> = weights.into_iter().map(idle).collect();
            for turn in 1..=requests {
                let index = choose(&nodes, asked).unwrap();
                let node = &mut nodes[index];
                node.tokens += asked;
                node.requests += 1;
                node.turn = turn as u64;
            }
            for a in &nodes {
                for b in &nodes {
                    // a did not get its last one while b would have been done earlier with it.
                    prop_assert!(u128::from(a.requests) * u128::from(b.weight)
                        <= u128::from(b.requests + 1) * u128::from(a.weight));
                }
            }
        }

        /// However sizes vary, no node is ahead of another by more than one request of the largest size.
        #[test]
        fn imbalance_is_bounded_by_one_request(
            sizes in prop::collection::vec(1u64..10_000, 1..300), nodes in 1usize..8,
        ) {
            let mut nodes = vec![idle(1); nodes];
            for (turn, size) in sizes.iter().enumerate() {
                let index = choose(&nodes, *size).unwrap();
                nodes[index].tokens += size;
                nodes[index].requests += 1;
                nodes[index].turn = turn as u64 + 1;
            }
            let tokens = || nodes.iter().map(|node| node.tokens);
            let most = sizes.iter().max().unwrap();
            prop_assert!(tokens().max().unwrap() - tokens().min().unwrap() <= *most);
        }

        /// Every request is warm on one node: it is ahead of the others by what that saves, and one request.
        #[test]
        fn warmth_yields_to_load(
            requests in 1usize..300, asked in 1u64..10_000, share in 0.0f64..=1.0, nodes in 2usize..6,
        ) {
            let warm = (asked as f64 * share) as u64;
            let mut nodes = vec![idle(1); nodes];
            nodes[0].warm = warm;
            for turn in 1..=requests {
                let index = choose(&nodes, asked).unwrap();
                nodes[index].tokens += asked;
                nodes[index].requests += 1;
                nodes[index].turn = turn as u64;
            }
            let tokens = || nodes.iter().map(|node| node.tokens);
            prop_assert!(tokens().max().unwrap() - tokens().min().unwrap() <= asked + warm);
            if warm > 0 {
                prop_assert_eq!(tokens().max().unwrap(), nodes[0].tokens);
            }
        }

        #[test]
        fn a_session_is_never_far_from_the_least_loaded(
            nodes in prop::collection::vec((candidate(), 0.0f64..10.0), 1..8), asked in 0u64..100_000,
        ) {
            let nodes: Vec<_> = nodes
                .into_iter()
                .map(|(node, rank)| Candidate { rank: Some(rank), ..node })
                .collect();
            let chosen = cost(&nodes[choose(&nodes, asked).unwrap()], asked);
            let least = nodes.iter().map(|node| cost(node, asked)).fold(f64::INFINITY, f64::min);
            let most = least * SESSION_FACTOR as f64 + SESSION_SLACK as f64;
            prop_assert!(chosen <= most * (1.0 + 1e-9));
        }

        /// A node goes: only its own sessions move.
        #[test]
        fn a_session_keeps_its_node_when_another_goes(ranks in prop::collection::vec(0.0f64..10.0, 2..8), gone in 0usize..8) {
            let nodes: Vec<_> = ranks
                .iter()
                .map(|rank| Candidate { rank: Some(*rank), ..idle(1) })
                .collect();
            let gone = gone % nodes.len();
            let before = choose(&nodes, 1).unwrap();
            let mut rest = nodes.clone();
            rest.remove(gone);
            let after = choose(&rest, 1).unwrap();
            if before != gone {
                prop_assert_eq!(after + usize::from(after >= gone), before);
            }
        }
    }

    #[test]
    fn sessions_are_spread_by_weight() {
        let weights = [1, 2, 5];
        let mut sessions = [0u32; 3];
        // Any mixing of the bits does for a test.
        let mix = |seed: u64| {
            let seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            seed ^ (seed >> 31)
        };
        for session in 0..8_000u64 {
            let ranks = [0, 1, 2].map(|node| {
                let hash = mix(session * 3 + node + 1);
                rank(hash, weights[usize::try_from(node).unwrap()])
            });
            let nodes = ranks.map(|rank| Candidate {
                rank: Some(rank),
                ..idle(1)
            });
            sessions[choose(&nodes, 1).unwrap()] += 1;
        }
        for (got, weight) in sessions.into_iter().zip(weights) {
            let expected = 1_000.0 * weight as f64;
            assert!(
                (f64::from(got) - expected).abs() < expected * 0.15,
                "{sessions:?}"
            );
        }
    }

    #[test]
    fn the_rank_is_finite_for_every_hash() {
        for hash in [0, 1, u64::MAX, u64::MAX - 1] {
            assert!(rank(hash, 1).is_finite() && rank(hash, 1) > 0.0);
        }
    }

    #[test]
    fn nobody_is_chosen_out_of_nobody() {
        assert_eq!(choose(&[], 1), None);
    }
}
