//! Whether splitting a request is worth it, where it is possible. Pure.
//!
//! | | served whole, because |
//! |---|---|
//! | a prompt of fewer than `split_min_tokens` | the hand-off takes longer than the prompt (`short_prompt`) |
//! | every prefill node has `split_max_backlog` tokens or more to do, and some decode node has nothing to do | that decode node is done sooner, and disturbs nobody (`prefill_busy`) |

use super::split::WholeReason;
use crate::fleet::{FleetSnapshot, NodeView, Role};
use crate::traffic::Traffic;

/// `[router]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// 0: every prompt is long enough.
    pub(super) min_tokens: u64,
    /// By unit of weight; 0: no backlog is too long.
    pub(super) max_backlog: u64,
}

/// How busy the nodes are that could share this request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pressure {
    /// Tokens in flight at the prefill node that has least, by its weight.
    pub(super) backlog: u64,
    pub(super) idle_decode: bool,
}

impl Pressure {
    /// `model`: which they have to serve.
    pub(super) fn of(fleet: &FleetSnapshot, traffic: &Traffic, model: Option<&str>) -> Self {
        let partners = |role| {
            fleet
                .ready(role)
                .filter(|node| node.can_hand_off() && node.serves(model))
        };
        let load = |node: &NodeView| traffic.open_load(&node.id);
        let backlogs = partners(Role::Prefill)
            .filter_map(|node| Some(load(node)?.tokens / u64::from(node.weight.max(1))));
        let idle = |node: &NodeView| load(node).is_some_and(|load| load.requests == 0);
        Self {
            backlog: backlogs.min().unwrap_or(0),
            idle_decode: partners(Role::Decode).any(idle),
        }
    }
}

/// `None`: split.
pub(super) fn not_worth_splitting(
    prompt: u64,
    limits: Limits,
    pressure: impl FnOnce() -> Pressure,
) -> Option<WholeReason> {
    if prompt < limits.min_tokens {
        return Some(WholeReason::ShortPrompt);
    }
    if limits.max_backlog == 0 {
        return None;
    }
    let pressure = pressure();
    let busy = pressure.backlog >= limits.max_backlog && pressure.idle_decode;
    busy.then_some(WholeReason::PrefillBusy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(min_tokens: u64, max_backlog: u64) -> Limits {
        Limits {
            min_tokens,
            max_backlog,
        }
    }

    fn pressure(backlog: u64, idle_decode: bool) -> Pressure {
        Pressure {
            backlog,
            idle_decode,
        }
    }

    #[test]
    fn short_prompts_stay_whole() {
        let calm = || pressure(0, true);
        let short = Some(WholeReason::ShortPrompt);
        assert_eq!(not_worth_splitting(99, limits(100, 0), calm), short);
        assert_eq!(not_worth_splitting(100, limits(100, 0), calm), None);
        assert_eq!(not_worth_splitting(0, limits(0, 0), calm), None);
    }

    #[test]
    fn only_an_idle_decode_node_relieves_prefill() {
        let busy = Some(WholeReason::PrefillBusy);
        for (backlog, idle, max, expected) in [
            (1_000, true, 1_000, busy),
            (999, true, 1_000, None),
            (1_000_000, false, 1_000, None),
            (1_000_000, true, 0, None),
        ] {
            let found = not_worth_splitting(50, limits(0, max), || pressure(backlog, idle));
            assert_eq!(found, expected, "{backlog} {idle} {max}");
        }
    }
}
