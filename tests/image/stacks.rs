//! Stacks of small layers: what can meet at a name in layers above each other.

use layer_tar::writer::{Header, Kind};
use oci_image::testing::Tar;

/// An entry of a layer.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Dir(String, u16),
    File(String, usize, u8),
    Symlink(String, String),
    Link(String, String),
    Fifo(String),
    Device(String),
    /// Deletes the name from the layers below.
    Whiteout(String),
    /// Hides what the layers below have in the directory.
    Opaque(String),
}

use Item::{Device, Dir, Fifo, File, Link, Opaque, Symlink, Whiteout};

/// Layers, the base first.
pub(crate) type Stack = Vec<Vec<Item>>;

impl Item {
    pub(crate) fn path(&self) -> &str {
        let (Dir(path, _)
        | File(path, ..)
        | Symlink(path, _)
        | Link(path, _)
        | Fifo(path)
        | Device(path)
        | Whiteout(path)
        | Opaque(path)) = self;
        path
    }
}

/// `directory/.wh.name` of a path.
fn marked(path: &str) -> String {
    match path.rsplit_once('/') {
        Some((directory, name)) => format!("{directory}/.wh.{name}"),
        None => format!(".wh.{path}"),
    }
}

/// The tar of a layer: each entry with an owner and a time of its own, directories with an attribute.
pub(crate) fn tar_of(items: &[Item]) -> Vec<u8> {
    let mut tar = Tar::default();
    for (n, item) in items.iter().enumerate() {
        let plain = Header {
            kind: Kind::File,
            path: b"",
            link: b"",
            mode: 0o644,
            uid: n as u32 % 5,
            gid: 8,
            mtime: (1_000_000_000 + n as i64, 0),
            device: (0, 0),
            size: 0,
            xattrs: &[],
            sparse: None,
        };
        let path = item.path().as_bytes();
        match item {
            Dir(path, mode) => {
                let path = format!("{path}/");
                let xattrs: [(&[u8], &[u8]); 2] =
                    [(b"trusted.own", b"1"), (b"user.of", &[b'0' + n as u8 % 10])];
                let header = Header {
                    kind: Kind::Directory,
                    path: path.as_bytes(),
                    mode: *mode,
                    xattrs: &xattrs,
                    ..plain
                };
                tar.entry(&header, b"");
            }
            File(_, len, seed) => {
                let data: Vec<u8> = (0..*len).map(|i| (i * 31 + i / 251) as u8 ^ seed).collect();
                let xattrs: [(&[u8], &[u8]); 1] = [(b"user.seed", &[*seed])];
                tar.entry(&Header { path, size: *len as u64, xattrs: &xattrs, ..plain }, &data);
            }
            Symlink(_, target) | Link(_, target) => {
                let kind = if matches!(item, Link(..)) { Kind::HardLink } else { Kind::Symlink };
                tar.entry(&Header { kind, path, link: target.as_bytes(), mode: 0o600, ..plain }, b"");
            }
            Fifo(_) => {
                tar.entry(&Header { kind: Kind::Fifo, path, ..plain }, b"");
            }
            Device(_) => {
                tar.entry(&Header { kind: Kind::BlockDevice, path, device: (7, 300), ..plain }, b"");
            }
            Whiteout(path) => {
                tar.entry(&Header { path: marked(path).as_bytes(), ..plain }, b"");
            }
            Opaque(path) => {
                let path = format!("{path}/.wh..wh..opq");
                tar.entry(&Header { path: path.as_bytes(), ..plain }, b"");
            }
        }
    }
    tar.finish()
}

fn s(text: &str) -> String {
    text.to_owned()
}

/// Everything that can be at one name in one layer.
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
        vec![Whiteout(s("a")), File(s("a/x"), 9, 9)],
        vec![File(s("a/x/w"), 4, 4)],
    ]
}

/// All stacks of three of these states over a directory to which a symbolic link may lead.
pub(crate) fn all_orders() -> Vec<Stack> {
    let (states, mut stacks) = (states(), Vec::new());
    for bottom in &states {
        for middle in &states {
            for top in &states {
                let mut base = vec![Dir(s("b"), 0o750), Dir(s("b/x"), 0o710)];
                base.extend(bottom.iter().cloned());
                stacks.push(vec![base, middle.clone(), top.clone()]);
            }
        }
    }
    stacks
}

