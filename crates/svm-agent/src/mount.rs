//! Sandboxes whose file system `ext4-image` does not support, read by the guest's kernel.
//!
//! ```text
//!   attached disk (read-only) ◄─ Overlay (writes stay in memory) ◄─ /dev/nbdN ◄─ ext4, read-only mount ◄─ Kernel ◄─ diff
//! ```
//!
//! The kernel mounts a network block device that the agent serves. So the journal can be replayed while the disk stays
//! unchanged, a VHDX is like any other disk, and the attached device is never mounted and can be detached at once. A mount
//! lasts for one operation and is not visible in the directory tree. Only `guest` makes a [`GuestMounter`]: a worker shares
//! the host's kernel, has no capabilities and never mounts. A file system that crashes the guest's kernel ends this VM and
//! nothing else. Called by `layer-codec` through [`Mounter`].

use super::disk::OpDisk;
use disk_io::ReadAt;
use ext4_image::{
    Ext4Error, FileKind, Inode, Place, Timestamp, Xattr,
    error::{CorruptKind, InodeFault},
};
use layer_codec::{DiffError, ForeignFs, Mounter, VisitName};
use lcow_sys::linux::{
    SysError,
    byhandle::{self, Tree},
    guest,
    nbd::{self, Device, Served},
};
use parking_lot::Mutex;
use std::{
    collections::{HashMap, hash_map::Entry},
    fs::File,
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// `EXT4_ROOT_INO`.
const ROOT_INO: u32 = 2;
/// Bytes of a written piece.
const PIECE: usize = 4096;
/// Written pieces may take one part in this many of the guest's memory.
const MEMORY_SHARE: u64 = 4;
/// The most ranges of one file, as in `ext4-image`.
const MAX_RANGES: usize = 4 << 20;
/// The most bytes of all xattrs of an inode, as in `ext4-image`.
const MAX_XATTRS: usize = 16 << 20;
/// Error numbers by which ext4 reports damage: `EUCLEAN`, `EBADMSG`, and `ESTALE` for a name without an inode.
const DAMAGED: [i32; 3] = [libc::EUCLEAN, libc::EBADMSG, libc::ESTALE];
/// Error numbers by which the kernel refuses a file system or an operation.
const REFUSED: [i32; 4] = [libc::EINVAL, libc::EOPNOTSUPP, libc::ENOKEY, libc::E2BIG];

fn failed(what: &'static str, error: io::Error) -> DiffError {
    match error.raw_os_error() {
        Some(number) if DAMAGED.contains(&number) => corrupt(format!("{what}: {error}")),
        Some(number) if REFUSED.contains(&number) => unsupported(format!("{what}: {error}")),
        _ => DiffError::Io { what, source: error },
    }
}

fn corrupt(what: String) -> DiffError {
    Ext4Error::corrupt(CorruptKind::Kernel(what), Place::default()).into()
}

fn unsupported(reason: String) -> DiffError {
    DiffError::Unsupported { what: "a sandbox file system that this driver did not create", reason }
}

/// Mounts with the kernel of this guest.
#[derive(Debug)]
pub(crate) struct GuestMounter {
    /// Directory with the modules that are loaded before the first mount.
    modules: PathBuf,
    loaded: Mutex<bool>,
    devices: Arc<Devices>,
    /// Bytes of memory that written pieces may still take.
    room: Arc<AtomicU64>,
}

/// The devices in use.
#[derive(Debug, Default)]
struct Devices(Mutex<[bool; nbd::DEVICES as usize]>);

/// A device in use; released on drop.
#[derive(Debug)]
struct Number {
    devices: Arc<Devices>,
    number: u32,
}

impl Devices {
    fn take(self: &Arc<Self>) -> Option<Number> {
        let mut taken = self.0.lock();
        let free = taken.iter().position(|taken| !taken)?;
        taken[free] = true;
        Some(Number { devices: self.clone(), number: free as u32 })
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        if let Some(taken) = self.devices.0.lock().get_mut(self.number as usize) {
            *taken = false;
        }
    }
}

impl GuestMounter {
    /// `modules`: a directory with the modules to load before the first mount.
    pub(crate) fn new(modules: PathBuf) -> Self {
        let room = Arc::new(AtomicU64::new(guest::memory_bytes() / MEMORY_SHARE));
        Self { modules, loaded: Mutex::new(false), devices: Arc::default(), room }
    }

    fn load(&self) -> Result<(), DiffError> {
        let mut loaded = self.loaded.lock();
        if !*loaded {
            guest::load_modules(&self.modules, nbd::MODULE_PARAMETERS).map_err(|e| {
                let reason = "this guest has no module for it; make it anew with scripts/build-svm-image";
                unsupported(format!("{reason}: {}", chain(&e)))
            })?;
            *loaded = true;
        }
        Ok(())
    }
}

/// An error with its cause.
fn chain(error: &SysError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

impl Mounter<OpDisk> for GuestMounter {
    fn mount(&self, disk: &OpDisk) -> Result<Box<dyn ForeignFs>, DiffError> {
        eprintln!("agent: mounting a sandbox whose file system the reader does not support");
        self.load()?;
        let number = self.devices.take().ok_or_else(|| {
            unsupported(format!("{} sandboxes are mounted already in this machine", nbd::DEVICES))
        })?;
        let bytes =
            disk.size().map_err(DiffError::io("asking for a disk's size"))? / nbd::SECTOR * nbd::SECTOR;
        let overlay = Arc::new(Overlay {
            disk: disk.clone(),
            bytes,
            written: Mutex::default(),
            room: self.room.clone(),
            full: AtomicBool::new(false),
        });
        let says = |what| {
            move |e: SysError| match e {
                SysError::Os { source, .. } => failed(what, source),
                usage @ SysError::Usage { .. } => unsupported(chain(&usage)),
            }
        };
        let device = Device::start(number.number, bytes, overlay.clone())
            .map_err(says("showing the disk to the guest's kernel"))?;
        let tree = match Tree::mount(device.path()) {
            Ok(tree) => tree,
            Err(_) if overlay.full.load(Ordering::Relaxed) => {
                let reason =
                    "its journal takes more memory than the guest may spend on it; raise lcow.guestmemory";
                return Err(unsupported(reason.to_owned()));
            }
            Err(e) => {
                return Err(says(
                    "mounting it with the guest's kernel (lcow-graphdriver svm console shows its messages)",
                )(e));
            }
        };
        Ok(Box::new(Kernel { last: Mutex::default(), tree, _device: device, _number: number }))
    }
}

/// A disk with the pieces that were written to it, in memory.
struct Overlay {
    disk: OpDisk,
    bytes: u64,
    written: Mutex<HashMap<u64, Box<[u8]>>>,
    room: Arc<AtomicU64>,
    /// There was no room for a piece.
    full: AtomicBool,
}

impl Overlay {
    fn below(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_exact_at(buf, offset)
    }

    fn check(&self, len: usize, offset: u64) -> io::Result<()> {
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= self.bytes);
        if inside { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// The piece that holds `offset`, its first byte there, and how many of `len` bytes lie in it.
    fn piece(offset: u64, len: usize) -> (u64, usize, usize) {
        let at = (offset % PIECE as u64) as usize;
        (offset / PIECE as u64, at, len.min(PIECE - at))
    }

    fn take_room(&self) -> io::Result<()> {
        let left = |room: u64| room.checked_sub(PIECE as u64);
        self.room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).map(drop).map_err(|_| {
            self.full.store(true, Ordering::Relaxed);
            io::ErrorKind::StorageFull.into()
        })
    }
}

impl Served for Overlay {
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(buf.len(), offset)?;
        self.below(buf, offset)?;
        let written = self.written.lock();
        let mut done = 0;
        while !written.is_empty() && done < buf.len() {
            let (number, at, n) = Self::piece(offset + done as u64, buf.len() - done);
            if let Some(piece) = written.get(&number) {
                buf[done..done + n].copy_from_slice(&piece[at..at + n]);
            }
            done += n;
        }
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.check(buf.len(), offset)?;
        let mut written = self.written.lock();
        let mut done = 0;
        while done < buf.len() {
            let (number, at, n) = Self::piece(offset + done as u64, buf.len() - done);
            let piece = match written.entry(number) {
                Entry::Occupied(there) => there.into_mut(),
                Entry::Vacant(place) => {
                    let start = number * PIECE as u64;
                    let mut piece = vec![0; PIECE].into_boxed_slice();
                    let there = (self.bytes - start).min(PIECE as u64) as usize;
                    self.below(&mut piece[..there], start)?;
                    self.take_room()?;
                    place.insert(piece)
                }
            };
            piece[at..at + n].copy_from_slice(&buf[done..done + n]);
            done += n;
        }
        Ok(())
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        self.room.fetch_add((self.written.lock().len() * PIECE) as u64, Ordering::Relaxed);
    }
}

/// A mounted file system; fields are dropped in this order.
#[derive(Debug)]
struct Kernel {
    /// The file that was read last: files are read sequentially.
    last: Mutex<Option<(u32, File)>>,
    tree: Tree,
    _device: Device,
    _number: Number,
}

impl ForeignFs for Kernel {
    fn root(&self) -> u32 {
        ROOT_INO
    }

    fn inode(&self, ino: u32) -> Result<Inode, DiffError> {
        inode(&self.tree, ino)
    }

    fn visit_dir(&self, ino: u32, visit: VisitName<'_>) -> Result<(), DiffError> {
        visit_dir(&self.tree, ino, visit)
    }

    fn xattrs(&self, ino: u32) -> Result<Vec<Xattr>, DiffError> {
        let found = self.tree.xattrs(ino).map_err(|e| failed("reading extended attributes", e))?;
        if found.iter().map(|(_, value)| value.len()).sum::<usize>() > MAX_XATTRS {
            return Err(unsupported(format!("inode {ino}: xattrs of more than {MAX_XATTRS} bytes")));
        }
        Ok(found.into_iter().map(|(name, value)| Xattr { name, value }).collect())
    }

    fn symlink_target(&self, ino: u32) -> Result<Vec<u8>, DiffError> {
        self.tree.read_link(ino).map_err(|e| failed("reading a symbolic link", e))
    }

    fn data_map(&self, ino: u32) -> Result<Vec<(u64, u64)>, DiffError> {
        let file = self.tree.open_file(ino).map_err(|e| failed("opening a file", e))?;
        byhandle::data_ranges(&file, MAX_RANGES).map_err(|e| failed("asking for a file's extents", e))
    }

    fn read(&self, ino: u32, offset: u64, buf: &mut [u8]) -> Result<(), DiffError> {
        let mut last = self.last.lock();
        let file = match &mut *last {
            Some((of, file)) if *of == ino => file,
            other => {
                let file = self.tree.open_file(ino).map_err(|e| failed("opening a file", e))?;
                &mut other.insert((ino, file)).1
            }
        };
        file.read_exact_at(buf, offset).map_err(|e| failed("reading a file", e))
    }
}

fn inode(tree: &Tree, ino: u32) -> Result<Inode, DiffError> {
    let stat = tree.stat(ino).map_err(|e| failed("reading an inode", e))?;
    // Without the key the kernel shows encrypted names and refuses the data.
    if stat.encrypted {
        return Err(unsupported(format!("inode {ino} is encrypted")));
    }
    let mut inode =
        Inode::reported(ino, stat.mode).ok_or(Ext4Error::corrupt(InodeFault::FileType, Place::inode(ino)))?;
    let time = |(secs, nanos): (i64, u32)| Timestamp { secs, nanos: nanos.min(999_999_999) };
    (inode.uid, inode.gid, inode.size, inode.rdev) = (stat.uid, stat.gid, stat.size, stat.rdev);
    (inode.mtime, inode.ctime) = (time(stat.mtime), time(stat.ctime));
    inode.links = stat.links.min(u32::from(u16::MAX)) as u16;
    Ok(inode)
}

/// What stops the reading of a directory.
enum Stop {
    Kernel(io::Error),
    Caller(DiffError),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Kernel(error)
    }
}

