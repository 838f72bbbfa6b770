//! Digests: `sha256:<64 hex digits>` and `sha512:<128 hex digits>` (OCI image specification, "Digests").
//!
//! ```text
//!   text ─parse─► Digest (checked: lower-case hex of the right length) ─► path of a blob: blobs/<algorithm>/<hex>
//!   bytes ─Hasher─► Digest
//! ```
//!
//! A [`Digest`] can be used as part of a path: it has no other characters than those of its algorithm and hex digits. Called
//! by everything in this crate.

use crate::text::shown;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest as _, Sha256, Sha512};
use std::{fmt, str::FromStr};

/// A registered algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// SHA-256, which everything uses.
    Sha256,
    /// SHA-512, which a reader may be given.
    Sha512,
}

impl Algorithm {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// Bytes of a hash.
    fn bytes(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

/// A text that is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DigestError(String);

/// The digest of some bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest {
    algorithm: Algorithm,
    /// The hash, followed by zeros.
    hash: [u8; 64],
}

impl Digest {
    /// The SHA-256 of `bytes`.
    pub fn sha256(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(bytes);
        hasher.finish()
    }

    fn new(algorithm: Algorithm, bytes: &[u8]) -> Self {
        let mut hash = [0; 64];
        hash[..bytes.len()].copy_from_slice(bytes);
        Self { algorithm, hash }
    }

    /// The algorithm.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The hash.
    pub fn hash(&self) -> &[u8] {
        &self.hash[..self.algorithm.bytes()]
    }

    /// The hash in hexadecimal digits.
    pub fn hex(&self) -> String {
        use fmt::Write as _;
        let mut text = String::with_capacity(2 * self.algorithm.bytes());
        for byte in self.hash() {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        text
    }

    /// The digest whose hash has these digits.
    pub fn from_hex(algorithm: Algorithm, hex: &str) -> Option<Self> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        if hex.len() != 2 * algorithm.bytes() {
            return None;
        }
        let mut hash = [0; 64];
        for (byte, pair) in hash.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self { algorithm, hash })
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let bad = |reason: &str| DigestError(format!("not a digest: {}: {reason}", shown(text)));
        let (algorithm, hex) =
            text.split_once(':').ok_or_else(|| bad("expected sha256: and 64 hexadecimal digits"))?;
        let algorithm = match algorithm {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return Err(bad("the algorithm is neither sha256 nor sha512")),
        };
        Self::from_hex(algorithm, hex)
            .ok_or_else(|| bad(&format!("expected {} lower-case hexadecimal digits", 2 * algorithm.bytes())))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// Computes a digest.
#[derive(Debug, Clone)]
pub enum Hasher {
    /// SHA-256.
    Sha256(Sha256),
    /// SHA-512.
    Sha512(Sha512),
}

impl Hasher {
    /// Starts a digest.
    pub fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256(Sha256::new()),
            Algorithm::Sha512 => Self::Sha512(Sha512::new()),
        }
    }

    /// Appends bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// The digest of all bytes.
    pub fn finish(self) -> Digest {
        match self {
            Self::Sha256(hasher) => Digest::new(Algorithm::Sha256, &hasher.finalize()),
            Self::Sha512(hasher) => Digest::new(Algorithm::Sha512, &hasher.finalize()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_read_strictly_and_written_alike() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::sha256(b"").to_string(), empty);
        assert_eq!(empty.parse::<Digest>().unwrap(), Digest::sha256(b""));
        let mut long = Hasher::new(Algorithm::Sha512);
        long.update(b"abc");
        let long = long.finish();
        assert!(long.to_string().starts_with("sha512:ddaf35a193617abacc417349ae204131"));
        assert_eq!(long.to_string().parse::<Digest>().unwrap(), long);
        for bad in [
            "",
            "sha256",
            "sha256:",
            "sha1:da39a3ee5e6b4b0d3255bfef95601890afd80709",
            "sha256:../../../etc/passwd",
            "sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855",
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b85",
            "sha512:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b85g",
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
