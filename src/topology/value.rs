//! One TOML value to one Rust value.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use bytesize::ByteSize;
use toml::de::DeValue;

use super::problem::ProblemKind;
use super::{CpuRequest, Device, NodeUrl, UrlError};
use crate::fleet::Role;

type Read<T> = Result<T, ProblemKind>;

pub(super) fn string(value: &DeValue<'_>) -> Read<String> {
    text(value, "a string, like \"...\"").map(str::to_owned)
}

pub(super) fn non_empty(value: &DeValue<'_>) -> Read<String> {
    match string(value)? {
        text if text.trim().is_empty() => Err(bad(value, "a string that is not empty")),
        text => Ok(text),
    }
}

pub(super) fn boolean(value: &DeValue<'_>) -> Read<bool> {
    value
        .as_bool()
        .ok_or_else(|| wrong(value, "true or false, without quotes"))
}

/// An integer within a range that fits the type.
pub(super) fn integer<T: TryFrom<i128>>(
    range: RangeInclusive<i128>,
) -> impl Fn(&DeValue<'_>) -> Read<T> {
    move |value| {
        let instead = format!("a whole number from {} to {}", range.start(), range.end());
        let number = whole(value).ok_or_else(|| wrong(value, &instead))?;
        if !range.contains(&number) {
            return Err(bad(value, &instead));
        }
        T::try_from(number).map_err(|_| bad(value, &instead))
    }
}

/// A number within a range.
pub(super) fn number(range: RangeInclusive<f64>) -> impl Fn(&DeValue<'_>) -> Read<f64> {
    move |value| {
        let instead = format!("a number from {:?} to {:?}", range.start(), range.end());
        let number = match value {
            DeValue::Float(float) => float.as_str().parse::<f64>().ok(),
            DeValue::Integer(integer) => integer.as_str().parse::<f64>().ok(),
            _ => None,
        }
        .ok_or_else(|| wrong(value, &instead))?;
        if range.contains(&number) {
            Ok(number)
        } else {
            Err(bad(value, &instead))
        }
    }
}

/// A duration that may be zero.
pub(super) fn duration_or_zero(value: &DeValue<'_>) -> Read<Duration> {
    const INSTEAD: &str = "a duration with its unit, like \"30s\", \"500ms\" or \"5m\"";
    let text = text(value, INSTEAD)?;
    humantime::parse_duration(text).map_err(|_| bad(value, INSTEAD))
}

/// A duration above zero, up to a week: longer is a typing error, and could overflow a deadline.
pub(super) fn duration(value: &DeValue<'_>) -> Read<Duration> {
    const WEEK: Duration = Duration::from_secs(7 * 24 * 3600);
    match duration_or_zero(value)? {
        duration if duration.is_zero() || duration > WEEK => {
            Err(bad(value, "a duration above zero and up to a week"))
        }
        duration => Ok(duration),
    }
}

/// A size in bytes.
pub(super) fn size(value: &DeValue<'_>) -> Read<u64> {
    const INSTEAD: &str = "a size with its unit, like \"8GiB\" or \"512MiB\"";
    let text = text(value, INSTEAD)?;
    match text.parse::<ByteSize>() {
        Ok(ByteSize(bytes)) if bytes > 0 => Ok(bytes),
        _ => Err(bad(value, INSTEAD)),
    }
}

/// A header's name in lower case; empty for none.
pub(super) fn header(value: &DeValue<'_>) -> Read<Option<String>> {
    const INSTEAD: &str = "the name of a header, like \"x-session-id\", or \"\" for none";
    let text = text(value, INSTEAD)?;
    if text.is_empty() {
        return Ok(None);
    }
    match http::HeaderName::from_bytes(text.as_bytes()) {
        Ok(name) => Ok(Some(name.as_str().to_owned())),
        Err(_) => Err(bad(value, INSTEAD)),
    }
}

pub(super) fn address(value: &DeValue<'_>) -> Read<SocketAddr> {
    const INSTEAD: &str = "an IP address and a port, like \"127.0.0.1:8000\"";
    text(value, INSTEAD)?
        .parse()
        .map_err(|_| bad(value, INSTEAD))
}

