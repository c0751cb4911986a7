//! What to write instead of a key that does not exist.

use super::{ALL, Table};

impl Table {
    pub(in crate::topology) fn hint(&self, unknown: &str) -> String {
        let elsewhere = ALL
            .iter()
            .find(|other| other.header != self.header && other.key(unknown).is_some());
        if let Some(other) = elsewhere {
            return match other.header {
                "" => format!("write `{unknown}` at the top of the file, above every [table]"),
                header => format!("write `{unknown}` under {header}"),
            };
        }
        match self.nearest(unknown) {
            Some(key) => format!("did you mean `{key}`?"),
            None => {
                let names: Vec<&str> = self.keys.iter().map(|key| key.name).collect();
                format!("known here: {}", names.join(", "))
            }
        }
    }

    fn nearest(&self, unknown: &str) -> Option<&'static str> {
        let limit = (unknown.chars().count() / 3).clamp(1, 4);
        self.keys
            .iter()
            .map(|key| (distance(unknown, key.name), key.name))
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
    use super::super::NODE;
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
}
