//! What a file tree holds, in full: the expected tree is computed from the entries of an image's layers, the real one is
//! read through a mount, and both are compared path by path.
//!
//! ```text
//!   entries of layer 1, 2, …  ──Tree::apply──►  Tree  ◄──Tree::of_folder──  a mounted image, a container's root
//!                                                │
//!                                           assert_same
//! ```
//!
//! The rules of `apply` are those of containerd's applier on overlayfs, which the control runs of every test prove:
//! directories that no entry describes take mode, owner and attributes from the layers below, or are 0755 of root.

use crate::tarball::{Entry, Kind};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
};

/// One path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    /// `d`, `f`, `l`, `c`, `b`, `p`, `s`.
    pub(crate) kind: char,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds; `None` is not compared.
    pub(crate) mtime: Option<(i64, u32)>,
    /// Bytes and sha256 of a file.
    pub(crate) content: Option<(u64, String)>,
    /// Target of a symlink.
    pub(crate) target: Option<Vec<u8>>,
    pub(crate) rdev: Option<(u32, u32)>,
    /// First path of the file that this one is a further name of.
    pub(crate) same_as: Option<Vec<u8>>,
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
}

/// A file tree: absolute paths without a last slash; the root is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tree(pub(crate) BTreeMap<Vec<u8>, Node>);

/// sha256 in hex.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

/// The absolute form of a tar's path.
fn absolute(path: &[u8]) -> Vec<u8> {
    let path = path.strip_prefix(b"./").unwrap_or(path);
    let path = path.strip_suffix(b"/").unwrap_or(path);
    if path.is_empty() || path == b"." { Vec::new() } else { [b"/", path].concat() }
}

fn parent_of(path: &[u8]) -> &[u8] {
    &path[..path.iter().rposition(|b| *b == b'/').expect("an absolute path")]
}

/// The paths that begin with a folder's.
fn is_below(path: &[u8], folder: &[u8]) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.first() == Some(&b'/'))
}

fn directory() -> Node {
    Node {
        kind: 'd',
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: None,
        content: None,
        target: None,
        rdev: None,
        same_as: None,
        xattrs: BTreeMap::new(),
    }
}

impl Tree {
    /// Reads a tree, through `/proc/PID/root` if it is in a room. What is mounted on its directories is left out, and so
    /// are these directories: runc mounts `/proc`, `/sys`, `/dev` and more.
    pub(crate) fn of_folder(root: &Path) -> Self {
        let mut tree = Self::default();
        let device = fs::metadata(root).unwrap_or_else(|e| panic!("{}: {e}", root.display())).dev();
        let mut inodes = BTreeMap::new();
        tree.read(root, &[], device, &mut inodes);
        assert!(!tree.0.is_empty(), "{} is empty", root.display());
        tree
    }

