//! What a file tree holds, in full: the expected tree is computed from tar entries, the real one by busybox **inside**
//! a container, and both are compared path by path.
//!
//! ```text
//!   entries of layer 1, 2, …  ──Tree::apply──►  Tree  ◄──Tree::of_container──  find | stat, sha256sum, readlink
//!                                                │
//!                                           assert_same
//! ```
//!
//! What the engine itself puts into every container (`/dev`, `/proc`, `/sys`, `/.dockerenv`, four files of `/etc`) is
//! left out on both sides.

use crate::{
    engine::Engine,
    tarball::{Entry, Kind},
};
use sha2::{Digest, Sha256};
use std::{collections::BTreeMap, fmt::Write as _};

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
}

/// A file tree: absolute paths without a last slash; the root is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tree(pub(crate) BTreeMap<Vec<u8>, Node>);

/// Paths that the engine makes in every container.
const ENGINES_OWN: [&str; 8] =
    ["/dev", "/proc", "/sys", "/.dockerenv", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab"];

fn engines_own(path: &[u8]) -> bool {
    path.is_empty()
        || ENGINES_OWN.iter().any(|own| {
            path.strip_prefix(own.as_bytes()).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
        })
}

/// The absolute form of a tar's path.
fn absolute(path: &[u8]) -> Vec<u8> {
    let path = path.strip_prefix(b"./").unwrap_or(path);
    let path = path.strip_suffix(b"/").unwrap_or(path);
    if path.is_empty() || path == b"." { Vec::new() } else { [b"/", path].concat() }
}

/// sha256 in hex.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

const MARK: u8 = 1;
const SECTION: u8 = 2;

/// Prints the three lists; every record starts with MARK, so that names with newlines stay whole.
const SCRIPT: &str = r#"
M=$(printf '\001')
list() { find / -xdev \( -path /proc -o -path /sys -o -path /dev \) -prune -o "$@" -print0; }
list | xargs -0 stat -c "$M%f %u %g %s %d:%i %t:%T %y|%n"
printf '\002'
list -type f | xargs -0 -n 1 sh -c 'printf "\001%s" "$(sha256sum <"$1")"; printf "%s" "$1"; echo' _
printf '\002'
list -type l | xargs -0 -n 1 sh -c 'printf "\001%s\003" "$1"; readlink "$1"' _
"#;

fn records(section: &[u8]) -> impl Iterator<Item = &[u8]> {
    section.split(|b| *b == MARK).skip(1).map(|r| r.strip_suffix(b"\n").unwrap_or(r))
}

fn split_at_byte(bytes: &[u8], byte: u8) -> (&[u8], &[u8]) {
    let at = bytes.iter().position(|b| *b == byte).expect("separator in a record of the container's list");
    (&bytes[..at], &bytes[at + 1..])
}

impl Tree {
    /// The tree of the running container `name`, computed in it.
    pub(crate) fn of_container(engine: &Engine, name: &str) -> Self {
        Self::parse(&engine.docker_bytes(&["exec", name, "/bin/sh", "-c", SCRIPT]))
    }

    /// The tree of a new container of `image`.
    pub(crate) fn of_image(engine: &Engine, image: &str) -> Self {
        let run = ["run", "--rm", "--network", "none", "--entrypoint", "", image, "/bin/sh", "-c", SCRIPT];
        Self::parse(&engine.docker_bytes(&run))
    }

    fn parse(listing: &[u8]) -> Self {
        let sections: Vec<&[u8]> = listing.split(|b| *b == SECTION).collect();
        assert_eq!(
            sections.len(),
            3,
            "the container's list is incomplete: {:?}",
            String::from_utf8_lossy(listing)
        );
        let mut tree = BTreeMap::new();
        let mut inodes: BTreeMap<(String, char), Vec<Vec<u8>>> = BTreeMap::new();
        for record in records(sections[0]) {
            let (facts, path) = split_at_byte(record, b'|');
            let facts = String::from_utf8_lossy(facts).into_owned();
            let fields: Vec<&str> = facts.split(' ').collect();
            let hex = |text: &str| u32::from_str_radix(text, 16).expect("hex field of stat");
            let raw = hex(fields[0]);
            let kind = match raw >> 12 {
                1 => 'p',
                2 => 'c',
                4 => 'd',
                6 => 'b',
                8 => 'f',
                10 => 'l',
                12 => 's',
                other => panic!("type {other} in {facts}"),
            };
            let path = if path == b"/" { Vec::new() } else { path.to_vec() };
            if engines_own(&path) {
                continue;
            }
            if kind != 'd' {
                inodes.entry((fields[4].to_owned(), kind)).or_default().push(path.clone());
            }
            let (major, minor) = fields[5].split_once(':').expect("device numbers");
            let node = Node {
                kind,
                mode: raw & 0o7777,
                uid: fields[1].parse().expect("uid"),
                gid: fields[2].parse().expect("gid"),
                mtime: Some(parse_time(fields[6], fields[7])),
                content: None,
                target: None,
                rdev: matches!(kind, 'c' | 'b').then(|| (hex(major), hex(minor))),
                same_as: None,
            };
            tree.insert(path, node);
        }
        for mut names in inodes.into_values() {
            names.sort();
            for name in &names[1..] {
                if let Some(node) = tree.get_mut(name) {
                    node.same_as = Some(names[0].clone());
                }
            }
        }
        for record in records(sections[1]) {
            // "<sha256>  -<path>", as busybox names standard input.
            let (hash, path) = (String::from_utf8_lossy(&record[..64]).into_owned(), &record[67..]);
            if let Some(node) = tree.get_mut(path) {
                node.content = Some((0, hash));
            }
        }
        for record in records(sections[0]) {
            let (facts, path) = split_at_byte(record, b'|');
            let size = String::from_utf8_lossy(facts).split(' ').nth(3).and_then(|s| s.parse().ok());
            if let Some(content) = tree.get_mut(path).and_then(|n| n.content.as_mut()) {
                content.0 = size.expect("size");
            }
        }
        for record in records(sections[2]) {
            let (path, target) = split_at_byte(record, 3);
            if let Some(node) = tree.get_mut(path) {
                node.target = Some(target.to_vec());
            }
        }
        for (path, node) in &tree {
            let shown = String::from_utf8_lossy(path);
            assert_eq!(node.kind == 'f', node.content.is_some(), "no digest of {shown}");
            assert_eq!(node.kind == 'l', node.target.is_some(), "no target of {shown}");
        }
        Self(tree)
    }

    /// The tree of a whole tar's entries, such as `docker export` gives. Times there have no nanoseconds, and are left
    /// out.
    pub(crate) fn of_tar(entries: &[Entry]) -> Self {
        let mut tree = Self::default();
        tree.apply(entries);
        for node in tree.0.values_mut() {
            node.mtime = None;
        }
        tree.0.retain(|path, _| !engines_own(path));
        tree
    }

    /// Puts a layer on top: entries in order, whiteouts and opaque folders as AUFS writes them.
    pub(crate) fn apply(&mut self, entries: &[Entry]) {
        let below: Vec<Vec<u8>> = self.0.keys().cloned().collect();
        for entry in entries {
            let path = absolute(&entry.path);
            if engines_own(&path) {
                continue;
            }
            let slash = path.iter().rposition(|b| *b == b'/').expect("an absolute path");
            let (folder, name) = (path[..slash].to_vec(), &path[slash + 1..]);
            if name == b".wh..wh..opq" {
                let prefix = [&folder[..], b"/"].concat();
                for old in below.iter().filter(|p| p.starts_with(&prefix)) {
                    self.0.remove(old);
                }
                continue;
            }
            if let Some(hidden) = name.strip_prefix(b".wh.") {
                self.remove([&folder[..], b"/", hidden].concat());
                continue;
            }
            let same_as = match &entry.kind {
                Kind::HardLink(target) => Some(absolute(target)),
                _ => None,
            };
            if !(entry.kind == Kind::Directory && self.0.get(&path).is_some_and(|n| n.kind == 'd')) {
                self.remove(&path);
            }
            let node = match &same_as {
                Some(first) => {
                    let first = self.0.get(first).expect("target of a hard link").clone();
                    Node { same_as, ..first }
                }
                None => Node {
                    kind: match entry.kind {
                        Kind::Directory => 'd',
                        Kind::File(_) | Kind::HardLink(_) => 'f',
                        Kind::Symlink(_) => 'l',
                        Kind::CharDevice(..) => 'c',
                        Kind::BlockDevice(..) => 'b',
                        Kind::Fifo => 'p',
                    },
                    mode: entry.mode,
                    uid: entry.uid,
                    gid: entry.gid,
                    mtime: Some(entry.mtime),
                    content: match &entry.kind {
                        Kind::File(data) => Some((data.len() as u64, sha256(data))),
                        _ => None,
                    },
                    target: match &entry.kind {
                        Kind::Symlink(target) => Some(target.clone()),
                        _ => None,
                    },
                    rdev: match entry.kind {
                        Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) => {
                            Some((major, minor))
                        }
                        _ => None,
                    },
                    same_as: None,
                },
            };
            self.0.insert(path, node);
        }
        self.settle_links();
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
            names.sort();
            for (n, name) in names.iter().enumerate() {
                if let Some(node) = self.0.get_mut(name) {
                    node.same_as = (n > 0).then(|| names[0].clone());
                }
            }
        }
    }

    /// Removes a path and what is below it.
    pub(crate) fn remove(&mut self, path: impl AsRef<[u8]>) {
        let prefix = [path.as_ref(), b"/"].concat();
        self.0.retain(|p, _| p != path.as_ref() && !p.starts_with(&prefix));
    }

    fn put(&mut self, path: impl AsRef<[u8]>, kind: char, mode: u32) -> &mut Node {
        let node = Node {
            kind,
            mode,
            uid: 0,
            gid: 0,
            mtime: None,
            content: None,
            target: None,
            rdev: None,
            same_as: None,
        };
        self.0.insert(path.as_ref().to_vec(), node);
        self.touched(path.as_ref());
        self.0.get_mut(path.as_ref()).expect("just inserted")
    }

    /// A file that something in a container made: its time is not known.
    pub(crate) fn file(&mut self, path: impl AsRef<[u8]>, mode: u32, data: impl AsRef<[u8]>) -> &mut Node {
        let node = self.put(path, 'f', mode);
        node.content = Some((data.as_ref().len() as u64, sha256(data.as_ref())));
        node
    }

    pub(crate) fn dir(&mut self, path: impl AsRef<[u8]>, mode: u32) -> &mut Node {
        self.put(path, 'd', mode)
    }

    /// A device or a named pipe.
    pub(crate) fn put_node(&mut self, path: &str, kind: char, mode: u32, rdev: Option<(u32, u32)>) {
        self.put(path, kind, mode).rdev = rdev;
    }

    pub(crate) fn symlink(&mut self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> &mut Node {
        let node = self.put(path, 'l', 0o777);
        node.target = Some(target.as_ref().to_vec());
        node
    }

    pub(crate) fn hard_link(&mut self, path: impl AsRef<[u8]>, first: impl AsRef<[u8]>) {
        let node = self.0.get(first.as_ref()).expect("first name of a file").clone();
        self.put(&path, 'f', 0);
        self.0.insert(path.as_ref().to_vec(), Node { same_as: Some(first.as_ref().to_vec()), ..node });
        self.settle_links();
    }

    /// The folders above `path` were written to: their times are no longer known.
    pub(crate) fn touched(&mut self, path: impl AsRef<[u8]>) {
        let mut path = path.as_ref();
        while let Some(slash) = path.iter().rposition(|b| *b == b'/') {
            path = &path[..slash];
            if let Some(node) = self.0.get_mut(path) {
                node.mtime = None;
            }
        }
    }

    /// Deletes a path as a container would.
    pub(crate) fn delete(&mut self, path: impl AsRef<[u8]>) {
        self.remove(path.as_ref());
        self.touched(path.as_ref());
    }

    /// The same tree with the times of these paths left out.
    pub(crate) fn except_times_of(mut self, paths: &[&str]) -> Self {
        for path in paths {
            if let Some(node) = self.0.get_mut(path.as_bytes()) {
                node.mtime = None;
            }
        }
        self
    }

    /// The same tree with all times left out.
    pub(crate) fn without_times(mut self) -> Self {
        for node in self.0.values_mut() {
            node.mtime = None;
        }
        self
    }

    /// Fails with every difference named.
    pub(crate) fn assert_same(&self, actual: &Self, what: &str) {
        let mut report = String::new();
        for (path, node) in &self.0 {
            let shown = String::from_utf8_lossy(path);
            match actual.0.get(path) {
                None => {
                    let _ = writeln!(report, "  missing {shown:?}: {node:?}");
                }
                Some(found) => {
                    let unknown_time = node.mtime.is_none() || found.mtime.is_none();
                    let mtime = if unknown_time { node.mtime } else { found.mtime };
                    if (Node { mtime, ..found.clone() }) != *node {
                        let _ =
                            writeln!(report, "  {shown:?}\n    expected {node:?}\n    found    {found:?}");
                    }
                }
            }
        }
        for (path, node) in actual.0.iter().filter(|(path, _)| !self.0.contains_key(*path)) {
            let _ = writeln!(report, "  unexpected {:?}: {node:?}", String::from_utf8_lossy(path));
        }
        assert!(report.is_empty(), "{what}: the trees differ\n{report}");
        assert!(self.0.len() > 3, "{what}: a tree of {} paths proves nothing", self.0.len());
    }
}

