//! Freezes file systems, and thaws them whatever happens.
//!
//! ```text
//!   freeze ─► FrozenMount ─┬─ thaw   one attempt; after a failure it can be tried again
//!      │                   └─ drop   attempts until the kernel reports "thawed" or "not frozen"
//!      └─► list of this process ─► thaw_all, before the process ends; nothing can be frozen afterwards
//! ```
//!
//! A freeze is a state of the kernel's super block and outlives the process that requested it, so every exit path must
//! thaw. [`thaw`] is for freezes that an earlier process left behind. Called by `driver` and `cli`.

use super::{Context, SysError, mount::open_directory};
use parking_lot::{Mutex, MutexGuard};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// Requests of `include/uapi/linux/fs.h` without an argument.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Request {
    /// `FIFREEZE`, `_IOWR('X', 119, int)`.
    Freeze = 0xC004_5877,
    /// `FITHAW`, `_IOWR('X', 120, int)`.
    Thaw = 0xC004_5878,
}

/// Attempts of a thaw before its caller is released, and the pause before the second one, which doubles each time.
const ATTEMPTS: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

fn freeze_ioctl(fd: BorrowedFd<'_>, request: Request) -> io::Result<()> {
    // SAFETY: these requests take no argument; the kernel reads and writes no memory of this process.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, 0) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn thaw_directory(directory: BorrowedFd<'_>) -> io::Result<()> {
    match freeze_ioctl(directory, Request::Thaw) {
        // EINVAL: not frozen.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}

/// A file system that is, is about to be, or was frozen by this process.
#[derive(Debug)]
struct Noted {
    directory: OwnedFd,
    /// Locked during the system call that changes it.
    frozen: Mutex<bool>,
}

impl Noted {
    fn thaw(self: &Arc<Self>, mut frozen: MutexGuard<'_, bool>) -> io::Result<()> {
        if *frozen {
            thaw_directory(self.directory.as_fd())?;
            *frozen = false;
        }
        drop(frozen);
        ALL.lock().noted.retain(|other| !Arc::ptr_eq(other, self));
        Ok(())
    }

    /// Repeats until it is thawed; calls `failed` with the number (from 1) and the error of each failure.
    fn thaw_surely(self: &Arc<Self>, mut failed: impl FnMut(u32, io::Error)) {
        let mut pauses = Pauses::default();
        let mut number = 0u32;
        while let Err(e) = self.thaw(self.frozen.lock()) {
            number = number.saturating_add(1);
            failed(number, e);
            pauses.pause();
        }
    }
}

#[derive(Debug, Default)]
struct All {
    /// Set for good by [`thaw_all`].
    ending: bool,
    noted: Vec<Arc<Noted>>,
}

/// The file systems that this process has frozen.
static ALL: Mutex<All> = Mutex::new(All { ending: false, noted: Vec::new() });

/// A file system whose writers wait until [`FrozenMount::thaw`] or until this is dropped. Everything written before is on
/// its device.
#[derive(Debug)]
pub struct FrozenMount {
    noted: Arc<Noted>,
}

/// Freezes the file system mounted at `path`: waits for running writes, writes everything back, blocks new writes.
///
/// # Errors
/// [`SysError::Os`]: `EBUSY` if it is already frozen, `EINVAL` if nothing is mounted at `path` itself (otherwise the file
/// system that contains the directory would be frozen), `EINTR` after a call of [`thaw_all`].
pub fn freeze(path: &Path) -> Result<FrozenMount, SysError> {
    let directory = open_directory(path)?;
    is_mount_root(directory.as_fd()).context("freeze", path)?;
    let noted = Arc::new(Noted { directory, frozen: Mutex::new(false) });
    let mut frozen = noted.frozen.lock();
    {
        let mut all = ALL.lock();
        if all.ending {
            return Err(io::Error::from_raw_os_error(libc::EINTR)).context("freeze", path);
        }
        all.noted.push(noted.clone());
    }
    let done = freeze_ioctl(noted.directory.as_fd(), Request::Freeze);
    *frozen = done.is_ok();
    drop(frozen);
    let mount = FrozenMount { noted };
    // Dropping one that is not frozen takes it off the list.
    done.context("freeze", path).map(|()| mount)
}

/// Succeeds if an open directory is the root of a mount.
fn is_mount_root(directory: BorrowedFd<'_>) -> io::Result<()> {
    let here = rustix::fs::fstat(directory)?;
    let above = rustix::fs::statat(directory, c"..", rustix::fs::AtFlags::empty())?;
    if here.st_dev == above.st_dev { Err(io::Error::from_raw_os_error(libc::EINVAL)) } else { Ok(()) }
}

impl FrozenMount {
    /// Thaws it, with one attempt. It is not an error if something else has thawed it. After an error it is still frozen,
    /// and the call can be repeated.
    ///
    /// # Errors
    /// [`SysError::Os`].
    pub fn thaw(&self) -> Result<(), SysError> {
        self.noted.thaw(self.noted.frozen.lock()).context("thaw", "frozen mount")
    }

    /// Repeats until it is thawed, however long that takes; calls `failed` with the number (from 1) and the error of each
    /// failure.
    pub fn thaw_surely(&self, failed: impl FnMut(u32, io::Error)) {
        self.noted.thaw_surely(failed);
    }
}

/// Pauses that double.
struct Pauses(Duration);

impl Default for Pauses {
    fn default() -> Self {
        Self(FIRST_PAUSE)
    }
}

impl Pauses {
    fn pause(&mut self) {
        std::thread::sleep(self.0);
        self.0 = (self.0 * 2).min(LONGEST_PAUSE);
    }
}

impl Drop for FrozenMount {
    /// A few attempts here, the rest on a thread.
    fn drop(&mut self) {
        let mut pauses = Pauses::default();
        for _ in 0..ATTEMPTS {
            if self.thaw().is_ok() {
                return;
            }
            pauses.pause();
        }
        let noted = self.noted.clone();
        // Without a thread, it is still on the list of this process.
        let _ = std::thread::Builder::new().name("thaw".into()).spawn(move || noted.thaw_surely(|_, _| {}));
    }
}

/// For the end of the process: thaws everything that it has frozen, waits for running freezes, and refuses new ones.
/// Returns the number of file systems that could not be thawed within `limit`.
pub fn thaw_all(limit: Duration) -> usize {
    let until = Instant::now() + limit;
    let mut pauses = Pauses::default();
    loop {
        let noted = {
            let mut all = ALL.lock();
            all.ending = true;
            all.noted.clone()
        };
        for one in &noted {
            // Waits for one that is being frozen.
            let Some(frozen) = one.frozen.try_lock_until(until) else { continue };
            // Repeated below if it fails.
            let _ = one.thaw(frozen);
        }
        let left = ALL.lock().noted.len();
        if left == 0 || Instant::now() >= until {
            return left;
        }
        pauses.pause();
    }
}

/// Thaws the file system mounted at `path`, whatever froze it (repair after a crash, and before an unmount), with a few
/// attempts. It is not an error if it is not frozen. Where nothing is mounted, nothing is done: that would be the file
/// system that the directory lies on.
///
/// # Errors
/// [`SysError::Os`] of the last attempt. Opening a directory of a frozen file system does not block.
pub fn thaw(path: &Path) -> Result<(), SysError> {
    let attempt = || {
        let directory = match open_directory(path) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            other => other?,
        };
        match is_mount_root(directory.as_fd()) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            Err(e) => Err(e).context("thaw", path),
            Ok(()) => thaw_directory(directory.as_fd()).context("thaw", path),
        }
    };
    let mut pauses = Pauses::default();
    for _ in 1..ATTEMPTS {
        if attempt().is_ok() {
            return Ok(());
        }
        pauses.pause();
    }
    attempt()
}
