//! Kinds of damage by name, each made once: what e2fsck rejects, and what only we refuse, and why.

use super::{
    Bytes, bases, e2fsck,
    image::{Image, Kind, Unit, put16, put32, u16_at, u32_at},
};
use ext4_image::check::{CheckLimits, check};
use std::fs;

const INDEX: u32 = 0x1000;
const INLINE: u32 = 0x1000_0000;
const SUPER: Kind = Kind::Super;

fn unit(image: &Image, what: impl Fn(&Image, &Unit) -> bool) -> Unit {
    image.units.iter().find(|unit| what(image, unit)).expect("the image has one of these").clone()
}

/// The first inode of these type bits, with these flags and without those.
fn inode(image: &Image, kind: u32, with: u32, without: u32) -> Unit {
    unit(image, |image, unit| {
        let b = &image.bytes[unit.span()];
        unit.kind == Kind::Inode
            && u16_at(b, 0) & 0xF000 == kind
            && u32_at(b, 32) & with == with
            && u32_at(b, 32) & without == 0
    })
}

fn of(image: &Image, kind: Kind) -> Unit {
    unit(image, |_, unit| unit.kind == kind)
}

/// Changes a piece and makes its checksum right.
fn change(image: &mut Image, unit: &Unit, how: impl FnOnce(&mut [u8])) {
    how(&mut image.bytes[unit.span()]);
    image.seal(unit);
}

fn named(name: &str) -> Image {
    let base = bases::all().into_iter().find(|base| base.name == name);
    Image::new(base.expect("there is such an image").bytes)
}

/// What our checker says; `None` if it takes the image.
fn ours(image: &Image) -> Option<String> {
    check(Bytes(&image.bytes), CheckLimits::default()).err().map(|e| e.to_string())
}

fn theirs(image: &Image) -> Option<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), image.for_e2fsck()).unwrap();
    e2fsck(file.path())
}

type Damage = fn(&mut Image);

