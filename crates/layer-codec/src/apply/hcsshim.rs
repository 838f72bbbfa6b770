//! Profile `hcsshim`: what hcsshim's `tar2ext4` makes of the entries of a tar.
//!
//! ```text
//!   Entry ─► clean the name ("/"+name, `..` stops at the root) ─► missing parents ─► whiteout │ hard link │ node
//!                                                                                        └► ext4::hcsshim
//! ```
//!
//! The rules of the default profile do not apply here, only the tool's, in its order: parents are created first, also those
//! of whiteouts; symlinks in a name are not followed; a second entry of a name is accepted if no data are lost; the target
//! of a hard link must precede it. What the tool refuses is refused, and so is what Go's tar reader interprets differently
//! from this project's. `docs/hcsshim-profile.md` has the list. Called by `apply` through [`Target`].

use super::{
    ApplyOptions, LowerLayers, NAMES,
    context::{Context, opaque},
    owner,
    target::{Placement, Settled, Target},
};
use crate::DiffError;
use disk_io::WriteAt;
use ext4_image::{
    Ext4Error, Place, Timestamp, Xattr,
    hcsshim::{HcsshimOptions, HcsshimWriter},
    writer::{Attributes, ImageSummary, NodeId, NodeKind, Placed},
};
use layer_tar::{Entry, EntryKind, Time};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// The layer being made.
pub(super) struct HcsshimLayer<'o, W> {
    writer: HcsshimWriter<W>,
    options: &'o ApplyOptions,
    context: Context,
    names: u64,
}

/// The components of a name as Go's `path.Clean("/" + name)` leaves them.
fn clean(path: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    parts
}

impl<'o, W: WriteAt> HcsshimLayer<'o, W> {
    pub(super) fn new(image: W, options: &'o ApplyOptions) -> Result<Self, DiffError> {
        let image_options = HcsshimOptions {
            max_disk_bytes: options.hcsshim.max_disk_bytes,
            max_image_bytes: options.max_image_bytes,
            inline_data: options.hcsshim.inline_data,
        };
        let writer = HcsshimWriter::new(image, image_options)?;
        Ok(Self { writer, options, context: Context::default(), names: 0 })
    }

    fn refuse(&self, what: impl Into<String>) -> DiffError {
        self.context
            .image(Ext4Error::unsupported(format!("{}, in profile hcsshim", what.into()), Place::default()))
    }

    fn count_name(&mut self) -> Result<(), DiffError> {
        self.names += 1;
        if self.names > self.options.limits.entries {
            return Err(self.context.limit(NAMES, self.options.limits.entries));
        }
        Ok(())
    }

    fn check_differs(&self, differs: Option<&'static str>) -> Result<(), DiffError> {
        differs.map_or(Ok(()), |what| Err(self.refuse(what)))
    }

