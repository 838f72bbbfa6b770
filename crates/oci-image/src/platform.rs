//! Platforms: `os/architecture[/variant]`, which of several fits, and which is the best.
//!
//! ```text
//!   linux/arm64 on an index:  arm64/v8 ─ else arm64 ─ else arm/v8 ─ arm/v7 ─ arm/v6 ─ arm/v5        (rank 0, 1, 2 …)
//! ```
//!
//! Names and order are those of containerd's `platforms` package (`defaults`, `compare.go`): an amd64 machine also runs
//! 386, an arm64 machine also runs arm, and a variant runs the lower ones. Called by `resolve`.

use crate::ImageError;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// What an image runs on.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// Operating system, as Go names it.
    #[serde(default)]
    pub os: String,
    /// Processor, as Go names it.
    #[serde(default)]
    pub architecture: String,
    /// Variant of the processor, for example `v7`; empty if there is none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
    /// Version of the system (Windows).
    #[serde(default, rename = "os.version", skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    /// Features of the system (Windows).
    #[serde(default, rename = "os.features", skip_serializing_if = "Vec::is_empty")]
    pub os_features: Vec<String>,
}

impl Platform {
    /// Linux on this machine's processor.
    pub fn linux() -> Self {
        Self::new("linux", std::env::consts::ARCH, "")
    }

    /// A platform with its names normalized.
    pub fn new(os: &str, architecture: &str, variant: &str) -> Self {
        Self { os: os.into(), architecture: architecture.into(), variant: variant.into(), ..Self::default() }
            .normalized()
    }

    /// Whether it says nothing, as for attestations (`unknown/unknown`).
    pub fn is_unknown(&self) -> bool {
        let unknown = |text: &str| text.is_empty() || text == "unknown";
        unknown(&self.os) && unknown(&self.architecture)
    }

    /// The same platform in the names that Go uses, with the default variant left out (`arm`: written out).
    #[must_use]
    pub fn normalized(&self) -> Self {
        let os = match self.os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let variant = self.variant.to_ascii_lowercase();
        let architecture = self.architecture.to_ascii_lowercase();
        let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
            ("i386" | "i486" | "i586" | "i686" | "x86", _) => ("386", ""),
            ("x86_64" | "x86-64" | "amd64", "" | "v1") => ("amd64", ""),
            ("x86_64" | "x86-64" | "amd64", other) => ("amd64", other),
            ("aarch64" | "arm64", "" | "8" | "v8") => ("arm64", ""),
            ("aarch64" | "arm64", "9") => ("arm64", "v9"),
            ("aarch64" | "arm64", other) => ("arm64", other),
            ("armhf", _) | ("arm", "" | "7") => ("arm", "v7"),
            ("armel", _) | ("arm", "6") => ("arm", "v6"),
            ("arm", "5") => ("arm", "v5"),
            ("arm", "8") => ("arm", "v8"),
            ("powerpc64le", other) => ("ppc64le", other),
            (architecture, other) => (architecture, other),
        };
        Self {
            os,
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
            os_version: self.os_version.clone(),
            os_features: self.os_features.clone(),
        }
    }

    /// How well `offered` serves a machine of this platform: 0 is exact, larger is worse; `None` if it does not run.
    pub fn rank(&self, offered: &Self) -> Option<usize> {
        let (wanted, offered) = (self.normalized(), offered.normalized());
        if wanted.os != offered.os {
            return None;
        }
        let found = (offered.architecture.as_str(), offered.variant.as_str());
        wanted.accepted().iter().position(|(a, v)| (a.as_str(), v.as_str()) == found)
    }

    /// Architectures and variants that run on this one, the best first.
    fn accepted(&self) -> Vec<(String, String)> {
        let version = |text: &str| text.strip_prefix('v').and_then(|n| n.parse::<u8>().ok());
        let down = |architecture: &str, from: u8, to: u8| {
            (to..=from).rev().map(|n| (architecture.to_owned(), format!("v{n}"))).collect::<Vec<_>>()
        };
        let mut list = vec![(self.architecture.clone(), self.variant.clone())];
        match (self.architecture.as_str(), version(&self.variant)) {
            ("amd64", variant) => {
                list.extend(down("amd64", variant.unwrap_or(1).clamp(1, 9).saturating_sub(1), 2));
                list.push(("amd64".to_owned(), String::new()));
                list.push(("386".to_owned(), String::new()));
            }
            ("arm64", variant) => {
                list.extend(down("arm64", variant.unwrap_or(8).clamp(8, 20).saturating_sub(1), 9));
                list.push(("arm64".to_owned(), String::new()));
                list.extend(down("arm", 8, 5));
            }
            ("arm", Some(variant)) => list.extend(down("arm", variant.clamp(5, 8) - 1, 5)),
            _ => {}
        }
        list
    }
}

