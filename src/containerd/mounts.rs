//! Snapshots as containerd's mounts, and back.
//!
//! ```text
//!   Shown (driver)                     Mount
//!   folder                             lcow-layer  source=folder  ro|rw, parentLayerPaths=["…"] or =null
//!   upper, lowers                      overlay     workdir=, upperdir=, lowerdir=top:…:bottom
//!   upper alone                        bind        source=upper   rw, rbind
//!   one lower                          bind        source=lower   ro, rbind
//!   lowers                             overlay     lowerdir=top:…:bottom
//!   nothing                            bind        source=empty   ro, rbind
//!   view with mapped ids               bind        source=view    rw|ro, rbind
//!   images                             fuse3.kata-overlay         a block device for each image
//! ```
//!
//! Invariants:
//! * One mount for each answer: runhcs and older shims take exactly one.
//! * No option that only containerd's mount manager understands (`X-containerd.…`, types with `format/`), because CRI's
//!   volumes, dockerd and BuildKit mount by themselves; and no `loop`, which would give each mount a device of its own.
//! * `lcow-layer` is, field by field, the answer of containerd's own snapshotter for runhcs, `windows-lcow`
//!   (`plugins/snapshots/lcow/lcow.go`).
//! * An active snapshot is never answered with a read-only mount last: containerd takes that for a finished layer and
//!   skips its Apply (`core/unpack/unpacker.go`).
//!
//! Pure functions. Called by `snapshots` and `differ` of this module.

use crate::driver::snapshots::{Shown, ShownPlace};
use containerd_api::types::Mount;
use std::path::{Path, PathBuf};

/// Type of a mount that names a layer's directory (containerd's `windows-lcow` snapshotter, hcsshim's
/// `internal/layers/lcow.go`).
pub const LCOW_LAYER: &str = "lcow-layer";
/// What its option with the directories of the ancestors starts with; the rest is a JSON array.
const PARENT_LAYER_PATHS: &str = "parentLayerPaths=";
const OVERLAY: &str = "overlay";
const BIND: &str = "bind";
const UPPERDIR: &str = "upperdir=";
const WORKDIR: &str = "workdir=";
const LOWERDIR: &str = "lowerdir=";
/// Type of a mount for Kata Containers' Go runtime, which does not look at it; a host that is to mount such snapshots
/// needs a helper of this name (`mount.fuse3 kata-overlay`).
const KATA_OVERLAY: &str = "fuse3.kata-overlay";
/// Source of such a mount, which the runtime does not use either.
const KATA_SOURCE: &str = "overlay";
/// A layer: a file, the type of its file system, and mount options, separated by commas
/// (`src/runtime/pkg/containerd-shim-v2/create.go`, `copyLayersToMounts`).
const KATA_LAYER: &str = "io.katacontainers.fs-opt.layer=";
/// The guest adds an upper directory, which lies in the guest's memory (`src/agent/src/storage/fs_handler.rs`).
const KATA_RW: &str = "io.katacontainers.fs-opt.overlay-rw";
/// Options of one layer: it is a file that becomes a block device, and a lower layer of the root file system.
const KATA_LAYER_OPTIONS: &str =
    "ext4,ro,io.katacontainers.fs-opt.block_device=file,io.katacontainers.fs-opt.is-layer";
/// Where the guest mounts a layer, by the last component of its file's path (`copyLayersToMounts`). Lowers are given by
/// these paths in full: only some agents change to this directory before they mount the overlay.
const KATA_LAYERS: &str = "/run/kata-containers/sandbox/layers/";

/// The mounts of a snapshot.
pub fn mounts_of(shown: &Shown) -> Vec<Mount> {
    vec![match shown {
        Shown::Folder { folder, parents, read_only } => lcow_layer(folder, parents, *read_only),
        Shown::Paths { upper, lowers, empty, xino } => match (upper, lowers.as_slice()) {
            (Some((upper, _)), []) => bind(upper, false),
            (None, []) => bind(empty, true),
            (None, [lower]) => bind(lower, true),
            _ => {
                // Layers are file systems of their own: without xino, inode numbers of their files collide.
                let mut options: Vec<String> =
                    ["index=off", "metacopy=off", "redirect_dir=nofollow"].map(str::to_owned).into();
                options.push(format!("xino={}", if *xino { "on" } else { "off" }));
                if let Some((upper, work)) = upper {
                    options.push(format!("{WORKDIR}{}", work.display()));
                    options.push(format!("{UPPERDIR}{}", upper.display()));
                }
                let lowers: Vec<String> = lowers.iter().map(|lower| lower.display().to_string()).collect();
                options.push(format!("{LOWERDIR}{}", lowers.join(":")));
                mount(OVERLAY, OVERLAY, options)
            }
        },
        Shown::Mapped { view, read_only } => bind(view, *read_only),
        Shown::Disks { images, read_only } => kata(images, *read_only),
    }]
}