fn visit_dir(tree: &Tree, ino: u32, visit: VisitName<'_>) -> Result<(), DiffError> {
    let done = tree.visit_dir(ino, |name| {
        let number = u32::try_from(name.ino).map_err(|_| io::Error::from_raw_os_error(libc::EUCLEAN))?;
        visit(name.name, number, kind(name.kind)).map_err(Stop::Caller)
    });
    done.map_err(|stop| match stop {
        Stop::Kernel(e) => failed("reading a directory", e),
        Stop::Caller(e) => e,
    })
}

fn kind(of: rustix::fs::FileType) -> Option<FileKind> {
    use rustix::fs::FileType;
    Some(match of {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        FileType::CharacterDevice => FileKind::CharDevice,
        FileType::BlockDevice => FileKind::BlockDevice,
        FileType::Fifo => FileKind::Fifo,
        FileType::Socket => FileKind::Socket,
        FileType::Unknown => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Cancel, Disk};
    use disk_io::WriteAt;
    use svm_protocol::DiskFormat;

    fn overlay(bytes: u64, room: u64) -> (Overlay, File) {
        let file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..bytes).map(|n| (n / 512) as u8 + 1).collect();
        file.write_all_at(&content, 0).unwrap();
        let disk = Disk::open(file.try_clone().unwrap(), DiskFormat::Raw, false, (0, None)).unwrap();
        let overlay = Overlay {
            disk: OpDisk::new(disk, Cancel::new(|| false)),
            bytes,
            written: Mutex::default(),
            room: Arc::new(AtomicU64::new(room)),
            full: AtomicBool::new(false),
        };
        (overlay, file)
    }

    #[test]
    fn what_is_written_is_read_again_and_the_disk_stays() {
        // The last piece is not whole.
        let bytes = 3 * PIECE as u64 + 1024;
        let (overlay, file) = overlay(bytes, 1 << 20);
        let mut model = vec![0; bytes as usize];
        file.read_exact_at(&mut model, 0).unwrap();
        let before = model.clone();
        for (at, len) in [(512, 512), (PIECE - 512, 1024), (3 * PIECE, 1024), (PIECE, 2 * PIECE)] {
            overlay.write(&vec![0xAA; len], at as u64).unwrap();
            model[at..at + len].fill(0xAA);
            let mut all = vec![0; model.len()];
            overlay.read(&mut all, 0).unwrap();
            assert!(all == model, "after {len} bytes at {at}");
        }
        for (at, len) in [(bytes - 512, 1024), (u64::MAX - 5, 512)] {
            assert!(
                overlay.write(&vec![0; len], at).is_err() && overlay.read(&mut vec![0; len], at).is_err()
            );
        }
        file.read_exact_at(&mut model, 0).unwrap();
        assert!(model == before);
    }

    #[test]
    fn memory_has_its_limit_and_comes_back() {
        let (overlay, _) = overlay(4 * PIECE as u64, 2 * PIECE as u64);
        for piece in [0, 1] {
            overlay.write(&[1; 512], piece * PIECE as u64).unwrap();
        }
        assert!(!overlay.full.load(Ordering::Relaxed));
        assert!(overlay.write(&[1; 512], 2 * PIECE as u64).is_err());
        assert!(overlay.full.load(Ordering::Relaxed));
        overlay.write(&[2; 512], 512).unwrap();
        let room = overlay.room.clone();
        drop(overlay);
        assert_eq!(room.load(Ordering::Relaxed), 2 * PIECE as u64);
    }

    #[test]
    fn devices_are_taken_once_and_given_back() {
        let devices = Arc::<Devices>::default();
        let mut all: Vec<Number> = (0..nbd::DEVICES).map(|_| devices.take().unwrap()).collect();
        assert!(devices.take().is_none());
        assert_eq!(all.remove(3).number, 3);
        assert_eq!(devices.take().unwrap().number, 3);
    }
}
