//! Options: what they are called, what they accept, where they come from.
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
//! tested against it. An unknown `lcow.*` option or a bad value is an error that names the option, the value and what
//! is accepted. Called by `main` and `driver`.

use bytesize::ByteSize;
use figment::{
    Figment,
    providers::{Env, Format, Toml},
};
use layer_codec::apply::Profile;
use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

/// Prefix of all options.
pub const PREFIX: &str = "lcow.";
/// Prefix of the environment's form of the options.
pub const ENV_PREFIX: &str = "LCOW_";
/// Size of a sandbox's file system where nobody asks for another: 20 GB, as in the original.
pub const DEFAULT_SANDBOX_BYTES: u64 = 20 * (1 << 30);
/// Smallest sandbox: room for a journal and a few files.
pub const MIN_SANDBOX_BYTES: u64 = 16 << 20;
/// Largest sandbox: what a VHD footer can name.
pub const MAX_SANDBOX_BYTES: u64 = 2040 << 30;

/// Longest text of boot parameters, in bytes; kernels cut their line at 2048.
const MAX_BOOT_PARAMETERS: usize = 1024;

/// One option.
#[derive(Debug)]
pub struct OptionSpec {
    /// Name with its prefix.
    pub name: &'static str,
    /// Default as text.
    pub default: &'static str,
    /// What is accepted, for messages and help.
    pub accepts: &'static str,
    /// One sentence for help and docs.
    pub help: &'static str,
    set: fn(&mut Options, &str) -> Option<()>,
    show: fn(&Options) -> String,
}

