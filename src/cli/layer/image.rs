//! Read access to an image: unwraps its container, and walks its tree by path.
//!
//! ```text
//!   VHDX │ dynamic VHD │ fixed VHD │ raw disk ──► disk ──► ext4          anything else is refused: foreign
//! ```

use super::{
    failure::{failed, shown},
    foreign, input,
};
use crate::cli::CliError;
use disk_io::{ReadAt, SubDisk};
use ext4_image::{Ext4, Ext4Error, FileKind, Inode};
use layer_codec::{LayerKind, LayerSource};
use lcow_sys::sparse::data_ranges;
use std::{
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};
use vhd_image::{
    qcow2::{Qcow2, is_qcow2},
    vhd::{
        self, Footer, VhdError,
        dynamic::{DynamicVhd, is_dynamic},
    },
    vhdx::{Geometry, Vhdx},
};

/// Directories of a sandbox.
const SANDBOX_FOLDERS: [&[u8]; 2] = [b"upper", b"work"];
/// Symbolic links followed in one path, as Linux has it (MAXSYMLINKS).
const MAX_HOPS: usize = 40;
/// The first bytes of a VHDX.
const VHDX_MAGIC: &[u8] = b"vhdxfile";

/// The disk in a VHD or VHDX, or a bare image.
pub(in crate::cli) type Disk = Arc<dyn ReadAt>;

/// What kind of file holds the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Container {
    /// The file is the disk.
    Raw,
    /// A fixed VHD: the disk followed by a footer.
    Vhd(Footer),
    /// A dynamic VHD.
    DynamicVhd {
        /// A footer with the disk's size, timestamp and id.
        footer: Footer,
        /// Size of a block, in bytes.
        block_bytes: u64,
    },
    /// A dynamic or fixed VHDX.
    Vhdx(Geometry),
}

/// An opened image.
pub(in crate::cli) struct Image {
    pub(super) path: PathBuf,
    pub(super) file_bytes: u64,
    pub(super) container: Container,
    /// The footer of a fixed VHD, byte for byte.
    pub(super) footer: Option<[u8; vhd::FOOTER_SIZE]>,
    pub(in crate::cli) disk: Disk,
    /// The file, opened once: what was checked is what is used.
    pub(super) file: Arc<File>,
    /// Byte ranges of the disk that may be nonzero, ascending.
    pub(super) data: Vec<Range<u64>>,
}

impl Image {
    pub(in crate::cli) fn open(path: &Path) -> Result<Self, CliError> {
        Self::open_with(path, false)
    }

