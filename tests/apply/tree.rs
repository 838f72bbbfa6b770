//! What a folder of the kernel holds, to be compared.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
};

/// One node; `Debug` is what a failed test shows.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, i64),
    pub(crate) device: (u32, u32),
    /// Content of a file, target of a symlink.
    pub(crate) content: Vec<u8>,
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
    /// The first name of the same inode.
    pub(crate) same_as: Option<String>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head = &self.content[..self.content.len().min(40)];
        write!(
            f,
            "{:o} {:?} {:?} {:?} {}B {:?} ",
            self.mode,
            self.owner,
            self.mtime,
            self.device,
            self.content.len(),
            String::from_utf8_lossy(head)
        )?;
        write!(f, "{:?} {:?}", self.xattrs, self.same_as)
    }
}

pub(crate) type Tree = BTreeMap<String, Node>;

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0u8; 1 << 16];
    let n = rustix::fs::llistxattr(path, &mut names).expect("xattrs can be listed");
    names[..n]
        .split(|&b| b == 0)
        .filter(|n| !n.is_empty())
        .map(|name| {
            let name = String::from_utf8(name.to_vec()).expect("names here are ascii");
            let mut value = vec![0u8; 1 << 16];
            match rustix::fs::lgetxattr(path, &name, &mut value) {
                Ok(n) => value.truncate(n),
                // Linux lists `user.` of symlinks and devices, but gives it for files and folders only.
                Err(rustix::io::Errno::NODATA) if name.starts_with("user.") => value.clear(),
                Err(e) => panic!("{}: {name}: {e}", path.display()),
            }
            (name, value)
        })
        .collect()
}

/// All below `root`, and the root itself as an empty name.
pub(crate) fn snapshot(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut firsts: HashMap<u64, String> = HashMap::new();
    add(root, "", &mut tree, &mut firsts);
    tree
}

fn add(path: &Path, name: &str, tree: &mut Tree, firsts: &mut HashMap<u64, String>) {
    let m = match fs::symlink_metadata(path) {
        // Overlayfs lists the whiteouts of a directory that only one layer has, and does not find them.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return,
        other => other.expect("a node can be looked at"),
    };
    let kind = m.file_type();
    let content = if kind.is_file() {
        fs::read(path).expect("a file can be read")
    } else if kind.is_symlink() {
        fs::read_link(path).expect("a symlink can be read").as_os_str().as_bytes().to_vec()
    } else {
        Vec::new()
    };
    let is_device = kind.is_char_device() || kind.is_block_device();
    let device = if is_device { (rustix::fs::major(m.rdev()), rustix::fs::minor(m.rdev())) } else { (0, 0) };
    let same_as = if kind.is_dir() { None } else { firsts.get(&m.ino()).cloned() };
    firsts.entry(m.ino()).or_insert_with(|| name.to_owned());
    let node = Node {
        mode: m.mode(),
        owner: (m.uid(), m.gid()),
        mtime: (m.mtime(), m.mtime_nsec()),
        device,
        content,
        xattrs: xattrs(path),
        same_as,
    };
    tree.insert(name.to_owned(), node);
    if kind.is_dir() {
        let mut children: Vec<_> =
            fs::read_dir(path).expect("a folder can be read").map(|e| e.expect("an entry")).collect();
        children.sort_by_key(fs::DirEntry::file_name);
        for child in children {
            let last = child.file_name().as_bytes().escape_ascii().to_string();
            let full = if name.is_empty() { last } else { format!("{name}/{last}") };
            add(&child.path(), &full, tree, firsts);
        }
    }
}

/// Panics with the first differences.
pub(crate) fn assert_same(what: &str, got: &Tree, want: &Tree) {
    let names: std::collections::BTreeSet<_> = got.keys().chain(want.keys()).collect();
    let differences: Vec<_> = names
        .into_iter()
        .filter(|n| got.get(*n) != want.get(*n))
        .take(5)
        .map(|n| format!("{n:?}\n   got {:?}\n  want {:?}", got.get(n), want.get(n)))
        .collect();
    assert!(differences.is_empty(), "{what}:\n{}", differences.join("\n"));
}
