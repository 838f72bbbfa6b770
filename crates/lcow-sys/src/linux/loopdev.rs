//! Loop devices: a window of a file as a block device.
//!
//! ```text
//!   layer.vhd  │ ext4 ……………………………………… │ footer 512 B │
//!              └ offset        sizelimit ┘      not part of the device
//!                    /dev/loopN
//! ```
//!
//! Source: `include/uapi/linux/loop.h`. A free number is only a hint (`LOOP_CTL_GET_FREE` reserves nothing), so two callers
//! may get the same one; the second sees `EBUSY` and tries the next. `LOOP_CONFIGURE` (Linux 5.8) binds file and window in
//! one step, so that no device is ever visible with the wrong size; on older kernels it is `LOOP_SET_FD` and
//! `LOOP_SET_STATUS64`. Called by `driver` and `cli`.

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

/// Requests that take a number or nothing.
#[derive(Clone, Copy)]
#[repr(u64)]
enum ByValue {
    /// `LOOP_SET_FD`: the descriptor of the file.
    SetFd = 0x4C00,
    /// `LOOP_CLR_FD`.
    ClrFd = 0x4C01,
    /// `LOOP_SET_DIRECT_IO`: 0 or 1.
    SetDirectIo = 0x4C08,
    /// `LOOP_CTL_GET_FREE`, to `/dev/loop-control`.
    CtlGetFree = 0x4C82,
}

// Requests that take a pointer; each has a function of its own.
const LOOP_SET_STATUS64: u64 = 0x4C04;
const LOOP_GET_STATUS64: u64 = 0x4C05;
const LOOP_CONFIGURE: u64 = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const LO_NAME_SIZE: usize = 64;
/// Block-device major number of loop devices (`include/uapi/linux/major.h`).
pub const LOOP_MAJOR: u32 = 7;
/// How often a lost race for a free number is repeated. Each loss means that another caller won, so this bounds the number
/// of simultaneous callers, not the time.
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

/// How a file becomes a device.
#[derive(Debug, Clone, Default)]
pub struct LoopSpec {
    /// First byte of the window; a multiple of 512.
    pub offset: u64,
    /// Bytes in the window; 0 means up to the end of the file.
    pub sizelimit: u64,
    /// The device refuses writes. The kernel forces it if the file was opened read-only.
    pub read_only: bool,
    /// The kernel detaches the device after its last user (open descriptor or mount).
    pub autoclear: bool,
    /// Bypass the page cache of the file if file system and alignment allow it; otherwise this has no effect.
    pub direct_io: bool,
    /// A name kept in the device, shown by `losetup` and [`status`]; truncated to 63 bytes.
    pub name: String,
}

/// An attached device. Dropping it closes the descriptor; with `autoclear` the device then exists as long as its mount.
#[derive(Debug)]
pub struct LoopDevice {
    /// `/dev/loopN`.
    pub path: PathBuf,
    /// The open device; keeps an `autoclear` device attached.
    pub fd: OwnedFd,
    /// The N of its path.
    pub number: u32,
}

/// The state of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoopStatus {
    /// The N of `/dev/loopN`.
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
    /// Bytes of the window; 0 means up to the end.
    pub sizelimit: u64,
    /// The device refuses writes.
    pub read_only: bool,
    /// The kernel detaches it after its last use.
    pub autoclear: bool,
    /// The page cache is bypassed.
    pub direct_io: bool,
}

/// One request, repeated while signals interrupt it.
///
/// # Safety
/// `argument` is what `linux/loop.h` names for `request`: a number, or the address of a live value of the right type, to
/// which nothing else has access if the kernel writes it.
unsafe fn ioctl(fd: BorrowedFd<'_>, request: u64, argument: u64) -> io::Result<i32> {
    loop {
        // SAFETY: the caller's promise; the kernel accesses nothing else.
        let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, argument) };
        if r >= 0 {
            return Ok(r);
        }
        let error = io::Error::last_os_error();
        // The driver waits for a lock, which a signal may interrupt.
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn by_value(fd: BorrowedFd<'_>, request: ByValue, argument: u64) -> io::Result<i32> {
    // SAFETY: all these requests take a number; a wrong one is an error.
    unsafe { ioctl(fd, request as u64, argument) }
}

fn configure(device: BorrowedFd<'_>, config: &LoopConfig) -> io::Result<()> {
    // SAFETY: LOOP_CONFIGURE reads a `struct loop_config`, which is live.
    unsafe { ioctl(device, LOOP_CONFIGURE, (&raw const *config) as u64) }.map(|_| ())
}

fn set_status64(device: BorrowedFd<'_>, info: &LoopInfo64) -> io::Result<()> {
    // SAFETY: LOOP_SET_STATUS64 reads a `struct loop_info64`, which is live.
    unsafe { ioctl(device, LOOP_SET_STATUS64, (&raw const *info) as u64) }.map(|_| ())
}

fn get_status(device: BorrowedFd<'_>) -> io::Result<LoopInfo64> {
    let mut info = LoopInfo64::ZERO;
    // SAFETY: LOOP_GET_STATUS64 writes a `struct loop_info64`, which is live and referenced only here; any bytes are a
    // valid value of it.
    unsafe { ioctl(device, LOOP_GET_STATUS64, (&raw mut info) as u64)? };
    Ok(info)
}

fn device_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

