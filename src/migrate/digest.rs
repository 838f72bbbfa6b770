//! `sha256:<64 hex digits>`: how the engine names configurations (image id), tars (diff id) and stacks of tars (chain
//! id).

use sha2::{Digest as _, Sha256};
use std::{fmt, str::FromStr};

const PREFIX: &str = "sha256:";

/// A SHA-256 digest in the engine's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// A text that is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{}' is not a digest: expected sha256: and 64 lower-case hexadecimal digits", .0.escape_debug())]
pub struct ParseDigestError(String);

impl Digest {
    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The result of a hash.
    pub(super) fn from_hash(hash: Sha256) -> Self {
        Self(hash.finalize().into())
    }

    /// The chain id of a layer: its diff id, or the digest of its parent's chain id and its diff id (OCI image
    /// specification, "Layer ChainID").
    pub fn chain(parent: Option<Self>, diff: Self) -> Self {
        parent.map_or(diff, |parent| Self::of(format!("{parent} {diff}").as_bytes()))
    }

    /// The 64 digits without the prefix: the name of its file or directory in the engine's databases.
    pub fn hex(&self) -> String {
        self.to_string().split_off(PREFIX.len())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, ParseDigestError> {
        /// Characters of a wrong text that an error shows.
        const SHOWN: usize = 80;
        let wrong = || ParseDigestError(text.chars().take(SHOWN).collect());
        let hex = text.strip_prefix(PREFIX).ok_or_else(wrong)?;
        let digit = |b: u8| match b {
            b'0'..=b'9' => Some(b - b'0'),
            b'a'..=b'f' => Some(b - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0; 32];
        if hex.len() != 2 * bytes.len() {
            return Err(wrong());
        }
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            *byte =
                digit(pair[0]).zip(digit(pair[1])).map(|(high, low)| high << 4 | low).ok_or_else(wrong)?;
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_read_and_shown_alike() {
        let empty = Digest::of(b"");
        let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(empty.to_string(), text);
        assert_eq!(text.parse(), Ok(empty));
        assert_eq!(empty.hex(), text[7..]);
        for wrong in
            ["", "sha256:", "sha256:ab", &text[..70], &text.to_uppercase(), &format!("{text}0"), "md5:x"]
        {
            assert!(wrong.parse::<Digest>().is_err(), "{wrong}");
        }
        assert!(format!("sha256:{}", "é".repeat(32)).parse::<Digest>().is_err());
    }

    #[test]
    fn a_chain_id_covers_the_parent() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(Digest::chain(None, a), a);
        assert_eq!(Digest::chain(Some(a), b), Digest::of(format!("{a} {b}").as_bytes()));
    }
}
