//! Parsers of option values.

use super::{MAX_SANDBOX_BYTES, MIN_SANDBOX_BYTES};
use bytesize::ByteSize;
use std::path::PathBuf;

/// The unit of a number that names none.
#[derive(Debug, Clone, Copy)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Units of 2^30 bytes.
    Gigabytes,
}

pub(super) fn path(text: &str) -> Option<PathBuf> {
    (!text.is_empty()).then(|| PathBuf::from(text))
}

/// Parses a boolean as Go's `strconv.ParseBool` does, which the original driver used.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// Parses `on` and `off`, the values of the kernel's mount option `xino`.
pub fn parse_switch(text: &str) -> Option<bool> {
    match text {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

/// Parses a size as docker does: units are powers of 1024, with or without `i` and `B`.
pub fn parse_size(text: &str, bare: Unit) -> Option<u64> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    if unit.trim().is_empty() {
        let number: u64 = number.parse().ok()?;
        return match bare {
            Unit::Bytes => Some(number),
            Unit::Gigabytes => number.checked_mul(1 << 30),
        };
    }
    // docker's units.RAMInBytes: `1g`, `1gb` and `1GiB` are all 2^30.
    let letter = unit.trim().to_ascii_lowercase();
    let letter = letter.strip_suffix("ib").or_else(|| letter.strip_suffix('b')).unwrap_or(&letter);
    let iec = if letter.is_empty() {
        format!("{number}B")
    } else {
        format!("{number}{}iB", letter.to_ascii_uppercase())
    };
    iec.parse::<ByteSize>().ok().map(|s| s.as_u64())
}

/// Parses a sandbox's size, checks its limits, and rounds it down to whole pages of 4 KiB.
pub fn parse_sandbox_size(text: &str, bare: Unit) -> Option<u64> {
    parse_size(text, bare).filter(|b| (MIN_SANDBOX_BYTES..=MAX_SANDBOX_BYTES).contains(b)).map(|b| b & !0xfff)
}
