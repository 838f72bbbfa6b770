//! What the commands refuse, what they say, and clones by reflink.

use super::{GIB, Kind, MIB, Mounted, fails, fsck, json, make, ok, raw_view, taken, text};
use disk_io::{ReadAt, WriteAt};
use ext4_image::{Ext4, format::BlankVersion};
use std::{
    fs::{self, File},
    path::Path,
    process::Command,
};

fn run(command: &mut Command) {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Fills a disk with files of a MiB and deletes most of them.
fn use_up(path: &Path, bytes: u64, files: u64) {
    let mounted = Mounted::new(path, bytes, "rw,nodiscard");
    for i in 0..files {
        fs::write(mounted.path().join(format!("upper/{i}")), vec![i as u8 + 1; MIB as usize]).unwrap();
    }
    rustix::fs::syncfs(File::open(mounted.path()).unwrap()).unwrap();
    for i in 1..files {
        fs::remove_file(mounted.path().join(format!("upper/{i}"))).unwrap();
    }
    mounted.unmount();
}

#[test]
fn twenty_gigabytes_become_two_hundred_with_little_to_write() {
    let folder = tempfile::tempdir().unwrap();
    for kind in Kind::ALL {
        for version in [BlankVersion::First, BlankVersion::Second] {
            let path = folder.path().join(format!("{version:?}.{}", kind.extension()));
            make(&path, kind, version, 20 * GIB);
            let before = taken(&path);
            let done = json(&["layer", "grow", text(&path), "200GiB"]);
            assert_eq!(done["after"]["file_system"], 200 * GIB, "{kind:?} {version:?}");
            if kind != Kind::Vhdx {
                assert!(taken(&path) < before + MIB, "{} more", taken(&path) - before);
            }
            let (view, bytes) = raw_view(&path, kind, folder.path());
            assert_eq!(bytes, 200 * GIB);
            fsck(&view);
            if kind == Kind::Vhdx {
                fs::remove_file(view).unwrap();
            }
            let said = ok(&["layer", "grow", text(&path), "200GiB"]);
            assert!(said.contains("file system") && said.contains("BEFORE"), "{said}");
        }
    }
    for (name, format) in [("Second.vhd", "vpc"), ("Second.vhdx", "vhdx")] {
        let out = Command::new("qemu-img")
            .args(["info", "--output=json", "-f", format])
            .arg(folder.path().join(name))
            .output()
            .unwrap();
        let info: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(info["virtual-size"], 200 * GIB, "{name}");
    }
}

#[test]
fn what_is_deleted_is_given_back() {
    let folder = tempfile::tempdir().unwrap();
    for kind in [Kind::Raw, Kind::Vhd] {
        let path = folder.path().join(format!("disk.{}", kind.extension()));
        make(&path, kind, BlankVersion::Second, GIB);
        use_up(&path, GIB, 60);
        assert!(taken(&path) > 50 * MIB);
        let done = json(&["layer", "compact", text(&path)]);
        assert!(taken(&path) < 12 * MIB, "{} bytes", taken(&path));
        assert_eq!(done["after"], taken(&path));
        assert!(ok(&["layer", "compact", text(&path)]).contains("on disk before"));
        fsck(&path);
        let mounted = Mounted::new(&path, GIB, "ro");
        assert!(fs::read(mounted.path().join("upper/0")).unwrap() == vec![1; MIB as usize]);
        mounted.unmount();
    }
    for in_place in [&[][..], &["--in-place"]] {
        let raw = folder.path().join("full.img");
        make(&raw, Kind::Raw, BlankVersion::Second, GIB);
        use_up(&raw, GIB, 60);
        let path = folder.path().join("disk.vhdx");
        ok(&["layer", "convert", text(&raw), text(&path)]);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o640);
        fs::set_permissions(&path, mode).unwrap();
        fs::remove_file(&raw).unwrap();
        let before = fs::metadata(&path).unwrap().len();
        json(&[&["layer", "compact", text(&path)], in_place].concat());
        let known = fs::metadata(&path).unwrap();
        assert!(known.len() + 50 * MIB < before, "{in_place:?}: {before} to {}", known.len());
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&known.permissions()) & 0o777, 0o640);
        run(Command::new("qemu-img").args(["check", "-f", "vhdx"]).arg(&path));
        let (view, bytes) = raw_view(&path, Kind::Vhdx, folder.path());
        fsck(&view);
        let mounted = Mounted::new(&view, bytes, "ro");
        assert!(fs::read(mounted.path().join("upper/0")).unwrap() == vec![1; MIB as usize]);
        mounted.unmount();
    }
}

