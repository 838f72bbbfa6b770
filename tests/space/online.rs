//! A blank grows while it is mounted: in a virtual machine, whose kernel lets its root do that.
//!
//! ```text
//!   guest of scripts/build-svm-image + busybox, resize2fs, /space-init ─► QEMU ─► mount, write, resize2fs, write, unmount
//! ```
//!
//! Many machines on which tests run lack `CAP_SYS_RESOURCE`, which that needs.

use super::{GIB, Kind, MIB, Mounted, fsck, make};
use ext4_image::{Ext4, format::BlankVersion};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What the guest does.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /mnt
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
for m in /modules/*.ko; do $b insmod $m; done
n=0; while [ ! -b /dev/sda ] && [ $n -lt 1200 ]; do $b usleep 50000; n=$((n + 1)); done
$b mount -t ext4 /dev/sda /mnt && echo "MOUNTED"
fill() { $b dd if=/dev/zero bs=1M count=$1 2>/dev/null | $b tr '\0' $2; }
fill 5 a >/mnt/upper/before
/bin/resize2fs /dev/sda && echo "RESIZED"
for i in 1 2 3 4 5 6 7 8; do $b mkdir /mnt/upper/$i; fill 3 b >/mnt/upper/$i/after; done
$b umount /mnt && echo "UNMOUNTED"
$b poweroff -f
"#;

fn image_folder() -> PathBuf {
    std::env::var_os("LCOW_SVM_IMAGE").map_or_else(
        || Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("svm-image"),
        PathBuf::from,
    )
}

/// The guest's files, and our own.
fn initrd(folder: &Path) -> PathBuf {
    let root = folder.join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    let copy = |from: &Path, to: &Path| {
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap_or_else(|e| panic!("this test needs {}: {e}", from.display()));
    };
    copy(Path::new("/usr/bin/busybox"), &root.join("bin/busybox"));
    let resize = Path::new("/usr/sbin/resize2fs");
    copy(resize, &root.join("bin/resize2fs"));
    let libraries = Command::new("ldd").arg(resize).output().unwrap();
    for word in String::from_utf8(libraries.stdout).unwrap().split_whitespace() {
        if let Some(inside) = word.strip_prefix('/') {
            copy(Path::new(word), &root.join(inside));
        }
    }
    let init = root.join("space-init");
    fs::write(&init, INIT).unwrap();
    fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let archive = folder.join("initrd");
    let theirs = image_folder().join("initrd");
    copy(&theirs, &archive);
    let packed = Command::new("bash")
        .args(["-c", "cd \"$1\" && find . | cpio --quiet -o -H newc >>\"$2\"", "cpio"])
        .args([&root, &archive])
        .status()
        .unwrap();
    assert!(packed.success(), "this test needs cpio");
    archive
}

#[test]
fn a_blank_grows_while_it_is_mounted() {
    let folder = tempfile::tempdir().unwrap();
    let initrd = initrd(folder.path());
    // From short and whole last groups, inside and over a block of descriptors.
    for (old, new) in [(100 * MIB, 9 * GIB), (7 * GIB + 900 * MIB, 8 * GIB + 200 * MIB)] {
        let disk = folder.path().join("disk.img");
        make(&disk, Kind::Raw, BlankVersion::Second, old);
        File::options().write(true).open(&disk).unwrap().set_len(new).unwrap();
        let drive = format!("driver=raw,node-name=disk,file.driver=file,file.filename={}", disk.display());
        let out = Command::new("timeout")
            .args(["120", "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"])
            .args([
                "-no-reboot",
                "-nic",
                "none",
                "-machine",
                "q35,smm=off,sata=off,smbus=off",
                "-accel",
                "tcg",
            ])
            .args(["-m", "256", "-serial", "stdio", "-device", "virtio-scsi-pci", "-blockdev", &drive])
            .args(["-device", "scsi-hd,drive=disk", "-append"])
            .arg("console=ttyS0 rdinit=/space-init panic=-1 quiet")
            .arg("-kernel")
            .arg(image_folder().join("vmlinux"))
            .arg("-initrd")
            .arg(&initrd)
            .stdin(Stdio::null())
            .output()
            .expect("this test needs QEMU");
        let said = String::from_utf8_lossy(&out.stdout);
        for step in ["MOUNTED", "RESIZED", "UNMOUNTED"] {
            assert!(said.contains(step), "{step}: {said}{}", String::from_utf8_lossy(&out.stderr));
        }
        assert!(!said.contains("Invalid checksum"), "{said}");
        fsck(&disk);
        let bytes = Ext4::open(File::open(&disk).unwrap()).unwrap().geometry().blocks_count * 4096;
        assert!(bytes + 3 * MIB > new, "{bytes} of {new}");
        let mounted = Mounted::new(&disk, new, "ro");
        assert!(fs::read(mounted.path().join("upper/before")).unwrap() == vec![b'a'; 5 << 20]);
        for i in 1..9 {
            let path = mounted.path().join(format!("upper/{i}/after"));
            assert!(fs::read(path).unwrap() == vec![b'b'; 3 << 20], "{i}");
        }
        mounted.unmount();
        fs::remove_file(&disk).unwrap();
    }
}