    fn read(
        &mut self,
        folder: &Path,
        prefix: &[u8],
        device: u64,
        inodes: &mut BTreeMap<(u64, u64), Vec<u8>>,
    ) {
        let listing = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut names: Vec<_> = listing.map(|entry| entry.expect("entry").file_name()).collect();
        // As the paths are sorted, so that the first name of a file is the first of the tree.
        names.sort_by_key(|name| [name.as_bytes(), b"/"].concat());
        for name in names {
            let (place, path) = (folder.join(&name), [prefix, b"/", name.as_bytes()].concat());
            let found = fs::symlink_metadata(&place).unwrap_or_else(|e| panic!("{}: {e}", place.display()));
            let kind = found.file_type();
            // Files of an overlay may be on its layers' devices; only mount points have directories of another one.
            if kind.is_dir() && found.dev() != device {
                continue;
            }
            let letter = [
                (kind.is_dir(), 'd'),
                (kind.is_file(), 'f'),
                (kind.is_symlink(), 'l'),
                (kind.is_char_device(), 'c'),
                (kind.is_block_device(), 'b'),
                (kind.is_fifo(), 'p'),
            ];
            let letter = letter.iter().find(|(is, _)| *is).map_or('s', |(_, letter)| *letter);
            let same_as = if kind.is_dir() {
                None
            } else {
                match inodes.entry((found.dev(), found.ino())) {
                    std::collections::btree_map::Entry::Vacant(place) => {
                        place.insert(path.clone());
                        None
                    }
                    std::collections::btree_map::Entry::Occupied(first) => Some(first.get().clone()),
                }
            };
            let node = Node {
                kind: letter,
                mode: found.mode() & 0o7777,
                uid: found.uid(),
                gid: found.gid(),
                mtime: Some((found.mtime(), u32::try_from(found.mtime_nsec()).expect("nanoseconds"))),
                content: kind.is_file().then(|| {
                    let bytes = fs::read(&place).unwrap_or_else(|e| panic!("{}: {e}", place.display()));
                    assert_eq!(bytes.len() as u64, found.len(), "size of {}", place.display());
                    (found.len(), sha256(&bytes))
                }),
                target: kind
                    .is_symlink()
                    .then(|| fs::read_link(&place).expect("link").into_os_string().into_vec()),
                rdev: (kind.is_char_device() || kind.is_block_device())
                    .then(|| (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()))),
                same_as,
                xattrs: attributes(&place),
            };
            self.0.insert(path.clone(), node);
            if kind.is_dir() {
                self.read(&place, &path, device, inodes);
            }
        }
    }

    /// Puts a layer on top: entries in order, whiteouts and opaque directories as AUFS writes them.
    pub(crate) fn apply(&mut self, entries: &[Entry]) {
        for entry in entries {
            let path = absolute(&entry.path);
            if path.is_empty() {
                continue;
            }
            let folder = parent_of(&path).to_vec();
            let name = &path[folder.len() + 1..];
            self.imply(&folder, entries);
            if name == b".wh..wh..opq" {
                // What this very layer has put there stays.
                let own: Vec<Vec<u8>> = entries.iter().map(|e| absolute(&e.path)).collect();
                self.0.retain(|p, _| !is_below(p, &folder) || own.iter().any(|o| o == p || is_below(o, p)));
                continue;
            }
            if let Some(hidden) = name.strip_prefix(b".wh.") {
                self.remove([&folder[..], b"/", hidden].concat());
                continue;
            }
            if !(entry.kind == Kind::Directory && self.0.get(&path).is_some_and(|n| n.kind == 'd')) {
                self.remove(&path);
            }
            let node = match &entry.kind {
                Kind::HardLink(target) => {
                    let first = absolute(target);
                    let node = self.0.get(&first).expect("target of a hard link").clone();
                    Node { same_as: Some(first), ..node }
                }
                _ => node_of(entry),
            };
            self.0.insert(path, node);
        }
        self.settle_links();
    }

    /// Makes the directories above an entry that the layer itself does not describe.
    fn imply(&mut self, folder: &[u8], entries: &[Entry]) {
        if folder.is_empty() {
            return;
        }
        self.imply(parent_of(folder), entries);
        if self.0.get(folder).is_some_and(|node| node.kind != 'd') {
            self.remove(folder);
        }
        let described = entries.iter().any(|e| e.kind == Kind::Directory && absolute(&e.path) == folder);
        let node = self.0.entry(folder.to_vec()).or_insert_with(directory);
        if !described {
            node.mtime = None;
        }
    }

    /// The first name, in order, of each file with several is the one that the others refer to.
    fn settle_links(&mut self) {
        let mut groups: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
        for (path, node) in &self.0 {
            if let Some(first) = &node.same_as {
                groups.entry(first.clone()).or_default().push(path.clone());
            }
        }
        for (first, mut names) in groups {
            if self.0.contains_key(&first) {
                names.push(first);
            }
            names.sort_by_key(|name| order(name));
            for (n, name) in names.iter().enumerate() {
                if let Some(node) = self.0.get_mut(name) {
                    node.same_as = (n > 0).then(|| names[0].clone());
                }
            }
        }
    }

    /// Removes a path and what is below it.
    pub(crate) fn remove(&mut self, path: impl AsRef<[u8]>) {
        self.0.retain(|p, _| p != path.as_ref() && !is_below(p, path.as_ref()));
    }

    /// Deletes a path as a container would.
    pub(crate) fn delete(&mut self, path: impl AsRef<[u8]>) {
        assert!(self.0.contains_key(path.as_ref()), "nothing to delete at {}", shown(path.as_ref()));
        self.remove(path.as_ref());
        self.touched(path.as_ref());
        self.settle_links();
    }

    /// The folders above `path` were written to: their times are no longer known.
    fn touched(&mut self, path: &[u8]) {
        let mut path = path;
        while let Some(slash) = path.iter().rposition(|b| *b == b'/') {
            path = &path[..slash];
            if let Some(node) = self.0.get_mut(path) {
                node.mtime = None;
            }
        }
    }

    /// Something that a container made: its time is not known.
    pub(crate) fn put(&mut self, path: &str, node: Node) {
        self.0.insert(path.as_bytes().to_vec(), node);
        self.touched(path.as_bytes());
    }

    pub(crate) fn put_file(&mut self, path: &str, mode: u32, data: impl AsRef<[u8]>) {
        let content = Some((data.as_ref().len() as u64, sha256(data.as_ref())));
        self.put(path, Node { kind: 'f', mode, content, ..directory() });
    }

    pub(crate) fn put_directory(&mut self, path: &str, mode: u32) {
        self.put(path, Node { mode, ..directory() });
    }

    pub(crate) fn put_hard_link(&mut self, path: &str, first: &str) {
        let node = self.0.get(first.as_bytes()).expect("first name of a file").clone();
        self.put(path, Node { same_as: Some(first.as_bytes().to_vec()), ..node });
        self.settle_links();
    }

    pub(crate) fn put_symlink(&mut self, path: &str, target: &str) {
        self.put(
            path,
            Node { kind: 'l', mode: 0o777, target: Some(target.as_bytes().to_vec()), ..directory() },
        );
    }

    /// Changes one path, whose time is then no longer known.
    pub(crate) fn change(&mut self, path: &str, change: impl FnOnce(&mut Node)) {
        let node = self.0.get_mut(path.as_bytes()).unwrap_or_else(|| panic!("no {path}"));
        node.mtime = None;
        change(node);
    }

    /// The same tree without these paths: mount points of a running container, and what is below them.
    pub(crate) fn without(&self, paths: &[&str]) -> Self {
        let mut tree = self.clone();
        for path in paths {
            tree.remove(path.as_bytes());
        }
        tree
    }

    /// The same tree with all times left out.
    pub(crate) fn without_times(&self) -> Self {
        let mut tree = self.clone();
        tree.0.values_mut().for_each(|node| node.mtime = None);
        tree
    }

    /// Fails with every difference named. Times that either side does not know are not compared.
    pub(crate) fn assert_same(&self, actual: &Self, what: &str) {
        let mut report = String::new();
        for (path, node) in &self.0 {
            match actual.0.get(path) {
                None => {
                    let _ = writeln!(report, "  missing {}: {node:?}", shown(path));
                }
                Some(found) => {
                    let unknown = node.mtime.is_none() || found.mtime.is_none();
                    let mtime = if unknown { node.mtime } else { found.mtime };
                    if (Node { mtime, ..found.clone() }) != *node {
                        let _ = writeln!(
                            report,
                            "  {}\n    expected {node:?}\n    found    {found:?}",
                            shown(path)
                        );
                    }
                }
            }
        }
        for (path, node) in actual.0.iter().filter(|(path, _)| !self.0.contains_key(*path)) {
            let _ = writeln!(report, "  unexpected {}: {node:?}", shown(path));
        }
        assert!(report.is_empty(), "{what}: the trees differ\n{report}");
        assert!(self.0.len() > 3, "{what}: a tree of {} paths proves nothing", self.0.len());
    }
}

