//! Named pipes: a blocking client with time-outs and, with the feature `tokio`, servers with an access list and pairs for a
//! worker.
//!
//! ```text
//!   server::create_server ──► NamedPipeServer (tokio)      \\.\pipe\NAME ◄── PipeStream::connect (blocking, time-outs)
//!   server::pair ──► NamedPipeServer  ═══  OwnedHandle for another process (PipeStream::from_handle there)
//! ```
//!
//! Every handle is opened for overlapped I/O: calls on a plain handle are serialized, so a reading thread would block a
//! writing one. Called by `listen`, `cli`, `svm`, `svm-agent` and tests.

#[cfg(feature = "tokio")]
mod server;

#[cfg(feature = "tokio")]
pub use server::{Instance, create_server, pair};

use super::{check, tried, wide};
use parking_lot::Mutex;
use std::{
    ffi::OsStr,
    io::{self, Read, Write},
    os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle, RawHandle},
    ptr,
    time::{Duration, Instant},
};
use windows_sys::Win32::{
    Foundation::{
        ERROR_BROKEN_PIPE, ERROR_FILE_NOT_FOUND, ERROR_IO_PENDING, ERROR_NO_DATA, ERROR_OPERATION_ABORTED,
        ERROR_PIPE_BUSY, ERROR_PIPE_NOT_CONNECTED, GENERIC_READ, GENERIC_WRITE, INVALID_HANDLE_VALUE,
        WAIT_OBJECT_0, WAIT_TIMEOUT,
    },
    Storage::FileSystem::{
        CreateFileW, FILE_FLAG_OVERLAPPED, OPEN_EXISTING, ReadFile, SECURITY_IDENTIFICATION,
        SECURITY_SQOS_PRESENT, WriteFile,
    },
    System::{
        IO::{CancelIoEx, GetOverlappedResult, OVERLAPPED},
        Pipes::{PeekNamedPipe, WaitNamedPipeW},
        Threading::{CreateEventW, INFINITE, WaitForSingleObject},
    },
};

