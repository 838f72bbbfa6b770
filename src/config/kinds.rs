//! Values of the options that name one of several kinds, and how each is shown.

use std::fmt;

/// `lcow.svm`: the kind of service VM.
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

/// `lcow.jail`: whether a worker may start although part of its jail is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JailKind {
    /// Strict as root, otherwise best effort.
    Auto,
    /// A worker starts only with its complete jail.
    Strict,
    /// A worker starts as long as the minimum of its jail is in force.
    BestEffort,
}

/// `lcow.accelerator`: how a virtual machine executes instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceleration {
    /// KVM where it is usable, otherwise translation.
    Auto,
    /// On the processor, with KVM.
    Kvm,
    /// By translation (QEMU's TCG).
    Tcg,
}

/// `lcow.mount`: what Get does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountKind {
    /// Mounts images and sandboxes and joins them with overlayfs.
    Overlay,
    /// Mounts nothing.
    None,
}

/// `lcow.containerd.mounts`: who mounts what containerd gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotMounts {
    /// The host: runc and whatever else mounts bind and overlay mounts.
    Host,
    /// A virtual machine of runhcs: one `lcow-layer` mount.
    LcowLayer,
    /// A virtual machine of Kata Containers' Go runtime, which takes each layer as a block device.
    Kata,
}

/// `lcow.containerd.share`: which snapshots share one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotSharing {
    /// None.
    Off,
    /// Those whose tars have the same digest.
    Digest,
    /// Also those that claim the same chain, without proof that the client has the layer.
    Ref,
}

/// `lcow.containerd.content`: how blobs are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContentAccess {
    /// Through containerd's content API.
    Grpc,
    /// As files below containerd's root.
    File,
}

/// `lcow.containerd.extract`: what containerd gets for a snapshot that a layer is to be unpacked into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extraction {
    /// A mount that only this program's differ uses.
    Layer,
    /// A writable file system, for another differ.
    Sandbox,
}

/// `lcow.overlayapi`: how overlayfs is mounted.
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
show_as!(SnapshotMounts: Host = "host", LcowLayer = "lcow-layer", Kata = "kata");
show_as!(SnapshotSharing: Off = "off", Digest = "digest", Ref = "ref");
show_as!(ContentAccess: Grpc = "grpc", File = "file");
show_as!(Extraction: Layer = "layer", Sandbox = "sandbox");
