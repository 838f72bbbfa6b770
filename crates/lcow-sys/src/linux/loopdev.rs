//! Loop devices: a window of a file as a block device.
//!
//! ```text
//!   layer.vhd  │ ext4 ……………………………………… │ footer 512 B │
//!              └ offset        sizelimit ┘      not in the device
//!                    /dev/loopN
//! ```
//!
//! Source: `include/uapi/linux/loop.h`. A free number is only a hint (`LOOP_CTL_GET_FREE` reserves nothing), so two
//! starters may get the same one; the loser sees `EBUSY` and takes the next. `LOOP_CONFIGURE` (Linux 5.8) binds file
//! and window in one step, so that no device is ever visible with the wrong size; older kernels get
//! `LOOP_SET_FD` + `LOOP_SET_STATUS64`. Called by `driver`.

use super::{Context, SysError};
use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
};
use std::{
    fs::File,
    io,
    mem::size_of,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::FileTypeExt,
    },
    path::{Path, PathBuf},
};

const LOOP_SET_FD: u64 = 0x4C00;
const LOOP_CLR_FD: u64 = 0x4C01;
const LOOP_SET_STATUS64: u64 = 0x4C04;
const LOOP_GET_STATUS64: u64 = 0x4C05;
const LOOP_SET_DIRECT_IO: u64 = 0x4C08;
const LOOP_CONFIGURE: u64 = 0x4C0A;
const LOOP_CTL_GET_FREE: u64 = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const LO_NAME_SIZE: usize = 64;
/// Block-device major number of loop devices (`include/uapi/linux/major.h`).
pub const LOOP_MAJOR: u32 = 7;
/// How often a lost race for a free number is repeated. Each loss means that another starter won, so this bounds the
/// number of simultaneous starters, not the time.
const ATTEMPTS: usize = 256;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(clippy::struct_field_names, reason = "the kernel's own names")]
struct LoopInfo64 {
    lo_device: u64,
    lo_inode: u64,
    lo_rdevice: u64,
    lo_offset: u64,
    lo_sizelimit: u64,
    lo_number: u32,
    lo_encrypt_type: u32,
    lo_encrypt_key_size: u32,
    lo_flags: u32,
    lo_file_name: [u8; LO_NAME_SIZE],
    lo_crypt_name: [u8; LO_NAME_SIZE],
    lo_encrypt_key: [u8; 32],
    lo_init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

impl LoopInfo64 {
    const ZERO: Self = Self {
        lo_device: 0,
        lo_inode: 0,
        lo_rdevice: 0,
        lo_offset: 0,
        lo_sizelimit: 0,
        lo_number: 0,
        lo_encrypt_type: 0,
        lo_encrypt_key_size: 0,
        lo_flags: 0,
        lo_file_name: [0; LO_NAME_SIZE],
        lo_crypt_name: [0; LO_NAME_SIZE],
        lo_encrypt_key: [0; 32],
        lo_init: [0; 2],
    };
}

/// What to make of a file.
#[derive(Debug, Clone, Default)]
pub struct LoopSpec {
    /// First byte of the window; a multiple of 512.
    pub offset: u64,
    /// Bytes in the window; 0 means up to the end of the file.
    pub sizelimit: u64,
    /// The device refuses writes. Also forced by the kernel when the file was opened read-only.
    pub read_only: bool,
    /// The kernel detaches the device when its last user (open descriptor or mount) is gone.
    pub autoclear: bool,
    /// The file's page cache is bypassed where file system and alignment allow it (otherwise silently not).
    pub direct_io: bool,
    /// A name kept in the device, shown by `losetup` and [`status`]; cut to 63 bytes.
    pub name: String,
}

/// An attached device. Dropping it closes the descriptor; with `autoclear` the device then lives as long as its mount.
#[derive(Debug)]
pub struct LoopDevice {
    /// `/dev/loopN`.
    pub path: PathBuf,
    /// The open device; keeps an `autoclear` device attached.
    pub fd: OwnedFd,
    /// N.
    pub number: u32,
}

/// What the kernel says of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoopStatus {
    /// N of `/dev/loopN`.
    pub number: u32,
    /// Major device number, as mount tables have it.
    pub major: u32,
    /// Minor device number: N, unless the kernel gives each device some for partitions.
    pub minor: u32,
    /// Device number (as `st_dev`) of the file system that holds the backing file.
    pub backing_dev: u64,
    /// Inode number of the backing file.
    pub backing_inode: u64,
    /// The name given at attach.
    pub name: String,
    /// First byte of the window.
    pub offset: u64,
    /// Bytes of the window, 0 = to the end.
    pub sizelimit: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Detached at last use.
    pub autoclear: bool,
    /// Page cache bypassed.
    pub direct_io: bool,
}

