//! What the first process of a guest does: file systems, modules, clock, random numbers, end.
//!
//! ```text
//!   kernel ─► /init: mounts ─ modules ─ serve …            RNDADDENTROPY, RNDRESEEDCRNG, clock_settime after a restore
//! ```
//!
//! Called by the program `lcow-agent` alone.

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
/// Most bytes added at once.
const MAX_ENTROPY: usize = 256;

/// `struct rand_pool_info` with room for bytes.
#[repr(C)]
struct RandPool {
    entropy_count: i32,
    buf_size: i32,
    buf: [u8; MAX_ENTROPY],
}

/// Mounts the kernel's own file systems, as far as they are not there yet.
///
/// # Errors
/// The kernel lacks one.
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

/// Loads all modules of a folder with the same parameters, in the order of their names; one that is there already is no
/// error.
///
/// # Errors
/// There is no such folder; what the kernel says.
pub fn load_modules(folder: &Path, parameters: &CStr) -> Result<(), SysError> {
    let entries = std::fs::read_dir(folder).context("list", folder)?;
    let mut modules: Vec<_> =
        entries.map(|e| e.map(|e| e.path())).collect::<io::Result<_>>().context("list", folder)?;
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

/// Adds fresh random bytes and makes the kernel forget what it would have given without them.
///
/// # Errors
/// What the kernel says.
pub fn reseed(entropy: &[u8]) -> Result<(), SysError> {
    let place = "/dev/urandom";
    let file = File::options().read(true).write(true).open(place).context("open", place)?;
    let n = entropy.len().min(MAX_ENTROPY);
    let mut pool = RandPool { entropy_count: (n * 8) as i32, buf_size: n as i32, buf: [0; MAX_ENTROPY] };
    pool.buf[..n].copy_from_slice(&entropy[..n]);
    // SAFETY: `pool` has the layout of rand_pool_info, its size field names bytes that it holds, and it lives through
    // the call, which only reads it.
    let added = unsafe { libc::ioctl(file.as_raw_fd(), RNDADDENTROPY as _, &raw const pool) };
    // SAFETY: the call takes no argument.
    let reseeded = unsafe { libc::ioctl(file.as_raw_fd(), RNDRESEEDCRNG as _) };
    if added < 0 || reseeded < 0 {
        return Err(io::Error::last_os_error()).context("reseed", place);
    }
    Ok(())
}

/// Sets the clock; `time` since 1970, UTC.
///
/// # Errors
/// What the kernel says.
pub fn set_clock(time: Duration) -> Result<(), SysError> {
    let spec = Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: i64::from(time.subsec_nanos()) };
    rustix::time::clock_settime(ClockId::Realtime, spec).context("set the clock to", format!("{time:?}"))
}

/// Memory of this machine, in bytes.
pub fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit))
}

/// Drops what the page cache holds of a block device: the disk behind it was written to by others.
///
/// # Errors
/// [`SysError::Os`].
pub fn forget_cached(device: &File) -> Result<(), SysError> {
    // SAFETY: BLKFLSBUF takes no argument; the kernel reads and writes no memory of ours.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), BLKFLSBUF as _, 0) };
    if done < 0 {
        Err(io::Error::last_os_error()).context("forget what is cached of", "a disk")
    } else {
        Ok(())
    }
}

/// A device once more, for access past the page cache.
///
/// # Errors
/// What the kernel says.
pub fn reopen_unbuffered(device: &File, writable: bool) -> Result<File, SysError> {
    let path = format!("/proc/self/fd/{}", device.as_raw_fd());
    let mut options = File::options();
    options.read(true).write(writable).custom_flags(libc::O_DIRECT);
    options.open(&path).context("open past the page cache", path)
}

/// Ends the machine at once (QEMU's `-no-reboot` ends with it).
pub fn end_machine() -> ! {
    // If the kernel refuses, ending the first process makes it panic, and `panic=-1` then ends the machine.
    let _ = rustix::system::reboot(RebootCommand::Restart);
    std::process::exit(1)
}