/// "2021-03-04" and "05:06:07.123456789" (UTC) as seconds and nanoseconds since 1970.
fn parse_time(date: &str, time: &str) -> (i64, u32) {
    let part = |text: &str| text.parse::<i64>().expect("a number in a time");
    let date: Vec<i64> = date.split('-').map(part).collect();
    let (clock, nanos) = time.split_once('.').expect("nanoseconds");
    let clock: Vec<i64> = clock.split(':').map(part).collect();
    // Days from the civil calendar: years start in March, eras are of 400 years.
    let year = date[0] - i64::from(date[1] <= 2);
    let (era, month) = (year.div_euclid(400), (date[1] + 9) % 12);
    let of_era = year - era * 400;
    let day_of_year = (153 * month + 2) / 5 + date[2] - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + day_of_year - 719_468;
    (days * 86_400 + clock[0] * 3600 + clock[1] * 60 + clock[2], nanos.parse().expect("nanoseconds"))
}

#[test]
fn times_are_read_as_written() {
    assert_eq!(parse_time("2021-03-04", "05:06:07.123456789"), crate::tarball::TIME);
    assert_eq!(parse_time("1970-01-01", "00:00:01.000000000"), (1, 0));
    assert_eq!(parse_time("2000-02-29", "00:00:00.5"), (951_782_400, 5));
}
