//! What profile `hcsshim` refuses, because the tool does, or because the tool writes a wrong image; and that the default
//! profile does better.

use crate::{
    image::{hcsshim, make, text},
    profile,
    tars::{Meta, Tar},
};
use ext4_image::{
    Ext4, Ext4Error,
    check::{CheckLimits, check},
    hcsshim::LCOW_MAX_DISK,
};
use layer_codec::{DiffError, apply::ApplyOptions};

/// What a tar of this kind is good for in the default profile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Default {
    Applied,
    /// ext4 cannot hold it either way.
    Refused,
}

fn entry(name: &str, flag: u8, meta: &Meta) -> Tar {
    Tar::default().add(name.as_bytes(), flag, b"", b"", meta)
}

fn xattr(name: &str, value: impl AsRef<[u8]>) -> Tar {
    entry("x", b'0', &Meta::default().xattr(name, value))
}

fn at(time: &str) -> Tar {
    entry("x", b'0', &Meta::default().pax("mtime", time))
}

/// A big-endian ACL would be no ACL: this is what `getxattr` gives for rw-r--r--.
const ACL: &[u8] = &[
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 4, 0, 4, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255, 255, 255,
    255,
];

#[test]
fn wrong_images_and_refused_tars_are_refused_with_entry_and_reason() {
    use self::Default::{Applied, Refused};
    let device = Meta { device: (1, 0x10_0000), ..Meta::default() };
    let cases: Vec<(Tar, &str, Default)> = vec![
        // Written wrongly by the tool.
        (at("-1"), "a date of -1 seconds", Applied),
        (at("2147483648"), "a date of 2147483648 seconds", Applied),
        (at("-62135596800"), "a date of", Applied),
        (xattr("system.posix_acl_access", ACL), "linux does not read", Applied),
        (xattr("btrfs.compression", "zstd"), "linux does not read", Applied),
        (xattr("trusted.overlay.redirect", "/etc"), "overlayfs would follow", Applied),
        (entry("x", b'3', &device), "device number 1:1048576", Refused),
        (Tar::default().sparse("x", (339 << 27) + 1, &[], Meta::default()), "writes wrong extents", Applied),
        (Tar::default().symlink("x", &"t".repeat(4096)), "target of 4096 bytes", Refused),
        // Refused by the tool.
        (Tar::default().file("x", b"1").file("x", b"2"), "has data on the disk", Applied),
        (Tar::default().file("x", b"1").file(".wh.x", b""), "has data on the disk", Applied),
        (Tar::default().dir("x").file("x", b"1"), "a directory is there already", Applied),
        (Tar::default().file("x", b"1").dir("x"), "something that is no directory", Applied),
        (Tar::default().link("x", "y").file("y", b"1"), "does not precede it", Applied),
        (Tar::default().link("x", "below"), "does not precede it", Refused),
        (Tar::default().file("x", b"1").file("y", b"2").link("x", "y"), "hard link in the place", Applied),
        (Tar::default().symlink("x", "y").file("x/in", b"1"), "no directory", Applied),
        (Tar::default().file(".wh.", b""), "whiteout without a name", Refused),
        (xattr("user.big", vec![1; 5000]), "does not fit the inode and one block", Applied),
        // Understood otherwise by Go's tar reader.
        (entry("x/", b'0', &Meta::default()), "Go reads as a file", Applied),
        (entry("x", b'0', &Meta::default().pax("LIBARCHIVE.xattr.user.a", "YQ")), "Go ignores", Applied),
        (entry("g", b'g', &Meta::default()), "global pax header", Applied),
    ];
    for (tar, reason, default) in cases {
        let tar = tar.end();
        match hcsshim(&tar, profile(LCOW_MAX_DISK, true, false)).map(|_| ()) {
            Err(e @ DiffError::Image { source: Ext4Error::Unsupported { .. }, .. }) => {
                let text = text(&e);
                assert!(text.contains(reason), "{reason:?} is not in {text:?}");
            }
            Err(e) => panic!("{reason}: {}", text(&e)),
            Ok(()) => panic!("{reason}: not refused"),
        }
        match (make(&tar, ApplyOptions::default()), default) {
            (Ok(image), Applied) => assert_eq!(image.e2fsck(), Vec::<String>::new(), "{reason}"),
            (Err(_), Refused) => {}
            (Ok(_), Refused) => panic!("{reason}: the default profile takes it"),
            (Err(e), Applied) => panic!("{reason}: the default profile: {}", text(&e)),
        }
    }
}

#[test]
fn a_file_that_just_fits_one_leaf_is_right() {
    const SIZE: u64 = 339 << 27;
    let tar = Tar::default().sparse("x", SIZE, &[(SIZE - 3, b"end")], Meta::default()).end();
    let image = hcsshim(&tar, profile(LCOW_MAX_DISK, true, false)).unwrap_or_else(|e| panic!("{}", text(&e)));
    check(&image.file, CheckLimits::default()).unwrap();
    assert_eq!(image.e2fsck(), Vec::<String>::new());
    let fs = Ext4::open(&image.file).unwrap();
    let file = fs.lookup(&fs.inode(fs.root()).unwrap(), b"x").unwrap().unwrap();
    let mut end = [1; 8];
    assert_eq!(fs.read_file_at(&fs.inode(file).unwrap(), SIZE - 8, &mut end).unwrap(), 8);
    assert_eq!(&end, b"\0\0\0\0\0end");
}
