//! Compressed streams: how one is recognized, what may be asked for, and what is reported.
//!
//! ```text
//!   blob ─► sniff (first bytes only) ─► Plain ──────────────► tar
//!                                   └─► Gzip, Zstd ─► expand ─► tar, within ExpandLimits
//!   tar  ─► compress ─► blob, the same bytes for the same tar and level, on every host
//! ```
//!
//! [`sniff`] compares at most [`SNIFF_BYTES`] bytes with constants and interprets nothing, so that a process that must not
//! interpret a stream may call it. Called by everything in this crate, and by its users.

use std::fmt;

/// Bytes of a stream that [`sniff`] looks at.
pub const SNIFF_BYTES: usize = 4;
/// Base-2 logarithm of the largest zstd window that is accepted by default: 128 MiB, as the `zstd` program accepts
/// without `--long=31` or `--memory`. A worker needs that much memory for such a frame.
pub const MAX_WINDOW_LOG: u32 = 27;
/// Level of gzip, on deflate's scale of 1 to 9. Part of the reproducible output: a change gives other bytes. Against the
/// customary 6 it is a third faster (92 and 70 MB/s of a tar of system files) for 2 % more bytes.
pub const GZIP_LEVEL: u32 = 4;
/// Level of zstd, on its scale of 1 to 22; 3 is the default of the `zstd` program. Part of the reproducible output.
pub const ZSTD_LEVEL: u32 = 3;

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Compression {
    /// Not at all.
    #[default]
    Plain,
    /// gzip (RFC 1952): one or more members.
    Gzip,
    /// Zstandard (RFC 8878): one or more frames, skippable ones included.
    Zstd,
}

impl Compression {
    /// The level at which this project compresses; 0 for [`Compression::Plain`].
    pub fn level(self) -> u32 {
        match self {
            Self::Plain => 0,
            Self::Gzip => GZIP_LEVEL,
            Self::Zstd => ZSTD_LEVEL,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}

/// How a stream that begins with `first` is compressed. Fewer than [`SNIFF_BYTES`] bytes are conclusive only if the
/// stream ends after them. A tar cannot be mistaken unless its first name begins with such bytes.
pub fn sniff(first: &[u8]) -> Compression {
    match first {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        // A frame, or a skippable one (0x184D2A50 to 0x184D2A5F), with which a stream may begin.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        _ => Compression::Plain,
    }
}

/// What an expansion may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ExpandLimits {
    /// The most plain bytes. A stream with more is refused with [`RecodeError::Output`](crate::RecodeError::Output).
    pub output_bytes: u64,
    /// Base-2 logarithm of the largest zstd window, from 10 on; frames that need more are refused likewise.
    pub window_log: u32,
}

impl ExpandLimits {
    /// At most `output_bytes`, with the largest window of [`MAX_WINDOW_LOG`].
    pub fn of_output(output_bytes: u64) -> Self {
        Self { output_bytes, window_log: MAX_WINDOW_LOG }
    }
}

/// The result of an expansion or a compression.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct RecodeSummary {
    /// The compressed side's format: what was found, or what was requested.
    pub format: Compression,
    /// Bytes that came in.
    pub bytes_in: u64,
    /// Bytes that went out.
    pub bytes_out: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_known_by_their_first_bytes() {
        for (first, expected) in [
            (&b"\x1f\x8b\x08\0"[..], Compression::Gzip),
            (b"\x1f\x8b", Compression::Gzip),
            (b"\x28\xb5\x2f\xfd\x04", Compression::Zstd),
            (b"\x50\x2a\x4d\x18", Compression::Zstd),
            (b"\x5f\x2a\x4d\x18", Compression::Zstd),
            (b"\x60\x2a\x4d\x18", Compression::Plain),
            (b"\x4f\x2a\x4d\x18", Compression::Plain),
            (b"\x28\xb5\x2f", Compression::Plain),
            (b"\x1f", Compression::Plain),
            (b"./\0\0\0\0\0\0", Compression::Plain),
            (b"BZh9", Compression::Plain),
            (b"", Compression::Plain),
        ] {
            assert_eq!(sniff(first), expected, "{first:x?}");
            assert_eq!(sniff(&first[..first.len().min(SNIFF_BYTES)]), expected, "{first:x?}");
        }
    }
}
