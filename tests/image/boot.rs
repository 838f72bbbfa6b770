//! A packed disk starts: a virtual machine with the kernel of a Debian package, the disk as its root file system.
//!
//! ```text
//!   image (busybox, /sbin/init) ─pack --size─► disk ─► QEMU: kernel, initramfs, virtio-blk ─► init writes, syncs, ends
//!                                              disk ◄─ e2fsck, mount: what init wrote is there
//! ```

use crate::pack::run;
use ext4_image::testing::{Mount, fsck};
use layer_tar::writer::{Header, Kind};
use oci_image::testing::{Packing, Store, Tar, directory};
use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// Without KVM, which not every machine has in working order, a start takes half a minute.
const LIMIT: Duration = Duration::from_mins(2);

/// Writes a file, lets the file system grow into a disk that became larger, and ends the machine with everything on it.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox grep ' / ' /proc/mounts >/mounts
/bin/busybox seq 100000 >/written
/bin/busybox rm /to-be-removed
/sbin/resize2fs /dev/vda
/bin/busybox df -m / >/room
/bin/busybox seq 100000 >/written-after
/bin/busybox sync
/bin/busybox umount /proc
/bin/busybox mount -o remount,ro /
echo the disk has started
/bin/busybox poweroff -f
";

#[test]
fn a_packed_disk_starts_as_the_root_of_a_machine() {
    let dir = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/build-svm-image");
    let guest = run(&script.display().to_string(), &["--disk"]);
    let guest = Path::new(guest.trim());

    let mut tar = Tar::default();
    for name in ["bin", "sbin", "proc", "dev", "sys"] {
        tar.dir(name);
    }
    let busybox = fs::read("/bin/busybox").expect("this test needs busybox-static");
    program(&mut tar, "bin/busybox", &busybox);
    program(&mut tar, "sbin/init", INIT.as_bytes());
    tar.file("to-be-removed", b"1");
    for file in dynamic("/sbin/resize2fs") {
        program(&mut tar, file.trim_start_matches('/'), &fs::read(&file).unwrap());
    }
    let mut store = Store::default();
    let manifest = store.manifest("linux/amd64", &[(&tar.finish(), Packing::Gzip)]);
    store.list(manifest, "test");
    directory(&dir.path().join("layout"), &store.files());
    let disk = dir.path().join("disk.img");
    let (source, out) = (format!("oci:{}", dir.path().join("layout").display()), disk.display().to_string());
    let program = env!("CARGO_BIN_EXE_lcow-graphdriver");
    run(program, &["image", "pack", "--size", "200MiB", "--require-init", "/sbin/init", &source, &out]);

    // Past 8 GiB a second group of descriptors begins.
    fs::File::options().write(true).open(&disk).unwrap().set_len(9 << 30).unwrap();
    let console = dir.path().join("console");
    let mut machine = Command::new("qemu-system-x86_64")
        .args([
            "-machine",
            "q35,accel=tcg",
            "-cpu",
            "max",
            "-m",
            "256",
            "-nographic",
            "-no-reboot",
            "-nodefaults",
        ])
        .arg("-kernel")
        .arg(guest.join("vmlinux"))
        .arg("-initrd")
        .arg(guest.join("initrd"))
        .args(["-append", "console=ttyS0 panic=-1 root=/dev/vda init=/sbin/init"])
        .args(["-drive", &format!("file={out},format=raw,if=virtio")])
        .args(["-serial", &format!("file:{}", console.display())])
        .spawn()
        .expect("this test needs QEMU (scripts/install-deps qemu)");
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = machine.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > LIMIT {
            machine.kill().unwrap();
            machine.wait().unwrap();
            panic!("the machine did not end; its console:\n{}", said(&console));
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(status.success() && said(&console).contains("the disk has started"), "{}", said(&console));

    fsck(&disk);
    let mount = Mount::new(&disk, "ro");
    let mounts = fs::read_to_string(mount.path().join("mounts")).unwrap();
    assert!(mounts.contains("ext4 rw"), "{mounts}");
    for name in ["written", "written-after"] {
        let written = fs::read_to_string(mount.path().join(name)).unwrap();
        assert_eq!(written.lines().last(), Some("100000"), "{name}");
    }
    let room = fs::read_to_string(mount.path().join("room")).unwrap();
    let size: u64 = room.lines().last().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(size > 8900, "it did not grow: {room}");
    assert!(!mount.path().join("to-be-removed").exists());
}

/// A dynamically linked program and everything that it loads, as paths.
fn dynamic(program: &str) -> Vec<String> {
    let mut files = vec![program.to_owned()];
    files.extend(
        run("ldd", &[program]).split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned),
    );
    files
}

/// An executable file.
fn program(tar: &mut Tar, path: &str, data: &[u8]) {
    let header = Header {
        kind: Kind::File,
        path: path.as_bytes(),
        link: b"",
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: (1_700_000_000, 0),
        device: (0, 0),
        size: data.len() as u64,
        xattrs: &[],
        sparse: None,
    };
    tar.entry(&header, data);
}

fn said(console: &Path) -> String {
    String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned()
}
