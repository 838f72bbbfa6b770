//! Named pipes: servers for tokio with an access list, a blocking client, and pairs for a worker.
//!
//! ```text
//!   create_server ──► NamedPipeServer (tokio)        \\.\pipe\NAME ◄── PipeStream::connect (blocking, time-outs)
//!   pair ──► NamedPipeServer  ═══  OwnedHandle for another process (PipeStream::from_handle there)
//! ```
//!
//! Every handle is opened for overlapped I/O: a plain handle would serialise its calls, and a thread that reads would
//! keep another from writing. Remote clients are always rejected. Called by `listen`, `cli`, `svm`, `agent` and tests.

use super::{check, security::SecurityDescriptor, tried, wide};
use parking_lot::Mutex;
use std::{
    ffi::{OsStr, OsString},
    io::{self, Read, Write},
    os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle, RawHandle},
    ptr,
    time::{Duration, Instant},
};
use tokio::net::windows::named_pipe::{NamedPipeServer, PipeMode, ServerOptions};
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

/// Kernel buffer of a pipe, each way; bytes.
const BUFFER: u32 = 256 << 10;
/// Whom a worker's pipes are open to: their maker's account and the system.
const PRIVATE: &str = "D:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;GA;;;OW)";

/// How a pipe's next instance is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instance {
    /// Fails if the name exists already: nobody can have squatted on it.
    First,
    /// Another one of a name that this process owns.
    Next,
}

/// Makes an instance of the pipe `name`, byte mode, both directions, local clients only. Must be called within a
/// runtime.
///
/// # Errors
/// `PermissionDenied` if the first instance exists already; what the system says.
pub fn create_server(
    name: &OsStr,
    instance: Instance,
    descriptor: &SecurityDescriptor,
) -> io::Result<NamedPipeServer> {
    let mut attributes = descriptor.attributes(false);
    let mut options = ServerOptions::new();
    options
        .pipe_mode(PipeMode::Byte)
        .reject_remote_clients(true)
        .first_pipe_instance(instance == Instance::First)
        .in_buffer_size(BUFFER)
        .out_buffer_size(BUFFER);
    // SAFETY: the attributes and the descriptor that they point to outlive the call.
    unsafe { options.create_with_security_attributes_raw(name, (&raw mut attributes).cast()) }
}

/// A connected pair: our end on the runtime, and a handle that can be given to another process. `overlapped` says how
/// that process will use it; standard streams must not be overlapped.
///
/// # Errors
/// What the system says.
pub fn pair(overlapped: bool) -> io::Result<(NamedPipeServer, OwnedHandle)> {
    let name = OsString::from(format!(r"\\.\pipe\lcow-{}", uuid::Uuid::new_v4().simple()));
    let server = create_server(&name, Instance::First, &SecurityDescriptor::parse(PRIVATE)?)?;
    let client = open(&name, if overlapped { FILE_FLAG_OVERLAPPED } else { 0 })?;
    Ok((server, client))
}

fn open(name: &OsStr, flags: u32) -> io::Result<OwnedHandle> {
    let name = wide(name)?;
    // Identification only: the server may learn who we are, and not act as us.
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
    // SAFETY: the call succeeded, so the handle is open and ours alone.
    Ok(unsafe { OwnedHandle::from_raw_handle(handle as RawHandle) })
}

/// An event for overlapped I/O.
#[derive(Debug)]
struct Event(OwnedHandle);

impl Event {
    fn new() -> io::Result<Self> {
        // SAFETY: no pointer but null ones is given.
        let handle = unsafe { CreateEventW(ptr::null(), 1, 0, ptr::null()) };
        if handle.is_null() {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so the handle is open and ours alone.
        Ok(Self(unsafe { OwnedHandle::from_raw_handle(handle as RawHandle) }))
    }
}

/// A blocking end of a pipe. Reading, writing and looking can go on at the same time from different threads.
#[derive(Debug)]
pub struct PipeStream {
    handle: OwnedHandle,
    reading: Mutex<Event>,
    writing: Mutex<Event>,
    /// Longest wait of one read or write.
    timeout: Mutex<Option<Duration>>,
}

impl PipeStream {
    /// Connects to the pipe `name`, waiting up to `patience` while all its instances are taken.
    ///
    /// # Errors
    /// `NotFound` if there is no such pipe; `TimedOut`; what the system says.
    pub fn connect(name: &OsStr, patience: Duration) -> io::Result<Self> {
        /// Longest wait of one turn; another client may be faster after it.
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
                            "all instances of the pipe are taken",
                        ));
                    }
                    // SAFETY: the name ends with a NUL. What the wait says is of no interest: the next turn opens.
                    unsafe { WaitNamedPipeW(units.as_ptr(), TURN.as_millis() as u32) };
                }
                Err(e) if e.raw_os_error() == Some(ERROR_FILE_NOT_FOUND as i32) => {
                    return Err(io::ErrorKind::NotFound.into());
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Takes a handle that was opened for overlapped I/O ([`pair`]).
    ///
    /// # Errors
    /// What the system says.
    pub fn from_handle(handle: OwnedHandle) -> io::Result<Self> {
        Ok(Self {
            handle,
            reading: Mutex::new(Event::new()?),
            writing: Mutex::new(Event::new()?),
            timeout: Mutex::new(None),
        })
    }

    /// Longest wait of one read or write from now on.
    pub fn set_timeout(&self, timeout: Option<Duration>) {
        *self.timeout.lock() = timeout;
    }

    /// Whether the other end is closed and everything it sent was read.
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

    /// Runs one overlapped call to its end; 0 bytes when the other end is closed.
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
                    // SAFETY: the call that `overlapped` describes is awaited below, cancelled or not.
                    unsafe { CancelIoEx(handle.cast(), &raw const overlapped) };
                }
            }
        }
        let mut bytes = 0;
        // Waits: when this returns, the system no longer touches the buffer or `overlapped`.
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

/// Whether an error says that the other end is closed.
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_pair_carries_bytes_both_ways_at_once_and_ends() {
        let (mut server, client) = pair(true).unwrap();
        server.connect().await.unwrap();
        let client = std::sync::Arc::new(PipeStream::from_handle(client).unwrap());
        let reader = client.clone();
        // The reader waits before anything is written: a plain handle would hold up the writer below.
        let read = std::thread::spawn(move || {
            let mut all = Vec::new();
            (&*reader).read_to_end(&mut all).unwrap();
            all
        });
        std::thread::sleep(Duration::from_millis(50));
        let big = vec![7; 3 << 20];
        let (ours, writer) = (big.clone(), client.clone());
        let write = std::thread::spawn(move || (&*writer).write_all(&ours).unwrap());
        let mut back = vec![0; big.len()];
        server.read_exact(&mut back).await.unwrap();
        assert!(back == big && !client.peer_gone());
        write.join().unwrap();
        server.write_all(b"answer").await.unwrap();
        drop(server);
        assert_eq!(read.join().unwrap(), b"answer");
        assert!(client.peer_gone());
        assert_eq!((&*client).write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn a_read_ends_at_its_time_out_and_the_pipe_lives_on() {
        let (mut server, client) = pair(true).unwrap();
        server.connect().await.unwrap();
        let client = PipeStream::from_handle(client).unwrap();
        client.set_timeout(Some(Duration::from_millis(60)));
        assert_eq!((&client).read(&mut [0; 4]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        server.write_all(b"late").await.unwrap();
        let mut bytes = [0; 4];
        (&client).read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"late");
    }

    #[test]
    fn a_missing_pipe_is_not_found() {
        let error = PipeStream::connect(OsStr::new(r"\\.\pipe\lcow-nobody"), Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
