//! The flat image against the layers one by one: each applied on those below it and the stack seen as overlayfs shows it,
//! written as one canonical tar. That view is held against a kernel's overlayfs elsewhere.

use super::*;
use crate::{
    ExportOptions, LayerKind, LayerSource, NoHooks, ParentSpec,
    apply::{LayerChain, LowerUse, apply},
    export,
};
use disk_io::{MemDisk, ReadAt};
use ext4_image::Ext4;
use proptest::prelude::*;
use std::cell::Cell;

/// An entry of a layer.
#[derive(Debug, Clone)]
enum Item {
    Dir(String, u32),
    File(String, usize, u8),
    Symlink(String, String),
    Link(String, String),
    Fifo(String),
    /// `.wh.NAME` in a directory.
    Whiteout(String),
    Opaque(String),
}

use Item::{Dir, Fifo, File, Link, Opaque, Symlink, Whiteout};

fn content(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8 ^ seed).collect()
}

/// `dir/prefix + name` of a path.
fn marked(path: &str, prefix: &str) -> String {
    match path.rsplit_once('/') {
        Some((dir, name)) => format!("{dir}/{prefix}{name}"),
        None => format!("{prefix}{path}"),
    }
}

fn tar_of(items: &[Item]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (n, item) in items.iter().enumerate() {
        let mut header = tar::Header::new_ustar();
        header.set_uid(n as u64 % 5);
        header.set_gid(8);
        header.set_mtime(1_000_000_000 + n as u64);
        header.set_size(0);
        header.set_mode(0o644);
        let mut data = Vec::new();
        match item {
            Dir(path, mode) => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(*mode);
                header.set_path(path).unwrap();
            }
            File(path, len, seed) => {
                data = content(*len, *seed);
                header.set_path(path).unwrap();
                header.set_size(data.len() as u64);
            }
            Symlink(path, target) | Link(path, target) => {
                let link = matches!(item, Link(..));
                header.set_entry_type(if link { tar::EntryType::Link } else { tar::EntryType::Symlink });
                header.set_path(path).unwrap();
                header.set_link_name(target).unwrap();
            }
            Fifo(path) => {
                header.set_entry_type(tar::EntryType::Fifo);
                header.set_path(path).unwrap();
            }
            Whiteout(path) => header.set_path(marked(path, ".wh.")).unwrap(),
            Opaque(dir) => header.set_path(format!("{dir}/.wh..wh..opq")).unwrap(),
        }
        header.set_cksum();
        tar.append(&header, &data[..]).unwrap();
    }
    tar.into_inner().unwrap()
}

fn canonical(layers: &[&MemDisk]) -> Vec<u8> {
    let target: Vec<_> = layers.iter().map(|disk| LayerSource::new(*disk, LayerKind::Applied)).collect();
    let mut out = Vec::new();
    let parent = ParentSpec::Layers(&[]);
    export(&target, Some(parent), &ExportOptions::default(), &mut NoHooks, &mut out).unwrap();
    out
}

/// The tar of the stack of layers that are applied one by one; `tars` from the base up.
fn stacked(tars: &[Vec<u8>]) -> Result<Vec<u8>, DiffError> {
    let options =
        ApplyOptions { lowers: LowerUse::LinksAndDirectories, footer: false, ..ApplyOptions::default() };
    let mut images: Vec<MemDisk> = Vec::new();
    for tar in tars {
        let image = MemDisk::new();
        let opened = Cell::new(0);
        {
            let mut chain = LayerChain::new(images.len(), || {
                opened.set(opened.get() + 1);
                Ok(LayerSource::new(&images[opened.get() - 1], LayerKind::Applied))
            });
            apply(&tar[..], &image, MemDisk::new(), &mut chain, &options)?;
        }
        images.insert(0, image);
    }
    Ok(canonical(&images.iter().collect::<Vec<_>>()))
}

fn flat_with(tars: &[Vec<u8>], options: &FlatOptions) -> Result<(MemDisk, FlatSummary), DiffError> {
    let image = MemDisk::new();
    let mut open = |n: usize| -> io::Result<Box<dyn Read>> { Ok(Box::new(io::Cursor::new(tars[n].clone()))) };
    let mut files = |_: FlatFile<'_>| Ok(());
    let summary = flatten(tars.len(), &mut open, &image, None, options, Some(&mut files))?;
    Ok((image, summary))
}

