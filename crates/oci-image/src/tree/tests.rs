//! Merged trees of small images, written out.

use super::{NodeKind, Tree, TreeOptions, copy_file};
use crate::{
    Digest, Image, ImageError, ImageErrorKind, Options, Source,
    testing::{Packing, Store, Tar, directory},
};
use layer_tar::writer::{Header, Kind};
use tempfile::TempDir;

struct Made {
    image: Image,
    _place: TempDir,
}

fn image(layers: &[Vec<u8>]) -> Made {
    let mut store = Store::default();
    let layers: Vec<(&[u8], Packing)> = layers.iter().map(|tar| (tar.as_slice(), Packing::Gzip)).collect();
    let manifest = store.manifest("linux/amd64", &layers);
    store.list(manifest, "");
    let place = TempDir::new().unwrap();
    directory(place.path(), &store.files());
    let source = Source::Layout { directory: place.path().into(), reference: None };
    Made { image: source.open(&Options::default()).unwrap(), _place: place }
}

fn read(layers: &[Vec<u8>]) -> Result<Tree, ImageError> {
    Tree::read(&image(layers).image, &TreeOptions::default(), &mut |_| {})
}

/// The tree as lines: type, layer, and path, with the target of a link and the size of a file.
fn lines(tree: &Tree) -> Vec<String> {
    let mut lines = Vec::new();
    tree.walk(tree.root(), &mut |path, id| {
        let node = tree.node(id);
        let path = String::from_utf8_lossy(path).into_owned();
        lines.push(match node.kind {
            NodeKind::Directory => format!("{} {path}/", node.layer),
            NodeKind::Symlink => {
                format!("{} {path} -> {}", node.layer, String::from_utf8_lossy(&node.target))
            }
            NodeKind::File if node.links > 1 => {
                format!("{} {path} {} x{}", node.layer, node.size, node.links)
            }
            NodeKind::File => format!("{} {path} {}", node.layer, node.size),
            other => format!("{} {path} {other:?}", node.layer),
        });
    });
    lines
}

