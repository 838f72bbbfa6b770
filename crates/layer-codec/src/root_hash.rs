//! The root hash of a dm-verity tree, as summaries, messages and files have it. Called by `apply` and by callers that
//! store or show a root hash.

use std::{fmt, str::FromStr};

/// Root hash of a dm-verity tree; 64 hexadecimal digits in messages and on screens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "String", into = "String"))]
pub struct RootHash(pub verity_tree::Hash);

/// A text that is not a [`RootHash`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a root hash is 64 hexadecimal digits")]
pub struct NoRootHash;

impl fmt::Display for RootHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for RootHash {
    type Err = NoRootHash;

    fn from_str(text: &str) -> Result<Self, NoRootHash> {
        let mut hash = [0; verity_tree::HASH];
        if text.len() != 2 * hash.len() || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(NoRootHash);
        }
        for (byte, pair) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| NoRootHash)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| NoRootHash)?;
        }
        Ok(Self(hash))
    }
}

impl From<RootHash> for String {
    fn from(hash: RootHash) -> Self {
        hash.to_string()
    }
}

impl TryFrom<String> for RootHash {
    type Error = NoRootHash;

    fn try_from(text: String) -> Result<Self, NoRootHash> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_hash_is_its_hexadecimal_digits() {
        let hash = RootHash([0xa5; verity_tree::HASH]);
        assert_eq!(hash.to_string(), "a5".repeat(32));
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert_eq!("A5".repeat(32).parse(), Ok(hash));
        for bad in ["", "a5", &"zz".repeat(32), &"+5".repeat(32), &"a5".repeat(33)] {
            assert_eq!(bad.parse::<RootHash>(), Err(NoRootHash), "{bad}");
        }
    }
}