    /// The components of a name; checks its depth.
    fn split<'a>(&self, path: &'a [u8]) -> Result<Vec<&'a [u8]>, DiffError> {
        let parts = clean(path);
        if parts.len() > self.options.limits.depth {
            return Err(self.context.limit("path components", self.options.limits.depth as u64));
        }
        Ok(parts)
    }

    /// The directory that these components lead to; missing ones are made.
    fn make_parents(&mut self, parents: &[&[u8]]) -> Result<NodeId, DiffError> {
        let mut dir = self.writer.root();
        for name in parents {
            dir = if let Some(known) = self.writer.lookup(dir, name) {
                known
            } else {
                self.count_name()?;
                self.writer.create_parent(dir, name).map_err(|e| self.context.image(e))?
            };
        }
        if !self.writer.is_directory(dir) {
            return Err(self.refuse("a name below something that is no directory"));
        }
        Ok(dir)
    }

    fn entry_at(&mut self, path: &[u8], entry: &mut Entry) -> Result<Placement, DiffError> {
        let parts = self.split(path)?;
        // The root is its own parent, and its name there is empty.
        let (name, parents) =
            parts.split_last().map_or((&b""[..], &[][..]), |(name, parents)| (*name, parents));
        let dir = self.make_parents(parents)?;
        let last = path.rsplit(|&b| b == b'/').next().unwrap_or(path);
        if self.options.hcsshim.convert_whiteouts
            && let Some(hidden) = last.strip_prefix(WHITEOUT_PREFIX)
        {
            if last == OPAQUE {
                self.set_opaque(dir, parents)?;
            } else if matches!(hidden, b"" | b"." | b"..") {
                return Err(self.refuse("a whiteout without a name"));
            } else {
                self.count_name()?;
                self.writer.create_whiteout(dir, hidden).map_err(|e| self.context.image(e))?;
            }
            return Ok(Placement::Nothing);
        }
        self.count_name()?;
        if entry.kind == EntryKind::HardLink {
            let link = self.convert(std::mem::take(&mut entry.link));
            let mut target = Some(self.writer.root());
            for part in self.split(&link)? {
                target = target.and_then(|dir| self.writer.lookup(dir, part));
            }
            let Some(target) = target else {
                let link = link.escape_ascii();
                return Err(
                    self.refuse(format!("hard link to \"{link}\", which does not precede it in the tar"))
                );
            };
            self.writer.link(dir, name, target).map_err(|e| self.context.image(e))?;
            return Ok(Placement::Nothing);
        }
        let kind = match entry.kind {
            EntryKind::File | EntryKind::HardLink => NodeKind::File,
            EntryKind::Directory => NodeKind::Directory,
            EntryKind::Symlink => NodeKind::Symlink { target: self.convert(std::mem::take(&mut entry.link)) },
            EntryKind::CharDevice => NodeKind::CharDevice { major: entry.major, minor: entry.minor },
            EntryKind::BlockDevice => NodeKind::BlockDevice { major: entry.major, minor: entry.minor },
            EntryKind::Fifo => NodeKind::Fifo,
        };
        let stamp = |t: Time| Timestamp { secs: t.secs, nanos: t.nanos };
        let attributes = Attributes {
            permissions: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: stamp(entry.mtime),
            atime: entry.atime.map(stamp),
            ctime: entry.ctime.map(stamp),
        };
        let xattrs = self.xattrs(entry)?;
        let node = self
            .writer
            .create(dir, name, kind, entry.size, &attributes, xattrs)
            .map_err(|e| self.context.image(e))?;
        let has_data = entry.kind == EntryKind::File && entry.size > 0;
        Ok(if has_data { Placement::Data(node) } else { Placement::Nothing })
    }

    fn set_opaque(&mut self, dir: NodeId, path: &[&[u8]]) -> Result<(), DiffError> {
        let mut parent = self.writer.root();
        let (name, parents) =
            path.split_last().map_or((&b""[..], &[][..]), |(name, parents)| (*name, parents));
        for part in parents {
            parent = self.writer.lookup(parent, part).unwrap_or(parent);
        }
        self.writer.add_xattr(parent, name, dir, opaque()).map_err(|e| self.context.image(e))
    }

    fn convert(&self, mut path: Vec<u8>) -> Vec<u8> {
        if self.options.hcsshim.convert_backslashes {
            for byte in &mut path {
                if *byte == b'\\' {
                    *byte = b'/';
                }
            }
        }
        path
    }

    fn xattrs(&self, entry: &mut Entry) -> Result<Vec<Xattr>, DiffError> {
        let bytes: usize = entry.xattrs.iter().map(|x| x.name.len() + x.value.len()).sum();
        if bytes > self.options.limits.xattr_bytes {
            return Err(self.context.limit("bytes of xattrs", self.options.limits.xattr_bytes as u64));
        }
        Ok(entry.xattrs.drain(..).map(|x| Xattr { name: x.name, value: x.value }).collect())
    }
}

impl<W: WriteAt> Target for HcsshimLayer<'_, W> {
    fn entry(&mut self, entry: &mut Entry) -> Result<Placement, DiffError> {
        self.context.path.clone_from(&entry.path);
        self.context.offset = entry.offset;
        self.check_differs(entry.go_differs)?;
        let longest = entry.path.len().max(entry.link.len());
        if longest > self.options.limits.path_bytes {
            return Err(self.context.limit("bytes of a name", self.options.limits.path_bytes as u64));
        }
        // The bytes are the tool's: no id is mapped, the host's root included.
        for (what, maps, id) in [
            ("owner", &self.options.id_maps.uids, entry.uid),
            ("group", &self.options.id_maps.gids, entry.gid),
        ] {
            if !owner::is_inside(maps, id) {
                return Err(self.context.refuse(format!("{what} {id} {}", owner::outside(maps))));
            }
        }
        let path = self.convert(std::mem::take(&mut entry.path));
        let placement = self.entry_at(&path, entry);
        entry.path = path;
        placement
    }

    fn begin_file(&mut self, node: NodeId, _size: u64) -> Result<(), DiffError> {
        self.writer.begin_file(node).map_err(|e| self.context.image(e))
    }

    fn write_data(
        &mut self,
        offset: u64,
        data: &[u8],
        placed: &mut dyn FnMut(Placed),
    ) -> Result<(), DiffError> {
        self.writer.write_data(offset, data, placed).map_err(|e| self.context.image(e))
    }

    fn end_file(&mut self) -> Result<(), DiffError> {
        self.writer.end_file().map_err(|e| self.context.image(e))
    }

    fn limit(&self, what: &'static str, limit: u64) -> DiffError {
        self.context.limit(what, limit)
    }

    fn end_of_stream(&mut self, go_differs: Option<&'static str>) -> Result<(), DiffError> {
        self.check_differs(go_differs)
    }

    fn settle(&mut self, _lowers: &mut dyn LowerLayers) -> Result<Settled, DiffError> {
        Ok(Settled { diff_size: self.writer.file_bytes(), ..Settled::default() })
    }

    fn finish(self, _tar_digest: [u8; 32]) -> Result<ImageSummary, DiffError> {
        Ok(self.writer.finish()?)
    }
}