#[test]
fn layers_merge_as_overlays_do() {
    type Case = (&'static str, Vec<Vec<u8>>, &'static [&'static str]);
    let tar = Tar::default;
    let cases: Vec<Case> = vec![
        (
            "a whiteout, a replaced file, a merged directory",
            vec![
                tar().dir("a").file("a/x", b"1").file("a/y", b"22").file("b", b"").finish(),
                tar().whiteout("", "b").file("a/y", b"333").dir("a").finish(),
            ],
            &["1 a/", "0 a/x 1", "1 a/y 3"],
        ),
        (
            "an implied directory shows the one below",
            vec![tar().dir("a").finish(), tar().file("a/b/c", b"").finish()],
            &["0 a/", "1 a/b/", "1 a/b/c 0"],
        ),
        (
            "an opaque directory, marked before and after",
            vec![
                tar().file("a/x", b"").file("b/x", b"").finish(),
                tar().opaque("a").file("a/y", b"").file("b/y", b"").opaque("b").finish(),
            ],
            &["0 a/", "1 a/y 0", "0 b/", "1 b/y 0"],
        ),
        (
            "a directory on a file, a file on a directory",
            vec![
                tar().file("a", b"1").file("b/c", b"1").finish(),
                tar().dir("a").file("a/n", b"").file("b", b"4444").finish(),
            ],
            &["1 a/", "1 a/n 0", "1 b 4"],
        ),
        (
            "a whiteout and a directory of the same name",
            vec![tar().file("a/x", b"").finish(), tar().whiteout("", "a").dir("a").file("a/y", b"").finish()],
            &["1 a/", "1 a/y 0"],
        ),
        (
            "links within a layer, before and after their target, and chains",
            vec![
                tar()
                    .link("early", "chain")
                    .link("chain", "file")
                    .file("file", b"12")
                    .link("late", "./file")
                    .finish(),
            ],
            &["0 chain 2 x4", "0 early 2 x4", "0 file 2 x4", "0 late 2 x4"],
        ),
        (
            "a link into a lower layer copies its target",
            vec![
                tar().file("d/low", b"123").file("other", b"").finish(),
                tar().link("l1", "l2").link("l2", "d/low").finish(),
            ],
            &["0 d/", "1 d/low 3 x3", "1 l1 3 x3", "1 l2 3 x3", "0 other 0"],
        ),
        (
            "one name of a link is replaced, the other stays",
            vec![tar().file("a", b"1").link("b", "a").finish(), tar().file("a", b"22").finish()],
            &["1 a 2", "0 b 1"],
        ),
        (
            "a symbolic link in a parent is followed in its own layer only",
            vec![
                tar().dir("usr/lib").symlink("lib", "usr/lib").file("lib/x", b"").finish(),
                tar().file("lib/y", b"").finish(),
            ],
            &["0 lib/", "1 lib/y 0", "0 usr/", "0 usr/lib/", "0 usr/lib/x 0"],
        ),
        (
            "AUFS's own entries mean nothing; the root has attributes",
            vec![
                tar()
                    .dir("./")
                    .file(".wh..wh.aufs", b"")
                    .file(".wh..wh.plnk/1.2", b"")
                    .file("a", b"")
                    .finish(),
            ],
            &["0 a 0"],
        ),
    ];
    for (what, layers, expected) in cases {
        let tree = read(&layers).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(lines(&tree), expected, "{what}");
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let tar = Tar::default;
    for (what, layers) in [
        ("a name that leaves the root", vec![tar().file("../x", b"").finish()]),
        ("a link to nothing", vec![tar().link("a", "b").finish()]),
        ("a link to itself", vec![tar().link("a", "a").finish()]),
        ("links to each other", vec![tar().link("a", "b").link("b", "a").finish()]),
        (
            "a link to what the layer deletes",
            vec![tar().file("t", b"").finish(), tar().whiteout("", "t").link("a", "t").finish()],
        ),
        ("a link to a directory", vec![tar().dir("d").link("a", "d").finish()]),
        ("a file as a directory", vec![tar().file("a", b"").file("a/b", b"").finish()]),
        (
            "a loop of symbolic links",
            vec![tar().symlink("a", "b").symlink("b", "a").file("a/x", b"").finish()],
        ),
        ("a whiteout without a name", vec![tar().whiteout("", "").finish()]),
        ("a file as root", vec![tar().file("/", b"").finish()]),
        ("no tar", vec![vec![7; 1024]]),
        ("a cut tar", vec![tar().file("a", &[0; 2000]).finish()[..1024].to_vec()]),
    ] {
        let e = read(&layers).expect_err(what);
        assert_eq!(e.kind(), ImageErrorKind::Corrupt, "{what}: {e}");
    }
    let layers = [tar().file("a", b"").finish(), tar().file("b", b"").finish()];
    let made = image(&layers);
    for (options, good) in [
        (TreeOptions { entries: 2, ..TreeOptions::default() }, true),
        (TreeOptions { entries: 1, ..TreeOptions::default() }, false),
        (TreeOptions { bytes: 1000, ..TreeOptions::default() }, false),
    ] {
        let result = Tree::read(&made.image, &options, &mut |_| {});
        assert_eq!(result.as_ref().err().map(ImageError::kind), (!good).then_some(ImageErrorKind::Limit));
    }
}

#[test]
fn hidden_files_are_named_with_their_layers() {
    let tar = Tar::default;
    let layers = [
        tar().file("a/x", b"1").file("a/y", b"22").file("twice", b"333").file("twice", b"4444").finish(),
        tar().file("a/y", b"55555").finish(),
        tar().whiteout("", "a").finish(),
    ];
    let tree = read(&layers).unwrap();
    let mut hidden: Vec<(String, u64, usize, usize)> = tree
        .shadowed
        .iter()
        .map(|s| (String::from_utf8_lossy(&s.path).into_owned(), s.size, s.layer, s.by))
        .collect();
    hidden.sort();
    let row = |path: &str, size, layer, by| (path.to_owned(), size, layer, by);
    assert_eq!(
        hidden,
        [row("a/x", 1, 0, 2), row("a/y", 2, 0, 1), row("a/y", 5, 1, 2), row("twice", 3, 0, 0)]
    );
    let used: Vec<(u64, u64)> = tree.layers.iter().map(|l| (l.file_bytes, l.visible_bytes)).collect();
    assert_eq!(used, [(10, 4), (5, 0), (0, 0)]);
    for (index, used) in tree.layers.iter().enumerate() {
        let hidden: u64 = tree.shadowed.iter().filter(|s| s.layer == index).map(|s| s.size).sum();
        assert_eq!(used.file_bytes, used.visible_bytes + hidden, "layer {index}");
    }
}

#[test]
fn files_are_found_through_links_and_read_again_with_their_digest() {
    let mut holes = Tar::default();
    let header = Header {
        kind: Kind::File,
        path: b"holes",
        link: b"",
        mode: 0o600,
        uid: 1,
        gid: 2,
        mtime: (3, 0),
        device: (0, 0),
        size: 4099,
        xattrs: &[(b"user.a", b"b"), (b"trusted.overlay.opaque", b"y")],
        sparse: Some(&[(4096, 3)]),
    };
    holes.entry(&header, b"end");
    holes.symlink("abs", "/dir/up").symlink("dir/up", "../holes");
    let made = image(&[Tar::default().file("holes", b"older").finish(), holes.finish()]);
    let options = TreeOptions { digests: true, ..TreeOptions::default() };
    let tree = Tree::read(&made.image, &options, &mut |_| {}).unwrap();
    let expected = [&[0; 4096][..], b"end"].concat();
    for path in ["holes", "/holes", "abs", "dir/up", "dir/../holes", "../holes"] {
        let node = tree.node(tree.find(path.as_bytes(), true).unwrap());
        let mut found = Vec::new();
        copy_file(&made.image, node, &mut found).unwrap();
        assert!(found == expected, "{path}");
        assert_eq!(node.digest, Some(Digest::sha256(&expected)), "{path}");
        assert_eq!(node.xattrs.len(), 1);
    }
    assert_eq!(tree.node(tree.find(b"abs", false).unwrap()).kind, NodeKind::Symlink);
    for missing in ["absent", "holes/x", "dir/up/x"] {
        assert_eq!(tree.find(missing.as_bytes(), true).unwrap_err().kind(), ImageErrorKind::NotFound);
    }
}