/// Stacks of hard links into lower layers, directories without an entry, and paths behind symbolic links.
pub(crate) fn chosen() -> Vec<Stack> {
    let file = |path: &str| File(s(path), 3000, path.len() as u8);
    let dir = |path: &str, mode| Dir(s(path), mode);
    let link = |path: &str, target: &str| Link(s(path), s(target));
    let symlink = |path: &str, target: &str| Symlink(s(path), s(target));
    vec![
        vec![vec![file("a")]],
        vec![vec![dir(".", 0o711), file("a")], vec![file("b")]],
        vec![vec![dir(".", 0o711), file("a")], vec![Opaque(s(".")), file("b")]],
        vec![vec![Fifo(s("p")), Device(s("c")), symlink("l", "p")], vec![link("m", "l"), link("q", "p")]],
        // Links within a layer, before and after their targets, in chains.
        vec![vec![link("a", "b"), file("b"), link("c", "a")]],
        vec![vec![link("a", "b"), link("b", "c"), file("c"), link("d", "b")]],
        vec![vec![file("b"), link("a", "b"), file("b")]],
        // Into lower layers.
        vec![vec![file("b")], vec![file("c")], vec![link("a", "b")]],
        vec![vec![dir("d", 0o711), file("d/b")], vec![link("a", "d/b")]],
        vec![vec![file("b"), link("c", "b")], vec![link("x", "b"), link("y", "c")]],
        vec![vec![file("b")], vec![link("c", "b")], vec![link("a", "b")]],
        vec![vec![file("b"), link("c", "b")], vec![link("a", "b")]],
        vec![vec![file("b")], vec![link("a", "c"), link("c", "b"), link("d", "b")]],
        vec![vec![file("b")], vec![link("a", "b")], vec![Whiteout(s("a"))]],
        vec![vec![file("b")], vec![link("a", "b")], vec![Whiteout(s("b"))]],
        vec![vec![file("b"), link("a", "b")], vec![file("b")]],
        vec![vec![file("b")], vec![link("b", "b")]],
        vec![vec![symlink("b", "nowhere")], vec![link("a", "b")]],
        vec![vec![file("c")], vec![link("a", "b")]],
        vec![vec![file("b")], vec![Whiteout(s("b"))], vec![link("a", "b")]],
        vec![vec![file("b")], vec![Whiteout(s("b")), link("a", "b")]],
        vec![vec![dir("b", 0o755)], vec![link("a", "b")]],
        vec![vec![file("d/b")], vec![Opaque(s("d"))], vec![link("a", "d/b")]],
        vec![vec![file("b/x")], vec![symlink("b", "c"), dir("c", 0o700), link("a", "b/x")]],
        vec![vec![link("a", "b"), link("b", "a")]],
        // Directories without an entry.
        vec![vec![dir("a", 0o711), dir("a/b", 0o1777)], vec![file("a/b/c")]],
        vec![vec![dir("a", 0o711)], vec![file("a/b/c")], vec![file("a/b/d")]],
        vec![vec![dir("a", 0o711)], vec![Whiteout(s("a"))], vec![file("a/c")]],
        vec![vec![dir("a", 0o711)], vec![file("a")], vec![file("a/c")]],
        vec![vec![dir("a", 0o711), dir("a/b", 0o700)], vec![Opaque(s("a"))], vec![file("a/b/c")]],
        vec![vec![dir("a", 0o711), dir("a/b", 0o700)], vec![Opaque(s("a")), file("a/b/c")]],
        // Behind a symbolic link.
        vec![vec![dir("d", 0o711), symlink("a", "d")], vec![file("a/c")]],
        vec![vec![dir("d", 0o711), symlink("a", "d")], vec![dir("a", 0o700), file("a/c")]],
        vec![vec![dir("d", 0o711), dir("d/x", 0o700), symlink("a", "d")], vec![file("a/x/c")]],
        vec![vec![dir("d", 0o711), symlink("a", "d")], vec![file("d/x")], vec![file("a/c")]],
        vec![vec![dir("d", 0o711)], vec![symlink("a", "d")], vec![file("a/c")]],
        vec![vec![dir("d", 0o711), symlink("a", "d")], vec![file("a/y")], vec![file("a/x/c")]],
        vec![vec![dir("d/x", 0o700), symlink("a", "d")], vec![dir("a", 0o755)], vec![file("a/x/c")]],
        vec![vec![dir("d/x", 0o700), symlink("a", "d")], vec![Opaque(s("a"))], vec![file("a/x/c")]],
        vec![vec![dir("d", 0o711), symlink("a", "d")], vec![Whiteout(s("a"))], vec![file("a/c")]],
        vec![vec![dir("d", 0o711), symlink("a", "/d/../d/."), symlink("e", "a")], vec![file("e/c")]],
        vec![vec![dir("a", 0o711)], vec![symlink("a", "nowhere")], vec![file("a/c")]],
        vec![vec![dir("a", 0o711)], vec![symlink("a", "a")], vec![file("a/c")]],
        vec![vec![dir("a", 0o711)], vec![symlink("a", "f/x"), file("f")], vec![file("a/c")]],
        vec![vec![dir("a/a", 0o700), symlink("c", "a")], vec![file("c/a/b")]],
        vec![
            vec![symlink("lib", "usr/lib"), dir("usr/lib", 0o711)],
            vec![file("lib/x")],
            vec![file("usr/lib/y")],
        ],
        vec![vec![file("f"), symlink("a", "f")], vec![file("a/c")]],
        vec![vec![symlink("a", "..")], vec![file("a/c")]],
    ]
}