/// An address that one listener can have, and others can connect to.
pub(super) fn host(value: &DeValue<'_>) -> Read<IpAddr> {
    const INSTEAD: &str = "an IP address of this machine, like \"10.0.0.8\"";
    const ONE: &str =
        "one IP address of this machine, like \"10.0.0.8\": pegaflow itself connects to it";
    let found: IpAddr = text(value, INSTEAD)?
        .parse()
        .map_err(|_| bad(value, INSTEAD))?;
    match found.is_unspecified() || found.is_multicast() {
        true => Err(bad(value, ONE)),
        false => Ok(found),
    }
}

pub(super) fn node_url(value: &DeValue<'_>) -> Read<NodeUrl> {
    let text = text(value, "a URL, like \"http://10.0.0.7:8000\"")?;
    text.parse().map_err(|error: UrlError| {
        let instead = error.to_string();
        let instead = instead.strip_prefix("write ").unwrap_or(&instead);
        bad(value, instead)
    })
}

pub(super) fn device(value: &DeValue<'_>) -> Read<Device> {
    one_of(value, &[("cuda", Device::Cuda), ("cpu", Device::Cpu)])
}

pub(super) fn role(value: &DeValue<'_>) -> Read<Role> {
    one_of(
        value,
        &[
            ("prefill", Role::Prefill),
            ("decode", Role::Decode),
            ("unified", Role::Unified),
        ],
    )
}

/// A string out of a list.
pub(super) fn one_of<T: Clone>(value: &DeValue<'_>, choices: &[(&str, T)]) -> Read<T> {
    let names: Vec<String> = choices
        .iter()
        .map(|(name, _)| format!("{name:?}"))
        .collect();
    let instead = names.join(" or ");
    let text = text(value, &instead)?;
    choices
        .iter()
        .find(|(name, _)| *name == text)
        .map(|(_, choice)| choice.clone())
        .ok_or_else(|| bad(value, &instead))
}

pub(super) fn cpus(value: &DeValue<'_>) -> Read<CpuRequest> {
    const INSTEAD: &str = "\"auto\", \"all\" or a list of cores, like [0, 1]";
    match value {
        DeValue::String(text) if text == "auto" => Ok(CpuRequest::Auto),
        DeValue::String(text) if text == "all" => Ok(CpuRequest::All),
        DeValue::String(_) => Err(bad(value, INSTEAD)),
        DeValue::Array(items) => {
            let listed = items
                .iter()
                .map(|item| integer(0..=4095)(item.get_ref()))
                .collect::<Read<Vec<usize>>>()?;
            if listed.is_empty() || has_duplicates(&listed) {
                return Err(bad(value, INSTEAD));
            }
            Ok(CpuRequest::Listed(listed))
        }
        _ => Err(wrong(value, INSTEAD)),
    }
}

pub(super) fn has_duplicates<T: PartialEq>(items: &[T]) -> bool {
    items
        .iter()
        .enumerate()
        .any(|(i, item)| items.iter().skip(i + 1).any(|other| other == item))
}

fn whole(value: &DeValue<'_>) -> Option<i128> {
    let integer = value.as_integer()?;
    i128::from_str_radix(integer.as_str(), integer.radix()).ok()
}

fn text<'v>(value: &'v DeValue<'_>, instead: &str) -> Read<&'v str> {
    value.as_str().ok_or_else(|| wrong(value, instead))
}

pub(super) fn wrong(value: &DeValue<'_>, instead: &str) -> ProblemKind {
    ProblemKind::WrongType {
        found: found(value),
        instead: instead.to_owned(),
    }
}

pub(super) fn bad(value: &DeValue<'_>, instead: &str) -> ProblemKind {
    ProblemKind::BadValue {
        found: found(value),
        instead: instead.to_owned(),
    }
}

/// A value as a person wrote it, with its type where that helps.
fn found(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("the string {text:?}"),
        DeValue::Integer(integer) => format!("the number {integer}"),
        DeValue::Float(float) => format!("the number {float}"),
        DeValue::Boolean(boolean) => format!("{boolean}"),
        DeValue::Datetime(datetime) => format!("the date {datetime}"),
        DeValue::Array(items) => format!("a list of {}", items.len()),
        DeValue::Table(_) => "a table".to_owned(),
    }
}
