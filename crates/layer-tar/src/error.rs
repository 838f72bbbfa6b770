//! Errors of a tar stream, each with the entry and the offset.

use std::{fmt, io};

/// The name of an entry as shown in errors: escaped, and truncated to fit a log line. Empty before the first entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryName(String);

impl EntryName {
    const MAX_CHARS: usize = 256;

    /// Escapes and truncates `path`.
    pub fn new(path: &[u8]) -> Self {
        let head = path.get(..Self::MAX_CHARS * 4).unwrap_or(path);
        let mut name: String = String::from_utf8_lossy(head)
            .chars()
            .take(Self::MAX_CHARS)
            .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
            .collect();
        if head.len() < path.len() {
            name.push('…');
        }
        Self(name)
    }
}

impl fmt::Display for EntryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No name yet: the stream is malformed before the header of the first entry was parsed.
        if self.0.is_empty() {
            f.write_str("before the first entry")
        } else {
            write!(f, "entry {:?}", self.0)
        }
    }
}

/// Why a tar stream was refused. `offset` counts bytes from the start of the stream, `entry` is the entry that was
/// being read (empty before the first).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TarError {
    /// The stream has no bytes. (An empty archive has at least its end blocks.)
    #[error("tar stream is empty: not even an end-of-archive block")]
    Empty,
    /// The stream ended inside an entry or a header.
    #[error("tar stream ends at byte {offset} inside {what} ({entry})")]
    Truncated {
        /// Entry being read.
        entry: EntryName,
        /// Length of the stream.
        offset: u64,
        /// The truncated part.
        what: &'static str,
    },
    /// A field contradicts the format.
    #[error("tar stream is corrupt at byte {offset} ({entry}): {reason}")]
    Corrupt {
        /// Entry being read.
        entry: EntryName,
        /// Start of the malformed header or data.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// Valid, but of a kind that this reader does not support.
    #[error("tar stream has an unsupported entry at byte {offset} ({entry}): {reason}")]
    Unsupported {
        /// Entry being read.
        entry: EntryName,
        /// Start of the header.
        offset: u64,
        /// What is not supported.
        reason: String,
    },
    /// More than this reader accepts.
    #[error("tar stream has more than {limit} {what} at byte {offset} ({entry})")]
    Limit {
        /// Entry being read.
        entry: EntryName,
        /// Start of the header.
        offset: u64,
        /// What exceeds the limit.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The stream could not be read.
    #[error("reading the tar stream failed at byte {offset}")]
    Io {
        /// Number of bytes read before.
        offset: u64,
        /// The error of the source.
        #[source]
        source: io::Error,
    },
}
