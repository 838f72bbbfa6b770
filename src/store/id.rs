//! Checked layer ids.

use super::names;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr, sync::Arc};

/// Longest id, in bytes.
pub const MAX_ID_BYTES: usize = 128;
/// The suffix that the original driver gave to a directory that it was deleting; never part of an id.
pub const REMOVING_SUFFIX: &str = "-removing";

/// Device names, which Windows reserves in every directory: such an id could not be created there.
const WINDOWS_DEVICES: &[&str] = &[
    "con", "prn", "aux", "nul", "com1", "com2", "com3", "com4", "com5", "com6", "com7", "com8", "com9",
    "lpt1", "lpt2", "lpt3", "lpt4", "lpt5", "lpt6", "lpt7", "lpt8", "lpt9",
];

/// The id of a layer: 1–128 of `[A-Za-z0-9_.-]`, without a dot at either end, not a name that the store or Windows
/// uses, and without the suffix `-removing`.
///
/// An id becomes the name of a directory in the store's home. Whatever could lead elsewhere (`""`, `..`, `a/b`) or name
/// something else (`cache`) is refused before a path is built from it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LayerId(Arc<str>);

impl LayerId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A text that is no layer id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{}' is not a layer id: {reason}", id.escape_debug())]
pub struct InvalidId {
    /// The text, cut after [`MAX_ID_BYTES`] and one more character.
    pub id: String,
    /// Which rule it breaks.
    pub reason: &'static str,
}

impl FromStr for LayerId {
    type Err = InvalidId;

    fn from_str(id: &str) -> Result<Self, InvalidId> {
        let refuse = |reason| Err(InvalidId { id: id.chars().take(MAX_ID_BYTES + 1).collect(), reason });
        if id.is_empty() {
            return refuse("it is empty");
        }
        if id.len() > MAX_ID_BYTES {
            return refuse("it is longer than 128 bytes");
        }
        if !id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) {
            return refuse("only letters, digits, '_', '.' and '-' are allowed");
        }
        if id.starts_with('.') || id.ends_with('.') {
            return refuse("it must not start or end with a dot");
        }
        let lower = id.to_ascii_lowercase();
        if lower.ends_with(REMOVING_SUFFIX) {
            return refuse("the suffix '-removing' marks directories that are being deleted");
        }
        if names::RESERVED_NAMES.contains(&lower.as_str()) {
            return refuse("the store uses this name itself");
        }
        let stem = lower.split('.').next().unwrap_or_default();
        if WINDOWS_DEVICES.contains(&stem) {
            return refuse("Windows reserves this name for a device");
        }
        Ok(Self(id.into()))
    }
}

impl TryFrom<String> for LayerId {
    type Error = InvalidId;

    fn try_from(id: String) -> Result<Self, InvalidId> {
        id.parse()
    }
}

impl From<LayerId> for String {
    fn from(id: LayerId) -> String {
        id.0.as_ref().into()
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_and_test_suite_ids_are_accepted() {
        let hex = "0123456789abcdef".repeat(4);
        for id in
            [hex.clone(), format!("{hex}-init"), "Base".into(), "empty".into(), "a".into(), "x".repeat(128)]
        {
            assert_eq!(id.parse::<LayerId>().unwrap().as_str(), id);
        }
    }

    #[test]
    fn everything_that_could_name_another_place_is_refused() {
        for id in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a\\b",
            "/abs",
            ".hidden",
            "x.",
            "a\0b",
            "a b",
            "é",
            "cache",
            "Cache",
            "scratch",
            "staging",
            "mnt",
            "lcow-store.json",
            "owner.lock",
            "abc-removing",
            "ABC-REMOVING",
            "con",
            "NUL.txt",
            "c:",
            &"x".repeat(129),
        ] {
            let error = id.parse::<LayerId>().unwrap_err();
            assert!(!error.reason.is_empty(), "{id:?}: {error}");
        }
    }
}
