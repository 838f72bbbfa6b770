//! The process of a service VM, as tests end it and stop it, and a disk that fills up.
//!
//! ```text
//!   "worker 12 (vm 1)", "qemu 12 (vm 1)" ─► process 12          "hcs GUID (vm 1)" ─► folder of the double's machine
//! ```

use std::{fs, path::PathBuf};

/// What runs behind a lease, by what the VM calls itself.
pub(crate) struct Machine(system::Process);

impl Machine {
    pub(crate) fn of(description: &str) -> Self {
        Self(system::Process::named(description.split(' ').nth(1).unwrap()))
    }

    /// Ends it from outside.
    pub(crate) fn kill(&self) {
        self.0.kill();
    }

    /// Stops it from outside: it is there and says nothing more.
    pub(crate) fn pause(&self) {
        self.0.pause();
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.0.is_alive()
    }

    /// What the pool tells of one that was ended by [`Machine::kill`].
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
            Self(Pid::from_raw(pid.parse().unwrap()).unwrap())
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
#[allow(unsafe_code, reason = "no crate of ours stops processes of others")]
mod system {
    use std::{
        ffi::c_void,
        fs,
        os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle},
        path::PathBuf,
    };
    use windows_sys::Win32::{
        Foundation::{HANDLE, WAIT_TIMEOUT},
        System::Threading::{
            OpenProcess, PROCESS_SUSPEND_RESUME, PROCESS_SYNCHRONIZE, PROCESS_TERMINATE, TerminateProcess,
            WaitForSingleObject,
        },
    };

    #[link(name = "ntdll")]
    unsafe extern "system" {
        fn NtSuspendProcess(process: *mut c_void) -> i32;
    }

    pub(super) enum Process {
        /// A worker.
        Handle(OwnedHandle),
        /// A machine of the double, which takes orders as files in its folder, and removes the folder at its end.
        Folder(PathBuf),
    }

    impl Process {
        pub(super) fn named(name: &str) -> Self {
            let Ok(pid) = name.parse() else {
                return Self::Folder(std::env::temp_dir().join(format!("computecore-double-{name}")));
            };
            let access = PROCESS_TERMINATE | PROCESS_SUSPEND_RESUME | PROCESS_SYNCHRONIZE;
            // SAFETY: only numbers are given; the handle is new, and ours alone.
            let handle = unsafe { OpenProcess(access, 0, pid) };
            assert!(!handle.is_null(), "no process {pid}: {}", std::io::Error::last_os_error());
            // SAFETY: as above.
            Self::Handle(unsafe { OwnedHandle::from_raw_handle(handle.cast()) })
        }

        pub(super) fn kill(&self) {
            match self {
                // SAFETY: the handle is open.
                Self::Handle(h) => assert_ne!(unsafe { TerminateProcess(raw(h), 9) }, 0),
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
                // SAFETY: the handle is open.
                Self::Handle(h) => assert_eq!(unsafe { NtSuspendProcess(raw(h)) }, 0),
                Self::Folder(folder) => fs::write(folder.join("order.pause"), "").unwrap(),
            }
        }

        pub(super) fn is_alive(&self) -> bool {
            match self {
                // SAFETY: the handle is open.
                Self::Handle(h) => (unsafe { WaitForSingleObject(raw(h), 0) }) == WAIT_TIMEOUT,
                Self::Folder(folder) => folder.exists(),
            }
        }

        pub(super) fn killed(&self) -> &'static str {
            match self {
                Self::Handle(_) => "exit status 9",
                Self::Folder(_) => "the guest ended by itself",
            }
        }
    }

    fn raw(handle: &OwnedHandle) -> HANDLE {
        handle.as_raw_handle().cast()
    }
}

/// A disk that is soon full.
pub(crate) struct SmallDisk {
    pub(crate) folder: PathBuf,
}

impl SmallDisk {
    /// Its usual size.
    pub(crate) const BYTES: u64 = 12 << 20;

    /// A tmpfs at `path`; `None`, with a word, where this user may not mount.
    #[cfg(unix)]
    pub(crate) fn of(path: PathBuf, bytes: u64) -> Option<Self> {
        use rustix::mount::{MountFlags, mount};
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting a small file system needs root");
            return None;
        }
        fs::create_dir_all(&path).unwrap();
        let size = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), Some(size.as_c_str())).unwrap();
        Some(Self { folder: path })
    }

    /// A folder of this test's own on the volume of [`Self::BYTES`] that `scripts/test-windows` made; `None`, with a word,
    /// without one.
    #[cfg(windows)]
    pub(crate) fn of(_: PathBuf, _: u64) -> Option<Self> {
        let Some(volume) = std::env::var_os("LCOW_SMALL_DISK") else {
            eprintln!("skipped: LCOW_SMALL_DISK names no folder on a volume of {} bytes", Self::BYTES);
            return None;
        };
        let folder = PathBuf::from(volume).join(uuid::Uuid::new_v4().to_string());
        fs::create_dir(&folder).unwrap();
        Some(Self { folder })
    }

    /// Bytes that it still takes.
    pub(crate) fn free(&self) -> u64 {
        #[cfg(unix)]
        {
            let room = rustix::fs::statvfs(&self.folder).unwrap();
            room.f_bavail * room.f_frsize
        }
        #[cfg(windows)]
        {
            lcow_graphdriver::sys::windows::fs::available_bytes(&self.folder).unwrap()
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
