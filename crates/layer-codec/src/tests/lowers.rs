//! What a layer takes from the layers below it, line by line.

use super::*;
use crate::apply::{ApplyOptions, ApplySummary, LayerChain, LowerUse, apply};
use disk_io::MemDisk;
use ext4_image::{Ext4, Inode};
use std::cell::Cell;

/// An entry of a tar.
#[derive(Clone, Copy)]
enum Entry {
    /// Name, mode; owner 7:8, time [`TIME`].
    Dir(&'static str, u32),
    File(&'static str),
    Symlink(&'static str, &'static str),
    Link(&'static str, &'static str),
    /// Attributes of the next entry, each with the value `1`.
    Xattrs(&'static [&'static str]),
}
use Entry::{Dir, File as Plain, Link, Symlink, Xattrs};

/// Time of all entries.
const TIME: u64 = 1_000_000_000;

fn tar_of(entries: &[Entry]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_ustar();
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(TIME);
        header.set_size(0);
        header.set_mode(0o644);
        match *entry {
            Xattrs(names) => {
                let names: Vec<String> = names.iter().map(|name| format!("SCHILY.xattr.{name}")).collect();
                tar.append_pax_extensions(names.iter().map(|name| (name.as_str(), &b"1"[..]))).unwrap();
                continue;
            }
            Dir(name, mode) => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(mode);
                header.set_path(name).unwrap();
            }
            Plain(name) => header.set_path(name).unwrap(),
            Symlink(name, target) | Link(name, target) => {
                let link = matches!(entry, Link(..));
                header.set_entry_type(if link { tar::EntryType::Link } else { tar::EntryType::Symlink });
                header.set_path(name).unwrap();
                header.set_link_name(target).unwrap();
            }
        }
        header.set_cksum();
        tar.append(&header, &[][..]).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Applies `entries` on layers that were applied before, nearest first; image, summary, and the number of layers that were
/// needed.
fn apply_on(
    lowers: &[MemDisk],
    entries: &[Entry],
    use_of_lowers: LowerUse,
) -> Result<(MemDisk, ApplySummary, usize), DiffError> {
    let (image, record) = (MemDisk::new(), MemDisk::new());
    let options = ApplyOptions { lowers: use_of_lowers, footer: false, ..ApplyOptions::default() };
    let opened = Cell::new(0);
    let mut chain = LayerChain::new(lowers.len(), || {
        let disk = lowers.get(opened.get()).unwrap();
        opened.set(opened.get() + 1);
        Ok(LayerSource::new(disk, LayerKind::Applied))
    });
    let summary = apply(&tar_of(entries)[..], &image, &record, &mut chain, &options)?;
    Ok((image, summary, opened.get()))
}

fn base(entries: &[Entry]) -> MemDisk {
    apply_on(&[], entries, LowerUse::LinksAndDirectories).unwrap().0
}

/// `mode uid:gid time name…` of a path, or `-`: names are those of its attributes.
fn shown(image: &MemDisk, path: &str) -> String {
    let fs = Ext4::open(image).unwrap();
    let mut inode: Inode = fs.inode(fs.root()).unwrap();
    for name in path.split('/').filter(|name| !name.is_empty()) {
        match fs.lookup(&inode, name.as_bytes()).unwrap() {
            Some(ino) => inode = fs.inode(ino).unwrap(),
            None => return "-".to_owned(),
        }
    }
    let mut text = format!("{:o} {}:{} {}", inode.mode & 0o7777, inode.uid, inode.gid, inode.mtime.secs);
    let mut xattrs = fs.xattrs(&inode).unwrap();
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    for xattr in xattrs {
        text = text + " " + &String::from_utf8_lossy(&xattr.name);
    }
    text
}

/// As it is without layers below.
const BARE: &str = "755 0:0 0";

#[test]
fn implied_directories_are_those_of_the_nearest_layer_that_has_them() {
    struct Case {
        what: &'static str,
        /// Nearest first.
        lowers: &'static [&'static [Entry]],
        tar: &'static [Entry],
        want: &'static [(&'static str, &'static str)],
        /// Implied directories, and layers that were opened.
        counts: (u64, usize),
    }
    const COLORED: &[Entry] =
        &[Xattrs(&["user.a", "trusted.mine", "security.selinux"]), Dir("a", 0o2750), Dir("a/b", 0o1777)];
    let cases = [
        Case { what: "no layers", lowers: &[], tar: &[Plain("a/f")], want: &[("a", BARE)], counts: (1, 0) },
        Case {
            what: "owner, mode, time, attributes but those of the name space trusted",
            lowers: &[COLORED],
            tar: &[Plain("a/b/f")],
            want: &[("a", "2750 7:8 1000000000 security.selinux user.a"), ("a/b", "1777 7:8 1000000000")],
            counts: (2, 1),
        },
        Case {
            what: "described: nothing is asked",
            lowers: &[COLORED],
            tar: &[Dir("a", 0o700), Dir("a/b", 0o711), Plain("a/b/f")],
            want: &[("a", "700 7:8 1000000000"), ("a/b", "711 7:8 1000000000")],
            counts: (0, 0),
        },
        Case {
            what: "described later",
            lowers: &[COLORED],
            tar: &[Plain("a/b/f"), Dir("a/b", 0o711)],
            want: &[("a", "2750 7:8 1000000000 security.selinux user.a"), ("a/b", "711 7:8 1000000000")],
            counts: (1, 1),
        },
        Case {
            what: "the nearest that has it",
            lowers: &[&[Plain("other")], &[Dir("a", 0o700)], &[Dir("a", 0o711), Dir("a/b", 0o701)]],
            tar: &[Plain("a/b/f")],
            want: &[("a", "700 7:8 1000000000"), ("a/b", "701 7:8 1000000000")],
            counts: (2, 3),
        },
        Case {
            what: "no further than needed",
            lowers: &[&[Dir("a", 0o700)], &[Dir("a", 0o711)]],
            tar: &[Plain("a/f")],
            want: &[("a", "700 7:8 1000000000")],
            counts: (1, 1),
        },
        Case {
            what: "replaced by a file in between",
            lowers: &[&[Plain("a")], &[Dir("a", 0o711)]],
            tar: &[Plain("a/f")],
            want: &[("a", BARE)],
            counts: (1, 1),
        },
        Case {
            what: "a whiteout in between, of it or of its parent",
            lowers: &[&[Plain(".wh.a")], &[Dir("a", 0o711), Dir("a/b", 0o711)]],
            tar: &[Plain("a/b/f")],
            want: &[("a", BARE), ("a/b", BARE)],
            counts: (2, 1),
        },
        Case {
            what: "an opaque directory in between",
            lowers: &[&[Dir("a", 0o700), Plain("a/.wh..wh..opq")], &[Dir("a", 0o711), Dir("a/b", 0o711)]],
            tar: &[Plain("a/b/f")],
            want: &[("a", "700 7:8 1000000000"), ("a/b", BARE)],
            counts: (2, 1),
        },
        Case {
            what: "an opaque root in between",
            lowers: &[&[Plain(".wh..wh..opq")], &[Dir("a", 0o711)]],
            tar: &[Plain("a/f")],
            want: &[("a", BARE)],
            counts: (1, 1),
        },
        Case {
            what: "a whiteout implies its parents",
            lowers: &[&[Dir("a", 0o711), Plain("a/f")]],
            tar: &[Plain("a/.wh.f")],
            want: &[("a", "711 7:8 1000000000")],
            counts: (1, 1),
        },
        Case {
            what: "an opaque marker: its directory is like that below, what lies in it is not",
            lowers: &[&[Dir("a", 0o711), Dir("a/b", 0o701)]],
            tar: &[Plain("a/b/f"), Plain("a/.wh..wh..opq")],
            want: &[("a", "711 7:8 1000000000 trusted.overlay.opaque"), ("a/b", BARE)],
            counts: (1, 1),
        },
        Case {
            what: "this layer's whiteout hides it",
            lowers: &[&[Dir("a", 0o711)]],
            tar: &[Plain(".wh.a"), Plain("a/f")],
            want: &[("a", "755 0:0 0 trusted.overlay.opaque")],
            counts: (0, 0),
        },
        Case {
            what: "this layer's opaque root hides all",
            lowers: &[&[Dir("a", 0o711)]],
            tar: &[Plain(".wh..wh..opq"), Plain("a/f")],
            want: &[("a", BARE)],
            counts: (0, 0),
        },
        Case {
            what: "replaced after all",
            lowers: &[&[Dir("a", 0o711)]],
            tar: &[Plain("a/b/f"), Plain("a")],
            want: &[("a", "644 7:8 1000000000")],
            counts: (0, 0),
        },
        Case {
            what: "a symlink below is followed in its layer",
            lowers: &[&[
                Dir("usr", 0o711),
                Dir("usr/lib", 0o701),
                Dir("usr/lib/x", 0o700),
                Symlink("lib", "usr/lib"),
            ]],
            tar: &[Plain("lib/x/f")],
            want: &[("lib", "701 7:8 1000000000"), ("lib/x", "700 7:8 1000000000")],
            counts: (2, 1),
        },
        Case {
            what: "absolute, upwards beyond the root, over another symlink",
            lowers: &[&[Dir("d", 0o711), Symlink("d/s", "../../../d"), Symlink("a", "/d/s")]],
            tar: &[Plain("a/f")],
            want: &[("a", "711 7:8 1000000000")],
            counts: (1, 1),
        },
        Case {
            what: "a symlink to what its layer does not have: the next layer is asked",
            lowers: &[&[Symlink("a", "gone")], &[Dir("a", 0o711)]],
            tar: &[Plain("a/f")],
            want: &[("a", "711 7:8 1000000000")],
            counts: (1, 2),
        },
        Case {
            what: "symlinks in a circle, and to a file",
            lowers: &[
                &[Symlink("a", "b"), Symlink("b", "a"), Symlink("c", "f"), Plain("f")],
                &[Dir("a", 0o711)],
            ],
            tar: &[Plain("a/f"), Plain("c/f")],
            want: &[("a", BARE), ("c", BARE)],
            counts: (2, 1),
        },
        Case {
            what: "a symlink of this layer: the directory that it leads to",
            lowers: &[&[Dir("usr", 0o711), Dir("usr/lib", 0o701)]],
            tar: &[Symlink("lib", "usr/lib"), Plain("lib/f")],
            want: &[("usr", "711 7:8 1000000000"), ("usr/lib", "701 7:8 1000000000")],
            counts: (2, 1),
        },
        Case {
            what: "the root is not implied",
            lowers: &[&[Dir("./", 0o700)]],
            tar: &[Plain("f")],
            want: &[("", BARE)],
            counts: (0, 0),
        },
        Case {
            what: "siblings, deep and shallow",
            lowers: &[&[Dir("a", 0o711), Dir("a/b", 0o701), Dir("a/c", 0o702), Dir("a/c/d", 0o703)]],
            tar: &[Plain("a/b/f"), Plain("a/c/d/f"), Plain("a/e/f")],
            want: &[
                ("a", "711 7:8 1000000000"),
                ("a/b", "701 7:8 1000000000"),
                ("a/c", "702 7:8 1000000000"),
                ("a/c/d", "703 7:8 1000000000"),
                ("a/e", BARE),
            ],
            counts: (5, 1),
        },
    ];
    for case in cases {
        let what = case.what;
        let lowers: Vec<MemDisk> = case.lowers.iter().map(|entries| base(entries)).collect();
        let (image, summary, opened) = apply_on(&lowers, case.tar, LowerUse::LinksAndDirectories).unwrap();
        for (path, want) in case.want {
            assert_eq!(shown(&image, path), *want, "{what}: {path}");
        }
        assert_eq!((summary.implied_directories, opened), case.counts, "{what}");
        assert_eq!((summary.lower_links, summary.depends_on_lowers()), (0, case.counts.0 > 0), "{what}");
        // By default nothing comes from below, and the same is counted.
        let (plain, counted, opened) = apply_on(&lowers, case.tar, LowerUse::Links).unwrap();
        assert_eq!((counted.implied_directories, opened), (case.counts.0, 0), "{what}");
        let (alone, ..) = apply_on(&[], case.tar, LowerUse::LinksAndDirectories).unwrap();
        assert!(plain.to_vec() == alone.to_vec(), "{what}: without layers below it is as by default");
        // On unknown layers it is refused if it depends on them, and else the same.
        match apply_on(&[], case.tar, LowerUse::Unknown) {
            Ok((unknown, ..)) => {
                assert_eq!(case.counts.0, 0, "{what}");
                assert!(unknown.to_vec() == image.to_vec(), "{what}");
            }
            Err(DiffError::NeedsLowers { what: told }) => {
                assert!(case.counts.0 > 0 && told.contains("directory \""), "{what}: {told}");
            }
            Err(other) => panic!("{what}: {other}"),
        }
    }
}

