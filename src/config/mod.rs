//! Options: their names, what they accept, and where their values come from.
//!
//! ```text
//!   strongest  Init's Opts (dockerd --storage-opt)     lcow.sandboxsize=30
//!      │       command line --storage-opt              lcow.sandboxsize=30
//!      │       environment                             LCOW_SANDBOXSIZE=30
//!      ▼       TOML file (--config)                    [lcow] sandboxsize = 30
//!   weakest    built-in defaults
//! ```
//!
//! Invariants: [`SPECS`] is the one list of options; help texts, `docs/options.md` and Status are made from it or
//! tested against it. An unknown `lcow.*` option or a bad value is an error that names its place, the option, the value
//! and what is accepted. Called by `cli` and `driver`.

mod kinds;
mod sources;
mod specs;
mod template;
mod values;

pub use kinds::{
    Acceleration, ContentAccess, Extraction, JailKind, MountKind, OverlayApi, SnapshotMounts,
    SnapshotSharing, SvmKind,
};
pub use sources::{Effective, Inputs, Place, Problem};
pub use specs::{OptionSpec, SPECS};
pub use template::template;
pub use values::{Unit, parse_sandbox_size, parse_size, parse_switch};

use layer_codec::apply::Profile;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// Prefix of the options that concern containerd alone.
pub const CONTAINERD_PREFIX: &str = "lcow.containerd.";
/// Prefix of all options.
pub const PREFIX: &str = "lcow.";
/// Prefix of all environment variables of this program.
pub const ENV_PREFIX: &str = "LCOW_";
/// Default size of a sandbox's file system: 20 GB, as in the original driver.
pub const DEFAULT_SANDBOX_BYTES: u64 = 20 * (1 << 30);
/// Smallest sandbox: room for a journal and a few files.
pub const MIN_SANDBOX_BYTES: u64 = 16 << 20;
/// Largest sandbox: the limit of a VHD footer.
pub const MAX_SANDBOX_BYTES: u64 = 2040 << 30;

/// The values of all options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// `lcow.globalmode`
    pub global_mode: bool,
    /// `lcow.sandboxsize`, bytes
    pub sandbox_bytes: u64,
    /// `lcow.svm`
    pub svm: SvmKind,
    /// `lcow.jail`
    pub jail: JailKind,
    /// `lcow.kirdpath`
    pub kird_path: PathBuf,
    /// `lcow.kernel`, relative to `kird_path`
    pub kernel: PathBuf,
    /// `lcow.initrd`, relative to `kird_path`
    pub initrd: PathBuf,
    /// `lcow.bootparameters`
    pub boot_parameters: String,
    /// `lcow.accelerator`
    pub accelerator: Acceleration,
    /// `lcow.guestmemory`, bytes
    pub guest_memory_bytes: u64,
    /// `lcow.guestmount`
    pub guest_mount: bool,
    /// `lcow.mount`
    pub mount: MountKind,
    /// `lcow.mount.keep`
    pub keep_mounts: usize,
    /// `lcow.mount.keepage`
    pub keep_age: Duration,
    /// `lcow.overlayapi`
    pub overlay_api: OverlayApi,
    /// `lcow.xino`
    pub xino: bool,
    /// `lcow.profile`
    pub profile: Profile,
    /// `lcow.blocksize`, bytes
    pub block_size: u32,
    /// `lcow.timeout`
    pub idle_timeout: Duration,
    /// `lcow.pool.spares`
    pub pool_spares: usize,
    /// `lcow.pool.max`
    pub pool_max: usize,
    /// `lcow.memory`, bytes
    pub memory_bytes: u64,
    /// `lcow.maxlayer`, bytes
    pub max_layer_bytes: u64,
    /// `lcow.verity`
    pub verity: bool,
    /// `lcow.minfree`, bytes
    pub min_free_bytes: u64,
    /// `lcow.containerd.mounts`
    pub snapshot_mounts: SnapshotMounts,
    /// `lcow.containerd.extract`
    pub extraction: Extraction,
    /// `lcow.containerd.share`
    pub sharing: SnapshotSharing,
    /// `lcow.containerd.content`
    pub content: ContentAccess,
}