fn flat(tars: &[Vec<u8>]) -> Result<(MemDisk, FlatSummary), DiffError> {
    flat_with(tars, &FlatOptions::default())
}

/// The entries of a tar as lines. `bare`: directories by their names alone.
fn lines(tar: &[u8], bare: bool) -> Vec<String> {
    let mut archive = tar::Archive::new(tar);
    let entries = archive.entries().unwrap();
    let line = |e: tar::Entry<'_, &[u8]>| {
        let (path, h) = (e.path().unwrap().display().to_string(), e.header());
        if bare && h.entry_type().is_dir() {
            return path;
        }
        let (mode, uid, mtime) = (h.mode().unwrap(), h.uid().unwrap(), h.mtime().unwrap());
        let (size, link) = (h.size().unwrap(), e.link_name().unwrap());
        format!("{path} {:?} {mode:o} {uid} {mtime} {size} -> {link:?}", h.entry_type())
    };
    entries.map(|e| line(e.unwrap())).collect()
}

/// Whether a layer has a link to what it does not have itself.
fn links_down(layers: &[Vec<Item>]) -> bool {
    let names = |item: &Item| match item {
        Dir(path, _) | File(path, ..) | Symlink(path, _) | Link(path, _) | Fifo(path) => path.clone(),
        Whiteout(_) | Opaque(_) => String::new(),
    };
    layers.iter().any(|layer| {
        layer.iter().any(|item| match item {
            Link(path, target) => path == target || !layer.iter().any(|other| names(other) == *target),
            _ => false,
        })
    })
}

/// Both ways give the same tree, or neither gives one.
///
/// One thing is left open: a directory without an entry, in a layer below whose place for it is a link into a layer further
/// down, which turns out to be a symlink.
fn agree(layers: &[Vec<Item>]) {
    let tars: Vec<Vec<u8>> = layers.iter().map(|items| tar_of(items)).collect();
    match (stacked(&tars), flat(&tars)) {
        (Ok(expected), Ok((image, _))) => {
            let found = canonical(&[&image]);
            let open = links_down(layers) && lines(&found, true) == lines(&expected, true);
            if found != expected && !open {
                let [expected, found] = [expected, found].map(|tar| lines(&tar, false).join("\n"));
                panic!("{layers:#?}\nexpected\n{expected}\nfound\n{found}");
            }
        }
        (Err(_), Err(_)) => {}
        // Below an opaque root nothing is read.
        (Err(_), Ok((_, summary))) if summary.layers_read < layers.len() => {}
        (Err(error), Ok(_)) => panic!("{layers:#?}\nonly flat accepts it, not: {error:?}"),
        (Ok(_), Err(error)) => panic!("{layers:#?}\nonly flat refuses it: {error:?}"),
    }
}

fn s(text: &str) -> String {
    text.to_owned()
}

/// Everything that can be at one name in one layer: one of two files, a directory with a file, a symlink, a whiteout, an
/// opaque directory with and without an entry of its own, nothing.
fn states() -> Vec<Vec<Item>> {
    vec![
        vec![],
        vec![File(s("a"), 10, 1)],
        vec![Dir(s("a"), 0o700), File(s("a/x"), 3000, 2)],
        vec![File(s("a/y"), 10, 3)],
        vec![Symlink(s("a"), s("b"))],
        vec![Whiteout(s("a"))],
        vec![Dir(s("a"), 0o711), Opaque(s("a")), File(s("a/z"), 0, 0)],
        vec![Opaque(s("a"))],
        vec![Whiteout(s("a/x"))],
        vec![File(s("a/x"), 9, 9), Whiteout(s("a"))],
        vec![Whiteout(s("a")), Dir(s("a"), 0o755), File(s("a/x"), 9, 9)],
    ]
}

#[test]
fn every_order_of_states_over_three_layers_is_what_overlayfs_shows() {
    let states = states();
    for bottom in &states {
        for middle in &states {
            for top in &states {
                let mut base = vec![Dir(s("b"), 0o750), File(s("b/x"), 7, 7)];
                base.extend(bottom.iter().cloned());
                agree(&[base, middle.clone(), top.clone()]);
            }
        }
    }
}