fn mount(kind: &str, source: &str, options: Vec<String>) -> Mount {
    // runhcs refuses a mount with a target.
    Mount { r#type: kind.into(), source: source.into(), target: String::new(), options }
}

fn bind(source: &Path, read_only: bool) -> Mount {
    let access = if read_only { "ro" } else { "rw" };
    mount(BIND, &source.display().to_string(), vec![access.into(), "rbind".into()])
}

fn lcow_layer(folder: &Path, parents: &[PathBuf], read_only: bool) -> Mount {
    let parents: Vec<String> = parents.iter().map(|p| p.display().to_string()).collect();
    // Without parents the original encodes a nil slice of Go, which is `null` in JSON.
    let parents = if parents.is_empty() { serde_json::Value::Null } else { parents.into() };
    let options =
        vec![if read_only { "ro" } else { "rw" }.to_owned(), format!("{PARENT_LAYER_PATHS}{parents}")];
    mount(LCOW_LAYER, &folder.display().to_string(), options)
}

fn kata(images: &[PathBuf], read_only: bool) -> Mount {
    let in_guest =
        |path: &PathBuf| format!("{KATA_LAYERS}{}", path.file_name().unwrap_or_default().to_string_lossy());
    let mut options: Vec<String> =
        images.iter().map(|path| format!("{KATA_LAYER}{},{KATA_LAYER_OPTIONS}", path.display())).collect();
    if !read_only {
        options.push(KATA_RW.into());
    }
    let lowers: Vec<String> = images.iter().map(in_guest).collect();
    options.push(format!("{LOWERDIR}{}", lowers.join(":")));
    mount(KATA_OVERLAY, KATA_SOURCE, options)
}

/// What mounts of a client show, if they have the form of this service's; whether they are ours is for the driver to
/// find out. No mounts at all are an empty view.
pub fn place_of(mounts: &[Mount]) -> Option<ShownPlace> {
    let [mount] = mounts else {
        return mounts.is_empty().then(|| ShownPlace::Paths { upper: None, lowers: Vec::new() });
    };
    let option = |name: &str| mount.options.iter().find_map(|o| o.strip_prefix(name));
    match mount.r#type.as_str() {
        LCOW_LAYER => Some(ShownPlace::Folder(PathBuf::from(&mount.source))),
        BIND => {
            let source = PathBuf::from(&mount.source);
            // CRI and others turn a view into a read-only mount by an option more.
            let read_only = mount.options.iter().any(|o| o == "ro");
            Some(if read_only {
                ShownPlace::Paths { upper: None, lowers: vec![source] }
            } else {
                ShownPlace::Paths { upper: Some(source), lowers: Vec::new() }
            })
        }
        OVERLAY => Some(ShownPlace::Paths {
            upper: option(UPPERDIR).map(PathBuf::from),
            lowers: option(LOWERDIR)
                .unwrap_or_default()
                .split(':')
                .filter(|l| !l.is_empty())
                .map(PathBuf::from)
                .collect(),
        }),
        // What a container wrote stays in the guest, so mounts of a container show nothing that could be compared.
        KATA_OVERLAY if !mount.options.iter().any(|o| o == KATA_RW) => Some(ShownPlace::Disks(
            mount
                .options
                .iter()
                .filter_map(|o| o.strip_prefix(KATA_LAYER)?.split(',').next())
                .map(PathBuf::from)
                .collect(),
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    fn paths(list: &[&str]) -> Vec<PathBuf> {
        list.iter().map(PathBuf::from).collect()
    }

    fn mapped(read_only: bool) -> Shown {
        Shown::Mapped { view: "/h/mnt/cd.mapped".into(), read_only }
    }

    fn shown_paths(upper: bool, lowers: &[&str], xino: bool) -> Shown {
        Shown::Paths {
            upper: upper.then(|| ("/h/mnt/cd/upper".into(), "/h/mnt/cd/work".into())),
            lowers: paths(lowers),
            empty: "/h/mnt/empty".into(),
            xino,
        }
    }

    /// One line for each field and option.
    fn text(mounts: &[Mount]) -> String {
        let mut text = String::new();
        for Mount { r#type, source, target, options } in mounts {
            write!(text, "{type} {source} [{target}]").unwrap();
            for option in options {
                write!(text, "\n  {option}").unwrap();
            }
        }
        text
    }

    #[test]
    fn every_kind_of_snapshot_has_its_mount() {
        for (name, shown, golden) in [
            (
                "container without an image",
                shown_paths(true, &[], true),
                "bind /h/mnt/cd/upper []\n  rw\n  rbind",
            ),
            ("view of nothing", shown_paths(false, &[], true), "bind /h/mnt/empty []\n  ro\n  rbind"),
            (
                "view of one layer",
                shown_paths(false, &["/h/mnt/ca"], true),
                "bind /h/mnt/ca []\n  ro\n  rbind",
            ),
            (
                "container",
                shown_paths(true, &["/h/mnt/cb", "/h/mnt/ca"], true),
                "overlay overlay []\n  index=off\n  metacopy=off\n  redirect_dir=nofollow\n  xino=on\n  \
                 workdir=/h/mnt/cd/work\n  upperdir=/h/mnt/cd/upper\n  lowerdir=/h/mnt/cb:/h/mnt/ca",
            ),
            (
                "view, without xino",
                shown_paths(false, &["/h/mnt/cb", "/h/mnt/ca"], false),
                "overlay overlay []\n  index=off\n  metacopy=off\n  redirect_dir=nofollow\n  xino=off\n  \
                 lowerdir=/h/mnt/cb:/h/mnt/ca",
            ),
            ("container in a user namespace", mapped(false), "bind /h/mnt/cd.mapped []\n  rw\n  rbind"),
            ("view in a user namespace", mapped(true), "bind /h/mnt/cd.mapped []\n  ro\n  rbind"),
        ] {
            assert_eq!(text(&mounts_of(&shown)), golden, "{name}");
        }
    }

    /// The answers of containerd 2.1.9's `windows-lcow`, folder names aside.
    #[test]
    fn runhcs_gets_what_windows_lcow_gives_it() {
        let folder = |folder: &str, parents: &[&str], read_only| Shown::Folder {
            folder: folder.into(),
            parents: paths(parents),
            read_only,
        };
        for (name, shown, golden) in [
            (
                "active without parents",
                folder(r"C:\s\cb", &[], false),
                "lcow-layer C:\\s\\cb []\n  rw\n  parentLayerPaths=null",
            ),
            (
                "view without parents",
                folder(r"C:\s\cb", &[], true),
                "lcow-layer C:\\s\\cb []\n  ro\n  parentLayerPaths=null",
            ),
            (
                "active",
                folder(r"C:\s\cc", &[r"C:\s\cb", r"C:\s\ca"], false),
                "lcow-layer C:\\s\\cc []\n  rw\n  parentLayerPaths=[\"C:\\\\s\\\\cb\",\"C:\\\\s\\\\ca\"]",
            ),
            (
                "view of two layers: the nearest is the source",
                folder(r"C:\s\cb", &[r"C:\s\ca"], true),
                "lcow-layer C:\\s\\cb []\n  ro\n  parentLayerPaths=[\"C:\\\\s\\\\ca\"]",
            ),
            (
                "on Linux",
                folder("/h/cb", &["/h/ca"], false),
                "lcow-layer /h/cb []\n  rw\n  parentLayerPaths=[\"/h/ca\"]",
            ),
        ] {
            assert_eq!(text(&mounts_of(&shown)), golden, "{name}");
        }
    }

    #[test]
    fn kata_gets_a_block_device_for_each_layer() {
        let disks = |read_only| Shown::Disks { images: paths(&["/h/cb/cb.vhd", "/h/ca/ca.vhd"]), read_only };
        let options = "ext4,ro,io.katacontainers.fs-opt.block_device=file,io.katacontainers.fs-opt.is-layer";
        let layers = format!(
            "fuse3.kata-overlay overlay []\n  io.katacontainers.fs-opt.layer=/h/cb/cb.vhd,{options}\n  \
             io.katacontainers.fs-opt.layer=/h/ca/ca.vhd,{options}"
        );
        let lowers =
            "lowerdir=/run/kata-containers/sandbox/layers/cb.vhd:/run/kata-containers/sandbox/layers/ca.vhd";
        let rw = "io.katacontainers.fs-opt.overlay-rw";
        assert_eq!(text(&mounts_of(&disks(false))), format!("{layers}\n  {rw}\n  {lowers}"));
        assert_eq!(text(&mounts_of(&disks(true))), format!("{layers}\n  {lowers}"));
    }

    #[test]
    fn mounts_lead_back_to_what_they_show() {
        let lowers = ["/h/mnt/cb", "/h/mnt/ca"];
        let shows = |upper: Option<&str>, lowers: &[&str]| {
            Some(ShownPlace::Paths { upper: upper.map(PathBuf::from), lowers: paths(lowers) })
        };
        let upper = Some("/h/mnt/cd/upper");
        for (shown, place) in [
            (shown_paths(true, &[], true), shows(upper, &[])),
            (shown_paths(true, &lowers, true), shows(upper, &lowers)),
            (mapped(false), shows(Some("/h/mnt/cd.mapped"), &[])),
            (shown_paths(false, &lowers, true), shows(None, &lowers)),
            (shown_paths(false, &["/h/mnt/ca"], true), shows(None, &["/h/mnt/ca"])),
            (mapped(true), shows(None, &["/h/mnt/cd.mapped"])),
            (shown_paths(false, &[], true), shows(None, &["/h/mnt/empty"])),
            (
                Shown::Folder { folder: "/h/cb".into(), parents: paths(&["/h/ca"]), read_only: false },
                Some(ShownPlace::Folder("/h/cb".into())),
            ),
            (
                Shown::Disks { images: paths(&["/h/cb/cb.vhd", "/h/ca/ca.vhd"]), read_only: true },
                Some(ShownPlace::Disks(paths(&["/h/cb/cb.vhd", "/h/ca/ca.vhd"]))),
            ),
            // What the container wrote is in its virtual machine.
            (Shown::Disks { images: paths(&["/h/ca/ca.vhd"]), read_only: false }, None),
        ] {
            assert_eq!(place_of(&mounts_of(&shown)), place, "{shown:?}");
        }
        assert_eq!(place_of(&[]), shows(None, &[]), "no mounts are an empty view");
    }

    #[test]
    fn hostile_mounts_are_text_and_nothing_else() {
        let made = |kind: &str, source: &str, options: &[&str]| {
            mount(kind, source, options.iter().map(|o| (*o).to_owned()).collect())
        };
        let nothing = Some(ShownPlace::Paths { upper: None, lowers: Vec::new() });
        for (name, mounts, place) in [
            ("two mounts", vec![made(BIND, "/a", &[]), made(BIND, "/b", &[])], None),
            ("an unknown type", vec![made("ext4", "/dev/sda1", &["ro"])], None),
            (
                "a type of the mount manager",
                vec![made("format/overlay", "overlay", &["lowerdir={{ mount 0 }}"])],
                None,
            ),
            ("no type", vec![made("", "/h/mnt/ca", &[])], None),
            (
                "a folder above",
                vec![made(LCOW_LAYER, "/h/../etc", &[])],
                Some(ShownPlace::Folder("/h/../etc".into())),
            ),
            ("an empty folder", vec![made(LCOW_LAYER, "", &[])], Some(ShownPlace::Folder(PathBuf::new()))),
            ("an overlay of nothing", vec![made(OVERLAY, OVERLAY, &[])], nothing.clone()),
            ("empty lowers", vec![made(OVERLAY, OVERLAY, &["lowerdir=::"])], nothing),
            (
                "a kata mount without layers",
                vec![made(KATA_OVERLAY, "/", &[])],
                Some(ShownPlace::Disks(Vec::new())),
            ),
            (
                "a kata layer without options",
                vec![made(KATA_OVERLAY, "/", &["io.katacontainers.fs-opt.layer="])],
                Some(ShownPlace::Disks(vec![PathBuf::new()])),
            ),
            (
                "both read-only and writable: the safer one",
                vec![made(BIND, "/h/mnt/cd/upper", &["rw", "ro"])],
                Some(ShownPlace::Paths { upper: None, lowers: paths(&["/h/mnt/cd/upper"]) }),
            ),
            (
                "an upper directory twice: the first",
                vec![made(OVERLAY, OVERLAY, &["upperdir=/a/upper", "upperdir=/b/upper", "lowerdir=/c"])],
                Some(ShownPlace::Paths { upper: Some("/a/upper".into()), lowers: paths(&["/c"]) }),
            ),
        ] {
            assert_eq!(place_of(&mounts), place, "{name}");
        }
    }
}