/// Opens `/dev/loopN`, after creating the node if the `/dev` of a container lacks it.
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
/// [`SysError::Os`] if there is no loop driver or no permission, or if the kernel refuses the window.
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
        let number = by_value(control.as_fd(), ByValue::CtlGetFree, 0)
            .context("find a free loop device with", control_path)?;
        let number = u32::try_from(number).map_err(|_| io::Error::from(Errno::RANGE));
        let number = number.context("find a free loop device with", control_path)?;
        let (path, fd) = match open_device(number, false) {
            // The device has been removed meanwhile (`losetup`, LOOP_CTL_REMOVE): try the next one.
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
                    // Fails for file systems and windows without support; the device works nevertheless.
                    let _ = by_value(fd.as_fd(), ByValue::SetDirectIo, 1);
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
    match configure(device, &config) {
        Ok(()) => return Ok(()),
        // Kernels before 5.8 do not have the request.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {}
        Err(e) => return Err(e),
    }
    by_value(device, ByValue::SetFd, file.as_raw_fd() as u64)?;
    let set = set_status(device, info).and_then(|()| {
        // LOOP_SET_FD takes the read-only flag only from the file.
        let made = get_status(device)?;
        if made.lo_flags & LO_FLAGS_READ_ONLY < info.lo_flags & LO_FLAGS_READ_ONLY {
            return Err(io::Error::from(Errno::ROFS));
        }
        Ok(())
    });
    if set.is_err() {
        let _ = by_value(device, ByValue::ClrFd, 0);
    }
    set
}

fn set_status(device: BorrowedFd<'_>, info: &LoopInfo64) -> io::Result<()> {
    /// The driver returns EAGAIN while pages of the device are being written back.
    const TRIES: u32 = 50;
    const PAUSE: std::time::Duration = std::time::Duration::from_millis(5);
    for _ in 1..TRIES {
        match set_status64(device, info) {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => std::thread::sleep(PAUSE),
            other => return other,
        }
    }
    set_status64(device, info)
}

impl LoopDevice {
    /// Opens an attached device by its number.
    ///
    /// # Errors
    /// [`SysError::Os`] if the node cannot be opened.
    pub fn open(number: u32) -> Result<Self, SysError> {
        let (path, fd) = open_device(number, true)?;
        Ok(Self { path, fd, number })
    }

    /// Opens a device that was found to be bound to `file`; `None` if it no longer is. An open device keeps its file, so the
    /// answer stays valid.
    ///
    /// # Errors
    /// [`SysError::Os`] if it cannot be opened, or its state cannot be read.
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

    /// Changes how many bytes of the file the device has, also while it is mounted.
    ///
    /// # Errors
    /// [`SysError::Os`]: `EAGAIN` on kernels that cannot do that while pages of the device are cached.
    pub fn set_sizelimit(&self, bytes: u64) -> Result<(), SysError> {
        let change = || {
            let mut info = get_status(self.fd.as_fd())?;
            info.lo_sizelimit = bytes;
            set_status(self.fd.as_fd(), &info)
        };
        change().context("change the size of", &self.path)
    }

    /// Detaches the device now or, if it is mounted or open elsewhere, as soon as it no longer is.
    ///
    /// # Errors
    /// [`SysError::Os`]. It is not an error if the device has been detached meanwhile.
    pub fn detach(self) -> Result<(), SysError> {
        match by_value(self.fd.as_fd(), ByValue::ClrFd, 0) {
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

/// The state of device `number`; `None` if it is free or does not exist.
///
/// # Errors
/// [`SysError::Os`] if it cannot be opened, or its state cannot be read.
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

/// All bound loop devices, by ascending number. Devices whose state cannot be read (those of others, or broken ones) are
/// omitted.
///
/// # Errors
/// [`SysError::Os`] if `/sys/block` cannot be read.
pub fn list() -> Result<Vec<LoopStatus>, SysError> {
    Ok(bound()?.into_iter().filter_map(|number| status(number).ok().flatten()).collect())
}

/// Numbers of the devices that are bound.
fn bound() -> Result<Vec<u32>, SysError> {
    let directory = Path::new("/sys/block");
    let mut numbers: Vec<u32> = Vec::new();
    for entry in std::fs::read_dir(directory).context("list", directory)? {
        let entry = entry.context("list", directory)?;
        let name = entry.file_name();
        let Some(number) = name.to_str().and_then(|n| n.strip_prefix("loop")).and_then(|n| n.parse().ok())
        else {
            continue;
        };
        // Bound devices have this directory; checking sysfs first avoids opening every free device.
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
/// As [`list`]. Also if the state of a device cannot be read that may be bound to `file`, judging by the name of its file
/// in sysfs.
pub fn find_by_backing(file: BorrowedFd<'_>) -> Result<Vec<LoopStatus>, SysError> {
    let stat = rustix::fs::fstat(file).context("stat", "backing file")?;
    let mut found = Vec::new();
    for number in bound()? {
        match status(number) {
            Ok(Some(s)) if s.backing_dev == stat.st_dev && s.backing_inode == stat.st_ino => found.push(s),
            Ok(_) => {}
            Err(error) if may_be_bound_to(number, file) => return Err(error),
            Err(error) => {
                tracing::debug!(number, %error, "skipping a loop device of another file whose state cannot be read");
            }
        }
    }
    Ok(found)
}

/// Whether the name of a device's file in sysfs is that of `file`, or there is none.
fn may_be_bound_to(number: u32, file: BorrowedFd<'_>) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let Ok(shown) = std::fs::read(format!("/sys/block/loop{number}/loop/backing_file")) else {
        // Unbound meanwhile, or as broken as the device, whose state would be the only evidence.
        return Path::new(&format!("/sys/block/loop{number}/loop")).exists();
    };
    let Ok(ours) = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) else { return true };
    let plain = |name: &[u8]| {
        let name = name.strip_suffix(b"\n").unwrap_or(name);
        name.strip_suffix(b" (deleted)").unwrap_or(name).to_vec()
    };
    plain(&shown) == plain(ours.as_os_str().as_bytes())
}

/// Whether `path` is a block device.
pub fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);
