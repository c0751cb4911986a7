//! The keys that exist, and which of them a wrong one may have meant.

/// A table of the file and the keys that it may hold.
pub(super) struct Known {
    /// As a person writes it: empty for the top, `[kv]`, `[[node]]`.
    pub(super) header: &'static str,
    pub(super) keys: &'static [&'static str],
}

pub(super) const TOP: Known = Known {
    header: "",
    keys: &[
        "name",
        "device",
        "model",
        "served_model_name",
        "dtype",
        "block_size",
        "max_model_len",
        "runtime",
        "kv",
        "router",
        "supervisor",
        "node",
    ],
};

pub(super) const RUNTIME: Known = Known {
    header: "[runtime]",
    keys: &[
        "kind",
        "python",
        "python_version",
        "requirements",
        "overrides",
    ],
};

pub(super) const KV: Known = Known {
    header: "[kv]",
    keys: &[
        "capacity",
        "hugepages",
        "numa",
        "handoff_deadline",
        "save_decoded",
        "allow_unproven_models",
        "canary_logprob_tolerance",
    ],
};

pub(super) const ROUTER: Known = Known {
    header: "[router]",
    keys: &[
        "listen",
        "connect_timeout",
        "first_byte_timeout",
        "chunk_timeout",
        "handoff_timeout",
        "max_body",
        "max_in_flight",
        "max_queue",
        "queue_timeout",
        "drain_timeout",
    ],
};

pub(super) const SUPERVISOR: Known = Known {
    header: "[supervisor]",
    keys: &[
        "start_timeout",
        "health_interval",
        "hang_timeout",
        "idle_canary",
        "stop_grace",
        "backoff_first",
        "backoff_max",
        "crash_limit",
        "crash_window",
        "log_bytes",
    ],
};

pub(super) const NODE: Known = Known {
    header: "[[node]]",
    keys: &[
        "name",
        "role",
        "pool",
        "count",
        "gpus",
        "cpus",
        "tensor_parallel",
        "args",
        "env",
        "port",
        "gpu_memory_fraction",
        "kv_cache",
    ],
};

const ALL: [&Known; 6] = [&TOP, &RUNTIME, &KV, &ROUTER, &SUPERVISOR, &NODE];

impl Known {
    /// What to write instead of a key that does not exist here.
    pub(super) fn hint(&self, unknown: &str) -> String {
        let elsewhere = ALL
            .iter()
            .find(|other| other.header != self.header && other.keys.contains(&unknown));
        if let Some(other) = elsewhere {
            return match other.header {
                "" => format!("write `{unknown}` at the top of the file, above every [table]"),
                header => format!("write `{unknown}` under {header}"),
            };
        }
        match self.nearest(unknown) {
            Some(key) => format!("did you mean `{key}`?"),
            None => format!("known here: {}", self.keys.join(", ")),
        }
    }

    fn nearest(&self, unknown: &str) -> Option<&'static str> {
        let limit = (unknown.chars().count() / 3).clamp(1, 4);
        self.keys
            .iter()
            .map(|key| (distance(unknown, key), *key))
            .filter(|(distance, _)| *distance <= limit)
            .min()
            .map(|(_, key)| key)
    }
}

/// Levenshtein: letters to insert, delete or replace.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(b.chars()) {
            let replace = diagonal + usize::from(x != y);
            diagonal = *cell;
            left = replace.min(diagonal + 1).min(left + 1);
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_edits() {
        for (a, b, edits) in [
            ("gpus", "gpus", 0),
            ("gpu", "gpus", 1),
            ("", "abc", 3),
            ("abc", "", 3),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(distance(a, b), edits, "{a} {b}");
        }
    }

    #[test]
    fn the_nearest_key_is_found_and_far_ones_are_not() {
        assert_eq!(NODE.nearest("gpu"), Some("gpus"));
        assert_eq!(NODE.nearest("tensor_paralell"), Some("tensor_parallel"));
        assert_eq!(NODE.nearest("banana"), None);
    }

    #[test]
    fn the_reference_explains_every_key() {
        let reference = include_str!("../../docs/topology.md");
        for known in ALL {
            for key in known.keys {
                assert!(
                    reference.contains(&format!("`{key}`"))
                        || reference.contains(&format!("[{key}]")),
                    "docs/topology.md lacks {key}"
                );
            }
        }
    }
}
