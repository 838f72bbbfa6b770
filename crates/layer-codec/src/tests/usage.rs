//! What a layer takes as an upper directory: the summary of an apply against the same tar unpacked by GNU tar on an ext4.

use super::*;
use crate::apply::{ApplyOptions, NoLowers, apply};
use disk_io::MemDisk;

/// A blank ext4 with mke2fs's defaults for a disk.
fn blank(dir: &Path) -> Mount {
    let image = dir.join("ext4.img");
    // mke2fs would take blocks of 1 KiB for a small disk.
    sh(&format!("truncate -s 256M {0} && mkfs.ext4 -q -b 4096 -I 256 -N 60000 {0}", image.display()));
    Mount::image(&dir.join("mnt"), &image, "")
}

/// `st_blocks × 512` of each inode once, and the number of inodes, as containerd's `fs.DiskUsage` walks.
fn walked(dir: &Path) -> (u64, u64) {
    let lines = sh(&format!("find {0} -printf '%i %b\\n' | sort -u", dir.display()));
    let blocks = lines.lines().map(|line| line.split_once(' ').unwrap().1.parse::<u64>().unwrap());
    (blocks.sum::<u64>() * 512, lines.lines().count() as u64)
}

/// Makes a tree by `script`, puts it into a tar, unpacks that; (usage of the summary, of the unpacked tree).
fn both(ext4: &Mount, script: &str) -> ((u64, u64), (u64, u64)) {
    let at = ext4.0.display();
    sh(&format!(
        "mkdir {at}/from {at}/upper; (umask 022; cd {at}/from; {script})
         tar -C {at}/from --xattrs --xattrs-include='*' --acls --sort=name -Scf {at}/tar .
         tar -C {at}/upper --xattrs --xattrs-include='*' --acls --numeric-owner -Spxf {at}/tar"
    ));
    let tar = fs::read(ext4.0.join("tar")).unwrap();
    let (image, record) = (MemDisk::new(), MemDisk::new());
    let options = ApplyOptions { block_size: 4096, ..ApplyOptions::default() };
    let summary = apply(&tar[..], &image, &record, &mut NoLowers, &options).unwrap();
    let upper = ext4.0.join("upper");
    // Blocks are allocated late, and counted anew then.
    let du = sh(&format!("sync -f {0}; du -s --block-size=1 {0} | cut -f1", upper.display()));
    let walked = walked(&upper);
    assert_eq!(du.trim().parse::<u64>().unwrap(), walked.0, "du counts the same");
    sh(&format!("rm -r {at}/from {at}/upper {at}/tar"));
    ((summary.usage_bytes, summary.usage_inodes), walked)
}

#[test]
#[cfg_attr(windows, ignore = "needs the mounts of Linux")]
fn a_layer_takes_what_it_would_take_on_ext4() {
    let cases = [
        ("nothing", "true"),
        ("files", "for n in 0 1 100 4095 4096 4097 12288 100000 5000001; do head -c $n /dev/urandom > f$n; done"),
        ("names of one inode", "echo x > a; ln a b; mkdir d; ln a d/c; mkfifo p; ln p q; ln -s t s; ln s r"),
        ("symlinks", "for n in 1 58 59 60 61 1000; do ln -s $(printf 'x%.0s' $(seq $n)) s$n; done"),
        ("devices", "mknod c c 1 3; mknod b b 8 0; mkfifo p; mknod w c 0 0"),
        (
            "holes",
            "truncate -s 10M all; truncate -s 10M tail; printf x | dd of=tail conv=notrunc status=none
             for n in 0 3 4 7 100; do printf x | dd of=some bs=4096 seek=$n conv=notrunc status=none; done
             truncate -s 20M many; for n in $(seq 0 2 600); do printf x | dd of=many bs=4096 seek=$n conv=notrunc \
             status=none; done; head -c 100000 /dev/zero > zeros",
        ),
        (
            "attributes",
            "for n in 1 66 67 68 69 100 2000; do touch x$n; setfattr -n user.name -v $(printf 'v%.0s' $(seq $n)) x$n; done
             touch two; setfattr -n user.a -v aaaaaaaaaaaaaaaa two; setfattr -n user.b -v bbbbbbbbbbbbbbbb two
             touch three; for n in a b c; do setfattr -n user.$n -v aaaaaaaaaaaaaaaa three; done
             mkdir d; setfattr -n user.name -v $(printf 'v%.0s' $(seq 500)) d; touch acl; setfacl -m u:5:rw,g:7:r acl
             mkdir acls; for n in $(seq 20); do setfacl -m u:$n:rw acls; done; setfacl -d -m u:1:r,u:2:r,g:3:r acls",
        ),
        ("directories of one block", "mkdir a b; touch a/{100..352} b/$(printf 'n%.0s' {1..200}){1..9}"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let ext4 = blank(dir.path());
    for (what, script) in cases {
        let (counted, walked) = both(&ext4, script);
        assert_eq!(counted, walked, "{what}");
    }
}

/// Where the kernel splits the leaves of a hash tree depends on a seed that each file system draws. The names come in their
/// own order: in that of this file system's hash, in which it lists them itself, leaves stay half full.
#[test]
#[cfg_attr(windows, ignore = "needs the mounts of Linux")]
fn large_directories_are_estimated() {
    let dir = tempfile::tempdir().unwrap();
    let ext4 = blank(dir.path());
    let names = |count: u64| format!("mkdir d; cd d; seq -f 'some-name-%g' {count} | xargs touch");
    // And how far off it may be: one part in so many, or one block.
    for (count, part) in [(300, 4), (1000, 4), (5000, 6), (20_000, 10)] {
        let ((bytes, inodes), walked) = both(&ext4, &names(count));
        assert_eq!((inodes, walked.1), (count + 2, count + 2));
        let off = bytes.abs_diff(walked.0);
        assert!(off <= (walked.0 / part).max(4096), "{count} names: {bytes} bytes, {} on ext4", walked.0);
    }
}