fn ioctl(fd: BorrowedFd<'_>, request: u64, argument: u64) -> io::Result<i32> {
    loop {
        // SAFETY: every caller passes either a plain number or the address of a live `repr(C)` value of the type that
        // `linux/loop.h` names for `request`; the kernel touches nothing else.
        let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, argument) };
        if r >= 0 {
            return Ok(r);
        }
        let error = io::Error::last_os_error();
        // The driver waits for a lock of its own, and a signal may end that.
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn device_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

/// Opens `/dev/loopN`, making the node first where a container's `/dev` lacks it.
fn open_device(number: u32, read_only: bool) -> Result<(PathBuf, OwnedFd), SysError> {
    let path = device_path(number);
    let flags = OFlags::CLOEXEC | if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    match rustix::fs::open(&path, flags, Mode::empty()) {
        Err(Errno::NOENT) => {
            let node = rustix::fs::makedev(LOOP_MAJOR, number);
            match rustix::fs::mknodat(
                rustix::fs::CWD,
                &path,
                FileType::BlockDevice,
                Mode::from_raw_mode(0o660),
                node,
            ) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e).context("make device node", &path),
            }
            let fd = rustix::fs::open(&path, flags, Mode::empty()).context("open", &path)?;
            Ok((path, fd))
        }
        other => Ok((path.clone(), other.context("open", &path)?)),
    }
}

/// Binds a window of `file` to a free loop device.
///
/// # Errors
/// [`SysError::Os`] when there is no loop driver, no permission, or the window is refused.
pub fn attach(file: BorrowedFd<'_>, spec: &LoopSpec) -> Result<LoopDevice, SysError> {
    let control_path = Path::new("/dev/loop-control");
    let control = File::options().read(true).write(true).open(control_path).context("open", control_path)?;
    let mut info = LoopInfo64::ZERO;
    info.lo_offset = spec.offset;
    info.lo_sizelimit = spec.sizelimit;
    let name = spec.name.as_bytes();
    let shown = name.len().min(LO_NAME_SIZE - 1);
    info.lo_file_name[..shown].copy_from_slice(&name[..shown]);
    if spec.read_only {
        info.lo_flags |= LO_FLAGS_READ_ONLY;
    }
    if spec.autoclear {
        info.lo_flags |= LO_FLAGS_AUTOCLEAR;
    }
    let mut last = io::Error::from(Errno::BUSY);
    for _ in 0..ATTEMPTS {
        let number = ioctl(control.as_fd(), LOOP_CTL_GET_FREE, 0)
            .context("find a free loop device by", control_path)?;
        let number = u32::try_from(number).map_err(|_| io::Error::from(Errno::RANGE));
        let number = number.context("find a free loop device by", control_path)?;
        let (path, fd) = match open_device(number, false) {
            // Somebody has removed the device meanwhile (`losetup`, LOOP_CTL_REMOVE): the next one then.
            Err(e)
                if [Errno::NXIO, Errno::NODEV, Errno::NOENT]
                    .iter()
                    .any(|n| e.raw_os_error() == Some(n.raw_os_error())) =>
            {
                last = io::Error::from_raw_os_error(e.raw_os_error().unwrap_or_default());
                continue;
            }
            other => other?,
        };
        match bind(fd.as_fd(), file, &info) {
            Ok(()) => {
                if spec.direct_io {
                    // Refused for file systems and windows that can't do it; the device works all the same.
                    let _ = ioctl(fd.as_fd(), LOOP_SET_DIRECT_IO, 1);
                }
                return Ok(LoopDevice { path, fd, number });
            }
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => last = e,
            Err(e) => return Err(e).context("attach a file to", path),
        }
    }
    Err(last).context("attach a file to any of", "/dev/loop*")
}

