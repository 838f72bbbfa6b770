//! The layers below as images: where a hard link of a tar may find its target, and a directory that no entry describes its
//! attributes.
//!
//! ```text
//!   path ─► layer 0 (nearest) ─ not there ─► layer 1 ─ …          a whiteout, an opaque directory or a non-directory on
//!                 └ found ─► LowerNode                            the way ends the search
//! ```
//!
//! Layers are requested, and their images opened, when a lookup reaches them: most tars have no link into a lower layer.
//! The names of a directory are cached after a lookup, and a file's map of data while it is copied: a tar may have many
//! links into one directory of a hundred thousand names, and the cost of each must not depend on the size of the directory.
//! Called by `svm-agent`.

use super::{
    LowerLayers, LowerNode,
    context::OVERLAY_OPAQUE,
    descent::{Descent, Place},
    opened::Opened,
};
use crate::{DiffError, LayerSource};
use disk_io::ReadAt;
use ext4_image::{
    Ext4, Ext4Error, FileKind, Inode,
    writer::{Attributes, NodeKind},
};

/// A chain of layers, nearest first.
pub struct LayerChain<R, F> {
    count: usize,
    next: F,
    opened: Vec<Opened<R>>,
    descent: Descent,
}

/// Result of a lookup in one layer.
enum Found {
    /// Found.
    Node(Box<Inode>),
    /// Hidden: lower layers are not searched.
    Hidden,
    /// Not found: search the next layer.
    Below,
}

impl<R: ReadAt, F: FnMut() -> Result<LayerSource<R>, DiffError>> LayerChain<R, F> {
    /// A chain of `count` layers, each of which `next` gives when it is needed.
    pub fn new(count: usize, next: F) -> Self {
        Self { count, next, opened: Vec::new(), descent: Descent::default() }
    }

    fn layer(&mut self, number: usize) -> Result<Option<&mut Opened<R>>, DiffError> {
        self.open_to(number)?;
        Ok(self.opened.get_mut(number))
    }

    /// Opens the layers up to this one.
    fn open_to(&mut self, number: usize) -> Result<(), DiffError> {
        while self.opened.len() <= number && self.opened.len() < self.count {
            let source = (self.next)()?;
            self.opened.push(Opened::new(source)?);
        }
        Ok(())
    }

    fn search(layer: &mut Opened<R>, path: &[&[u8]]) -> Result<Found, Ext4Error> {
        let Some(mut inode) = layer.root()? else { return Ok(Found::Below) };
        let mut opaque = is_opaque(&layer.fs, &inode)?;
        for name in path {
            if inode.kind != FileKind::Directory {
                return Ok(Found::Hidden);
            }
            let Some(ino) = layer.find(&inode, name)? else {
                return Ok(if opaque { Found::Hidden } else { Found::Below });
            };
            inode = layer.fs.inode(ino)?;
            if inode.is_whiteout() {
                return Ok(Found::Hidden);
            }
            opaque = opaque || is_opaque(&layer.fs, &inode)?;
        }
        Ok(Found::Node(Box::new(inode)))
    }
}

fn is_opaque<R: ReadAt>(fs: &Ext4<R>, inode: &Inode) -> Result<bool, Ext4Error> {
    if inode.kind != FileKind::Directory {
        return Ok(false);
    }
    Ok(fs.xattrs(inode)?.iter().any(|x| x.name == OVERLAY_OPAQUE && x.value == b"y"))
}

fn node_kind<R: ReadAt>(fs: &Ext4<R>, inode: &Inode) -> Result<NodeKind, Ext4Error> {
    let (major, minor) = inode.rdev;
    Ok(match inode.kind {
        FileKind::File => NodeKind::File,
        FileKind::Directory => NodeKind::Directory,
        FileKind::Symlink => NodeKind::Symlink { target: fs.symlink_target(inode)? },
        FileKind::CharDevice => NodeKind::CharDevice { major, minor },
        FileKind::BlockDevice => NodeKind::BlockDevice { major, minor },
        FileKind::Fifo => NodeKind::Fifo,
        FileKind::Socket => NodeKind::Socket,
    })
}

/// A node of layer `number`.
fn node<R: ReadAt>(number: usize, fs: &Ext4<R>, inode: &Inode) -> Result<LowerNode, DiffError> {
    /// Permission bits of `i_mode`.
    const PERMISSIONS: u16 = 0o7777;
    let data = if inode.kind == FileKind::File {
        fs.data_map(inode)?.into_iter().map(|range| (range.offset, range.len)).collect()
    } else {
        Vec::new()
    };
    Ok(LowerNode {
        layer: number,
        inode: inode.ino,
        kind: node_kind(fs, inode)?,
        attributes: Attributes {
            permissions: inode.mode & PERMISSIONS,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
            atime: None,
            ctime: None,
        },
        xattrs: fs.xattrs(inode)?,
        size: inode.size,
        data,
    })
}

impl<R: ReadAt, F: FnMut() -> Result<LayerSource<R>, DiffError>> LowerLayers for LayerChain<R, F> {
    fn lookup(&mut self, path: &[&[u8]]) -> Result<Option<LowerNode>, DiffError> {
        for number in 0..self.count {
            let Some(layer) = self.layer(number)? else { break };
            let inode = match Self::search(layer, path)? {
                Found::Node(inode) => inode,
                Found::Hidden => return Ok(None),
                Found::Below => continue,
            };
            return node(number, &layer.fs, &inode).map(Some);
        }
        Ok(None)
    }

