//! Freezing file systems, and thawing them whatever happens.
//!
//! ```text
//!   freeze ─► FrozenMount ─┬─ thaw   one attempt; after a failure it can be tried again
//!      │                   └─ drop   attempts until the kernel says "thawed" or "not frozen"
//!      └─► list of this process ─► thaw_all, at the process's end; nothing is frozen afterwards
//! ```
//!
//! A freeze belongs to the kernel's super block and outlives the process that asked for it, so whoever freezes must thaw
//! on every way out. [`thaw`] is for what an earlier process left behind. Called by `driver` and `cli`.

use super::{Context, SysError, mount::open_folder};
use parking_lot::{Mutex, MutexGuard};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// `_IOWR('X', 119, int)`, `include/uapi/linux/fs.h`.
const FIFREEZE: u64 = 0xC004_5877;
/// `_IOWR('X', 120, int)`.
const FITHAW: u64 = 0xC004_5878;

/// Attempts of a thaw before whoever waits for it is let go, and the pause before the second; it doubles each time.
const ATTEMPTS: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

fn freeze_ioctl(fd: BorrowedFd<'_>, request: u64) -> io::Result<()> {
    // SAFETY: FIFREEZE and FITHAW take no argument; the kernel reads and writes no memory of ours.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, 0) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn thaw_folder(folder: BorrowedFd<'_>) -> io::Result<()> {
    match freeze_ioctl(folder, FITHAW) {
        // EINVAL: not frozen.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}

/// A file system that is frozen, is about to be, or was.
#[derive(Debug)]
struct Noted {
    folder: OwnedFd,
    /// Held while the kernel is asked to change it.
    frozen: Mutex<bool>,
}

impl Noted {
    fn thaw(self: &Arc<Self>, mut frozen: MutexGuard<'_, bool>) -> io::Result<()> {
        if *frozen {
            thaw_folder(self.folder.as_fd())?;
            *frozen = false;
        }
        drop(frozen);
        ALL.lock().noted.retain(|other| !Arc::ptr_eq(other, self));
        Ok(())
    }

    /// Attempts until it is thawed; `failed` hears of each failure and its number, from 1.
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

/// What this process has frozen.
static ALL: Mutex<All> = Mutex::new(All { ending: false, noted: Vec::new() });

/// A file system that takes no writes until [`FrozenMount::thaw`] or until this is dropped. Everything written before is
/// on its device.
#[derive(Debug)]
pub struct FrozenMount {
    noted: Arc<Noted>,
}

/// Freezes the file system mounted at `path`: waits for running writes, writes all back, stops new ones.
///
/// # Errors
/// [`SysError::Os`]: `EBUSY` if it is frozen already, `EINVAL` if nothing is mounted at `path` itself (what would stop
/// then is the file system that the folder lies on), `EINTR` once [`thaw_all`] was called.
pub fn freeze(path: &Path) -> Result<FrozenMount, SysError> {
    let folder = open_folder(path)?;
    is_mount_root(folder.as_fd()).context("freeze", path)?;
    let noted = Arc::new(Noted { folder, frozen: Mutex::new(false) });
    let mut frozen = noted.frozen.lock();
    {
        let mut all = ALL.lock();
        if all.ending {
            return Err(io::Error::from_raw_os_error(libc::EINTR)).context("freeze", path);
        }
        all.noted.push(noted.clone());
    }
    let done = freeze_ioctl(noted.folder.as_fd(), FIFREEZE);
    *frozen = done.is_ok();
    drop(frozen);
    let mount = FrozenMount { noted };
    // Dropping one that is not frozen takes it off the list.
    done.context("freeze", path).map(|()| mount)
}

/// Whether an open folder is where something is mounted.
fn is_mount_root(folder: BorrowedFd<'_>) -> io::Result<()> {
    let here = rustix::fs::fstat(folder)?;
    let above = rustix::fs::statat(folder, c"..", rustix::fs::AtFlags::empty())?;
    if here.st_dev == above.st_dev { Err(io::Error::from_raw_os_error(libc::EINVAL)) } else { Ok(()) }
}

impl FrozenMount {
    /// Lets writers go on: one attempt. A file system that somebody else thawed is no error. After an error it is still
    /// frozen, and can be thawed again.
    ///
    /// # Errors
    /// [`SysError::Os`].
    pub fn thaw(&self) -> Result<(), SysError> {
        self.noted.thaw(self.noted.frozen.lock()).context("thaw", "frozen mount")
    }

    /// Attempts until it is thawed, however long that takes; `failed` hears of each failure and its number, from 1.
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
    /// A few attempts here, the rest by a thread of its own.
    fn drop(&mut self) {
        let mut pauses = Pauses::default();
        for _ in 0..ATTEMPTS {
            if self.thaw().is_ok() {
                return;
            }
            pauses.pause();
        }
        let noted = self.noted.clone();
        // Without a thread, the list of this process still has it.
        let _ = std::thread::Builder::new().name("thaw".into()).spawn(move || noted.thaw_surely(|_, _| {}));
    }
}

/// For the end of the process: thaws all that it has frozen, waits for freezes on their way, and lets none begin any more.
/// Gives the number of file systems that could not be thawed within `limit`.
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
            // One that is being frozen is waited for.
            let Some(frozen) = one.frozen.try_lock_until(until) else { continue };
            // Tried again below.
            let _ = one.thaw(frozen);
        }
        let left = ALL.lock().noted.len();
        if left == 0 || Instant::now() >= until {
            return left;
        }
        pauses.pause();
    }
}

/// Thaws the file system mounted at `path` whoever froze it (repair after a crash, and before an unmount), in a few
/// attempts; one that is not frozen is no error. Where nothing is mounted nothing is done: that would be the file system
/// that the folder lies on.
///
/// # Errors
/// [`SysError::Os`] of the last attempt. Opening a folder of a frozen file system does not block.
pub fn thaw(path: &Path) -> Result<(), SysError> {
    let attempt = || {
        let folder = match open_folder(path) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            other => other?,
        };
        match is_mount_root(folder.as_fd()) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            Err(e) => Err(e).context("thaw", path),
            Ok(()) => thaw_folder(folder.as_fd()).context("thaw", path),
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
