//! The keys of `[kv]` that say what memory the store takes.

use bytesize::ByteSize;
use toml::de::DeValue;

use super::problem::ProblemKind;
use super::value::{bad, has_duplicates, integer, one_of, wrong};

/// `capacity`: how much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capacity {
    Bytes(u64),
    /// Of the memory that this machine, or the control group that pegaflow runs in, has; 1 to 100.
    Percent(u8),
}

impl Capacity {
    /// In bytes, on a machine with this much memory.
    pub fn bytes(self, memory: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => {
                let bytes = u128::from(memory) * u128::from(percent) / 100;
                u64::try_from(bytes).unwrap_or(u64::MAX)
            }
        }
    }
}

/// `hugepages`: whether the store is made of 2 MiB pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HugepageRequest {
    /// Where the machine has set enough of them aside.
    Auto,
    On,
    Off,
}

/// `numa`: on which NUMA nodes the store lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NumaRequest {
    /// On those of the GPUs or cores that share it.
    Auto,
    /// Spread over all.
    Interleave,
    /// Where the kernel puts it.
    None,
    /// On the one listed, or spread over several; not empty.
    Nodes(Vec<u32>),
}

pub(super) fn capacity(value: &DeValue<'_>) -> Result<Capacity, ProblemKind> {
    const INSTEAD: &str = "a size with its unit, like \"8GiB\", or a share of this machine's \
                           memory, \"1%\" to \"100%\"";
    let text = value.as_str().ok_or_else(|| wrong(value, INSTEAD))?;
    let capacity = match text.strip_suffix('%') {
        Some(percent) => percent
            .parse()
            .ok()
            .filter(|percent| (1..=100).contains(percent))
            .map(Capacity::Percent),
        None => match text.parse::<ByteSize>() {
            Ok(ByteSize(bytes)) if bytes > 0 => Some(Capacity::Bytes(bytes)),
            _ => None,
        },
    };
    capacity.ok_or_else(|| bad(value, INSTEAD))
}

pub(super) fn hugepages(value: &DeValue<'_>) -> Result<HugepageRequest, ProblemKind> {
    use HugepageRequest::{Auto, Off, On};
    one_of(value, &[("auto", Auto), ("on", On), ("off", Off)])
}

pub(super) fn numa(value: &DeValue<'_>) -> Result<NumaRequest, ProblemKind> {
    use NumaRequest::{Auto, Interleave, Nodes, None};
    const INSTEAD: &str = "\"auto\", \"interleave\", \"none\", or a list of NUMA nodes, like [0]";
    match value {
        DeValue::String(_) => one_of(
            value,
            &[("auto", Auto), ("interleave", Interleave), ("none", None)],
        )
        .map_err(|_| bad(value, INSTEAD)),
        DeValue::Array(items) => {
            let listed = items
                .iter()
                .map(|item| integer(0..=1023)(item.get_ref()))
                .collect::<Result<Vec<u32>, _>>()?;
            if listed.is_empty() || has_duplicates(&listed) {
                return Err(bad(value, INSTEAD));
            }
            Ok(Nodes(listed))
        }
        _ => Err(wrong(value, INSTEAD)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_largest_memory_does_not_overflow() {
        assert_eq!(Capacity::Percent(100).bytes(u64::MAX), u64::MAX);
        assert_eq!(Capacity::Percent(50).bytes(9), 4);
        assert_eq!(Capacity::Bytes(7).bytes(1), 7);
    }
}
