//! `image ls` shows the tree that `image pack` writes: both are made of the same layers by code of their own.
//!
//! ```text
//!   layers ─┬─ oci_image::tree (ls, cat, diff; from the base up) ──────────► names, attributes, contents, groups of links
//!           └─ layer_codec::flat (pack; from the top down) ─► ext4 ─ reader ─► the same
//! ```
//!
//! Left out: ACLs, capabilities and attributes that a kernel would refuse; the disk has what a kernel makes of them.

use crate::stacks::{Item, Stack, all_orders, chosen, tar_of};
use disk_io::MemDisk;
use ext4_image::{Ext4, FileKind, Inode};
use layer_codec::flat::{FlatOptions, flatten};
use oci_image::{
    Digest, Options, Source,
    testing::{Packing, Store, archive},
    tree::{NodeKind, Tree, TreeOptions},
};
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    hash::Hash,
    io::{self, Read},
    path::Path,
};

/// What a name is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Facts {
    kind: NodeKind,
    mode: u16,
    owner: (u32, u32),
    mtime: (i64, u32),
    device: (u32, u32),
    target: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Size and digest of a file.
    content: Option<(u64, Digest)>,
    /// The first name of its node.
    first: String,
}

/// By path; the root's is empty.
type Names = BTreeMap<String, Facts>;

/// The first name of each node, which are met in the order of their paths.
fn first_of<I: Hash + Eq>(known: &mut HashMap<I, String>, id: I, path: &str) -> String {
    known.entry(id).or_insert_with(|| path.to_owned()).clone()
}

/// The tree of `ls`.
fn listed(tars: &[Vec<u8>], dir: &Path) -> Result<Names, String> {
    let mut store = Store::default();
    let layers: Vec<(&[u8], Packing)> = tars.iter().map(|tar| (&tar[..], Packing::Plain)).collect();
    let manifest = store.manifest("linux/amd64", &layers);
    store.list(manifest, "");
    let file = dir.join("archive");
    fs::write(&file, archive(&store.files())).unwrap();
    let image = Source::OciArchive { file, reference: None }.open(&Options::default()).unwrap();
    let options = TreeOptions { digests: true, ..TreeOptions::default() };
    let tree = Tree::read(&image, &options, &mut |_| {}).map_err(|e| e.to_string())?;
    let (mut names, mut firsts) = (Names::new(), HashMap::new());
    let mut add = |path: &[u8], id| {
        let (path, node) = (String::from_utf8_lossy(path).into_owned(), tree.node(id));
        let facts = Facts {
            kind: node.kind,
            mode: node.mode,
            owner: (node.uid, node.gid),
            mtime: (node.mtime.secs, node.mtime.nanos),
            device: node.device,
            target: node.target.clone(),
            xattrs: node.xattrs.iter().map(|x| (x.name.clone(), x.value.clone())).collect(),
            content: (node.kind == NodeKind::File).then(|| (node.size, node.digest.expect("a digest"))),
            first: first_of(&mut firsts, id, &path),
        };
        names.insert(path, facts);
    };
    add(b"", tree.root());
    tree.walk(tree.root(), &mut add);
    Ok(names)
}

fn kind(kind: FileKind) -> NodeKind {
    match kind {
        FileKind::File => NodeKind::File,
        FileKind::Directory => NodeKind::Directory,
        FileKind::Symlink => NodeKind::Symlink,
        FileKind::CharDevice => NodeKind::CharDevice,
        FileKind::BlockDevice => NodeKind::BlockDevice,
        FileKind::Fifo => NodeKind::Fifo,
        FileKind::Socket => panic!("no layer has sockets"),
    }
}

fn facts(fs: &Ext4<&MemDisk>, inode: &Inode, first: String) -> Facts {
    let content = (inode.kind == FileKind::File).then(|| {
        let mut bytes = vec![0; inode.size as usize];
        let n = fs.read_file_at(inode, 0, &mut bytes).unwrap();
        assert_eq!(n, bytes.len());
        (inode.size, Digest::sha256(&bytes))
    });
    Facts {
        kind: kind(inode.kind),
        mode: inode.mode & 0o7777,
        owner: (inode.uid, inode.gid),
        mtime: (inode.mtime.secs, inode.mtime.nanos),
        device: inode.rdev,
        target: if inode.kind == FileKind::Symlink { fs.symlink_target(inode).unwrap() } else { Vec::new() },
        xattrs: fs.xattrs(inode).unwrap().into_iter().map(|x| (x.name, x.value)).collect(),
        content,
        first,
    }
}