/// Every option.
pub const SPECS: &[OptionSpec] = &[
    OptionSpec {
        name: "lcow.globalmode",
        default: "false",
        accepts: "true or false",
        help: "One service VM for all layers (faster) instead of one for each operation's layer (safer).",
        set: |o, v| parse_bool(v).map(|v| o.global_mode = v),
        show: |o| o.global_mode.to_string(),
    },
    OptionSpec {
        name: "lcow.sandboxsize",
        default: "20",
        accepts: "a size of 16 MiB to 2040 GiB; a bare number means GB (2^30 bytes), as in the original driver",
        help: "Size of a container's read-write file system: its hard quota.",
        set: |o, v| parse_sandbox_size(v, Unit::Gigabytes).map(|v| o.sandbox_bytes = v),
        show: |o| ByteSize(o.sandbox_bytes).to_string(),
    },
    OptionSpec {
        name: "lcow.svm",
        default: "auto",
        accepts: if cfg!(target_os = "linux") {
            "embedded, qemu or auto (which is embedded here)"
        } else if cfg!(windows) {
            "embedded, hcs or auto (which is embedded here)"
        } else {
            "embedded or auto (which is embedded here)"
        },
        help: "Kind of service VM that handles layer bytes: embedded is a jailed worker process, qemu and (on Windows) hcs are virtual machines.",
        set: |o, v| {
            o.svm = match v {
                "auto" | "embedded" => SvmKind::Embedded,
                #[cfg(target_os = "linux")]
                "qemu" => SvmKind::Qemu,
                #[cfg(windows)]
                "hcs" => SvmKind::Hcs,
                _ => return None,
            };
            Some(())
        },
        show: |o| o.svm.to_string(),
    },
    OptionSpec {
        name: "lcow.jail",
        default: "auto",
        accepts: "strict, best-effort or auto (strict as root, else best-effort)",
        help: "Whether a worker process starts although a wall of its jail is missing. strict asks for the system-call filter, no_new_privs, a user that owns nothing, no capability, closed descriptors, limits, and no path: Landlock, or an empty root. Of no effect on virtual machines and on Windows.",
        set: |o, v| {
            o.jail = match v {
                "auto" => JailKind::Auto,
                "strict" => JailKind::Strict,
                "best-effort" => JailKind::BestEffort,
                _ => return None,
            };
            Some(())
        },
        show: |o| o.jail.to_string(),
    },
    OptionSpec {
        name: "lcow.kirdpath",
        default: if cfg!(windows) {
            r"C:\Program Files\Linux Containers"
        } else {
            "/usr/lib/lcow-graphdriver"
        },
        accepts: "a folder",
        help: "Folder of a virtual machine's kernel and initrd, as scripts/build-svm-image makes it.",
        set: |o, v| path(v).map(|v| o.kird_path = v),
        show: |o| o.kird_path.display().to_string(),
    },
    OptionSpec {
        name: "lcow.kernel",
        default: if cfg!(windows) { "kernel" } else { "vmlinux" },
        accepts: "a file name in lcow.kirdpath, or an absolute path",
        help: "Kernel of a virtual machine: an uncompressed vmlinux that boots by PVH.",
        set: |o, v| path(v).map(|v| o.kernel = v),
        show: |o| o.kernel.display().to_string(),
    },
    OptionSpec {
        name: "lcow.initrd",
        default: if cfg!(windows) { "initrd.img" } else { "initrd" },
        accepts: "a file name in lcow.kirdpath, or an absolute path",
        help: "Initial file system of a virtual machine: the agent and the modules that it loads.",
        set: |o, v| path(v).map(|v| o.initrd = v),
        show: |o| o.initrd.display().to_string(),
    },
    OptionSpec {
        name: "lcow.bootparameters",
        default: "",
        accepts: "words for a kernel's line; may be empty",
        help: "Added to the line of a virtual machine's kernel.",
        set: |o, v| (v.len() <= MAX_BOOT_PARAMETERS).then(|| v.clone_into(&mut o.boot_parameters)),
        show: |o| o.boot_parameters.clone(),
    },
    OptionSpec {
        name: "lcow.accelerator",
        default: "auto",
        accepts: "auto, kvm or tcg",
        help: "How a virtual machine's instructions run: by the processor (kvm), by translation (tcg), or by what works.",
        set: |o, v| {
            o.accelerator = match v {
                "auto" => Acceleration::Auto,
                "kvm" => Acceleration::Kvm,
                "tcg" => Acceleration::Tcg,
                _ => return None,
            };
            Some(())
        },
        show: |o| o.accelerator.to_string(),
    },
    OptionSpec {
        name: "lcow.guestmemory",
        default: "512MiB",
        accepts: "a size of 128 MiB to 64 GiB",
        help: "Memory of one virtual machine; pages that it has not written are shared by all.",
        set: |o, v| {
            parse_size(v, Unit::Bytes)
                .filter(|b| (128 << 20..=64 << 30).contains(b))
                .map(|b| o.guest_memory_bytes = b)
        },
        show: |o| ByteSize(o.guest_memory_bytes).to_string(),
    },
    OptionSpec {
        name: "lcow.guestmount",
        default: "false",
        accepts: "true or false",
        help: "Let a virtual machine's kernel mount a sandbox whose ext4 has features that the built-in reader does not know, and read it that way. It meets hostile bytes then. Of no effect with lcow.svm=embedded.",
        set: |o, v| parse_bool(v).map(|v| o.guest_mount = v),
        show: |o| o.guest_mount.to_string(),
    },
    OptionSpec {
        name: "lcow.mount",
        default: if cfg!(target_os = "linux") { "overlay" } else { "none" },
        accepts: if cfg!(target_os = "linux") { "overlay or none" } else { "none" },
        help: "What Get does: mount the merged view (overlay), or return the layer's folder for a VM engine (none).",
        set: |o, v| {
            o.mount = match v {
                "overlay" if cfg!(target_os = "linux") => MountKind::Overlay,
                "none" => MountKind::None,
                _ => return None,
            };
            Some(())
        },
        show: |o| o.mount.to_string(),
    },
    OptionSpec {
        name: "lcow.overlayapi",
        default: "auto",
        accepts: "auto, new or legacy",
        help: "How overlayfs is mounted: by the mount API of Linux 6.7, by one option string, or by what works.",
        set: |o, v| {
            o.overlay_api = match v {
                "auto" => OverlayApi::Auto,
                "new" => OverlayApi::New,
                "legacy" => OverlayApi::Legacy,
                _ => return None,
            };
            Some(())
        },
        show: |o| o.overlay_api.to_string(),
    },
    OptionSpec {
        name: "lcow.xino",
        default: "on",
        accepts: "on or off",
        help: "One device and unique inode numbers in merged views. Numbers of files in lower layers are larger than 32 bits then: off is for 32-bit programs without large-file support.",
        set: |o, v| parse_switch(v).map(|v| o.xino = v),
        show: |o| (if o.xino { "on" } else { "off" }).into(),
    },
    OptionSpec {
        name: "lcow.profile",
        default: "default",
        accepts: "default or hcsshim",
        help: "Layout of applied layers: this project's, or byte for byte what hcsshim's tar2ext4 writes for LCOW.",
        set: |o, v| v.parse().ok().map(|v| o.profile = v),
        show: |o| o.profile.to_string(),
    },
    OptionSpec {
        name: "lcow.blocksize",
        default: "1KiB",
        accepts: "1KiB, 2KiB or 4KiB",
        help: "Blocks of applied layers. Small ones waste least; disks with sectors of 4096 bytes need 4KiB. A layer with an entry that needs larger ones (a symbolic link whose target is as long as a block, names of extended attributes that fill one) has 4KiB by itself. Profile hcsshim always has 4KiB.",
        set: |o, v| {
            parse_size(v, Unit::Bytes)
                .and_then(|b| u32::try_from(b).ok())
                .filter(|b| [1024, 2048, 4096].contains(b))
                .map(|b| o.block_size = b)
        },
        show: |o| ByteSize(o.block_size.into()).to_string(),
    },
    OptionSpec {
        name: "lcow.timeout",
        default: "300",
        accepts: "seconds, 1 or more",
        help: "Longest time that a transfer or a service VM may stand still; a whole transfer has no limit.",
        set: |o, v| v.parse().ok().filter(|s| *s > 0).map(|s| o.idle_timeout = Duration::from_secs(s)),
        show: |o| o.idle_timeout.as_secs().to_string(),
    },
    OptionSpec {
        name: "lcow.pool.spares",
        default: "2",
        accepts: "0 to 64",
        help: "Service VMs that are kept started and unused, so that an operation need not wait for one.",
        set: |o, v| v.parse().ok().filter(|n| *n <= 64).map(|n| o.pool_spares = n),
        show: |o| o.pool_spares.to_string(),
    },
    OptionSpec {
        name: "lcow.pool.max",
        default: "32",
        accepts: "2 to 1024",
        help: "Most service VMs at one time; further operations wait in line.",
        set: |o, v| v.parse().ok().filter(|n| (2..=1024).contains(n)).map(|n| o.pool_max = n),
        show: |o| o.pool_max.to_string(),
    },
    OptionSpec {
        name: "lcow.memory",
        default: "4GiB",
        accepts: "a size of 64 MiB or more",
        help: "Address space of one service VM; a layer that needs more fails with an error.",
        set: |o, v| parse_size(v, Unit::Bytes).filter(|b| *b >= 64 << 20).map(|b| o.memory_bytes = b),
        show: |o| ByteSize(o.memory_bytes).to_string(),
    },
    OptionSpec {
        name: "lcow.maxlayer",
        default: "128GiB",
        accepts: "a size of 1 MiB to 2040 GiB",
        help: "Largest image that an applied layer may become, and the largest exact record.",
        set: |o, v| {
            parse_size(v, Unit::Bytes)
                .filter(|b| (1 << 20..=MAX_SANDBOX_BYTES).contains(b))
                .map(|b| o.max_layer_bytes = b)
        },
        show: |o| ByteSize(o.max_layer_bytes).to_string(),
    },
    OptionSpec {
        name: "lcow.verity",
        default: "false",
        accepts: "true or false",
        help: "Write a dm-verity hash tree behind each applied layer; its root hash is in GetMetadata, and scrub checks every block.",
        set: |o, v| parse_bool(v).map(|v| o.verity = v),
        show: |o| o.verity.to_string(),
    },
    OptionSpec {
        name: "lcow.minfree",
        default: "256MiB",
        accepts: "a size",
        help: "Space to keep free on the home's disk: below it new layers are refused, so that sandboxes can go on.",
        set: |o, v| parse_size(v, Unit::Bytes).map(|b| o.min_free_bytes = b),
        show: |o| ByteSize(o.min_free_bytes).to_string(),
    },
];