impl Default for Options {
    fn default() -> Self {
        let mut options = Self {
            global_mode: false,
            sandbox_bytes: DEFAULT_SANDBOX_BYTES,
            svm: SvmKind::Embedded,
            jail: JailKind::Auto,
            kird_path: PathBuf::new(),
            kernel: PathBuf::new(),
            initrd: PathBuf::new(),
            boot_parameters: String::new(),
            accelerator: Acceleration::Auto,
            guest_memory_bytes: 0,
            guest_mount: false,
            mount: MountKind::None,
            keep_mounts: 0,
            keep_age: Duration::ZERO,
            overlay_api: OverlayApi::Auto,
            xino: false,
            profile: Profile::Default,
            block_size: 0,
            idle_timeout: Duration::ZERO,
            pool_spares: 0,
            pool_max: 0,
            memory_bytes: 0,
            max_layer_bytes: 0,
            verity: false,
            min_free_bytes: 0,
            snapshot_mounts: SnapshotMounts::LcowLayer,
            extraction: Extraction::Layer,
            sharing: SnapshotSharing::Off,
            content: ContentAccess::Grpc,
        };
        for spec in SPECS {
            (spec.set)(&mut options, spec.default).expect("defaults are tested to be acceptable");
        }
        options
    }
}

impl Options {
    /// Name and value of every option, for Status and logs.
    pub fn entries(&self) -> impl Iterator<Item = (&'static str, String)> + '_ {
        SPECS.iter().map(|spec| (spec.name, (spec.show)(self)))
    }

    /// Sets one option; the case of names does not matter, as in the original driver.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), ConfigError> {
        let spec = SPECS
            .iter()
            .find(|s| s.name.eq_ignore_ascii_case(name))
            .ok_or_else(|| ConfigError::Unknown { name: name.to_owned() })?;
        (spec.set)(self, value.trim()).ok_or_else(|| ConfigError::BadValue {
            name: spec.name,
            value: value.to_owned(),
            accepts: spec.accepts,
        })
    }

    /// Sets options from `key=value` texts.
    pub fn set_all<S: AsRef<str>>(&mut self, options: &[S]) -> Result<(), ConfigError> {
        for option in options {
            let (name, value) = option
                .as_ref()
                .split_once('=')
                .ok_or_else(|| ConfigError::NoValue { option: option.as_ref().to_owned() })?;
            self.set(name.trim(), value)?;
        }
        Ok(())
    }

    /// Reads the TOML file (if one is named), then the environment, then the options of the command line. The first
    /// problem is the error.
    pub fn load(file: Option<&Path>, command_line: &[String]) -> Result<Self, ConfigError> {
        let inputs = Inputs { file, environment: sources::environment(), command_line, engine: &[] };
        let effective = Effective::read(&inputs)?;
        match effective.problems.into_iter().next() {
            Some(problem) => Err(ConfigError::At(Box::new(problem))),
            None => Ok(effective.options),
        }
    }
}

/// The environment's form of an option's name: `lcow.pool.max` is `LCOW_POOL_MAX`.
pub fn env_name(name: &str) -> String {
    name.to_ascii_uppercase().replace('.', "_")
}

/// An option that cannot be used, or a configuration file that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No such option.
    #[error("unknown option '{name}'; the options are: {}", SPECS.iter().map(|s| s.name).collect::<Vec<_>>().join(", "))]
    Unknown {
        /// The name that was given.
        name: String,
    },
    /// The value is not accepted.
    #[error("option {name}: '{value}' is not accepted; give {accepts}")]
    BadValue {
        /// The option.
        name: &'static str,
        /// The value.
        value: String,
        /// The values that are accepted.
        accepts: &'static str,
    },
    /// There is no `=`.
    #[error("option '{option}' has no value; write it as name=value")]
    NoValue {
        /// The text that was given.
        option: String,
    },
    /// The configuration file cannot be read.
    #[error("cannot read the configuration file '{}'", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
    /// The configuration file is not TOML.
    #[error("the file is not valid TOML: {reason}")]
    File {
        /// The parser's message.
        reason: String,
    },
    /// One of the others, with the place where it was found.
    #[error(transparent)]
    At(Box<Problem>),
}

#[cfg(test)]
mod tests;
