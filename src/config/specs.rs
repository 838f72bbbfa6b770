//! The list of all options: name, default, accepted values, help, and how each is set and shown.
//!
//! Help texts, Status, `plugin-config.json`, `docs/options.md` and the commented configuration file are made from this
//! list or tested against it. Values are parsed in `values`; a new option is described in CONTRIBUTING.md.

use super::{
    Acceleration, ContentAccess, Extraction, JailKind, MAX_SANDBOX_BYTES, MountKind, Options, OverlayApi,
    SnapshotMounts, SnapshotSharing, SvmKind,
    values::{Unit, parse_bool, parse_sandbox_size, parse_size, parse_switch, path},
};
use bytesize::ByteSize;
use std::time::Duration;

/// Maximum length of `lcow.bootparameters`, in bytes; kernels truncate their command line at 2048.
pub(super) const MAX_BOOT_PARAMETERS: usize = 1024;

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
    pub(super) set: fn(&mut Options, &str) -> Option<()>,
    pub(super) show: fn(&Options) -> String,
}

/// Every option.
pub const SPECS: &[OptionSpec] = &[
    OptionSpec {
        name: "lcow.globalmode",
        default: "false",
        accepts: "true or false",
        help: "One service VM for all layers (faster) instead of one per layer being processed (safer).",
        set: |o, v| parse_bool(v).map(|v| o.global_mode = v),
        show: |o| o.global_mode.to_string(),
    },
    OptionSpec {
        name: "lcow.sandboxsize",
        default: "20",
        accepts: "a size of 16 MiB to 2040 GiB; a bare number means GB (2^30 bytes)",
        help: "Size of a container's read-write file system: its hard quota.",
        set: |o, v| parse_sandbox_size(v, Unit::Gigabytes).map(|v| o.sandbox_bytes = v),
        show: |o| ByteSize(o.sandbox_bytes).to_string(),
    },
    OptionSpec {
        name: "lcow.svm",
        default: "auto",
        accepts: if cfg!(target_os = "linux") {
            "embedded, qemu or auto (which is embedded)"
        } else if cfg!(windows) {
            "embedded, hcs or auto (which is embedded)"
        } else {
            "embedded or auto (which is embedded)"
        },
        help: "Kind of service VM that handles layer bytes: embedded is a jailed worker process, qemu (Linux) and hcs (Windows) are virtual machines.",
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
        accepts: "strict, best-effort or auto (strict as root, otherwise best-effort)",
        help: "Whether a worker process or QEMU may start although part of its jail is missing. strict requires the system-call filter, no_new_privs, a user that owns nothing, no capabilities, closed descriptors, limits, and no reachable path: Landlock, or an empty root (QEMU: one without the host's other mounts). No effect on Windows.",
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
        accepts: "a directory",
        help: "Directory of a virtual machine's kernel and initrd, as built by scripts/build-svm-image.",
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
        help: "Initial file system of a virtual machine: the agent and the modules it loads.",
        set: |o, v| path(v).map(|v| o.initrd = v),
        show: |o| o.initrd.display().to_string(),
    },
    OptionSpec {
        name: "lcow.bootparameters",
        default: "",
        accepts: "kernel command-line parameters (may be empty)",
        help: "Appended to the kernel command line of a virtual machine.",
        set: |o, v| (v.len() <= MAX_BOOT_PARAMETERS).then(|| v.clone_into(&mut o.boot_parameters)),
        show: |o| o.boot_parameters.clone(),
    },
    OptionSpec {
        name: "lcow.accelerator",
        default: "auto",
        accepts: "auto, kvm or tcg",
        help: "How a virtual machine executes instructions: on the processor (kvm), by translation (tcg), or whichever works (auto).",
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
        help: "Memory of one virtual machine; pages it has not written are shared by all machines.",
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
        help: "Let a virtual machine's kernel mount and read a sandbox whose ext4 has features that the built-in reader does not know. This exposes that kernel to hostile bytes. No effect with lcow.svm=embedded.",
        set: |o, v| parse_bool(v).map(|v| o.guest_mount = v),
        show: |o| o.guest_mount.to_string(),
    },
    OptionSpec {
        name: "lcow.mount",
        default: if cfg!(target_os = "linux") { "overlay" } else { "none" },
        accepts: if cfg!(target_os = "linux") { "overlay or none" } else { "none" },
        help: "What Get does: mount the merged view (overlay), or return the layer's directory for a VM engine (none).",
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
        name: "lcow.mount.keep",
        default: "0",
        accepts: "0 to 4096",
        help: "Most layers that stay mounted when no container uses them, so that the next one finds their files in the page cache. 0 unmounts a layer with its last container.",
        set: |o, v| v.parse().ok().filter(|n| *n <= 4096).map(|n| o.keep_mounts = n),
        show: |o| o.keep_mounts.to_string(),
    },
    OptionSpec {
        name: "lcow.mount.keepage",
        default: "600",
        accepts: "seconds, 1 or more",
        help: "Longest time for which a layer stays mounted without a container.",
        set: |o, v| v.parse().ok().filter(|s| *s > 0).map(|s| o.keep_age = Duration::from_secs(s)),
        show: |o| o.keep_age.as_secs().to_string(),
    },
    OptionSpec {
        name: "lcow.overlayapi",
        default: "auto",
        accepts: "auto, new or legacy",
        help: "How overlayfs is mounted: with the mount API of Linux 6.7 (new), with a single option string (legacy), or whichever works (auto).",
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
        help: "One device and unique inode numbers in merged views. The numbers of files in lower layers then exceed 32 bits: off is for 32-bit programs without large-file support.",
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
        help: "Block size of applied layers. Small blocks waste the least space; disks with sectors of 4096 bytes need 4KiB. A layer with an entry that needs larger blocks (a symbolic link whose target is as long as a block, extended attribute names that fill one) gets 4KiB automatically. Profile hcsshim always uses 4KiB.",
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
        help: "Longest time for which a transfer or a service VM may make no progress; the total time of a transfer is not limited.",
        set: |o, v| v.parse().ok().filter(|s| *s > 0).map(|s| o.idle_timeout = Duration::from_secs(s)),
        show: |o| o.idle_timeout.as_secs().to_string(),
    },
    OptionSpec {
        name: "lcow.pool.spares",
        default: "2",
        accepts: "0 to 64",
        help: "Number of service VMs kept started and unused, so that an operation need not wait for one.",
        set: |o, v| v.parse().ok().filter(|n| *n <= 64).map(|n| o.pool_spares = n),
        show: |o| o.pool_spares.to_string(),
    },
    OptionSpec {
        name: "lcow.pool.max",
        default: "32",
        accepts: "2 to 1024",
        help: "Maximum number of service VMs at one time; further operations queue.",
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
        help: "Maximum size of an applied layer's image, and of its exact record.",
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
        help: "Write a dm-verity hash tree after each applied layer; its root hash is in GetMetadata, and scrub checks every block.",
        set: |o, v| parse_bool(v).map(|v| o.verity = v),
        show: |o| o.verity.to_string(),
    },
    OptionSpec {
        name: "lcow.minfree",
        default: "256MiB",
        accepts: "a size",
        help: "Space to keep free on the home's disk: below it, new layers are refused, so that existing sandboxes can still grow.",
        set: |o, v| parse_size(v, Unit::Bytes).map(|b| o.min_free_bytes = b),
        show: |o| ByteSize(o.min_free_bytes).to_string(),
    },
    OptionSpec {
        name: "lcow.containerd.mounts",
        default: if cfg!(target_os = "linux") { "host" } else { "lcow-layer" },
        accepts: if cfg!(target_os = "linux") { "host, lcow-layer or kata" } else { "lcow-layer" },
        help: "What containerd gets for a container: bind and overlay mounts of this host (host), one lcow-layer mount for runhcs (lcow-layer), or block devices for Kata Containers (kata, experimental).",
        set: |o, v| {
            o.snapshot_mounts = match v {
                "host" if cfg!(target_os = "linux") => SnapshotMounts::Host,
                "kata" if cfg!(target_os = "linux") => SnapshotMounts::Kata,
                "lcow-layer" => SnapshotMounts::LcowLayer,
                _ => return None,
            };
            Some(())
        },
        show: |o| o.snapshot_mounts.to_string(),
    },
    OptionSpec {
        name: "lcow.containerd.extract",
        default: "layer",
        accepts: "layer or sandbox",
        help: "What containerd gets for a snapshot that a layer is to be unpacked into: a mount for this program's differ only (layer), or a writable file system for another differ (sandbox).",
        set: |o, v| {
            o.extraction = match v {
                "layer" => Extraction::Layer,
                "sandbox" => Extraction::Sandbox,
                _ => return None,
            };
            Some(())
        },
        show: |o| o.extraction.to_string(),
    },
    OptionSpec {
        name: "lcow.containerd.share",
        default: "digest",
        accepts: "off, digest or ref",
        help: "Which of containerd's snapshots share one image: none, those whose tars have the same digest, or also those that claim the same chain (ref: a namespace then gets layers whose bytes it never had to show; only for nodes with one tenant).",
        set: |o, v| {
            o.sharing = match v {
                "off" => SnapshotSharing::Off,
                "digest" => SnapshotSharing::Digest,
                "ref" => SnapshotSharing::Ref,
                _ => return None,
            };
            Some(())
        },
        show: |o| o.sharing.to_string(),
    },
    OptionSpec {
        name: "lcow.containerd.content",
        default: "grpc",
        accepts: "grpc or file",
        help: "How blobs are read: through containerd's content API (grpc), or as files below its root directory (file: faster, but bypasses the policies of namespaces).",
        set: |o, v| {
            o.content = match v {
                "grpc" => ContentAccess::Grpc,
                "file" => ContentAccess::File,
                _ => return None,
            };
            Some(())
        },
        show: |o| o.content.to_string(),
    },
];
