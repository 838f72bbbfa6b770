//! Pipe servers on tokio's event loop. Remote clients are always rejected. Called by `listen`, `svm` and tests.

use super::open;
use crate::windows::security::SecurityDescriptor;
use std::{
    ffi::{OsStr, OsString},
    io,
    os::windows::io::OwnedHandle,
};
use tokio::net::windows::named_pipe::{NamedPipeServer, PipeMode, ServerOptions};
use windows_sys::Win32::Storage::FileSystem::FILE_FLAG_OVERLAPPED;

/// Kernel buffer of a pipe in each direction, in bytes.
const BUFFER: u32 = 256 << 10;
/// Access list of a worker's pipes: the creator's account, administrators and the system.
const PRIVATE: &str = "D:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;GA;;;OW)";

/// Which instance of a pipe is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instance {
    /// The first; fails if the name already exists, so no other process can have taken it.
    First,
    /// A further one of a name that this process owns.
    Next,
}

/// Creates an instance of the pipe `name`: byte mode, both directions, local clients only. Call it within a runtime.
///
/// # Errors
/// `PermissionDenied` if the first instance already exists; the name is invalid.
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

/// A connected pair: one end on the runtime, and a handle that can be passed to another process. `overlapped` is the mode in
/// which that process will use it; standard streams must not be overlapped.
///
/// # Errors
/// The pipe cannot be created or opened.
pub fn pair(overlapped: bool) -> io::Result<(NamedPipeServer, OwnedHandle)> {
    let name = OsString::from(format!(r"\\.\pipe\lcow-{}", uuid::Uuid::new_v4().simple()));
    let server = create_server(&name, Instance::First, &SecurityDescriptor::parse(PRIVATE)?)?;
    let client = open(&name, if overlapped { FILE_FLAG_OVERLAPPED } else { 0 })?;
    Ok((server, client))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::windows::pipe::PipeStream;
    use std::{
        io::{Read, Write},
        time::Duration,
    };
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
}
