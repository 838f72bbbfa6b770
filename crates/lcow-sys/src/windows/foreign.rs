//! A process of somebody else, by its number: looked at, stopped, ended.
//!
//! For tests alone, which do to workers and to the double's machines what a crash or a debugger does; the program ends
//! only what it has started (`process`). It is here because unsafe code is nowhere else.

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

/// A process that was there when it was opened. Its number is not used again as long as this lives.
#[derive(Debug)]
pub struct ForeignProcess(OwnedHandle);

impl ForeignProcess {
    /// The process of this number.
    ///
    /// # Errors
    /// There is none, or this user may not end it.
    pub fn open(pid: u32) -> io::Result<Self> {
        let access = PROCESS_TERMINATE | PROCESS_SUSPEND_RESUME | PROCESS_SYNCHRONIZE;
        // SAFETY: only numbers are given.
        let handle = unsafe { OpenProcess(access, 0, pid) };
        if handle.is_null() {
            return Err(tried("open the process")(io::Error::last_os_error()));
        }
        // SAFETY: the handle is new, and ours alone.
        Ok(Self(unsafe { OwnedHandle::from_raw_handle(handle.cast()) }))
    }

    /// Ends it with this exit status.
    ///
    /// # Errors
    /// What the system says, also of one that has ended.
    pub fn end(&self, status: u32) -> io::Result<()> {
        // SAFETY: the handle is open.
        check(unsafe { TerminateProcess(self.0.as_raw_handle().cast(), status) })
            .map_err(tried("end the process"))
    }

    /// Stops all its threads: it is there and says nothing more.
    ///
    /// # Errors
    /// What the system says, as its number of a status.
    pub fn suspend(&self) -> io::Result<()> {
        // SAFETY: the handle is open.
        match unsafe { NtSuspendProcess(self.0.as_raw_handle().cast()) } {
            0 => Ok(()),
            status => Err(io::Error::other(format!("stop the process: status {status:#010x}"))),
        }
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        // SAFETY: the handle is open.
        (unsafe { WaitForSingleObject(self.0.as_raw_handle().cast(), 0) }) == WAIT_TIMEOUT
    }
}