fn open(name: &OsStr, flags: u32) -> io::Result<OwnedHandle> {
    let name = wide(name)?;
    // Identification only: the server may learn the client's identity, and not impersonate it.
    let flags = flags | SECURITY_SQOS_PRESENT | SECURITY_IDENTIFICATION;
    // SAFETY: the name ends with a NUL; the other pointers may be null.
    let handle = unsafe {
        CreateFileW(
            name.as_ptr(),
            GENERIC_READ | GENERIC_WRITE,
            0,
            ptr::null(),
            OPEN_EXISTING,
            flags,
            ptr::null_mut(),
        )
    };
    if handle == INVALID_HANDLE_VALUE {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the handle is open and nothing else owns it.
    Ok(unsafe { OwnedHandle::from_raw_handle(handle as RawHandle) })
}

/// An event for overlapped I/O.
#[derive(Debug)]
struct Event(OwnedHandle);

impl Event {
    fn new() -> io::Result<Self> {
        // SAFETY: both pointers may be null.
        let handle = unsafe { CreateEventW(ptr::null(), 1, 0, ptr::null()) };
        if handle.is_null() {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so the handle is open and nothing else owns it.
        Ok(Self(unsafe { OwnedHandle::from_raw_handle(handle as RawHandle) }))
    }
}

/// A blocking end of a pipe. Different threads can read, write and query it at the same time.
#[derive(Debug)]
pub struct PipeStream {
    handle: OwnedHandle,
    reading: Mutex<Event>,
    writing: Mutex<Event>,
    /// Time-out of one read or write.
    timeout: Mutex<Option<Duration>>,
}

impl PipeStream {
    /// Connects to the pipe `name`, and waits up to `patience` while all its instances are in use.
    ///
    /// # Errors
    /// `NotFound` if there is no such pipe; `TimedOut`; `PermissionDenied`.
    pub fn connect(name: &OsStr, patience: Duration) -> io::Result<Self> {
        /// Longest wait of one attempt; another client may take the instance after it.
        const TURN: Duration = Duration::from_millis(50);
        let begin = Instant::now();
        let units = wide(name)?;
        loop {
            match open(name, FILE_FLAG_OVERLAPPED) {
                Ok(handle) => return Self::from_handle(handle),
                Err(e) if e.raw_os_error() == Some(ERROR_PIPE_BUSY as i32) => {
                    if begin.elapsed() >= patience {
                        return Err(io::Error::new(
                            io::ErrorKind::TimedOut,
                            "all instances of the pipe are in use",
                        ));
                    }
                    // SAFETY: the name ends with a NUL. The result does not matter: the next attempt opens the pipe.
                    unsafe { WaitNamedPipeW(units.as_ptr(), TURN.as_millis() as u32) };
                }
                Err(e) if e.raw_os_error() == Some(ERROR_FILE_NOT_FOUND as i32) => {
                    return Err(io::ErrorKind::NotFound.into());
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// A stream over a handle that was opened for overlapped I/O.
    ///
    /// # Errors
    /// The system cannot create an event.
    pub fn from_handle(handle: OwnedHandle) -> io::Result<Self> {
        Ok(Self {
            handle,
            reading: Mutex::new(Event::new()?),
            writing: Mutex::new(Event::new()?),
            timeout: Mutex::new(None),
        })
    }

    /// Sets the time-out of each later read and write.
    pub fn set_timeout(&self, timeout: Option<Duration>) {
        *self.timeout.lock() = timeout;
    }

    /// Whether the other end is closed and everything that it sent has been read.
    pub fn peer_gone(&self) -> bool {
        let mut available = 0;
        // SAFETY: one integer is written; the other pointers may be null.
        let looked = check(unsafe {
            PeekNamedPipe(
                self.handle.as_raw_handle().cast(),
                ptr::null_mut(),
                0,
                ptr::null_mut(),
                &raw mut available,
                ptr::null_mut(),
            )
        });
        looked.is_err()
    }

    /// Runs one overlapped call to its end and returns the number of bytes.
    fn transfer(
        &self,
        event: &Event,
        begin: impl FnOnce(RawHandle, *mut OVERLAPPED) -> i32,
    ) -> io::Result<usize> {
        let handle = self.handle.as_raw_handle();
        // SAFETY: all-zero is a valid OVERLAPPED.
        let mut overlapped: OVERLAPPED = unsafe { std::mem::zeroed() };
        overlapped.hEvent = event.0.as_raw_handle().cast();
        let begun = check(begin(handle, &raw mut overlapped));
        let pending = matches!(&begun, Err(e) if e.raw_os_error() == Some(ERROR_IO_PENDING as i32));
        if !pending {
            begun?;
        }
        let mut timed_out = false;
        if pending {
            let wait =
                self.timeout.lock().map_or(INFINITE, |t| t.as_millis().min(u128::from(INFINITE - 1)) as u32);
            // SAFETY: the event is open.
            match unsafe { WaitForSingleObject(event.0.as_raw_handle().cast(), wait) } {
                WAIT_OBJECT_0 => {}
                other => {
                    timed_out = other == WAIT_TIMEOUT;
                    // SAFETY: the call that `overlapped` describes is awaited below, canceled or not.
                    unsafe { CancelIoEx(handle.cast(), &raw const overlapped) };
                }
            }
        }
        let mut bytes = 0;
        // Waits: when this returns, the system no longer accesses the buffer or `overlapped`.
        // SAFETY: both structures live until the call returns.
        let ended =
            check(unsafe { GetOverlappedResult(handle.cast(), &raw const overlapped, &raw mut bytes, 1) });
        match ended {
            Err(e) if timed_out && e.raw_os_error() == Some(ERROR_OPERATION_ABORTED as i32) => {
                Err(io::ErrorKind::TimedOut.into())
            }
            Err(e) => Err(e),
            Ok(()) => Ok(bytes as usize),
        }
    }
}

/// Whether an error means that the other end is closed.
fn is_end(error: &io::Error) -> bool {
    let ends = [ERROR_BROKEN_PIPE, ERROR_NO_DATA, ERROR_PIPE_NOT_CONNECTED];
    error.raw_os_error().is_some_and(|code| ends.contains(&(code as u32)))
}

impl Read for &PipeStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let event = self.reading.lock();
        let len = u32::try_from(buf.len()).unwrap_or(u32::MAX);
        let read = self.transfer(&event, |handle, overlapped| {
            // SAFETY: the buffer is valid for `len` bytes until `transfer` returns, which waits for the end.
            unsafe { ReadFile(handle.cast(), buf.as_mut_ptr(), len, ptr::null_mut(), overlapped) }
        });
        match read {
            Err(e) if is_end(&e) => Ok(0),
            other => other,
        }
    }
}

impl Write for &PipeStream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let event = self.writing.lock();
        let len = u32::try_from(buf.len()).unwrap_or(u32::MAX);
        let written = self.transfer(&event, |handle, overlapped| {
            // SAFETY: the buffer is valid for `len` bytes until `transfer` returns, which waits for the end.
            unsafe { WriteFile(handle.cast(), buf.as_ptr(), len, ptr::null_mut(), overlapped) }
        });
        written.map_err(|e| {
            if is_end(&e) { io::ErrorKind::BrokenPipe.into() } else { tried("write to a pipe")(e) }
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for PipeStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buf)
    }
}

impl Write for PipeStream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        (&*self).write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_pipe_is_not_found() {
        let error = PipeStream::connect(OsStr::new(r"\\.\pipe\lcow-missing"), Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
