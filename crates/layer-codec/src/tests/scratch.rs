//! Sandboxes that runhcs wrote: their layer is at `/scratch/ID/upper`.

use super::*;
use crate::apply::{ApplyOptions, LayerChain, LowerUse, apply};

/// An ext4 that holds what `script` makes.
fn image(dir: &TempDir, script: &str) -> PathBuf {
    let (from, image) = (dir.path().join("from"), dir.path().join("image"));
    sh(&format!(
        "mkdir {0}; (cd {0}; {script}); truncate -s 16M {1}; mke2fs -q -t ext4 -d {0} {1}",
        from.display(),
        image.display()
    ));
    image
}

#[test]
#[cfg_attr(windows, ignore = "needs mke2fs")]
fn the_upper_directory_is_found_where_runhcs_puts_it() {
    let id = |text: &str| LayerKind::Scratch(Some(text.parse().unwrap()));
    let found = LayerKind::Scratch(None);
    const EMPTY: &str = "mkdir upper work";
    const ONE: &str = "mkdir -p upper work scratch/c-1/{upper,work}; touch scratch/c-1/upper/one";
    const TWO: &str =
        "mkdir -p scratch/{c-1,c-2}/{upper,work}; touch scratch/c-1/upper/one scratch/c-2/upper/two";
    const OWN: &str = "mkdir -p upper work scratch/c-1/upper; touch upper/own scratch/c-1/upper/one";
    type Case<'a> = (&'a str, &'a str, LayerKind, Result<&'a [&'a str], &'a str>);
    let cases: &[Case<'_>] = &[
        ("blank", EMPTY, found, Ok(&[])),
        ("blank, by its own kind", EMPTY, LayerKind::Sandbox, Ok(&[])),
        ("blank, by id", EMPTY, id("c-1"), Err("`scratch/c-1/upper`")),
        ("one container", ONE, found, Ok(&["one"])),
        ("one container, by id", ONE, id("c-1"), Ok(&["one"])),
        ("one container, by another id", ONE, id("c-2"), Err("`scratch/c-2/upper`")),
        ("one container, by its own kind", ONE, LayerKind::Sandbox, Ok(&[])),
        ("two containers", TWO, found, Err("\"c-1\" and \"c-2\"")),
        ("two containers, by id", TWO, id("c-2"), Ok(&["two"])),
        ("written at both places", OWN, found, Ok(&["own"])),
        ("written at both places, by id", OWN, id("c-1"), Ok(&["one"])),
        ("work only", "mkdir -p upper scratch/c-1/work", found, Ok(&[])),
        ("never used", "mkdir lost", found, Err("`upper`")),
        (
            "files and symlinks are no directories",
            "mkdir a; ln -s a upper; touch scratch",
            found,
            Err("`upper`"),
        ),
        (
            "nor in there",
            "mkdir -p x/upper scratch/c-1/upper; ln -s ../x scratch/c-2; touch scratch/c-3 x/upper/x scratch/c-1/upper/one",
            found,
            Ok(&["one"]),
        ),
        (
            "nor by id",
            "mkdir -p x/upper scratch; ln -s ../x scratch/c-2",
            id("c-2"),
            Err("`scratch/c-2/upper`"),
        ),
    ];
    for (what, script, kind, want) in cases {
        let dir = tempfile::tempdir().unwrap();
        let image = image(&dir, script);
        let layers = [LayerSource::new(File::open(&image).unwrap(), *kind)];
        let mut tar = Vec::new();
        let options = ExportOptions::default();
        let exported = export(&layers, None, &options, &mut NoHooks, &mut tar);
        match (exported, want) {
            (Ok(_), Ok(want)) => {
                assert_eq!(names(&tar, "tar"), *want, "{what}");
                let listed = changes(&layers, None, &options, &mut NoHooks).unwrap();
                assert_eq!(listed.len(), want.len(), "{what}");
                let blank = BlankRoot { permissions: 0o755, uid: 0, gid: 0 };
                assert_eq!(written(&layers, blank, &mut NoHooks).unwrap(), !want.is_empty(), "{what}");
            }
            (Err(error @ DiffError::Unsupported { .. }), Err(want)) => {
                assert!(error.to_string().contains(want), "{what}: {error}");
            }
            (other, _) => panic!("{what}: {other:?}"),
        }
    }
}

#[test]
#[cfg_attr(windows, ignore = "needs mke2fs")]
fn a_layer_is_applied_on_one() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(
        &dir,
        "mkdir -p upper scratch/c-1/upper/d; chmod 2711 scratch/c-1/upper/d; touch scratch/c-1/upper/f",
    );
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o644);
    tar.append_data(&mut header, "d/new", &[][..]).unwrap();
    header.set_entry_type(tar::EntryType::Link);
    tar.append_link(&mut header, "link", "f").unwrap();
    let next = || Ok(LayerSource::new(File::open(&image).unwrap(), LayerKind::Scratch(None)));
    let options = ApplyOptions { lowers: LowerUse::LinksAndDirectories, ..ApplyOptions::default() };
    let disk = MemDisk::new();
    let tar = tar.into_inner().unwrap();
    let summary = apply(&tar[..], &disk, MemDisk::new(), &mut LayerChain::new(1, next), &options).unwrap();
    assert_eq!((summary.implied_directories, summary.lower_links), (1, 1));
    let fs = ext4_image::Ext4::open(&disk).unwrap();
    let ino = fs.lookup(&fs.inode(fs.root()).unwrap(), b"d").unwrap().unwrap();
    assert_eq!(fs.inode(ino).unwrap().mode & 0o7777, 0o2711);
}

#[cfg(feature = "serde")]
#[test]
fn kinds_in_messages_keep_their_form() {
    for (kind, json) in [
        (LayerKind::Applied, r#""applied""#),
        (LayerKind::Sandbox, r#""sandbox""#),
        (LayerKind::Scratch(None), r#"{"scratch":null}"#),
        (LayerKind::Scratch(Some("c-1".parse().unwrap())), r#"{"scratch":"c-1"}"#),
    ] {
        assert_eq!(serde_json::to_string(&kind).unwrap(), json);
        assert_eq!(serde_json::from_str::<LayerKind>(json).unwrap(), kind);
    }
    for bad in [r#"{"scratch":"../x"}"#, r#"{"scratch":""}"#] {
        serde_json::from_str::<LayerKind>(bad).unwrap_err();
    }
}