#[test]
fn what_e2fsck_rejects_by_name_is_refused() {
    let kinds: &[(&str, &str, Damage)] = &[
        ("a small file that looks like an extent root", "1 KiB", |image| {
            let file = unit(image, |image, unit| {
                let b = &image.bytes[unit.span()];
                unit.kind == Kind::Inode && u16_at(b, 0) >> 12 == 8 && u32_at(b, 32) == INLINE && b[4] > 56
            });
            change(image, &file, |b| {
                for (at, value) in [(40, 0xF30A), (42, 1), (44, 4), (46, 0)] {
                    put16(b, at, value);
                }
            });
        }),
        ("a byte behind the name `.`", "1 KiB", |image| {
            let leaf = of(image, Kind::DirectoryLeaf);
            change(image, &leaf, |b| b[9] = b'x');
        }),
        ("a byte behind the name `..`", "1 KiB", |image| {
            let leaf = of(image, Kind::DirectoryLeaf);
            change(image, &leaf, |b| b[22] = b'x');
        }),
        ("`..` reaches over the checksum", "1 KiB, no inline data", |image| {
            let leaf = unit(image, |image, unit| {
                unit.kind == Kind::DirectoryLeaf
                    && u16_at(&image.bytes, unit.at + 16) as usize == unit.len - 24
            });
            change(image, &leaf, |b| put16(b, 16, b.len() as u32 - 12));
        }),
        ("xattr blocks without feature ext_attr", "1 KiB", |image| {
            change(image, &of(image, SUPER), |b| put32(b, 0x5C, u32_at(b, 0x5C) & !0x8));
        }),
        ("hash trees without feature dir_index", "1 KiB, no inline data", |image| {
            change(image, &of(image, SUPER), |b| put32(b, 0x5C, u32_at(b, 0x5C) & !0x20));
        }),
        ("a file of 3 GiB without feature large_file", "4 KiB", |image| {
            let file = inode(image, 0x8000, 0x8_0000, 0);
            change(image, &file, |b| put32(b, 4, 3 << 30));
            change(image, &of(image, SUPER), |b| put32(b, 0x64, u32_at(b, 0x64) & !0x2));
        }),
        ("blocks counted as feature huge_file would, without it", "4 KiB", |image| {
            let file = unit(image, |image, unit| {
                let b = &image.bytes[unit.span()];
                unit.kind == Kind::Inode && u16_at(b, 0) >> 12 == 8 && u32_at(b, 28) != 0
            });
            change(image, &file, |b| {
                put32(b, 32, u32_at(b, 32) | 0x4_0000);
                put32(b, 28, u32_at(b, 28) / 8);
            });
            change(image, &of(image, SUPER), |b| put32(b, 0x64, u32_at(b, 0x64) & !0x8));
        }),
        ("the size of an inline folder goes on in its high half", "1 KiB", |image| {
            let folder = inode(image, 0x4000, INLINE, 0);
            change(image, &folder, |b| put32(b, 108, 1));
        }),
        ("the size of a folder goes on in its high half", "1 KiB, no inline data", |image| {
            let folder = inode(image, 0x4000, 0, INDEX);
            change(image, &folder, |b| put32(b, 108, 1));
        }),
        ("a value of an xattr is not padded with zeros", "1 KiB", |image| {
            let block = of(image, Kind::XattrBlock);
            change(image, &block, |b| {
                let end = u16_at(b, 34) as usize + u32_at(b, 40) as usize;
                assert!(!end.is_multiple_of(4), "the first value needs padding");
                b[end] = b'x';
            });
        }),
        ("an owner of the list of bad blocks", "1 KiB", |image| {
            let bad = unit(image, |_, unit| unit.kind == Kind::Inode && unit.owner == 1);
            change(image, &bad, |b| put16(b, 2, 7));
        }),
        ("a symbolic link whose target goes on behind its size", "1 KiB", |image| {
            let link = inode(image, 0xA000, 0x8_0000, 0);
            change(image, &link, |b| put32(b, 4, u32_at(b, 4) - 1));
        }),
        ("a symbolic link whose inline data end elsewhere", "mke2fs, 1 KiB", |image| {
            let link = inode(image, 0xA000, INLINE, 0);
            change(image, &link, |b| put32(b, 4, u32_at(b, 4) - 1));
        }),
        ("the bitmap of the last group is not initialised", "mke2fs, 1 KiB", |image| {
            let last = image.units.iter().rfind(|unit| unit.kind == Kind::Descriptor).unwrap().clone();
            change(image, &last, |b| put16(b, 0x12, u16_at(b, 0x12) | 2));
        }),
    ];
    for (kind, base, damage) in kinds {
        let mut image = named(base);
        assert_eq!((ours(&image), theirs(&image)), (None, None), "{base}");
        damage(&mut image);
        assert!(theirs(&image).is_some(), "e2fsck takes this: {kind}");
        assert!(ours(&image).is_some(), "we take this: {kind}");
    }
}

/// What we refuse and e2fsck takes, beyond the fields and features that our writer never uses.
#[test]
fn what_only_we_refuse_has_a_name() {
    let kinds: &[(&str, &str, Damage)] = &[
        // Other programs look there for disks of their kinds.
        ("bytes before the super block", "1 KiB", |image| image.bytes[0] = b'Q'),
        ("bytes behind the super block in its block", "4 KiB", |image| image.bytes[3000] = 1),
        // The kernel does (EFSCORRUPTED), and so do newer versions of e2fsck.
        ("an extent tree of some depth without entries", "1 KiB", |image| {
            let file = unit(image, |image, unit| {
                let b = &image.bytes[unit.span()];
                unit.kind == Kind::Inode && u16_at(b, 0) >> 12 == 8 && u32_at(b, 4) == 0 && u16_at(b, 42) == 0
            });
            change(image, &file, |b| put16(b, 46, 1));
        }),
        // Newer versions of e2fsck do.
        ("an extra size that covers no field", "1 KiB", |image| {
            change(image, &of(image, SUPER), |b| put16(b, 0x15E, 3));
        }),
    ];
    for (kind, base, damage) in kinds {
        let mut image = named(base);
        damage(&mut image);
        assert_eq!(theirs(&image), None, "e2fsck rejects this, too: {kind}");
        assert!(ours(&image).is_some(), "we take this: {kind}");
    }
    // A group keeps some of the kernel's memory as long as it is mounted.
    let tiny = Image::new(bases::mke2fs(&["-b", "1024", "-g", "256"]));
    assert_eq!(theirs(&tiny), None);
    assert!(ours(&tiny).is_some_and(|reason| reason.contains("groups of 256")), "tiny groups are taken");
}