#[test]
fn what_must_not_be_changed_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhd");
    make(&path, Kind::Vhd, BlankVersion::Second, 64 * MIB);
    let all = |path: &Path, reason: &str| {
        let clone = folder.path().join("clone");
        for arguments in [
            &["layer", "grow", text(path), "1GiB"][..],
            &["layer", "compact", text(path)],
            &["layer", "clone", text(path), text(&clone), "--size", "1GiB"],
        ] {
            let before = fs::metadata(path).unwrap().len();
            let said = fails(arguments);
            assert!(said.contains(reason), "{arguments:?}: {said}");
            assert_eq!(fs::metadata(path).unwrap().len(), before);
            assert!(!clone.exists());
        }
    };
    // Attached.
    let mounted = Mounted::new(&path, 64 * MIB, "rw");
    all(&path, "attached as /dev/loop");
    mounted.unmount();
    // Open elsewhere.
    let open = File::options().read(true).write(true).open(&path).unwrap();
    all(&path, "open in another process");
    // A partition table.
    let begin = [0x80, 0, 2, 0, 0x83, 0, 0, 0, 1, 0, 0, 0, 0xff, 0, 0, 0];
    open.write_all_at(&begin, 446).unwrap();
    open.write_all_at(&[0x55, 0xAA], 510).unwrap();
    drop(open);
    all(&path, "partition table");
    // A differencing disk.
    let child = folder.path().join("child.vhd");
    make(&child, Kind::Vhd, BlankVersion::Second, 64 * MIB);
    let dynamic = folder.path().join("dynamic.vhd");
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "vpc", "-o", "subformat=dynamic"])
        .arg(&dynamic)
        .arg("64M"));
    let said = fails(&["layer", "grow", text(&dynamic), "1GiB"]);
    assert!(said.contains("dynamic VHD"), "{said}");
    // A read-only image, and one with a hash tree.
    let (tree, tar) = (folder.path().join("tree"), folder.path().join("in.tar"));
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "content").unwrap();
    run(Command::new("tar").arg("-C").arg(&tree).arg("-cf").arg(&tar).arg("."));
    let layer = folder.path().join("layer.vhd");
    ok(&["layer", "pack", "--verity", text(&tar), text(&layer)]);
    all(&layer, "hash tree");
    // Sizes.
    let good = folder.path().join("good.vhd");
    make(&good, Kind::Vhd, BlankVersion::Second, 64 * MIB);
    for (size, reason) in [("63MiB", "cannot shrink"), ("100000001", "multiple of 512"), ("3TiB", "2040 GiB")]
    {
        let said = fails(&["layer", "grow", text(&good), size]);
        assert!(said.contains(reason), "{size}: {said}");
    }
    fsck(&good);
}