    /// Like [`Self::open`]; also opens the file for writing if `write`.
    pub(super) fn open_with(path: &Path, write: bool) -> Result<Self, CliError> {
        let file =
            if write { File::options().read(true).write(true).open(path) } else { input::open_file(path) };
        let file = file.map_err(|e| failed("open", path, &e))?;
        let file = Arc::new(file);
        if file.metadata().is_ok_and(|m| m.is_dir()) {
            return Err(format!("{} is a directory, not an image", shown(path)).into());
        }
        let file_bytes = file.size().map_err(|e| failed("read", path, &e))?;
        let unread = |e: &(dyn std::error::Error + 'static)| failed("read", path, e);
        let head = part(&file, 0, foreign::HEAD).map_err(|e| unread(&e))?;
        let opened = Self::contained(path, file, file_bytes, &head)?;
        let refusal = if opened.container == Container::Raw {
            let tail = opened.disk.size().map_err(|e| unread(&e))?.saturating_sub(foreign::TAIL as u64);
            let tail = part(&opened.disk, tail, foreign::TAIL).map_err(|e| unread(&e))?;
            foreign::refusal(path, &head, &tail)
        } else {
            foreign::refusal_inside(path, &part(&opened.disk, 0, foreign::HEAD).map_err(|e| unread(&e))?)
        };
        refusal.map_or(Ok(opened), |text| Err(text.into()))
    }

    /// The disk in the file, or the file as a disk.
    fn contained(path: &Path, file: Arc<File>, file_bytes: u64, head: &[u8]) -> Result<Self, CliError> {
        if head.starts_with(VHDX_MAGIC) {
            let vhdx = Vhdx::open(file.clone()).map_err(|e| failed("read", path, &e))?;
            let (container, data) = (Container::Vhdx(*vhdx.geometry()), vhdx.allocated());
            return Ok(Self {
                path: path.to_owned(),
                file_bytes,
                container,
                footer: None,
                disk: Arc::new(vhdx),
                file,
                data,
            });
        }
        let footer = match footer(&file, file_bytes) {
            // A damaged end does not matter: there is a copy of the footer at the beginning.
            Ok(None) if is_dynamic(head) => return Self::dynamic(path, file, file_bytes),
            Err(e) if is_dynamic(head) || matches!(e.downcast_ref(), Some(VhdError::Unsupported(_))) => {
                return Self::dynamic(path, file, file_bytes);
            }
            other => other.map_err(|e| failed("read", path, &*e))?,
        };
        let disk_bytes = footer.map_or(file_bytes, |(f, _)| f.disk_bytes);
        let data = data_ranges(&file, disk_bytes);
        Ok(Self {
            path: path.to_owned(),
            file_bytes,
            container: footer.map_or(Container::Raw, |(f, _)| Container::Vhd(f)),
            footer: footer.map(|(_, bytes)| bytes),
            disk: Arc::new(SubDisk::new(file.clone(), 0, disk_bytes)),
            file,
            data,
        })
    }

    fn dynamic(path: &Path, file: Arc<File>, file_bytes: u64) -> Result<Self, CliError> {
        let vhd = DynamicVhd::open(file.clone()).map_err(|e| failed("read", path, &e))?;
        let disk_bytes = vhd.size().map_err(|e| failed("read", path, &e))?;
        let footer =
            Footer::new(disk_bytes, vhd.timestamp(), vhd.uuid()).map_err(|e| failed("read", path, &e))?;
        let container = Container::DynamicVhd { footer, block_bytes: vhd.block_bytes() };
        let data = vhd.allocated();
        Ok(Self {
            path: path.to_owned(),
            file_bytes,
            container,
            footer: None,
            disk: Arc::new(vhd),
            file,
            data,
        })
    }

    pub(super) fn ext4(&self) -> Result<Ext4<Disk>, CliError> {
        Ext4::open(self.disk.clone()).map_err(|e| failed("read", &self.path, &e))
    }

    /// Whether it is an applied layer or a sandbox, which is written through a mount.
    pub(super) fn kind(&self) -> Result<LayerKind, CliError> {
        let fs = self.ext4()?;
        kind(&fs).map_err(|e| failed("read", &self.path, &e))
    }

    /// Whether its file system has no journal, as in applied layers.
    #[cfg(target_os = "linux")]
    pub(super) fn has_no_journal(&self) -> Result<bool, CliError> {
        let fs = self.ext4()?;
        Ok(!fs.geometry().has_journal())
    }

    /// The image as a layer.
    pub(super) fn layer(&self) -> Result<LayerSource<Disk>, CliError> {
        Ok(LayerSource::new(self.disk.clone(), self.kind()?))
    }
}

/// The disk in a file of any kind, qcow2 included, for those who only read it.
pub(in crate::cli) fn open_disk(path: &Path) -> Result<Disk, CliError> {
    let file = Arc::new(input::open_file(path).map_err(|e| failed("open", path, &e))?);
    let unread = |e: &(dyn std::error::Error + 'static)| failed("read", path, e);
    if !is_qcow2(&part(&file, 0, foreign::HEAD).map_err(|e| unread(&e))?) {
        return Ok(Image::open(path)?.disk);
    }
    let disk = Qcow2::open(file).map_err(|e| unread(&e))?;
    let head = part(&disk, 0, foreign::HEAD).map_err(|e| unread(&e))?;
    foreign::refusal_inside(path, &head).map_or_else(|| Ok(Arc::new(disk) as Disk), |text| Err(text.into()))
}

/// Up to `most` bytes at `offset`; fewer at the end of the disk.
fn part(disk: &impl ReadAt, offset: u64, most: usize) -> std::io::Result<Vec<u8>> {
    let rest = disk.size()?.saturating_sub(offset);
    let mut bytes = vec![0; usize::try_from(rest).map_or(most, |rest| rest.min(most))];
    disk.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Size of a file system, in bytes.
pub(super) fn fs_bytes<R: ReadAt>(fs: &Ext4<R>) -> u64 {
    fs.geometry().blocks_count.saturating_mul(u64::from(fs.geometry().block_size))
}

/// The footer at the end of a file, and its bytes; `None` for a bare image.
fn footer(file: &File, file_bytes: u64) -> Result<Option<(Footer, [u8; vhd::FOOTER_SIZE])>, CliError> {
    let Some(at) = file_bytes.checked_sub(vhd::FOOTER_SIZE as u64) else { return Ok(None) };
    let mut bytes = [0; vhd::FOOTER_SIZE];
    file.read_exact_at(&mut bytes, at)?;
    match Footer::parse(&bytes) {
        Ok(footer) if footer.disk_bytes <= at => Ok(Some((footer, bytes))),
        Ok(footer) => Err(format!(
            "the file is truncated: its vhd footer gives a disk of {} bytes, the file has {at}",
            footer.disk_bytes
        )
        .into()),
        Err(VhdError::Corrupt("no cookie")) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Layer images have no journal; an image with a journal and a sandbox's two directories is a sandbox.
pub(super) fn kind<R: ReadAt>(fs: &Ext4<R>) -> Result<LayerKind, Ext4Error> {
    if !fs.geometry().has_journal() {
        return Ok(LayerKind::Applied);
    }
    let root = fs.inode(fs.root())?;
    for name in SANDBOX_FOLDERS {
        match fs.lookup(&root, name)? {
            Some(ino) if fs.inode(ino)?.kind == FileKind::Directory => {}
            _ => return Ok(LayerKind::Applied),
        }
    }
    Ok(LayerKind::Sandbox)
}

/// The inode that a path leads to; symbolic links on the way are followed inside the image, a final one only if
/// `follow`.
pub(super) fn resolve<R: ReadAt>(fs: &Ext4<R>, path: &[u8], follow: bool) -> Result<Inode, CliError> {
    let mut todo: Vec<Vec<u8>> = parts(path);
    let mut stack: Vec<Inode> = vec![fs.inode(fs.root())?];
    let mut hops = 0;
    // A slash at the end asks for what a link leads to.
    let follow = follow || path.ends_with(b"/");
    while let Some(part) = todo.pop() {
        if part == b".." {
            if stack.len() > 1 {
                stack.pop();
            }
            continue;
        }
        let Some(dir) = stack.last() else { break };
        if dir.kind != FileKind::Directory {
            return Err(
                format!("a part of the path before '{}' is not a directory", part.escape_ascii()).into()
            );
        }
        let found = fs.lookup(dir, &part)?;
        let ino = found.ok_or_else(|| format!("'{}' does not exist in the image", part.escape_ascii()))?;
        let inode = fs.inode(ino)?;
        if inode.kind == FileKind::Symlink && (follow || !todo.is_empty()) {
            hops += 1;
            if hops > MAX_HOPS {
                return Err("too many symbolic links in the path".into());
            }
            let target = fs.symlink_target(&inode)?;
            if target.starts_with(b"/") {
                stack.truncate(1);
            }
            todo.extend(parts(&target));
            continue;
        }
        stack.push(inode);
    }
    stack.pop().ok_or_else(|| "the path does not lead to an entry".into())
}

/// The parts of a path, the last one first.
fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|b| *b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .rev()
        .map(<[u8]>::to_vec)
        .collect()
}