#[test]
fn links_into_layers_below_are_counted_and_refused_while_those_are_unknown() {
    let below = [base(&[Dir("d", 0o700), Plain("d/f"), Plain("g")])];
    let tar: &[Entry] = &[Plain("own"), Link("a", "own"), Link("b", "d/f"), Link("c", "d/f"), Link("g", "g")];
    let (image, summary, _) = apply_on(&below, tar, LowerUse::Links).unwrap();
    // The directory of a copied target comes from below with it: it is not one that the tar implies.
    assert_eq!((summary.lower_links, summary.implied_directories, summary.depends_on_lowers()), (3, 0, true));
    assert_eq!(shown(&image, "d"), "700 7:8 1000000000");
    for (tar, want) in [
        (tar, Some("hard link \"b\" to \"d/f\", which the tar does not hold")),
        (&[Link("g", "g")], Some("hard link \"g\" to \"g\"")),
        (&[Link("x/y", "g"), Plain("g")], Some("directory \"x\"")),
        (&[Link("y", "g"), Plain("g")], None),
        (&[Link("y", "gone"), Plain("y")], None),
    ] {
        match (apply_on(&below, tar, LowerUse::Unknown), want) {
            (Ok((_, summary, opened)), None) => {
                assert_eq!((summary.depends_on_lowers(), opened), (false, 0));
            }
            (Err(error @ DiffError::NeedsLowers { .. }), Some(want)) => {
                let error = error.to_string();
                assert!(error.contains(want) && error.contains("apply the tar again"), "{error}");
            }
            (other, want) => panic!("{want:?}: {other:?}"),
        }
    }
    // What no layer below can have is an error for good.
    let hidden: &[Entry] = &[Plain(".wh.g"), Link("y", "g")];
    assert!(matches!(apply_on(&below, hidden, LowerUse::Unknown), Err(DiffError::Entry { .. })));
}

/// Looked up from the root each time, directories in each other would cost the square of their depth, in every layer.
#[test]
fn deep_implied_directories_cost_what_they_are_many() {
    const DEPTH: usize = 1000;
    let path: &'static str = Box::leak("d/".repeat(DEPTH).into_boxed_str());
    let whole = |last: &str| {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("{path}{last}"), &[][..]).unwrap();
        tar.into_inner().unwrap()
    };
    let apply_to = |lower: Option<&MemDisk>, last: &str| {
        let image = MemDisk::new();
        let options = ApplyOptions { lowers: LowerUse::LinksAndDirectories, ..ApplyOptions::default() };
        let next = || Ok(LayerSource::new(lower.unwrap(), LayerKind::Applied));
        let mut chain = LayerChain::new(usize::from(lower.is_some()), next);
        let summary = apply(&whole(last)[..], &image, MemDisk::new(), &mut chain, &options).unwrap();
        assert_eq!(summary.implied_directories, DEPTH as u64);
        image
    };
    let lower = apply_to(None, "f");
    disk_io::steps::taken();
    apply_to(Some(&lower), "g");
    let cost = disk_io::steps::taken();
    assert!(cost < 100 * DEPTH as u64, "{cost} steps for {DEPTH} directories");
}