/// Kind of service VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SvmKind {
    /// A jailed worker process.
    Embedded,
    /// A virtual machine under QEMU.
    #[cfg(target_os = "linux")]
    Qemu,
    /// A Hyper-V utility VM.
    #[cfg(windows)]
    Hcs,
}

/// Whether a worker starts although a wall of its jail is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JailKind {
    /// Strict as root.
    Auto,
    /// It does not.
    Strict,
    /// It does, as long as the least of walls stands.
    BestEffort,
}

/// How a virtual machine's instructions run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceleration {
    /// By what works.
    Auto,
    /// By the processor.
    Kvm,
    /// By translation.
    Tcg,
}

/// What Get does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountKind {
    /// Mounts images and sandboxes and joins them with overlayfs.
    Overlay,
    /// Mounts nothing.
    None,
}

/// How overlayfs is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverlayApi {
    /// The new mount API where the kernel has `lowerdir+`, else the option string.
    Auto,
    /// `fsopen` and `lowerdir+` only.
    New,
    /// One option string only.
    Legacy,
}

macro_rules! show_as {
    ($kind:ty: $($variant:ident = $text:literal),*) => {
        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text),* })
            }
        }
    };
}
#[cfg(target_os = "linux")]
show_as!(SvmKind: Embedded = "embedded", Qemu = "qemu");
#[cfg(windows)]
show_as!(SvmKind: Embedded = "embedded", Hcs = "hcs");
#[cfg(not(any(target_os = "linux", windows)))]
show_as!(SvmKind: Embedded = "embedded");
show_as!(JailKind: Auto = "auto", Strict = "strict", BestEffort = "best-effort");
show_as!(Acceleration: Auto = "auto", Kvm = "kvm", Tcg = "tcg");
show_as!(MountKind: Overlay = "overlay", None = "none");
show_as!(OverlayApi: Auto = "auto", New = "new", Legacy = "legacy");

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

    /// Sets one option; names are matched without case, as the original did.
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

    /// Reads the TOML file (if one is named), then the environment, then the command line's options.
    pub fn load(file: Option<&Path>, command_line: &[String]) -> Result<Self, ConfigError> {
        let mut figment = Figment::new();
        if let Some(file) = file {
            // A named file that is missing is a mistake; figment would pass over it.
            let text = std::fs::read_to_string(file)
                .map_err(|source| ConfigError::Read { path: file.to_owned(), source })?;
            figment = figment.merge(Toml::string(&text));
        }
        let mut options = Self::default();
        let tree: BTreeMap<String, figment::value::Value> =
            figment.extract().map_err(|e| ConfigError::File(Box::new(e)))?;
        let mut pairs = Vec::new();
        for (key, value) in tree {
            flatten(&key, &value, &mut pairs);
        }
        for (name, value) in &pairs {
            options.set(name, value)?;
        }
        options.set_environment(Env::raw().iter().map(|(k, v)| (k.as_str().to_owned(), v)))?;
        options.set_all(command_line)?;
        Ok(options)
    }
}