fn bind(device: BorrowedFd<'_>, file: BorrowedFd<'_>, info: &LoopInfo64) -> io::Result<()> {
    let config =
        LoopConfig { fd: file.as_raw_fd().cast_unsigned(), block_size: 0, info: *info, reserved: [0; 8] };
    match ioctl(device, LOOP_CONFIGURE, (&raw const config) as u64) {
        Ok(_) => return Ok(()),
        // Kernels before 5.8 don't know the request.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {}
        Err(e) => return Err(e),
    }
    ioctl(device, LOOP_SET_FD, file.as_raw_fd() as u64)?;
    let set = set_status(device, info).and_then(|()| {
        // This way the flag of a read-only device is taken from the file alone.
        let made = get_status(device)?;
        if made.lo_flags & LO_FLAGS_READ_ONLY < info.lo_flags & LO_FLAGS_READ_ONLY {
            return Err(io::Error::from(Errno::ROFS));
        }
        Ok(())
    });
    if set.is_err() {
        let _ = ioctl(device, LOOP_CLR_FD, 0);
    }
    set
}

fn set_status(device: BorrowedFd<'_>, info: &LoopInfo64) -> io::Result<()> {
    /// While pages of the device are being written back the driver asks to try again.
    const TRIES: u32 = 50;
    const PAUSE: std::time::Duration = std::time::Duration::from_millis(5);
    for _ in 1..TRIES {
        match ioctl(device, LOOP_SET_STATUS64, (&raw const *info) as u64) {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => std::thread::sleep(PAUSE),
            other => return other.map(|_| ()),
        }
    }
    ioctl(device, LOOP_SET_STATUS64, (&raw const *info) as u64).map(|_| ())
}

fn get_status(device: BorrowedFd<'_>) -> io::Result<LoopInfo64> {
    let mut info = LoopInfo64::ZERO;
    ioctl(device, LOOP_GET_STATUS64, (&raw mut info) as u64)?;
    Ok(info)
}

impl LoopDevice {
    /// Opens a device that is attached already, by its number.
    ///
    /// # Errors
    /// [`SysError::Os`] if the node can't be opened.
    pub fn open(number: u32) -> Result<Self, SysError> {
        let (path, fd) = open_device(number, true)?;
        Ok(Self { path, fd, number })
    }

    /// Opens a device that was found to be bound to `file`; `None` if it no longer is. An open device keeps its file,
    /// so what is asked now stays true.
    ///
    /// # Errors
    /// [`SysError::Os`] if it can't be opened or asked.
    pub fn open_bound(number: u32, file: BorrowedFd<'_>) -> Result<Option<Self>, SysError> {
        let stat = rustix::fs::fstat(file).context("stat", "backing file")?;
        Self::open_if(number, |info| info.lo_device == stat.st_dev && info.lo_inode == stat.st_ino)
    }

    /// Opens a device that was found; `None` if it is bound to another file by now, or to none.
    ///
    /// # Errors
    /// As [`LoopDevice::open_bound`].
    pub fn open_same(found: &LoopStatus) -> Result<Option<Self>, SysError> {
        Self::open_if(found.number, |info| {
            info.lo_device == found.backing_dev
                && info.lo_inode == found.backing_inode
                && shown_name(info) == found.name
        })
    }

    fn open_if(number: u32, same: impl Fn(&LoopInfo64) -> bool) -> Result<Option<Self>, SysError> {
        let device = Self::open(number)?;
        match get_status(device.fd.as_fd()) {
            Ok(info) if same(&info) => Ok(Some(device)),
            Ok(_) => Ok(None),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(e) => Err(e).context("read the state of", &device.path),
        }
    }

    /// Detaches the device now, or, if it is mounted or open elsewhere, as soon as it no longer is.
    ///
    /// # Errors
    /// [`SysError::Os`]; a device that was detached meanwhile is no error.
    pub fn detach(self) -> Result<(), SysError> {
        match ioctl(self.fd.as_fd(), LOOP_CLR_FD, 0) {
            Ok(_) => Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(()),
            Err(e) => Err(e).context("detach", &self.path),
        }
    }
}