    fn directory(&mut self, path: &[&[u8]]) -> Result<Option<LowerNode>, DiffError> {
        self.descent.go(path);
        for number in 0..self.count {
            self.open_to(number)?;
            let Some(layer) = self.opened.get_mut(number) else { break };
            match self.descent.place(number, layer)? {
                Place::Dir { ino, .. } => return node(number, &layer.fs, &layer.fs.inode(ino)?).map(Some),
                Place::Missing => {}
                Place::Hidden => break,
            }
        }
        Ok(None)
    }

    fn read(&mut self, node: &LowerNode, offset: u64, buf: &mut [u8]) -> Result<usize, DiffError> {
        let Some(layer) = self.layer(node.layer)? else { return Ok(0) };
        Ok(layer.read(node.inode, offset, buf)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LayerKind;
    use crate::apply::{ApplyOptions, NoLowers, apply};
    use disk_io::{MemDisk, steps};

    /// One entry of a tar; `link` makes a hard link.
    fn entry(name: &str, link: Option<&str>, data: &[u8]) -> Vec<u8> {
        let mut header = vec![0; 512];
        let size = format!("{:011o}\0", data.len());
        let fields: [(usize, &[u8]); 7] = [
            (0, name.as_bytes()),
            (100, b"0000644\x000000000\x000000000\x00"),
            (124, size.as_bytes()),
            (136, b"14000000000\0"),
            (148, b"        "),
            (156, if link.is_some() { b"1" } else { b"0" }),
            (157, link.unwrap_or_default().as_bytes()),
        ];
        for (at, text) in fields {
            header[at..at + text.len()].copy_from_slice(text);
        }
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.extend_from_slice(data);
        header.resize(header.len().next_multiple_of(512), 0);
        header
    }

    fn apply_on(lower: Option<&MemDisk>, tar: &[u8]) -> MemDisk {
        let image = MemDisk::new();
        let options = ApplyOptions::default();
        let done = match lower {
            None => apply(tar, &image, MemDisk::new(), &mut NoLowers, &options),
            Some(lower) => {
                let next = || Ok(LayerSource::new(lower, LayerKind::Applied));
                apply(tar, &image, MemDisk::new(), &mut LayerChain::new(1, next), &options)
            }
        };
        done.unwrap();
        image
    }

    fn end() -> Vec<u8> {
        vec![0; 1024]
    }

    /// Read for each link, a directory of many names would make the work the product of both.
    #[test]
    fn many_links_into_a_large_folder_cost_what_both_are_long() {
        const MANY: usize = 3000;
        let names: Vec<String> = (0..MANY).map(|n| format!("directory/{n}")).collect();
        let files: Vec<u8> = names.iter().flat_map(|n| entry(n, None, b"")).chain(end()).collect();
        let links = names.iter().enumerate().flat_map(|(n, to)| entry(&format!("l{n}"), Some(to), b""));
        let links: Vec<u8> = links.chain(end()).collect();
        let lower = apply_on(None, &files);
        steps::taken();
        let image = apply_on(Some(&lower), &links);
        let cost = steps::taken();
        assert!(cost < 100 * MANY as u64, "{cost} steps for {MANY} links");
        let fs = Ext4::open(&image).unwrap();
        let root = fs.inode(fs.root()).unwrap();
        assert!(fs.read_dir(&root).unwrap().len() >= MANY);
    }

    /// Looked up for each piece, the map of a file of many extents would be read once for each of them.
    #[test]
    fn a_linked_file_is_copied_by_one_look_at_its_map() {
        const RANGES: u64 = 3000;
        const STEP: u64 = 128 << 10;
        // A file of many ranges, as an old GNU tar writes it: by PAX 1.0, its map before its data.
        let mut map = format!("{RANGES}\n").into_bytes();
        for n in 0..RANGES {
            map.extend(format!("{}\n512\n", n * STEP).into_bytes());
        }
        map.resize(map.len().next_multiple_of(512), 0);
        map.extend((0..RANGES).flat_map(|n| [n as u8 | 1; 512]));
        let record = |key: &str, value: String| {
            let body = format!(" {key}={value}\n");
            let mut len = body.len() + 1;
            while len != body.len() + len.to_string().len() {
                len += 1;
            }
            format!("{len}{body}")
        };
        let pax = record("GNU.sparse.major", "1".into())
            + &record("GNU.sparse.minor", "0".into())
            + &record("GNU.sparse.name", "sparse".into())
            + &record("GNU.sparse.realsize", (RANGES * STEP).to_string());
        let mut head = entry("pax", None, pax.as_bytes());
        head[156] = b'x';
        head[148..156].fill(b' ');
        let sum: u32 = head[..512].iter().map(|b| u32::from(*b)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let tar = [head, entry("GNUSparseFile.0/sparse", None, &map), end()].concat();
        let lower = apply_on(None, &tar);
        steps::taken();
        let image = apply_on(Some(&lower), &[entry("copy", Some("sparse"), b""), end()].concat());
        let cost = steps::taken();
        assert!(cost < 100 * RANGES, "{cost} steps for {RANGES} ranges");
        let (a, b) = (Ext4::open(&lower).unwrap(), Ext4::open(&image).unwrap());
        let inode = |fs: &Ext4<&MemDisk>, name: &[u8]| {
            let root = fs.inode(fs.root()).unwrap();
            fs.inode(fs.lookup(&root, name).unwrap().unwrap()).unwrap()
        };
        let (from, to) = (inode(&a, b"sparse"), inode(&b, b"copy"));
        assert_eq!(from.size, to.size);
        for offset in [0, STEP, 77 * STEP, (RANGES - 1) * STEP] {
            let (mut x, mut y) = ([0; 1024], [0; 1024]);
            a.read_file_at(&from, offset, &mut x).unwrap();
            b.read_file_at(&to, offset, &mut y).unwrap();
            assert!(x == y && x[0] != 0, "at {offset}");
        }
    }
}