#[test]
fn a_clone_has_an_identity_of_its_own_or_says_why_not() {
    let folder = tempfile::tempdir().unwrap();
    let uuid = |path: &Path, kind| {
        let (view, bytes) = raw_view(path, kind, folder.path());
        let disk = disk_io::SubDisk::new(File::open(view).unwrap(), 0, bytes);
        Ext4::open(disk).unwrap().geometry().uuid
    };
    for kind in Kind::ALL {
        for version in [BlankVersion::First, BlankVersion::Second] {
            let (source, clone) = (
                folder.path().join(format!("{version:?}.{}", kind.extension())),
                folder.path().join(format!("{version:?}-clone.{}", kind.extension())),
            );
            make(&source, kind, version, 200 * MIB);
            let before = fs::read(&source).unwrap();
            let done = json(&["layer", "clone", text(&source), text(&clone)]);
            assert!(fs::read(&source).unwrap() == before, "the source changed");
            assert_eq!(
                (done["uuid_kept"].as_bool(), done["seed_added"].as_bool()),
                (Some(false), Some(version == BlankVersion::First))
            );
            assert_ne!(uuid(&source, kind), uuid(&clone, kind));
            let inspect = |path: &Path| json(&["layer", "inspect", text(path)]);
            let (one, two) = (inspect(&source), inspect(&clone));
            if kind != Kind::Raw {
                assert_ne!((&one["vhd"], &one["vhdx"]), (&two["vhd"], &two["vhdx"]), "{one}");
            }
            let (view, bytes) = raw_view(&clone, kind, folder.path());
            fsck(&view);
            // Both at once: the kernel mounts them side by side.
            if kind != Kind::Vhdx {
                let (first, second) = (Mounted::new(&source, bytes, "rw"), Mounted::new(&clone, bytes, "rw"));
                fs::write(second.path().join("upper/only-here"), "x").unwrap();
                assert!(!first.path().join("upper/only-here").exists());
                second.unmount();
                first.unmount();
                fsck(&clone);
            }
        }
    }
    // An applied layer, without and with a hash tree.
    let (tree, tar) = (folder.path().join("tree"), folder.path().join("in.tar"));
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), vec![b'x'; 100_000]).unwrap();
    run(Command::new("tar").arg("-C").arg(&tree).arg("-cf").arg(&tar).arg("."));
    let (layer, clone) = (folder.path().join("layer.vhd"), folder.path().join("clone.vhd"));
    ok(&["layer", "pack", text(&tar), text(&layer)]);
    let done = json(&["layer", "clone", text(&layer), text(&clone), "--writable", "--size", "500MiB"]);
    assert_eq!(done["disk_bytes"], 500 * MIB);
    fsck(&clone);
    let mounted = Mounted::new(&clone, 500 * MIB, "rw");
    fs::write(mounted.path().join("new"), vec![1; 300 << 20]).unwrap();
    assert_eq!(fs::read(mounted.path().join("file")).unwrap(), vec![b'x'; 100_000]);
    mounted.unmount();
    fsck(&clone);
    let packed = json(&["layer", "pack", "--verity", text(&tar), text(&layer)]);
    let done = json(&["layer", "clone", text(&layer), text(&clone)]);
    assert_eq!(done["uuid_kept"], true);
    let root = packed["verity"]["root_hash"].as_str().unwrap();
    ok(&["layer", "verify", "--root-hash", root, text(&clone)]);
}

/// XFS in a file, mounted.
struct Xfs {
    _folder: tempfile::TempDir,
    mount: std::path::PathBuf,
}

impl Xfs {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (image, mount) = (folder.path().join("xfs.img"), folder.path().join("mnt"));
        File::create(&image).unwrap().set_len(4 * GIB).unwrap();
        fs::create_dir(&mount).unwrap();
        run(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).args([&image, &mount]));
        Self { _folder: folder, mount }
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.mount).status();
    }
}

#[test]
fn a_clone_shares_its_blocks_where_the_file_system_can() {
    let xfs = Xfs::new();
    let (source, clone) = (xfs.mount.join("source.vhd"), xfs.mount.join("clone.vhd"));
    make(&source, Kind::Vhd, BlankVersion::Second, 2 * GIB);
    let mounted = Mounted::new(&source, 2 * GIB, "rw");
    fs::write(mounted.path().join("upper/big"), vec![7; GIB as usize]).unwrap();
    mounted.unmount();
    File::open(&source).unwrap().sync_all().unwrap();
    let free = || rustix::fs::statvfs(&xfs.mount).map(|s| s.f_bavail * s.f_frsize).unwrap();
    let before = free();
    let done = json(&["layer", "clone", text(&source), text(&clone)]);
    assert_eq!(done["how"], "reflink");
    assert!(before - free() < 8 * MIB, "{} bytes", before - free());
    fsck(&clone);
    // Written apart from then on.
    let mounted = Mounted::new(&clone, 2 * GIB, "rw");
    File::options()
        .write(true)
        .open(mounted.path().join("upper/big"))
        .unwrap()
        .write_all_at(&[9; 4096], 0)
        .unwrap();
    mounted.unmount();
    let mounted = Mounted::new(&source, 2 * GIB, "ro");
    let mut first = [0; 1];
    File::open(mounted.path().join("upper/big")).unwrap().read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [7]);
    mounted.unmount();
}