#[test]
fn links_across_layers() {
    let big = 300_000;
    let cases: Vec<Vec<Vec<Item>>> = vec![
        // Into a lower layer, past one that has nothing to do with it.
        vec![vec![File(s("b"), big, 1)], vec![File(s("c"), 5, 5)], vec![Link(s("a"), s("b"))]],
        // Into a lower layer's directory that no upper entry describes.
        vec![vec![Dir(s("d"), 0o711), File(s("d/b"), 10, 1)], vec![Link(s("a"), s("d/b"))]],
        // Two links to one file by two names.
        vec![
            vec![File(s("b"), big, 1), Link(s("c"), s("b"))],
            vec![Link(s("x"), s("b")), Link(s("y"), s("c"))],
        ],
        // A link whose target is a link into a layer further down.
        vec![vec![File(s("b"), big, 1)], vec![Link(s("c"), s("b"))], vec![Link(s("a"), s("b"))]],
        // The target is also visible under another name.
        vec![vec![File(s("b"), big, 1), Link(s("c"), s("b"))], vec![Link(s("a"), s("b"))]],
        // The target's own name is a link in its layer.
        vec![vec![File(s("z"), big, 1), Link(s("b"), s("z"))], vec![Link(s("a"), s("b"))]],
        // Hidden by an upper layer: the link, the target, both.
        vec![vec![File(s("b"), big, 1)], vec![Link(s("a"), s("b"))], vec![Whiteout(s("a"))]],
        vec![vec![File(s("b"), big, 1)], vec![Link(s("a"), s("b"))], vec![Whiteout(s("b"))]],
        vec![
            vec![File(s("b"), big, 1)],
            vec![Link(s("a"), s("b"))],
            vec![Whiteout(s("a")), Whiteout(s("b"))],
        ],
        // A visible link to a file that an upper layer hides or replaces.
        vec![vec![File(s("b"), big, 1), Link(s("a"), s("b"))], vec![Whiteout(s("b"))]],
        vec![vec![File(s("b"), big, 1), Link(s("a"), s("b"))], vec![File(s("b"), 5, 5)]],
        // Other kinds than files.
        vec![vec![Symlink(s("b"), s("nowhere"))], vec![Link(s("a"), s("b"))]],
        vec![vec![Fifo(s("b"))], vec![Link(s("a"), s("b"))]],
        vec![vec![File(s("b"), 0, 0)], vec![Link(s("a"), s("b"))]],
        // The target is replaced in its own layer after it was met.
        vec![vec![File(s("b"), big, 1), File(s("b"), 40, 2)], vec![Link(s("a"), s("b"))]],
        vec![vec![File(s("b"), big, 1), Symlink(s("b"), s("x"))], vec![Link(s("a"), s("b"))]],
        // To the same name: the file of the layer below, with the header of the link.
        vec![vec![File(s("b"), big, 1)], vec![Link(s("b"), s("b"))]],
        // Nowhere; hidden on the way; a directory.
        vec![vec![File(s("c"), 1, 1)], vec![Link(s("a"), s("b"))]],
        vec![vec![File(s("b"), 1, 1)], vec![Whiteout(s("b"))], vec![Link(s("a"), s("b"))]],
        vec![vec![Dir(s("b"), 0o755)], vec![Link(s("a"), s("b"))]],
        vec![vec![File(s("d/b"), 1, 1)], vec![Opaque(s("d"))], vec![Link(s("a"), s("d/b"))]],
    ];
    for layers in &cases {
        agree(layers);
    }
}

#[test]
fn directories_without_an_entry_are_like_those_below() {
    let cases: Vec<Vec<Vec<Item>>> = vec![
        vec![vec![Dir(s("a"), 0o711), Dir(s("a/b"), 0o1777)], vec![File(s("a/b/c"), 1, 1)]],
        vec![vec![Dir(s("a"), 0o711)], vec![File(s("a/b/c"), 1, 1)], vec![File(s("a/b/d"), 1, 1)]],
        vec![vec![Dir(s("a"), 0o711)], vec![Whiteout(s("a"))], vec![File(s("a/c"), 1, 1)]],
        vec![vec![Dir(s("a"), 0o711)], vec![File(s("a"), 1, 1)], vec![File(s("a/c"), 1, 1)]],
        vec![
            vec![Dir(s("a"), 0o711), Dir(s("a/b"), 0o700)],
            vec![Opaque(s("a"))],
            vec![File(s("a/b/c"), 1, 1)],
        ],
        // A symlink in the place of the directory is followed for the attributes, in its own layer.
        vec![vec![Dir(s("d"), 0o711), Symlink(s("a"), s("d"))], vec![File(s("a/c"), 1, 1)]],
        vec![vec![Dir(s("a"), 0o711)], vec![Symlink(s("a"), s("nowhere"))], vec![File(s("a/c"), 1, 1)]],
        vec![vec![Dir(s("a"), 0o711)], vec![Symlink(s("a"), s("a"))], vec![File(s("a/c"), 1, 1)]],
        vec![
            vec![Dir(s("a"), 0o711)],
            vec![Symlink(s("a"), s("f/x")), File(s("f"), 1, 1)],
            vec![File(s("a/c"), 1, 1)],
        ],
        vec![
            vec![Dir(s("c"), 0o700)],
            vec![Symlink(s("c"), s("a")), Dir(s("a/a"), 0o700)],
            vec![File(s("c/a"), 0, 0)],
        ],
        vec![
            vec![Dir(s("d"), 0o711), Dir(s("d/x"), 0o700), Symlink(s("a"), s("d"))],
            vec![File(s("a/x/c"), 1, 1)],
        ],
    ];
    for layers in &cases {
        agree(layers);
    }
}

