//! A process that this one did not start, by its process id: queried, suspended, ended.
//!
//! Only for tests, which do to workers and to the machines of the double what a crash or a debugger does; the program ends
//! only processes that it has started (`process`). It is here because only this crate has unsafe code.

use super::{check, tried};
use std::{
    ffi::c_void,
    io,
    os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle},
};
use windows_sys::Win32::{
    Foundation::WAIT_TIMEOUT,
    System::Threading::{
        OpenProcess, PROCESS_SUSPEND_RESUME, PROCESS_SYNCHRONIZE, PROCESS_TERMINATE, TerminateProcess,
        WaitForSingleObject,
    },
};

#[link(name = "ntdll")]
unsafe extern "system" {
    fn NtSuspendProcess(process: *mut c_void) -> i32;
}

/// An open process. Its id is not reused while this exists.
#[derive(Debug)]
pub struct ForeignProcess(OwnedHandle);

impl ForeignProcess {
    /// Opens the process with this id.
    ///
    /// # Errors
    /// There is no such process, or this user may not end it.
    pub fn open(pid: u32) -> io::Result<Self> {
        let access = PROCESS_TERMINATE | PROCESS_SUSPEND_RESUME | PROCESS_SYNCHRONIZE;
        // SAFETY: the arguments are plain numbers.
        let handle = unsafe { OpenProcess(access, 0, pid) };
        if handle.is_null() {
            return Err(tried("open the process")(io::Error::last_os_error()));
        }
        // SAFETY: the handle is new, and nothing else owns it.
        Ok(Self(unsafe { OwnedHandle::from_raw_handle(handle.cast()) }))
    }

    /// Ends it with this exit status.
    ///
    /// # Errors
    /// It has already ended.
    pub fn end(&self, status: u32) -> io::Result<()> {
        // SAFETY: the handle is open.
        check(unsafe { TerminateProcess(self.0.as_raw_handle().cast(), status) })
            .map_err(tried("end the process"))
    }

    /// Suspends all its threads.
    ///
    /// # Errors
    /// The status of NtSuspendProcess.
    pub fn suspend(&self) -> io::Result<()> {
        // SAFETY: the handle is open.
        match unsafe { NtSuspendProcess(self.0.as_raw_handle().cast()) } {
            0 => Ok(()),
            status => Err(io::Error::other(format!("suspend the process: status {status:#010x}"))),
        }
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        // SAFETY: the handle is open.
        (unsafe { WaitForSingleObject(self.0.as_raw_handle().cast(), 0) }) == WAIT_TIMEOUT
    }
}