/// A path as a report shows it.
fn shown(path: &[u8]) -> String {
    path.escape_ascii().to_string()
}

/// The order in which [`Tree::of_folder`] finds paths.
fn order(path: &[u8]) -> Vec<u8> {
    [path, b"/"].concat()
}

fn node_of(entry: &Entry) -> Node {
    let content = match &entry.kind {
        Kind::File(data) => Some((data.len() as u64, sha256(data))),
        _ => None,
    };
    let target = match &entry.kind {
        Kind::Symlink(target) => Some(target.clone()),
        _ => None,
    };
    let rdev = match entry.kind {
        Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) => Some((major, minor)),
        _ => None,
    };
    let kind = match entry.kind {
        Kind::Directory => 'd',
        Kind::File(_) | Kind::HardLink(_) => 'f',
        Kind::Symlink(_) => 'l',
        Kind::CharDevice(..) => 'c',
        Kind::BlockDevice(..) => 'b',
        Kind::Fifo => 'p',
    };
    Node {
        kind,
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: Some(entry.mtime),
        content,
        target,
        rdev,
        same_as: None,
        xattrs: entry.xattrs.iter().cloned().collect(),
    }
}

/// Extended attributes of a path, a symlink's own; those that overlayfs keeps for itself are left out.
fn attributes(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0_u8; 1 << 16];
    let length =
        rustix::fs::llistxattr(path, &mut names[..]).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut found = BTreeMap::new();
    for name in names[..length].split(|b| *b == 0).filter(|name| !name.is_empty()) {
        let name = String::from_utf8(name.to_vec()).expect("name of an attribute");
        if name.starts_with("trusted.overlay.") || name == "security.selinux" {
            continue;
        }
        let mut value = vec![0_u8; 1 << 16];
        let length = rustix::fs::lgetxattr(path, name.as_str(), &mut value[..])
            .unwrap_or_else(|e| panic!("{name} of {}: {e}", path.display()));
        value.truncate(length);
        found.insert(name, value);
    }
    found
}

#[test]
fn layers_are_put_on_top_of_each_other() {
    let mut tree = Tree::default();
    tree.apply(&[
        Entry::dir("d/").mode(0o700),
        Entry::file("d/gone", "1"),
        Entry::file("d/kept", "2"),
        Entry::dir("o/"),
        Entry::file("o/hidden", "3"),
    ]);
    tree.apply(&[
        Entry::file("d/.wh.gone", ""),
        Entry::file("d/new", "4"),
        Entry::hard_link("d/again", "d/new"),
        Entry::dir("o/"),
        Entry::file("o/own", "5"),
        Entry::file("o/.wh..wh..opq", ""),
        Entry::file("made/by/name", "6"),
    ]);
    let paths: Vec<_> = tree.0.keys().map(|p| String::from_utf8_lossy(p).into_owned()).collect();
    assert_eq!(
        paths,
        ["/d", "/d/again", "/d/kept", "/d/new", "/made", "/made/by", "/made/by/name", "/o", "/o/own"]
    );
    assert_eq!(tree.0[b"/d".as_slice()].mode, 0o700, "a directory that the layer only implies");
    assert_eq!(tree.0[b"/d/new".as_slice()].same_as.as_deref(), Some(b"/d/again".as_slice()));
}
