//! What the configuration of containerd depends on: the engine's version, the operating system, and where the
//! containerd face listens and keeps its layers.
//!
//! ```text
//!   containerd --version ─► "containerd github.com/…/v2 v2.1.4 75cb2b7" ─► Engine { 2, 1 } ─► Format (2 or 3)
//! ```
//!
//! Pure data and parsing; no I/O. Used by `text` (prints it), `check` (compares with it) and `mod` (builds it).

use std::{fmt, str::FromStr};

/// The oldest containerd that the face works with. 1.6 panics when it is configured with a proxy differ.
pub(super) const OLDEST: Engine = Engine { major: 1, minor: 7 };
/// The first containerd that unpacks the layers of an image in parallel (`max_concurrent_unpacks`).
pub(super) const PARALLEL_UNPACK: Engine = Engine { major: 2, minor: 2 };
/// The first containerd whose `config.toml` may have version 3.
const FORMAT_3: Engine = Engine { major: 2, minor: 0 };
/// Ending of the differ's name; the snapshotter's name stands before it.
const DIFFER_SUFFIX: &str = "-diff";

/// A containerd release, without its patch level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Engine {
    pub(super) major: u32,
    pub(super) minor: u32,
}

/// A text that is no version of a usable containerd.
#[derive(Debug, thiserror::Error)]
pub(super) enum EngineError {
    /// Neither `MAJOR.MINOR` nor an output of `containerd --version`.
    #[error("'{0}' is not a version of containerd; expected MAJOR.MINOR, such as 2.1")]
    Syntax(String),
    /// Older than [`OLDEST`].
    #[error(
        "containerd {0} cannot use a proxy differ; upgrade to {OLDEST} or later (an older one panics when it \
         reads this configuration)"
    )]
    TooOld(Engine),
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Engine {
    type Err = EngineError;

    /// Reads `2.1`, `v2.1.4`, `1.7.24~ds1`.
    fn from_str(text: &str) -> Result<Self, EngineError> {
        let syntax = || EngineError::Syntax(text.escape_default().to_string());
        let digits = |part: &str| -> Option<u32> {
            let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..end].parse().ok()
        };
        let mut parts = text.trim().trim_start_matches('v').splitn(3, '.');
        let (Some(major), Some(minor)) =
            (parts.next().and_then(|p| p.parse().ok()), parts.next().and_then(digits))
        else {
            return Err(syntax());
        };
        let engine = Self { major, minor };
        if engine < OLDEST { Err(EngineError::TooOld(engine)) } else { Ok(engine) }
    }
}

impl Engine {
    /// Reads the output of `containerd --version`: program, module path, version, commit.
    ///
    /// # Errors
    /// No third field, or it is not a version of a usable containerd.
    pub(super) fn from_output(output: &str) -> Result<Self, EngineError> {
        let version = output.split_whitespace().nth(2);
        version.ok_or_else(|| EngineError::Syntax(output.trim().escape_default().to_string()))?.parse()
    }

    /// The newest format of `config.toml` that this engine reads.
    pub(super) fn format(self) -> Format {
        if self < FORMAT_3 { Format::V2 } else { Format::V3 }
    }
}

/// The `version` of containerd's configuration file; plugins have other names in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Format {
    V2,
    V3,
}

impl Format {
    /// The value of `version`; `None` for a version that no supported engine writes.
    pub(super) fn from_number(number: i64) -> Option<Self> {
        match number {
            2 => Some(Self::V2),
            3 => Some(Self::V3),
            _ => None,
        }
    }

    pub(super) fn number(self) -> i64 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }

    /// The plugin that holds CRI's default snapshotter, and the key's path below it.
    pub(super) fn cri_images(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::V2 => ("io.containerd.grpc.v1.cri", &["containerd"]),
            Self::V3 => ("io.containerd.cri.v1.images", &[]),
        }
    }
}

/// The operating system on which containerd runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum System {
    Linux,
    Windows,
}

impl System {
    /// Snapshotters and differs that containerd itself brings, and what an `unpack_config` for them says: platform,
    /// snapshotter, differ. `{arch}` is the machine's.
    pub(super) fn kept(self) -> &'static [(&'static str, &'static str, &'static str)] {
        match self {
            Self::Linux => &[("linux", "overlayfs", "walking")],
            Self::Windows => &[("windows", "windows", "windows"), ("linux", "windows-lcow", "windows-lcow")],
        }
    }
}

