//! System calls of the first process of a guest: file systems, modules, clock, entropy, reboot.
//!
//! ```text
//!   kernel ─► /init: mounts ─ modules ─ serve …            RNDADDENTROPY, RNDRESEEDCRNG, clock_settime after a restore
//! ```
//!
//! Called only by the program `lcow-agent`.

use super::{Context, SysError};
use rustix::{
    mount::MountFlags,
    system::RebootCommand,
    time::{ClockId, Timespec},
};
use std::{
    ffi::CStr,
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::Path,
    time::Duration,
};

/// `RNDADDENTROPY`, include/uapi/linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `RNDRESEEDCRNG`, the same.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
/// `BLKFLSBUF`, include/uapi/linux/fs.h.
const BLKFLSBUF: libc::c_ulong = 0x1261;
/// Most bytes of entropy added in one call.
const MAX_ENTROPY: usize = 256;

/// `struct rand_pool_info` with room for bytes.
#[repr(C)]
struct RandPool {
    entropy_count: i32,
    buf_size: i32,
    buf: [u8; MAX_ENTROPY],
}
const _: () = assert!(size_of::<RandPool>() == 8 + MAX_ENTROPY);

/// Mounts /dev, /proc and /sys, unless they are already mounted.
///
/// # Errors
/// [`SysError::Os`] if the kernel lacks one of these file systems.
pub fn mount_basics() -> Result<(), SysError> {
    for (kind, place) in [(c"devtmpfs", "/dev"), (c"proc", "/proc"), (c"sysfs", "/sys")] {
        std::fs::create_dir_all(place).context("create", place)?;
        match rustix::mount::mount(kind, place, kind, MountFlags::empty(), None::<&CStr>) {
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(e) => Err(e).context("mount a kernel file system on", place)?,
        }
    }
    Ok(())
}

/// Loads all modules in `directory` with the same parameters, in the order of their names. A module that is already loaded is
/// not an error.
///
/// # Errors
/// [`SysError::Os`]: the directory cannot be listed, or the kernel refuses a module.
pub fn load_modules(directory: &Path, parameters: &CStr) -> Result<(), SysError> {
    let entries = std::fs::read_dir(directory).context("list", directory)?;
    let mut modules: Vec<_> =
        entries.map(|e| e.map(|e| e.path())).collect::<io::Result<_>>().context("list", directory)?;
    modules.sort();
    modules.iter().try_for_each(|module| load_module(module, parameters))
}

fn load_module(path: &Path, parameters: &CStr) -> Result<(), SysError> {
    let file = File::open(path).context("open the module", path)?;
    match rustix::system::finit_module(&file, parameters, 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(e).context("load the module", path),
    }
}

/// Adds entropy (at most 256 bytes) and reseeds the kernel's random number generator, so that guests restored from the same
/// state do not draw the same numbers.
///
/// # Errors
/// [`SysError::Os`] without `CAP_SYS_ADMIN`.
pub fn reseed(entropy: &[u8]) -> Result<(), SysError> {
    let place = "/dev/urandom";
    let file = File::options().read(true).write(true).open(place).context("open", place)?;
    let n = entropy.len().min(MAX_ENTROPY);
    let mut pool = RandPool { entropy_count: (n * 8) as i32, buf_size: n as i32, buf: [0; MAX_ENTROPY] };
    pool.buf[..n].copy_from_slice(&entropy[..n]);
    // SAFETY: `pool` has the layout of rand_pool_info, its size field names bytes that it holds, and it lives through
    // the call, which only reads it.
    let added = unsafe { libc::ioctl(file.as_raw_fd(), RNDADDENTROPY as _, &raw const pool) };
    // SAFETY: the request takes no argument.
    let reseeded = unsafe { libc::ioctl(file.as_raw_fd(), RNDRESEEDCRNG as _) };
    if added < 0 || reseeded < 0 {
        return Err(io::Error::last_os_error()).context("reseed", place);
    }
    Ok(())
}

/// Sets the clock to `time` after 1970-01-01 00:00 UTC.
///
/// # Errors
/// [`SysError::Os`] without `CAP_SYS_TIME`.
pub fn set_clock(time: Duration) -> Result<(), SysError> {
    let spec = Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: i64::from(time.subsec_nanos()) };
    rustix::time::clock_settime(ClockId::Realtime, spec).context("set the clock to", format!("{time:?}"))
}

/// Total memory of this machine, in bytes.
pub fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit))
}

/// Drops the cached pages of a block device, whose disk something else has written.
///
/// # Errors
/// [`SysError::Os`].
pub fn forget_cached(device: &File) -> Result<(), SysError> {
    // SAFETY: BLKFLSBUF takes no argument; the kernel reads and writes no memory of this process.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), BLKFLSBUF as _, 0) };
    if done < 0 {
        Err(io::Error::last_os_error()).context("flush the cached pages of", "a disk")
    } else {
        Ok(())
    }
}

/// Opens a device again, for access that bypasses the page cache.
///
/// # Errors
/// [`SysError::Os`], for example without /proc.
pub fn reopen_unbuffered(device: &File, writable: bool) -> Result<File, SysError> {
    let path = format!("/proc/self/fd/{}", device.as_raw_fd());
    let mut options = File::options();
    options.read(true).write(writable).custom_flags(libc::O_DIRECT);
    options.open(&path).context("open without the page cache", path)
}

/// Reboots the machine immediately, which ends a QEMU started with `-no-reboot`.
pub fn end_machine() -> ! {
    // If the kernel refuses, the end of the first process makes it panic, and `panic=-1` then reboots.
    let _ = rustix::system::reboot(RebootCommand::Restart);
    std::process::exit(1)
}