fn shown_name(info: &LoopInfo64) -> String {
    let end = info.lo_file_name.iter().position(|b| *b == 0).unwrap_or(LO_NAME_SIZE);
    String::from_utf8_lossy(&info.lo_file_name[..end]).into_owned()
}

/// What device `number` is bound to; `None` if it is free or does not exist.
///
/// # Errors
/// [`SysError::Os`] for anything but "not there" and "not bound".
pub fn status(number: u32) -> Result<Option<LoopStatus>, SysError> {
    let path = device_path(number);
    let fd = match rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT | Errno::NXIO) => return Ok(None),
        Err(e) => return Err(e).context("open", path),
    };
    let info = match get_status(fd.as_fd()) {
        Ok(info) => info,
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        Err(e) => return Err(e).context("read the state of", path),
    };
    let node = rustix::fs::fstat(&fd).context("stat", &path)?.st_rdev;
    Ok(Some(LoopStatus {
        number,
        major: rustix::fs::major(node),
        minor: rustix::fs::minor(node),
        backing_dev: info.lo_device,
        backing_inode: info.lo_inode,
        name: shown_name(&info),
        offset: info.lo_offset,
        sizelimit: info.lo_sizelimit,
        read_only: info.lo_flags & LO_FLAGS_READ_ONLY != 0,
        autoclear: info.lo_flags & LO_FLAGS_AUTOCLEAR != 0,
        direct_io: info.lo_flags & LO_FLAGS_DIRECT_IO != 0,
    }))
}

/// All bound loop devices, in order of number. One whose state cannot be read is left out: it is somebody else's, or
/// it is sick.
///
/// # Errors
/// [`SysError::Os`] if `/sys/block` can't be read.
pub fn list() -> Result<Vec<LoopStatus>, SysError> {
    Ok(bound()?.into_iter().filter_map(|number| status(number).ok().flatten()).collect())
}

/// Numbers of the devices that are bound.
fn bound() -> Result<Vec<u32>, SysError> {
    let folder = Path::new("/sys/block");
    let mut numbers: Vec<u32> = Vec::new();
    for entry in std::fs::read_dir(folder).context("list", folder)? {
        let entry = entry.context("list", folder)?;
        let name = entry.file_name();
        let Some(number) = name.to_str().and_then(|n| n.strip_prefix("loop")).and_then(|n| n.parse().ok())
        else {
            continue;
        };
        // A bound device has this folder; asking sysfs first spares opening every free one.
        if entry.path().join("loop").exists() {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Bound devices whose backing file is `file` (by device and inode).
///
/// # Errors
/// As [`list`]; and if the state of a device can't be read that may be bound to `file`, by the name that sysfs gives
/// of its file.
pub fn find_by_backing(file: BorrowedFd<'_>) -> Result<Vec<LoopStatus>, SysError> {
    let stat = rustix::fs::fstat(file).context("stat", "backing file")?;
    let mut found = Vec::new();
    for number in bound()? {
        match status(number) {
            Ok(Some(s)) if s.backing_dev == stat.st_dev && s.backing_inode == stat.st_ino => found.push(s),
            Ok(_) => {}
            Err(error) if may_be_bound_to(number, file) => return Err(error),
            Err(error) => {
                tracing::debug!(number, %error, "a loop device of somebody else cannot be asked; it is passed by");
            }
        }
    }
    Ok(found)
}

/// Whether sysfs gives the file's own name, or none, for what is behind a device.
fn may_be_bound_to(number: u32, file: BorrowedFd<'_>) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let Ok(shown) = std::fs::read(format!("/sys/block/loop{number}/loop/backing_file")) else {
        // Unbound meanwhile, or as sick as the device: only its own word would tell.
        return Path::new(&format!("/sys/block/loop{number}/loop")).exists();
    };
    let Ok(ours) = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) else { return true };
    let plain = |name: &[u8]| {
        let name = name.strip_suffix(b"\n").unwrap_or(name);
        name.strip_suffix(b" (deleted)").unwrap_or(name).to_vec()
    };
    plain(&shown) == plain(ours.as_os_str().as_bytes())
}

/// Whether `path` is a block device (what a test machine without loop support lacks).
pub fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);
