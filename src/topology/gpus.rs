//! The keys of a `[[node]]` that say which GPUs it gets.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use toml::de::DeValue;

use super::problem::ProblemKind;
use super::value::{bad, has_duplicates, integer, wrong};

/// `gpus` of a node; how many is `tensor_parallel`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GpuRequest {
    /// Those that are close to each other and to their partners, and have the most free memory.
    Auto,
    Listed(Vec<GpuSelector>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GpuSelector {
    /// In PCI bus order, as nvidia-smi counts.
    Index(u32),
    /// As `nvidia-smi -L` prints it: `GPU-...`.
    Uuid(String),
    Pci(PciAddress),
}

impl fmt::Display for GpuSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(index) => write!(f, "GPU {index}"),
            Self::Uuid(uuid) => f.write_str(uuid),
            Self::Pci(address) => write!(f, "the GPU at {address}"),
        }
    }
}

/// Where a device sits on the PCI bus. A GPU's function is always 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PciAddress {
    pub domain: u32,
    pub bus: u8,
    pub device: u8,
}

impl fmt::Display for PciAddress {
    /// As Linux names it in /sys/bus/pci/devices.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            device,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.0")
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> Self {
        address.to_string()
    }
}

/// A text that is no address of a device's first function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a PCI address like 0000:3b:00.0")]
pub struct NoPciAddress;

impl FromStr for PciAddress {
    type Err = NoPciAddress;

    /// `0000:3b:00.0`, nvidia-smi's `00000000:3B:00.0`, or lspci's `3b:00.0`.
    fn from_str(text: &str) -> Result<Self, NoPciAddress> {
        let text = text.strip_suffix(".0").ok_or(NoPciAddress)?;
        let parts: Vec<&str> = text.split(':').collect();
        let (domain, bus, device) = match parts[..] {
            [bus, device] => ("0", bus, device),
            [domain, bus, device] => (domain, bus, device),
            _ => return Err(NoPciAddress),
        };
        let number = |digits: &str| {
            let is_hex = digits.chars().all(|digit| digit.is_ascii_hexdigit());
            let number = is_hex.then(|| u32::from_str_radix(digits, 16).ok());
            number.flatten().ok_or(NoPciAddress)
        };
        let byte = |digits| u8::try_from(number(digits)?).map_err(|_| NoPciAddress);
        let device = byte(device)?;
        // Five bits on the bus.
        if device > 0x1f {
            return Err(NoPciAddress);
        }
        Ok(Self {
            domain: number(domain)?,
            bus: byte(bus)?,
            device,
        })
    }
}

impl TryFrom<String> for PciAddress {
    type Error = NoPciAddress;

    fn try_from(text: String) -> Result<Self, NoPciAddress> {
        text.parse()
    }
}

/// `gpus`, and how many were asked for where that was said.
pub(super) fn gpus(value: &DeValue<'_>) -> Result<(GpuRequest, Option<u32>), ProblemKind> {
    const INSTEAD: &str =
        "\"auto\", a number of GPUs, or a list like [0, 1], [\"GPU-...\"] or [\"0000:3b:00.0\"]";
    match value {
        DeValue::String(text) if text == "auto" => Ok((GpuRequest::Auto, None)),
        DeValue::String(_) => Err(bad(value, INSTEAD)),
        DeValue::Integer(_) => {
            let count = integer::<u32>(1..=64)(value).map_err(|_| bad(value, INSTEAD))?;
            Ok((GpuRequest::Auto, Some(count)))
        }
        DeValue::Array(items) => {
            let listed = items
                .iter()
                .map(|item| selector(item.get_ref()))
                .collect::<Result<Vec<_>, _>>()?;
            if listed.is_empty() || has_duplicates(&listed) {
                return Err(bad(value, INSTEAD));
            }
            let count = u32::try_from(listed.len()).ok();
            Ok((GpuRequest::Listed(listed), count))
        }
        _ => Err(wrong(value, INSTEAD)),
    }
}

fn selector(value: &DeValue<'_>) -> Result<GpuSelector, ProblemKind> {
    const INSTEAD: &str = "an index like 0, a UUID like \"GPU-...\" (nvidia-smi -L lists them), or \
                           a PCI address like \"0000:3b:00.0\"";
    const WHOLE: &str = "a whole GPU: MIG instances are not supported; switch MIG off \
                         (nvidia-smi -i INDEX -mig 0) or name another GPU";
    match value {
        DeValue::Integer(_) => integer(0..=1023)(value)
            .map(GpuSelector::Index)
            .map_err(|_| bad(value, INSTEAD)),
        DeValue::String(text) if text.starts_with("GPU-") => {
            Ok(GpuSelector::Uuid(text.clone().into_owned()))
        }
        DeValue::String(text) if text.starts_with("MIG-") => Err(bad(value, WHOLE)),
        DeValue::String(text) => text
            .parse()
            .map(GpuSelector::Pci)
            .map_err(|NoPciAddress| bad(value, INSTEAD)),
        _ => Err(wrong(value, INSTEAD)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_in_every_common_spelling() {
        let address = PciAddress {
            domain: 0,
            bus: 0x3b,
            device: 0,
        };
        for text in ["0000:3b:00.0", "00000000:3B:00.0", "3b:00.0"] {
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
        assert_eq!(address.to_string(), "0000:3b:00.0");
        let far: PciAddress = "1a2b:ff:1f.0".parse().unwrap();
        assert_eq!(far.to_string().parse(), Ok(far));
        for text in [
            "",
            "3b:00",
            "3b:00.1",
            "3b:20.0",
            "+3:00.0",
            "100:00.0",
            "a:b:c:d.0",
            "0000:xx:00.0",
        ] {
            assert_eq!(text.parse::<PciAddress>(), Err(NoPciAddress), "{text}");
        }
    }
}
