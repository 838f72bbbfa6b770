//! The process of a service VM, which tests kill or pause, and a disk that fills up.
//!
//! ```text
//!   "worker 12 (vm 1)", "qemu 12 (vm 1)" ─► process 12          "hcs GUID (vm 1)" ─► directory of the double's machine
//! ```

#[cfg(windows)]
use super::skip::skip;
use std::{fs, path::PathBuf};

/// What runs behind a lease, found by the VM's own description.
pub(crate) struct Machine(system::Process);

impl Machine {
    pub(crate) fn of(description: &str) -> Self {
        Self(system::Process::named(description.split(' ').nth(1).unwrap()))
    }

    /// Kills it from outside.
    pub(crate) fn kill(&self) {
        self.0.kill();
    }

    /// Pauses it from outside: it exists, but no longer responds.
    pub(crate) fn pause(&self) {
        self.0.pause();
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.0.is_alive()
    }

    /// How the pool reports one that was ended by [`Machine::kill`].
    pub(crate) fn killed(&self) -> &'static str {
        self.0.killed()
    }
}

#[cfg(unix)]
mod system {
    use rustix::process::{Pid, Signal, kill_process};

    pub(super) struct Process(Pid);

    impl Process {
        pub(super) fn named(pid: &str) -> Self {
            let pid = pid.parse().unwrap_or_else(|_| {
                panic!("'{pid}': the second word of describe() must be a pid (ServiceVm::describe)")
            });
            Self(Pid::from_raw(pid).unwrap())
        }

        pub(super) fn kill(&self) {
            kill_process(self.0, Signal::KILL).unwrap();
        }

        pub(super) fn pause(&self) {
            kill_process(self.0, Signal::STOP).unwrap();
        }

        pub(super) fn is_alive(&self) -> bool {
            std::path::Path::new(&format!("/proc/{}", self.0)).exists()
        }

        #[expect(clippy::unused_self, reason = "as on Windows")]
        pub(super) fn killed(&self) -> &'static str {
            "signal 9"
        }
    }
}

#[cfg(windows)]
mod system {
    use lcow_sys::windows::foreign::ForeignProcess;
    use std::{fs, path::PathBuf};

    pub(super) enum Process {
        /// A worker.
        Worker(ForeignProcess),
        /// A machine of the double, which takes orders as files in its directory, and removes the directory at its end.
        Folder(PathBuf),
    }

    impl Process {
        pub(super) fn named(name: &str) -> Self {
            match name.parse() {
                Ok(pid) => Self::Worker(ForeignProcess::open(pid).unwrap()),
                Err(_) => Self::Folder(std::env::temp_dir().join(format!("computecore-double-{name}"))),
            }
        }

        pub(super) fn kill(&self) {
            match self {
                Self::Worker(process) => process.end(9).unwrap(),
                Self::Folder(folder) => {
                    fs::write(folder.join("order.kill"), "").unwrap();
                    while folder.exists() {
                        std::thread::sleep(std::time::Duration::from_millis(5));
                    }
                }
            }
        }

        pub(super) fn pause(&self) {
            match self {
                Self::Worker(process) => process.suspend().unwrap(),
                Self::Folder(folder) => fs::write(folder.join("order.pause"), "").unwrap(),
            }
        }

        pub(super) fn is_alive(&self) -> bool {
            match self {
                Self::Worker(process) => process.is_alive(),
                Self::Folder(folder) => folder.exists(),
            }
        }

        pub(super) fn killed(&self) -> &'static str {
            match self {
                Self::Worker(_) => "exit status 9",
                Self::Folder(_) => "the guest ended by itself",
            }
        }
    }
}

/// A disk that fills up soon.
pub(crate) struct SmallDisk {
    pub(crate) folder: PathBuf,
}

impl SmallDisk {
    /// Its usual size.
    pub(crate) const BYTES: u64 = 12 << 20;

    /// A tmpfs at `path`.
    #[cfg(unix)]
    #[expect(clippy::unnecessary_wraps, reason = "as on Windows")]
    pub(crate) fn of(path: PathBuf, bytes: u64) -> Option<Self> {
        use rustix::mount::{MountFlags, mount};
        assert!(rustix::process::geteuid().is_root(), "mounting a small file system needs root");
        fs::create_dir_all(&path).unwrap();
        let size = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), Some(size.as_c_str())).unwrap();
        Some(Self { folder: path })
    }

    /// This test's own directory on the volume of [`Self::BYTES`] that `scripts/test-windows` made; `None`, counted as
    /// a skip, if there is no such volume.
    #[cfg(windows)]
    pub(crate) fn of(_: PathBuf, _: u64) -> Option<Self> {
        let Some(volume) = std::env::var_os("LCOW_SMALL_DISK") else {
            skip("LCOW_SMALL_DISK names no directory on a small volume");
            return None;
        };
        let folder = PathBuf::from(volume).join(uuid::Uuid::new_v4().to_string());
        fs::create_dir(&folder).unwrap();
        Some(Self { folder })
    }

    /// Bytes that still fit.
    pub(crate) fn free(&self) -> u64 {
        #[cfg(unix)]
        {
            let room = rustix::fs::statvfs(&self.folder).unwrap();
            room.f_bavail * room.f_frsize
        }
        #[cfg(windows)]
        {
            lcow_sys::windows::fs::available_bytes(&self.folder).unwrap()
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        #[cfg(unix)]
        let _ = rustix::mount::unmount(&self.folder, rustix::mount::UnmountFlags::DETACH);
        #[cfg(windows)]
        let _ = fs::remove_dir_all(&self.folder);
    }
}