#[test]
fn what_is_shadowed_is_not_written() {
    let size = 4 << 20;
    let layers = [
        tar_of(&[
            Dir(s("d"), 0o755),
            File(s("d/old"), size, 1),
            File(s("gone"), size, 2),
            File(s("kept"), 9, 9),
        ]),
        tar_of(&[File(s("d/old"), 10, 3), Whiteout(s("gone"))]),
    ];
    let (image, summary) = flat(&layers).unwrap();
    assert_eq!((summary.shadowed_files, summary.shadowed_bytes), (2, 2 * size as u64));
    assert_eq!((summary.layers_read, summary.second_reads, summary.entries), (2, 0, 6));
    assert!(image.size().unwrap() < 1 << 20, "the image has none of it");
    // No inode is kept for what is not there: root, d, old, kept.
    assert_eq!(summary.inodes, 10 + 3);
}

#[test]
fn a_second_read_is_only_made_for_a_link_to_a_hidden_file() {
    let hidden = [
        tar_of(&[File(s("b"), 70_000, 1), Link(s("a"), s("b")), File(s("c"), 70_000, 2)]),
        tar_of(&[Whiteout(s("b"))]),
    ];
    let (image, summary) = flat(&hidden).unwrap();
    assert_eq!((summary.layers_read, summary.second_reads), (2, 1));
    let fs = Ext4::open(&image).unwrap();
    let root = fs.inode(fs.root()).unwrap();
    let a = fs.inode(fs.lookup(&root, b"a").unwrap().unwrap()).unwrap();
    let mut bytes = vec![0; 70_000];
    fs.read_file_at(&a, 0, &mut bytes).unwrap();
    assert!(bytes == content(70_000, 1));
    // A link into a lower layer needs none.
    let below = [tar_of(&[File(s("b"), 70_000, 1)]), tar_of(&[Link(s("a"), s("b"))])];
    assert_eq!(flat(&below).unwrap().1.second_reads, 0);
}

#[test]
fn without_contents_everything_else_is_the_same() {
    let layers = [
        tar_of(&[
            Dir(s("d"), 0o711),
            File(s("d/b"), 70_000, 1),
            File(s("c"), 9, 9),
            Link(s("e"), s("c")),
            File(s("gone"), 70_000, 2),
        ]),
        tar_of(&[Link(s("a"), s("d/b")), File(s("f"), 90_000, 3), Whiteout(s("gone"))]),
    ];
    let options = FlatOptions { contents: false, ..FlatOptions::default() };
    let (bare, _) = flat_with(&layers, &options).unwrap();
    let (full, _) = flat(&layers).unwrap();
    assert_eq!(lines(&canonical(&[&bare]), false), lines(&canonical(&[&full]), false));
    assert!(bare.size().unwrap() + 80_000 < full.size().unwrap());
}

#[test]
fn the_root_is_that_of_the_topmost_layer_with_an_entry_for_it() {
    let layers = [
        tar_of(&[Dir(s("./"), 0o711), File(s("a"), 1, 1)]),
        tar_of(&[Dir(s("./"), 0o750)]),
        tar_of(&[File(s("b"), 1, 1)]),
    ];
    let mode = |count: usize| {
        let (image, _) = flat(&layers[..count]).unwrap();
        let fs = Ext4::open(&image).unwrap();
        fs.inode(fs.root()).unwrap().mode & 0o7777
    };
    assert_eq!([mode(1), mode(2), mode(3)], [0o711, 0o750, 0o750]);
    let (image, _) = flat(&[tar_of(&[File(s("b"), 1, 1)])]).unwrap();
    let fs = Ext4::open(&image).unwrap();
    assert_eq!(fs.inode(fs.root()).unwrap().mode & 0o7777, 0o755);
}