/// A runtime handler of CRI whose pods use the snapshotter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Runtime {
    /// The handler's name, as a RuntimeClass gives it.
    pub(super) name: String,
    /// The shim of a new handler; `None` for a handler that the main file defines.
    pub(super) shim: Option<String>,
}

impl FromStr for Runtime {
    type Err = String;

    /// Reads `NAME` or `NAME=TYPE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, shim) = text.split_once('=').map_or((text, None), |(name, shim)| (name, Some(shim)));
        if name.is_empty() || shim.is_some_and(str::is_empty) {
            return Err("expected NAME or NAME=TYPE, such as lcow=io.containerd.runc.v2".into());
        }
        Ok(Self { name: name.into(), shim: shim.map(Into::into) })
    }
}

/// Everything that the configuration says.
#[derive(Debug, Clone)]
pub(super) struct Face {
    pub(super) engine: Engine,
    pub(super) format: Format,
    pub(super) system: System,
    /// Path of the socket, or name of the pipe.
    pub(super) address: String,
    /// Directory of the layers, for CRI's image file system statistics.
    pub(super) root: String,
    /// `linux/amd64`; the layers' platform, whatever containerd runs on.
    pub(super) platform: String,
    /// The snapshotter's name.
    pub(super) name: String,
    /// Whether CRI and requests that name no snapshotter use it.
    pub(super) default: bool,
    pub(super) runtimes: Vec<Runtime>,
    /// Layers of an image that are unpacked at once.
    pub(super) unpacks: u32,
}

impl Face {
    /// The differ's name.
    pub(super) fn differ(&self) -> String {
        format!("{}{DIFFER_SUFFIX}", self.name)
    }

    /// The proxy's capabilities: `rebase` (parents come with Commit) and, where there are user namespaces,
    /// `remap-ids`.
    pub(super) fn capabilities(&self) -> &'static [&'static str] {
        match self.system {
            System::Linux => &["rebase", "remap-ids"],
            System::Windows => &["rebase"],
        }
    }

    /// The differs in the order in which they are asked.
    pub(super) fn differs(&self) -> Vec<String> {
        let built_in = self.system.kept().iter().map(|(_, _, differ)| (*differ).to_owned());
        std::iter::once(self.differ()).chain(built_in).collect()
    }

    /// Platform, snapshotter and differ of each `unpack_config`. containerd takes the first that fits, and the list
    /// replaces its own, so the built-in snapshotters stand in it too.
    pub(super) fn unpack_configs(&self) -> Vec<(String, String, String)> {
        let ours = (self.platform.clone(), self.name.clone(), self.differ());
        let arch = self.platform.split('/').nth(1).unwrap_or("amd64");
        let mut list: Vec<_> = self
            .system
            .kept()
            .iter()
            .filter(|(_, snapshotter, _)| *snapshotter != self.name)
            .map(|(os, snapshotter, differ)| {
                (format!("{os}/{arch}"), (*snapshotter).to_owned(), (*differ).to_owned())
            })
            .collect();
        list.insert(if self.default { 0 } else { list.len() }, ours);
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_people_and_packages_write_them() {
        for (text, major, minor) in
            [("1.7", 1, 7), ("v2.1.4", 2, 1), ("1.7.24~ds1", 1, 7), ("2.4.0-beta.1", 2, 4)]
        {
            assert_eq!(text.parse::<Engine>().unwrap(), Engine { major, minor }, "{text}");
        }
        for text in ["", "2", "two.one", "2.", "-1.7", "1.x"] {
            assert!(matches!(text.parse::<Engine>(), Err(EngineError::Syntax(_))), "{text}");
        }
        assert!(matches!("1.6.20".parse::<Engine>(), Err(EngineError::TooOld(_))));
    }

    #[test]
    fn the_output_of_the_program_is_read() {
        for (output, engine) in [
            (
                "containerd github.com/containerd/containerd/v2 2.1.9+unknown \n",
                Engine { major: 2, minor: 1 },
            ),
            (
                "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6\n",
                Engine { major: 1, minor: 7 },
            ),
            ("containerd containerd.io v2.2.0 1c4457e00facac03ce1d75f7b6777a7a851e5c41\n", PARALLEL_UNPACK),
        ] {
            assert_eq!(Engine::from_output(output).unwrap(), engine, "{output}");
        }
        assert!(Engine::from_output("containerd 2.1").is_err());
    }
}