/// The tree on the disk of `pack`, and how many layers were read for it.
fn packed(tars: &[Vec<u8>]) -> Result<(Names, usize), String> {
    let disk = MemDisk::new();
    let mut open = |n: usize| -> io::Result<Box<dyn Read>> { Ok(Box::new(io::Cursor::new(tars[n].clone()))) };
    let done = flatten(tars.len(), &mut open, &disk, None, &FlatOptions::default(), None)
        .map_err(|e| format!("{e:?}"))?;
    let fs = Ext4::open(&disk).unwrap();
    let (mut names, mut firsts) = (Names::new(), HashMap::new());
    let mut todo = vec![(String::new(), fs.root())];
    while let Some((path, ino)) = todo.pop() {
        let inode = fs.inode(ino).unwrap();
        if inode.kind == FileKind::Directory {
            let mut below = fs.read_dir(&inode).unwrap();
            below.sort_by(|a, b| b.name.cmp(&a.name));
            todo.extend(below.into_iter().filter(|e| !matches!(&e.name[..], b"." | b"..")).map(|e| {
                let name = String::from_utf8(e.name).unwrap();
                (if path.is_empty() { name } else { format!("{path}/{name}") }, e.ino)
            }));
        }
        let first = first_of(&mut firsts, ino, &path);
        names.insert(path, facts(&fs, &inode, first));
    }
    Ok((names, done.layers_read))
}

/// The lines that differ.
fn difference(a: &Names, b: &Names) -> String {
    let only = |a: &Names, b: &Names, sign: char| {
        let lines = a.iter().filter(|(path, facts)| b.get(*path) != Some(facts));
        lines.map(|(path, facts)| format!("{sign} {path:?} {facts:?}")).collect::<Vec<_>>()
    };
    [only(a, b, '<'), only(b, a, '>')].concat().join("\n")
}

/// Whether a layer has a link to what it does not have itself.
fn links_down(layers: &[Vec<Item>]) -> bool {
    layers.iter().any(|layer| {
        layer.iter().any(|item| match item {
            Item::Link(path, target) => {
                path == target || !layer.iter().any(|other| other.path() == target.as_str())
            }
            _ => false,
        })
    })
}

/// Without the attributes of directories.
fn bare(mut names: Names) -> Names {
    for facts in names.values_mut().filter(|facts| facts.kind == NodeKind::Directory) {
        (facts.mode, facts.owner, facts.mtime) = (0, (0, 0), (0, 0));
        facts.xattrs.clear();
    }
    names
}

/// Both trees are the same, or there is none.
///
/// One thing is left open, as between `pack` and overlayfs: a directory without an entry, in a layer below whose place for it
/// is a link into a layer further down, which turns out to be a symbolic link.
fn agree(layers: &[Vec<Item>], dir: &Path) -> Result<(), String> {
    let tars: Vec<Vec<u8>> = layers.iter().map(|items| tar_of(items)).collect();
    match (listed(&tars, dir), packed(&tars)) {
        (Ok(listed), Ok((packed, _))) if listed == packed => Ok(()),
        (Ok(listed), Ok((packed, _)))
            if links_down(layers) && bare(listed.clone()) == bare(packed.clone()) =>
        {
            Ok(())
        }
        (Ok(listed), Ok((packed, _))) => {
            Err(format!("{layers:?}\nlisted <, packed >\n{}", difference(&listed, &packed)))
        }
        (Err(_), Err(_)) => Ok(()),
        // Below an opaque root nothing is packed.
        (Err(_), Ok((_, read))) if read < layers.len() => Ok(()),
        (Err(error), Ok(_)) => Err(format!("{layers:?}\nonly pack accepts it, not: {error}")),
        (Ok(_), Err(error)) => Err(format!("{layers:?}\nonly ls accepts it, not: {error}")),
    }
}

fn all_agree(stacks: &[Stack]) {
    let dir = tempfile::tempdir().unwrap();
    let wrong: Vec<String> = stacks.iter().filter_map(|stack| agree(stack, dir.path()).err()).collect();
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        stacks.len(),
        wrong[..wrong.len().min(5)].join("\n")
    );
}

#[test]
fn every_order_of_states_is_listed_as_it_is_packed() {
    all_agree(&all_orders());
}

#[test]
fn links_and_directories_without_an_entry_are_listed_as_they_are_packed() {
    all_agree(&chosen());
}

fn name() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..=3).prop_map(|parts| parts.join("/"))
}

fn item() -> impl Strategy<Value = Item> {
    prop_oneof![
        3 => (name(), prop::sample::select(vec![0o700, 0o711, 0o755])).prop_map(|(n, m)| Item::Dir(n, m)),
        4 => (name(), prop::sample::select(vec![0, 5, 3000]), any::<u8>()).prop_map(|(n, l, x)| Item::File(n, l, x)),
        2 => (name(), name()).prop_map(|(a, b)| Item::Symlink(a, b)),
        2 => (name(), name()).prop_map(|(a, b)| Item::Link(a, b)),
        1 => name().prop_map(Item::Fifo),
        2 => name().prop_map(Item::Whiteout),
        1 => name().prop_map(Item::Opaque),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 800, ..ProptestConfig::default() })]

    #[test]
    fn random_layers_are_listed_as_they_are_packed(
        layers in prop::collection::vec(prop::collection::vec(item(), 0..6), 1..5)
    ) {
        let dir = tempfile::tempdir().unwrap();
        if let Err(wrong) = agree(&layers, dir.path()) {
            panic!("{wrong}");
        }
    }
}