impl FromStr for Platform {
    type Err = ImageError;

    /// Reads `os/architecture[/variant]`.
    fn from_str(text: &str) -> Result<Self, ImageError> {
        let plain = |part: &str| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        let parts: Vec<&str> = text.split('/').collect();
        match parts[..] {
            [os, architecture] if plain(os) && plain(architecture) => Ok(Self::new(os, architecture, "")),
            [os, architecture, variant] if plain(os) && plain(architecture) && plain(variant) => {
                Ok(Self::new(os, architecture, variant))
            }
            _ => Err(ImageError::Usage(
                "expected os/architecture or os/architecture/variant, for example linux/arm64".to_owned(),
            )),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |text: &str| text.escape_debug().take(40).collect::<String>();
        write!(f, "{}/{}", part(&self.os), part(&self.architecture))?;
        if !self.variant.is_empty() {
            write!(f, "/{}", part(&self.variant))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn names_are_normalized() {
        for (text, expected) in [
            ("linux/x86_64", "linux/amd64"),
            ("Linux/AMD64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/arm/6", "linux/arm/v6"),
            ("linux/i686", "linux/386"),
            ("linux/s390x", "linux/s390x"),
        ] {
            assert_eq!(platform(text).to_string(), expected, "{text}");
        }
        for bad in ["", "linux", "linux/", "/amd64", "linux/arm/v7/x", "linux/a b", "linux/\u{1b}"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_best_of_several_is_chosen() {
        for (wanted, offered, best) in [
            ("linux/amd64", &["linux/386", "linux/amd64", "linux/arm64"][..], Some("linux/amd64")),
            ("linux/amd64", &["linux/386", "linux/arm64"], Some("linux/386")),
            ("linux/amd64", &["linux/amd64/v2", "linux/s390x"], None),
            ("linux/amd64/v3", &["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], Some("linux/amd64/v2")),
            ("linux/arm64", &["linux/arm/v7", "linux/arm64/v8"], Some("linux/arm64/v8")),
            ("linux/arm64", &["linux/arm/v6", "linux/arm/v7"], Some("linux/arm/v7")),
            ("linux/arm64/v9", &["linux/arm64", "linux/arm/v7"], Some("linux/arm64")),
            ("linux/arm/v6", &["linux/arm/v7", "linux/arm/v5"], Some("linux/arm/v5")),
            ("linux/arm/v7", &["linux/arm/v6", "linux/arm"], Some("linux/arm")),
            ("linux/arm/v5", &["linux/arm/v6"], None),
            ("linux/riscv64", &["linux/riscv64"], Some("linux/riscv64")),
            ("linux/amd64", &["windows/amd64"], None),
        ] {
            let wanted_platform = platform(wanted);
            let ranked = offered.iter().filter_map(|o| Some((wanted_platform.rank(&platform(o))?, *o))).min();
            assert_eq!(ranked.map(|(_, o)| o), best, "{wanted} of {offered:?}");
        }
    }
}