impl Options {
    /// Takes the options out of an environment. An empty value is none: `docker plugin set` cannot unset a variable.
    fn set_environment(
        &mut self,
        variables: impl Iterator<Item = (String, String)>,
    ) -> Result<(), ConfigError> {
        for (key, value) in variables {
            self.set_variable(&key, &value)?;
        }
        Ok(())
    }

    fn set_variable(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        match SPECS.iter().find(|s| env_name(s.name).eq_ignore_ascii_case(key)) {
            Some(spec) if !value.trim().is_empty() => self.set(spec.name, value),
            _ => Ok(()),
        }
    }
}

/// The environment's form of an option's name: `lcow.pool.max` is `LCOW_POOL_MAX`.
pub fn env_name(name: &str) -> String {
    name.to_ascii_uppercase().replace('.', "_")
}

fn flatten(key: &str, value: &figment::value::Value, pairs: &mut Vec<(String, String)>) {
    use figment::value::Value;
    let text = match value {
        Value::Dict(_, dict) => {
            for (name, value) in dict {
                flatten(&format!("{key}.{name}"), value, pairs);
            }
            return;
        }
        Value::String(_, text) => text.clone(),
        Value::Bool(_, b) => b.to_string(),
        Value::Num(_, n) => n
            .to_i128()
            .map(|n| n.to_string())
            .or_else(|| n.to_f64().map(|n| n.to_string()))
            .unwrap_or_default(),
        other => format!("{other:?}"),
    };
    pairs.push((key.to_owned(), text));
}

/// What is wrong with an option.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No such option.
    #[error("unknown option '{name}'; the options are: {}", SPECS.iter().map(|s| s.name).collect::<Vec<_>>().join(", "))]
    Unknown {
        /// What was given.
        name: String,
    },
    /// The value is not accepted.
    #[error("option {name}: '{value}' is not accepted; give {accepts}")]
    BadValue {
        /// The option.
        name: &'static str,
        /// The value.
        value: String,
        /// What would be accepted.
        accepts: &'static str,
    },
    /// There is no `=`.
    #[error("option '{option}' has no value; write it as name=value")]
    NoValue {
        /// What was given.
        option: String,
    },
    /// The configuration file cannot be read.
    #[error("cannot read the configuration file '{}'", path.display())]
    Read {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The configuration file is not TOML of the expected form.
    #[error("the configuration file is wrong")]
    File(#[source] Box<figment::Error>),
}

/// What a number without a unit means.
#[derive(Debug, Clone, Copy)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Units of 2^30 bytes.
    Gigabytes,
}

fn path(text: &str) -> Option<PathBuf> {
    (!text.is_empty()).then(|| PathBuf::from(text))
}

/// Go's `strconv.ParseBool`, which the original used.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// Parses `on` and `off`, the words of the kernel's own switch.
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

/// Parses a sandbox's size and checks its limits.
pub fn parse_sandbox_size(text: &str, bare: Unit) -> Option<u64> {
    parse_size(text, bare).filter(|b| (MIN_SANDBOX_BYTES..=MAX_SANDBOX_BYTES).contains(b)).map(|b| b & !0xfff)
}

#[cfg(test)]
mod tests;