#[test]
fn below_an_opaque_root_nothing_is_read() {
    let layers = [b"not a tar".to_vec(), tar_of(&[Opaque(s(".")), File(s("b"), 1, 1)])];
    let (_, summary) = flat(&layers).unwrap();
    assert_eq!(summary.layers_read, 1);
}

#[test]
fn an_error_names_the_layer() {
    let layers = [tar_of(&[File(s("a"), 1, 1)]), b"not a tar".repeat(100), tar_of(&[])];
    let error = flat(&layers).unwrap_err();
    assert!(matches!(error, DiffError::Layer { number: 1, .. }), "{error:?}");
}

#[test]
fn each_file_comes_with_the_digest_of_its_content() {
    let layers = [
        tar_of(&[
            File(s("z"), 70_000, 1),
            File(s("d/b"), 30, 2),
            Link(s("d/c"), s("d/b")),
            File(s("e"), 0, 0),
        ]),
        tar_of(&[Link(s("y"), s("z")), Symlink(s("l"), s("z"))]),
    ];
    let mut open =
        |n: usize| -> io::Result<Box<dyn Read>> { Ok(Box::new(io::Cursor::new(layers[n].clone()))) };
    let mut found = Vec::new();
    let mut files = |file: FlatFile<'_>| {
        found.push((String::from_utf8_lossy(file.path).into_owned(), file.size, file.blake3));
        Ok(())
    };
    flatten(2, &mut open, MemDisk::new(), None, &FlatOptions::default(), Some(&mut files)).unwrap();
    let hash = |len, seed| Some(blake3::hash(&content(len, seed)).into());
    let expected = vec![
        (s("d/b"), 30, hash(30, 2)),
        (s("d/c"), 30, hash(30, 2)),
        (s("e"), 0, hash(0, 0)),
        (s("y"), 70_000, hash(70_000, 1)),
        (s("z"), 70_000, hash(70_000, 1)),
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_program_can_be_required() {
    let exe = |mode| {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(1);
        header.set_mode(mode);
        tar.append_data(&mut header, "sbin/init", &b"x"[..]).unwrap();
        let layers = [tar.into_inner().unwrap(), tar_of(&[Symlink(s("init"), s("/sbin/init"))])];
        let options = FlatOptions { require: Some(b"/init".to_vec()), ..FlatOptions::default() };
        flat_with(&layers, &options).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(exe(0o755), Ok(()));
    assert!(exe(0o644).unwrap_err().contains("not executable"));
    let options = FlatOptions { require: Some(b"/sbin/init".to_vec()), ..FlatOptions::default() };
    let error = flat_with(&[tar_of(&[])], &options).unwrap_err().to_string();
    assert!(error.contains("/sbin/init") && error.contains("nothing there"), "{error}");
}

#[test]
fn the_same_layers_give_the_same_bytes() {
    let layers: Vec<Vec<u8>> = states().iter().map(|items| tar_of(items)).collect();
    let (a, first) = flat(&layers).unwrap();
    let (b, second) = flat(&layers).unwrap();
    assert!(a.to_vec() == b.to_vec() && first == second);
}

fn name() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..=3).prop_map(|parts| parts.join("/"))
}

fn item() -> impl Strategy<Value = Item> {
    prop_oneof![
        3 => (name(), prop::sample::select(vec![0o700, 0o711, 0o755])).prop_map(|(n, m)| Dir(n, m)),
        4 => (name(), prop::sample::select(vec![0, 5, 3000]), any::<u8>()).prop_map(|(n, l, x)| File(n, l, x)),
        1 => (name(), name()).prop_map(|(a, b)| Symlink(a, b)),
        3 => (name(), name()).prop_map(|(a, b)| Link(a, b)),
        1 => name().prop_map(Fifo),
        2 => name().prop_map(Whiteout),
        1 => name().prop_map(Opaque),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn random_layers_are_what_overlayfs_shows(
        layers in prop::collection::vec(prop::collection::vec(item(), 0..6), 1..5)
    ) {
        agree(&layers);
    }
}
